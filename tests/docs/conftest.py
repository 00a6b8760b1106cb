"""Documents as tests see them: the repository's root, and a cache folder of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mezzo.torch import fast_cpu


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The machine is measured once for all tests, into a temporary folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def undone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a document's code does to the process ends with its test: fast_cpu, random numbers, the current folder."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    fast_cpu(force=True).undo()
    if "keras" in sys.modules:  # a page about it sets this for the whole process
        sys.modules["keras"].mixed_precision.set_global_policy("float32")
