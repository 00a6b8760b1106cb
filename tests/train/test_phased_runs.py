"""Runs whose precision changes in phases: resume to the bit anywhere, what the log says, triggers that compare runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import OVERFLOWING, Heard, Tiny, assert_same_state, logged, saved, train

from mezzo.errors import ConfigError, RunError
from mezzo.policy import Phase, Policy, Schedule
from mezzo.policy.trigger import Parts
from mezzo.train.config import Config, parse
from mezzo.train.loop import Loop
from mezzo.train.phased import describe, gaps
from mezzo.train.rundir import RunDir
from mezzo.train.schedule import learning_rate
from mezzo.train.session import Session
from mezzo.train.stored import load_run, read_config

LOW = "fp8; *:fprop.a=e4m3@tensor delayed=4; *:grad_output=e5m2@tensor stochastic; loss_scale.init=1024"
FOUR: list[dict[str, Any]] = [
    {"until": 3},
    {"policy": "fp32", "until": 6, "calibrate": True},
    {"policy": "fp16", "until": 0.75, "lr": 0.5, "when": {"trigger": "underflow", "sites": "*:grad_output",
                                                          "above": 0.9, "window": 2, "every": 2}},
    {"rules": "head:*=float32", "lr": 0.1},
]  # fmt: skip


def phased(config: Config, phases: Any, **train: Any) -> Config:
    data = config.model_dump(exclude_none=True)
    data["train"] |= train
    return parse(data | ({} if phases is None else {"phase": phases}))


def test_a_run_goes_through_its_phases_and_its_log_says_so(tmp_path: Path, tiny: Tiny) -> None:
    heard = Heard()
    config = phased(tiny("train.steps=12", policy=LOW), FOUR)
    records = train(Session.start(config, tmp_path / "run", heard))
    assert [r["phase"] for r in records] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert {r["step"]: r["entered"] for r in records if "entered" in r} == {3: 2, 6: 3, 9: 4}
    assert [r["step"] for r in records if "underflow" in r] == [7, 9], "step 8 is not due"
    entering, leaving = records[2]["calibration"], records[5]["calibration"]
    assert set(entering) == {"gradient_cosine", "gradient_ratio", "val_loss_low", "val_loss_high"}
    assert 0.9 < entering["gradient_cosine"] < 1
    assert set(leaving) == {"loss_scale"}
    assert records[6]["loss_scale"] == leaving["loss_scale"]
    assert [r["loss_scale"] for r in records] == [1024.0] * 3 + [1.0] * 3 + [leaving["loss_scale"]] * 3 + [1024.0] * 3
    for record in records:
        usual = learning_rate(record["step"] - 1, steps=12, peak=config.train.lr, warmup=2, kind="cosine", min_lr=0.1,
                              decay=0.2)  # fmt: skip
        assert record["lr"] == (1.0, 1.0, 0.5, 0.1)[record["phase"] - 1] * usual
    lines = heard.info["phases"]
    assert lines[0] == f"phase 1 of 4, {Policy.parse(LOW)}, to step 3"
    assert lines[1] == "phase 2 of 4, fp32, to step 6, calibrates"
    assert lines[2].endswith("to step 9 or until more than 90.00% of *:grad_output underflows, learning rate × 0.5")
    told = [message for message in heard.messages if message.startswith("after step")]
    assert [message.partition(": phase")[0] for message in told] == [
        f"after step {step} (step {step})" for step in (3, 6, 9)
    ]
    assert "; at the same weights: held-out loss " in told[0]
    assert f"cosine of their gradients {entering['gradient_cosine']:.5f}" in told[0]
    assert told[1].endswith(f"loss scale measured: {leaving['loss_scale']:g}")


@pytest.mark.parametrize("at", [2, 3, 5, 6, 8, 9, 11])
def test_a_run_resumed_in_a_phase_or_between_two_equals_one_that_never_stopped(
    tmp_path: Path, tiny: Tiny, at: int
) -> None:
    config = phased(tiny("train.steps=12", "train.eval_every=4", policy=LOW), FOUR)
    train(Session.start(config, tmp_path / "whole", Heard()))
    stopping = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": at, "keep": 9})})
    train(Session.start(stopping, tmp_path / "parts", Heard()), stop_after=min(at + 1, 11))
    heard = Heard()
    second = Session.resume(tmp_path / "parts", read_config(RunDir.open(tmp_path / "parts")), heard)
    assert second.first == at
    assert heard.messages == []
    train(second)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")


def test_a_middle_phase_of_no_steps_changes_no_bit_of_a_run(tmp_path: Path, tiny: Tiny) -> None:
    base = tiny("train.steps=6", policy=LOW)
    train(Session.start(base, tmp_path / "alone", Heard()))
    phases = [{"until": 3}, {"policy": "fp32", "until": 3, "calibrate": True}, {}]
    train(Session.start(phased(base, phases), tmp_path / "phased", Heard()))
    own = ("phase", "entered", "ended_by")
    records = [{k: v for k, v in r.items() if k not in own} for r in logged(tmp_path / "phased")]
    assert records == logged(tmp_path / "alone")
    assert_same_state(tmp_path / "phased", tmp_path / "alone")


def test_one_phase_has_its_policy_and_its_learning_rate(tmp_path: Path, tiny: Tiny) -> None:
    config = phased(tiny("train.steps=2", policy="fp16"), [{"policy": "bf16", "lr": 0.5}])
    session = Session.start(config, tmp_path / "run", Heard())
    records = train(session)
    assert str(session.precision.policy) == "bf16"
    usual = learning_rate(0, steps=2, peak=config.train.lr, warmup=2, kind="cosine", min_lr=0.1, decay=0.2)
    assert records[0]["lr"] == 0.5 * usual
    assert "phase" not in records[0]


def test_the_schedule_dmp_runs_as_it_is_named(tmp_path: Path, tiny: Tiny) -> None:
    records = train(Session.start(phased(tiny("train.steps=20", policy="fp8"), "dmp"), tmp_path / "run", Heard()))
    assert [r["phase"] for r in records] == [1] * 15 + [2] + [3] * 4
    assert 0.9 < records[14]["calibration"]["gradient_cosine"] < 1
    assert all(math.isfinite(r["loss"]) for r in records)


def test_too_many_skipped_steps_move_the_run_on(tmp_path: Path, tiny: Tiny) -> None:
    phases = [{"when": {"trigger": "skipped", "above": 2, "window": 5}}, {"policy": "bf16"}]
    config = phased(tiny("train.steps=10", policy=OVERFLOWING), phases)
    records = train(Session.start(config, tmp_path / "run", Heard()))
    third = [r["step"] for r in records if r["skipped"]][2]
    assert [r["step"] for r in records if "entered" in r] == [third]
    assert not any(r["skipped"] for r in records[third:])


def test_records_that_are_read_late_as_on_a_gpu_give_the_same_run(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = [{"when": {"trigger": "skipped", "above": 2, "window": 5}},
              {"policy": "fp32", "until": 8, "calibrate": True}, {}]  # fmt: skip
    config = phased(tiny("train.steps=10", "train.eval_every=2", policy=OVERFLOWING), phases)
    train(Session.start(config, tmp_path / "prompt", Heard()))
    monkeypatch.setattr(Loop, "late", True)
    train(Session.start(config, tmp_path / "late", Heard()))
    assert logged(tmp_path / "late") == logged(tmp_path / "prompt")
    assert_same_state(tmp_path / "late", tmp_path / "prompt")


# --- a reference run ---


def test_a_run_that_parts_from_its_reference_moves_on_and_resumes_anywhere(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("train.steps=8", "train.lr=0.02", policy="fp32")
    train(Session.start(phased(base, None, eval_every=4), tmp_path / "reference", Heard()))
    monkeypatch.chdir(tmp_path)
    phases = [{"policy": "mxfp4", "lr": 0.01, "when": {"trigger": "parts", "run": "reference", "above": 0.01}}, {}]
    config = phased(base, phases, eval_every=2, checkpoint_every=5)
    records = train(Session.start(config, "run", Heard()), stop_after=6)
    run = str(tmp_path / "reference")
    curve = {r["step"]: r["val_loss_fp32"] for r in RunDir.open("reference").records() if "val_loss_fp32" in r}
    assert sorted(curve) == [4, 8]
    at_four = records[3]
    assert "reference_gap" not in records[1], "the reference has no loss before its first evaluation"
    assert at_four["reference_gap"] == {run: at_four["val_loss_fp32"] / curve[4] - 1}
    between = (curve[4] + curve[8]) / 2
    assert records[5]["reference_gap"][run] == pytest.approx(records[5]["val_loss_fp32"] / between - 1, rel=1e-12)
    assert [r["phase"] for r in records] == [1] * 6
    assert records[5]["entered"] == 2, "the second evaluation in a row"
    assert records[5]["ended_by"].startswith("the held-out loss is ")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    heard = Heard()
    session = Session.resume(tmp_path / "run", read_config(RunDir.open(tmp_path / "run")), heard)
    assert heard.messages == [], "the reference is found from another folder, and the phases are the same"
    again = train(session)
    assert again[0]["entered"] == 2, "the gap at step 4 was remembered"


def test_between_two_evaluations_of_the_reference_the_line_between_them_counts() -> None:
    curves = {"a": ((10, 4.0), (20, 2.0)), "b": ((12, 3.0),)}
    assert gaps(curves, {"step": 15, "val_loss": 3.3}) == {"a": pytest.approx(0.1)}
    assert gaps(curves, {"step": 12, "val_loss": 3.6, "val_loss_fp32": 3.0}) == {"a": pytest.approx(-1 / 6), "b": 0.0}
    assert gaps(curves, {"step": 9, "val_loss": 3.3}) == gaps(curves, {"step": 21, "val_loss": 3.3}) == {}
    assert gaps(curves, {"step": 15}) == {}


def test_a_reference_that_cannot_be_compared_with_is_an_error(tmp_path: Path, tiny: Tiny) -> None:
    when = {"trigger": "parts", "run": str(tmp_path / "none"), "above": 0.01}
    config = phased(tiny(), [{"when": when}, {}])
    with pytest.raises(RunError, match=r"none is not a run: it has no config.toml"):
        Session.start(config, tmp_path / "run", Heard())
    train(Session.start(tiny("train.steps=3"), tmp_path / "none", Heard()), stop_after=1)
    with pytest.raises(RunError, match=r"none was never evaluated: its steps.jsonl has no val_loss"):
        Session.start(config, tmp_path / "run", Heard())


# --- resume with other phases ---


def test_other_phases_at_a_resume_are_told_and_taken(tmp_path: Path, tiny: Tiny) -> None:
    config = phased(tiny("train.steps=8", policy="fp16"), [{"until": 5}, {"policy": "fp32"}], checkpoint_every=4)
    train(Session.start(config, tmp_path / "run", Heard()), stop_after=5)
    heard = Heard()
    changed = phased(read_config(RunDir.open(tmp_path / "run")), [{"until": 2}, {"policy": "bf16"}])
    session = Session.resume(tmp_path / "run", changed, heard)
    assert heard.messages == [
        "the phases are not those of the checkpoint; the run goes on in phase 2",
        "the policy was fp16, now bf16: a new loss scale begins",
    ]
    assert [r["phase"] for r in train(session)] == [2] * 4


def test_a_run_without_phases_may_get_some_at_a_resume(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny("train.steps=6", "train.checkpoint_every=3", policy="fp16")
    train(Session.start(config, tmp_path / "run", Heard()), stop_after=4)
    heard = Heard()
    later = phased(read_config(RunDir.open(tmp_path / "run")), [{"until": 4}, {"policy": "fp32"}])
    session = Session.resume(tmp_path / "run", later, heard)
    assert heard.messages == ["the phases are not those of the checkpoint; the run goes on in phase 1"]
    assert [r["phase"] for r in train(session)] == [1, 2, 2]


def test_a_run_is_read_under_the_policy_of_the_phase_that_it_was_saved_in(tmp_path: Path, tiny: Tiny) -> None:
    config = phased(tiny("train.steps=3", policy="fp16"), [{"until": 2}, {"policy": "bf16"}])
    train(Session.start(config, tmp_path / "run", Heard()))
    assert str(load_run(tmp_path / "run")[2].policy) == "bf16"
    assert str(load_run(tmp_path / "run", "fp32")[2].policy) == "fp32"
    assert saved(tmp_path / "run")[0] == 3


# --- refused ---


def test_counting_underflow_in_compiled_code_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    when = {"trigger": "underflow", "sites": "*:grad_output", "above": 0.1}
    config = phased(tiny(), [{"when": when}, {}], compile=True)
    with pytest.raises(ConfigError, match=r"phase 1: underflow is counted while the model runs uncompiled; set"):
        Session.start(config, tmp_path / "run", Heard())


def test_a_phase_that_cannot_be_carried_out_leaves_no_run_behind(tmp_path: Path, tiny: Tiny) -> None:
    config = phased(tiny(policy="bf16-pure"), [{"until": 2}, {"policy": "bf16"}])
    with pytest.raises(ConfigError, match=r"phase 2: a phase cannot change how weights and moments are stored"):
        Session.start(config, tmp_path / "run", Heard())
    good = phased(tiny("train.steps=3", policy="bf16-pure"), "bf16-finish")
    records = train(Session.start(good, tmp_path / "run", Heard()))
    assert [r["phase"] for r in records] == [1, 1, 2]


def test_phases_are_described_in_a_line_each() -> None:
    phases = (Phase(Policy("fp8"), when=Parts("runs/a", 0.005)), Phase(Policy("fp32"), until=1500, calibrate=True),
              Phase(Policy("bf16"), lr=0.5))  # fmt: skip
    assert describe(Schedule(phases, 2000)) == [
        "phase 1 of 3, fp8, until the held-out loss is 0.50% above that of runs/a",
        "phase 2 of 3, fp32, to step 1,500, calibrates",
        "phase 3 of 3, bf16, to the end, learning rate × 0.5",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_run_compiles_every_phase_before_its_first_step(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=backend))
    phases = [{"until": 2}, {"policy": "fp32", "until": 4, "calibrate": True}, {"rules": "*:fprop.a=bf16"}]
    session = Session.start(phased(tiny("train.steps=6", policy="fp16"), phases, compile=True), tmp_path / "a", Heard())
    counts = []
    records = []
    for record in session.train():
        records.append(record)
        counts.append(len(graphs))
    assert [r["phase"] for r in records] == [1, 1, 2, 2, 3, 3]
    assert set(counts) == {counts[0]}
    assert "gradient_cosine" in records[1]["calibration"]
    torch._dynamo.reset()
