"""A tiny text and a config whose runs take a second. Nothing is written outside of pytest's temporary folders."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzo.train.config import Config, load

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "rain", "fall", "over", "green", "hills", "while"]


@pytest.fixture(scope="session")
def proof_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _nothing_outside(monkeypatch: pytest.MonkeyPatch, proof_cache: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(proof_cache))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(5)
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(WORDS) for _ in range(60)) + "." for _ in range(12)))
    return path


@pytest.fixture
def small(story: Path, proof_cache: Path) -> Callable[..., Config]:
    def make(*settings: str, **more: Any) -> Config:
        base = {
            "model": {"preset": "gpt-tiny", "layers": 1, "d_model": 32, "heads": 1, "seq_len": 32},
            "data": {"corpus": str(story), "vocab_size": 300, "cache": str(proof_cache / "corpora")},
            "train": {"steps": 6, "batch": 2, "warmup": 2, "checkpoint_every": 2, "eval_every": 100,
                      "eval_batches": 2},
            **more,
        }  # fmt: skip
        return load(None, settings, base)

    return make
