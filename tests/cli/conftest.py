"""`mezzo` run in this process, as its entry point runs it, below a temporary folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from in_process import Done, Mezzo, write_text

from mezzo.cli.main import main


@pytest.fixture(scope="session")
def cli_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_cache(cli_cache: Path) -> Iterator[None]:
    """The machine is measured once for all tests, into a temporary folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cli_cache))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mezzo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mezzo:
    """mezzo("train", "config.toml") → exit code, what it printed, what it printed as an error."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["mezzo", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


CONFIG = """
policy = "bf16"
model = {preset = "gpt-tiny", layers = 1, d_model = 32, heads = 1, seq_len = 32}
data = {corpus = "book.txt", vocab_size = 300}
train = {steps = 4, batch = 2, warmup = 1, eval_batches = 1, sample_prompt = "the cat"}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A config of a tiny model, with its text beside it, in the current folder."""
    write_text(tmp_path / "book.txt")
    (tmp_path / "config.toml").write_text(CONFIG)
    return "config.toml"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cli_cache: Path) -> Path:
    """A finished run, whose text is gone: copy it before changing it."""
    from mezzo.train.config import load
    from mezzo.train.listeners import Listener
    from mezzo.train.session import Session

    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder / "book.txt")
    (folder / "config.toml").write_text(CONFIG)
    settings = [f'data.corpus="{text}"', f'data.cache="{cli_cache}/corpora"', "train.steps=30", "train.lr=0.01"]
    for _ in Session.start(load(folder / "config.toml", settings), folder / "run", Listener()).train():
        pass
    text.unlink()
    return folder / "run"
