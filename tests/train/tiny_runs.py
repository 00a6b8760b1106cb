"""Text, listeners and comparisons for runs of a model that takes milliseconds a step."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mezzo.train.arrays import bytes_of
from mezzo.train.checkpoint import newest
from mezzo.train.config import Config
from mezzo.train.listeners import Listener
from mezzo.train.rundir import RunDir
from mezzo.train.session import Session

Tiny = Callable[..., Config]  # the fixture `tiny`
WORDS = "the cat sat on a mat and saw rain fall over green hills while birds sang old songs of stone water light"
# Grows after two good steps, so that it overflows again and again.
OVERFLOWING = "fp16; loss_scale=dynamic; loss_scale.init=16777216; loss_scale.growth_interval=2"
CLOCK = ("tokens_per_s", "mfu", "memory")  # what a record says of the machine rather than of the training


def write_text(path: Path, paragraphs: int = 12, seed: int = 1) -> Path:
    """About 25 windows of 32 tokens in all: an epoch of 6 steps of 2 × 2 sequences."""
    rng = random.Random(seed)
    words = WORDS.split()
    path.write_text("\n\n".join(" ".join(rng.choice(words) for _ in range(60)) + "." for _ in range(paragraphs)))
    return path


class Heard(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.info: dict[str, Any] = {}
        self.outcome = ""

    def started(self, info: dict[str, Any]) -> None:
        self.info = info

    def record(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def ended(self, outcome: str) -> None:
        self.outcome = outcome


def train(
    session: Session, stop_after: int | None = None, meanwhile: dict[int, Callable[[], object]] | None = None
) -> list[dict[str, Any]]:
    """Train to the end, or let go of the session after a step as if the process had died there.

    meanwhile   step → what happens after it
    """
    records = []
    steps = session.train()
    for record in steps:
        records.append(record)
        (meanwhile or {}).get(record["step"], lambda: None)()
        if record["step"] == stop_after:
            steps.close()
            break
    return records


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]


def logged(path: Path) -> list[dict[str, Any]]:
    """steps.jsonl without what the clock decides."""
    return without_clock(RunDir.open(path).records())


def saved(path: Path) -> tuple[int, dict[str, NDArray[np.uint8]]]:
    """Step and every array of the newest checkpoint, as bytes, so that equal means equal to the bit."""
    checkpoint, problems = newest(path)
    assert checkpoint is not None, problems
    tensors = {
        f"{group}.{name}": bytes_of(array)
        for group in checkpoint.groups
        for name, array in checkpoint.load_group(group).items()
    }
    return checkpoint.step, tensors


def assert_same_state(path: Path, other: Path) -> None:
    (step, tensors), (other_step, others) = saved(path), saved(other)
    assert step == other_step
    assert tensors.keys() == others.keys()
    differ = [name for name, tensor in tensors.items() if not np.array_equal(tensor, others[name])]
    assert not differ, f"not equal to the bit: {differ}"
