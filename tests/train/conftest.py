"""A tiny corpus and a config of a tiny model. Nothing is written outside of pytest's temporary folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_text

from mezzo.train.config import Config, load


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _nothing_outside(monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> Iterator[None]:
    """The machine is measured once for all tests, into a temporary cache; one thread, as forked trainers have."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "book.txt")


@pytest.fixture
def tiny(book: Path, shared_cache: Path) -> Callable[..., Config]:
    """tiny("train.steps=3", policy="fp16") → Config of a model that takes milliseconds a step."""

    def make(*settings: str, policy: Any = "fp32") -> Config:
        base = {
            "policy": policy,
            "model": {"preset": "gpt-tiny", "layers": 1, "d_model": 32, "heads": 1, "seq_len": 32},
            "data": {"corpus": str(book), "vocab_size": 300, "cache": str(shared_cache / "corpora")},
            "train": {"steps": 6, "batch": 2, "accumulate": 2, "warmup": 2, "checkpoint_every": 100,
                      "eval_every": 100, "eval_batches": 2},
        }  # fmt: skip
        return load(None, settings, base)

    return make
