"""Killed with -9 at any moment, or asked to stop by a signal: the resumed run is the one that never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import OVERFLOWING, Heard, Tiny, assert_same_state, logged, saved, train

from mezzo.train.checkpoint import newest
from mezzo.train.config import Config
from mezzo.train.rundir import RunDir
from mezzo.train.session import Session

# Imports torch once, then forks a trainer for every line of arguments on its input; says how each one ended.
TRAINERS = """
import json, os, signal, sys, torch, torch._dynamo  # the last takes seconds
torch.set_num_threads(1)
from mezzo.cli.main import main
import mezzo.train.session, mezzo.train.stored, mezzo.cli.console
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv = ["mezzo", *json.loads(line)]
        sys.stderr = sys.stdout
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
        os._exit(code)
    print("pid", child, flush=True)
    _, status = os.waitpid(child, 0)
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
"""


class Trainers:
    """Forked `mezzo` processes, one at a time."""

    def __init__(self, cache: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINERS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        )

    def run(self, *arguments: str, after: int | None = None, wait: float = 0.0, number: int = 0) -> tuple[int, str]:
        """One `mezzo` with these arguments; sent the signal `number` once it printed `after` steps, `wait` s later.

        returns   (exit code, negative if a signal ended it; what it printed)
        """
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        pid, printed, steps = 0, [], 0
        for line in self.process.stdout:
            word, _, rest = line.partition(" ")
            if word == "pid":
                pid = int(rest)
            elif word == "ended":
                return int(rest), "".join(printed)
            else:
                printed.append(line)
                steps += line.startswith("step ")
            if steps == after:
                after = None
                time.sleep(wait)
                os.kill(pid, number)
        raise AssertionError("the trainers ended: " + "".join(printed))


@pytest.fixture(scope="module")
def trainers(shared_cache: Path) -> Any:
    found = Trainers(shared_cache)
    yield found
    assert found.process.stdin
    assert found.process.stdout
    found.process.stdin.close()
    found.process.wait()
    found.process.stdout.close()


def config_file(tmp_path: Path, config: Config) -> str:
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    return str(path)


# Prints a line for each step.
CHATTY = ("train.eval_every=1", "train.eval_batches=1")


def test_a_run_killed_with_kill_9_at_any_moment_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, tiny: Tiny, trainers: Trainers
) -> None:
    config = tiny("train.steps=14", "train.checkpoint_every=1", "observe.every=5", *CHATTY, policy=OVERFLOWING)
    run = str(tmp_path / "run")
    begin = ("train", config_file(tmp_path, config), "--out", run)
    code, printed = trainers.run(*begin[:-1], str(tmp_path / "whole"))
    assert code == 0, printed
    again = ("train", "--resume", run)
    # A save is running nearly all the time: these delays fall before, into and after it.
    for i, (after, wait) in enumerate([(1, 0.0), (2, 0.004), (2, 0.008), (1, 0.012), (3, 0.002), (2, 0.016)]):
        code, printed = trainers.run(*(again if i else begin), after=after, wait=wait, number=signal.SIGKILL)
        assert code == -signal.SIGKILL, printed
    code, printed = trainers.run(*again)
    assert code == 0, printed
    assert [record["step"] for record in logged(Path(run))] == list(range(1, 15))
    assert logged(Path(run)) == logged(tmp_path / "whole")
    assert_same_state(Path(run), tmp_path / "whole")
    sites = [RunDir.open(path).records("sites.jsonl") for path in (run, tmp_path / "whole")]
    assert sites[0] == sites[1]
    assert [sample["step"] for sample in sites[0]] == [1, 5, 10]


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path, tiny: Tiny, trainers: Trainers) -> None:
    config = tiny("train.steps=8", *CHATTY)
    train(Session.start(config, tmp_path / "whole", Heard()))
    run = str(tmp_path / "run")
    code, _ = trainers.run("train", config_file(tmp_path, config), "--out", run, after=2, number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert newest(run) == (None, [])
    code, printed = trainers.run("train", "--resume", run)
    assert code == 0, printed
    assert logged(Path(run)) == logged(tmp_path / "whole")
    assert_same_state(Path(run), tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_ends_with_75_and_the_resumed_run_is_whole(
    tmp_path: Path, tiny: Tiny, trainers: Trainers, number: int
) -> None:
    config = tiny("train.steps=30", *CHATTY)
    train(Session.start(config, tmp_path / "whole", Heard()))
    run = str(tmp_path / "run")
    code, printed = trainers.run("train", config_file(tmp_path, config), "--out", run, after=2, number=number)
    assert code == 75, printed
    step, _ = saved(Path(run))
    assert 2 <= step < 30
    assert printed.rstrip().endswith(f"stopped and saved after step {step}; to go on: mezzo train --resume {run}")
    assert [record["step"] for record in logged(Path(run))] == list(range(1, step + 1))
    code, printed = trainers.run("train", "--resume", run)
    assert code == 0, printed
    assert f"resumed   after step {step}\n" in printed
    assert "not bitwise" not in printed
    assert_same_state(Path(run), tmp_path / "whole")
    assert logged(Path(run)) == logged(tmp_path / "whole")


def test_a_signal_at_the_last_step_is_no_interruption(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=3"), tmp_path / "run", Heard())
    for record in session.train():
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    assert not session.interrupted
    assert saved(tmp_path / "run")[0] == 3


def test_signals_are_as_they_were_after_training(tmp_path: Path, tiny: Tiny) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    deterministic = torch.are_deterministic_algorithms_enabled()
    session = Session.start(tiny("train.steps=1"), tmp_path / "run", Heard())
    train(session)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert torch.are_deterministic_algorithms_enabled() == deterministic
