"""What counts as an incident, and how incidents are kept."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import config

from mezzo.errors import MezzoError, RunError
from mezzo.observe.incidents import Incident, Incidents, Watch, read
from mezzo.observe.listener import RunObserver
from mezzo.storage import JsonLines
from mezzo.train.listeners import Listener, Listeners
from mezzo.train.rundir import RunDir
from mezzo.train.session import Session
from mezzo.train.stored import read_config


def record(step: int, loss: float = 3.0, scale: float = 65536.0, skipped: bool = False) -> dict[str, Any]:
    return {"step": step, "loss": loss, "loss_scale": scale, "skipped": skipped, "grad_norm": 1.0}


def kinds(records: list[dict[str, Any]]) -> list[tuple[int, str]]:
    watch = Watch()
    return [(one["step"], kind) for one in records for kind, _ in watch.note(one)]


def falling(steps: int, noise: float = 0.05) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [record(step, 8 * step**-0.2 + rng.gauss(0, noise)) for step in range(1, steps + 1)]


def test_a_run_of_skipped_steps_is_one_incident() -> None:
    records = [record(step, skipped=step in (3, 4, 5, 9)) for step in range(1, 12)]
    assert kinds(records) == [(3, "nonfinite"), (9, "nonfinite")]
    assert kinds([record(1, loss=math.nan), record(2, loss=math.inf), record(3)]) == [(1, "nonfinite")]


def test_a_loss_scale_that_collapses_is_one_and_one_that_searches_is_none() -> None:
    searching = [record(step, scale=2.0 ** (16 - min(step, 7))) for step in range(1, 50)]
    assert kinds(searching) == []
    collapsing = [record(step, scale=max(1.0, 2.0 ** (17 - step))) for step in range(1, 60)]
    assert kinds(collapsing) == [(9, "loss_scale")]
    long_ago = [record(step, scale=65536.0 if step < 3 else 2.0 ** (16 - step // 30)) for step in range(1, 400)]
    assert kinds(long_ago) == []
    without = [record(step, scale=65536.0 if step < 30 else 1.0) for step in range(1, 60)]
    assert kinds(without) == []
    entered = [record(step, scale=65536.0 if step < 30 else 64.0) for step in range(1, 60)]
    assert kinds(entered) == [(30, "loss_scale")]
    watch = Watch()
    for one in entered:
        assert watch.note(one) == []
        watch.passed(one | ({"entered": 2} if one["step"] == 29 else {}))


def test_a_spike_is_one_and_a_falling_noisy_loss_is_none() -> None:
    for noise in (0.0, 0.05, 0.3):
        records = falling(400, noise)
        assert kinds(records) == []
        for step in (200, 201, 300):
            records[step - 1]["loss"] += 2.5
        assert kinds(records) == [(200, "loss_spike"), (300, "loss_spike")], noise


def test_a_watch_that_begins_again_from_the_records_is_the_same() -> None:
    records = falling(120)
    records[99]["loss"] += 3
    records[110]["skipped"] = records[111]["skipped"] = True
    whole = kinds(records)
    for cut in (50, 99, 100, 111, 112):
        again = Watch(records[:cut])
        rest = [(one["step"], kind) for one in records[cut:] for kind, _ in again.note(one)]
        assert rest == [one for one in whole if one[0] > cut]


def test_the_first_and_the_last_are_kept_when_there_are_too_many(tmp_path: Path) -> None:
    store = Incidents(tmp_path, most=5)
    for step in [*range(1, 29), 999_999, 1_000_000]:
        store.keep(Incident(step, "nonfinite", "a gradient was not finite", steps=[step]), np.zeros(8, np.uint8))
    assert [one["step"] for one in read(tmp_path)[0]] == [1, 2, 28, 999_999, 1_000_000]


def test_incidents_of_one_step_do_not_overwrite_each_other_and_torn_ones_are_left_out(tmp_path: Path) -> None:
    store = Incidents(tmp_path)
    for kind in ("nonfinite", "loss_spike", "exception"):
        store.keep(Incident(7, kind, kind, loss=math.nan))
    (tmp_path / "incidents" / "step-000008").mkdir()
    (tmp_path / "incidents" / "step-000008" / "incident.json").write_text('{"step": 8, "ki')
    found, broken = read(tmp_path)
    assert broken == ["step-000008"]
    assert [one["kind"] for one in found] == ["exception", "loss_spike", "nonfinite"]
    assert all(math.isnan(one["loss"]) for one in found)
    assert read(tmp_path / "nothing") == ([], [])


def test_an_exception_in_the_middle_of_a_run_leaves_an_incident(folder: Path, tmp_path: Path) -> None:
    session = Session.start(config(folder, "bf16"), tmp_path / "run", RunObserver(every=2))

    def fail(module: Any, args: Any, out: Any) -> None:
        if session.precision.steps == 3:
            raise ValueError("the disk of the data is gone")

    session.model.blocks[0].register_forward_hook(fail)
    with pytest.raises(ValueError, match="the disk"):
        list(session.train())
    ((incident,), _) = read(tmp_path / "run")
    assert (incident["step"], incident["kind"]) == (4, "exception")
    assert incident["what"] == "ValueError: the disk of the data is gone"
    assert "in fail" in incident["traceback"]
    assert session.precision.hooks.taps == session.precision.hooks.observers == []
    assert [one["step"] for one in RunDir.open(tmp_path / "run").records("sites.jsonl")] == [1, 2]


def test_training_that_gives_up_leaves_its_nonfinite_steps_and_the_end(folder: Path, tmp_path: Path) -> None:
    policy = "fp16; loss_scale=dynamic; loss_scale.init=16777216; loss_scale.floor=16777216; loss_scale.patience=3"
    session = Session.start(config(folder, policy), tmp_path / "run", RunObserver())
    with pytest.raises(MezzoError):
        list(session.train())
    nonfinite, end = sorted(read(tmp_path / "run")[0], key=lambda one: one["kind"], reverse=True)
    assert (nonfinite["step"], nonfinite["steps"], end["kind"]) == (1, [1, 2], "exception")
    assert ":dgrad." in nonfinite["site"]


def test_what_is_switched_off_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    session = Session.start(config(folder, "fp16"), tmp_path / "run", RunObserver(every=0, incidents=0))
    session.model.blocks[0].mlp.up.weight.data[0, 0] = math.inf
    next(session.train())
    assert session.precision.hooks.observers == session.precision.hooks.taps == []
    assert not (tmp_path / "run" / "incidents").exists()
    assert not (tmp_path / "run" / "sites.jsonl").exists()


def test_samples_of_a_run_that_goes_on_are_those_of_one_that_never_stopped(folder: Path, tmp_path: Path) -> None:
    settings = ("train.steps=6", "train.checkpoint_every=3")
    listener = RunObserver(every=2, whatif=("nvfp4",))
    list(Session.start(config(folder, "bf16", *settings), tmp_path / "whole", listener).train())
    session = Session.start(config(folder, "bf16", *settings), tmp_path / "run", RunObserver(every=2, whatif=["nvfp4"]))
    for one in session.train():
        if one["step"] == 5:
            break
    del one
    session.close()
    again = Session.resume(tmp_path / "run", read_config(session.run), RunObserver(2, ("nvfp4",)))
    assert [sample["step"] for sample in again.run.records("sites.jsonl")] == [1, 2]
    list(again.train())
    logs = [RunDir.open(tmp_path / name).records("sites.jsonl") for name in ("run", "whole")]
    assert logs[0] == logs[1]
    assert [sample["step"] for sample in logs[0]] == [1, 2, 4, 6]
    assert logs[0][0]["whatif"]["nvfp4"].keys() == logs[0][0]["sites"].keys()


def test_a_full_disk_is_told_of_and_ends_no_training(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    said: list[str] = []

    class Says(Listener):
        def message(self, text: str) -> None:
            said.append(text)

    def full(self: Any, record: Any) -> None:
        if self.path.name == "sites.jsonl":
            raise RunError("cannot append to sites.jsonl: No space left on device")
        append(self, record)

    append = JsonLines.append
    monkeypatch.setattr(JsonLines, "append", full)
    listener = Listeners([Says(), RunObserver(every=1)])
    session = Session.start(config(folder, "fp16", "train.steps=3"), tmp_path / "run", listener)
    (tmp_path / "run" / "incidents").write_text("in the way")
    session.model.blocks[0].mlp.up.weight.data[0, 0] = math.inf
    steps = session.train()
    next(steps)
    assert sum("NOT WRITTEN: cannot append to sites.jsonl: No space" in text for text in said) == 1
    assert sum("NOT WRITTEN: cannot write the incident" in text for text in said) == 1
    steps.close()


def test_a_step_that_cannot_be_run_again_is_told_of_and_ends_no_training(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Says(Listener):
        def message(self, text: str) -> None:
            said.append(text)

    listener = Listeners([Says(), RunObserver()])
    session = Session.start(config(folder, "fp16", "train.steps=3"), tmp_path / "run", listener)
    calls = []

    def spoil(module: Any, args: Any, out: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError("no more")
        return out * math.nan

    session.model.blocks[0].register_forward_hook(spoil)
    record = next(session.train())
    assert record["skipped"]
    assert any("could not be run again to find the site: no more" in text for text in said)
    assert read(tmp_path / "run")[0][0]["site"] == record["site"]


def test_samples_and_incidents_of_phases_are_those_of_their_policy(folder: Path, tmp_path: Path) -> None:
    """The policy changes between two steps: what begins then runs, is sampled and is run again under the new one."""
    phases = 'phase=[{until=2}, {policy="fp16"}]'
    session = Session.start(config(folder, "fp8", phases), tmp_path / "run", RunObserver(every=3))
    for one in session.train():
        if one["step"] == 3:
            session.model.blocks[1].mlp.up.weight.data[0, 0] = math.inf
        if one["step"] == 4:
            break
    samples = session.run.records("sites.jsonl")
    assert [(sample["step"], sample["policy"]) for sample in samples] == [(1, "fp8"), (3, "fp16")]
    assert samples[1]["sites"]["blocks.0.mlp.up:fprop.a"]["format"] == "float16"
    ((incident,), _) = read(tmp_path / "run")
    assert (incident["step"], incident["policy"], incident["phase"]) == (4, "fp16", 2)
    assert incident["sites"]["blocks.1.mlp.up:fprop.b"]["format"] == "float16"
    assert incident["loss_scale"] == 65536
