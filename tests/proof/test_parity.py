"""Parity proofs on tiny runs: pairs are pairs, nothing is trained twice, a plan does not change, failures count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzo.errors import ConfigError, MezzoError, RunError
from mezzo.proof.parity import Parity
from mezzo.proof.run import Job, run, with_seed
from mezzo.proof.samples import parses
from mezzo.proof.statistics import Finding, Plan
from mezzo.train.checkpoint import newest
from mezzo.train.config import Config
from mezzo.train.listeners import Listener
from mezzo.train.session import Session

Small = Callable[..., Config]
CLOCK = ("seconds",)
HOPELESS = "fp16; loss_scale=16777216"  # a constant scale under which every gradient overflows


def prove(
    config: Config, out: Path, policy: str | None = "fp32", against: str = "fp32", plan: Plan | None = None
) -> Any:
    proof = Parity(config, policy, against, plan or Plan.of(2, 0.01), out, jobs=1)
    proof.threads = 1
    told: list[dict[str, Any]] = []
    findings: list[Finding] = list(proof.train(lambda result, so_far: told.append(result)))
    return proof, findings, told


def weights(run_directory: Path) -> list[torch.Tensor]:
    checkpoint, problems = newest(run_directory)
    assert checkpoint is not None, problems
    return list(checkpoint.load_group("model").values())


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in CLOCK}


def test_the_same_policy_twice_gives_gaps_of_zero_and_the_control_arm_does_not(small: Small, tmp_path: Path) -> None:
    proof, findings, told = prove(small(), tmp_path / "proof")
    assert [f.verdict for f in findings] == ["equivalent"]
    assert proof.gaps("candidate") == {0: 0.0, 1: 0.0}
    assert all(abs(gap) < 1e-4 for gap in proof.gaps("control").values())
    reference, candidate, control = (weights(proof.out / "runs" / f"{arm}-000") for arm in proof.configs)
    assert all(torch.equal(a, b) for a, b in zip(reference, candidate, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(reference, control, strict=True))
    losses = [result["val_loss_fp32"] for result in told if result["arm"] == "reference"]
    assert losses[0] != losses[1]  # two seeds are two runs
    table, picture = proof.write()
    assert json.loads(table.read_text())["arms"]["candidate"]["finding"]["verdict"] == "equivalent"
    assert picture.read_bytes().startswith(b"\x89PNG")
    samples = [result["samples"] for result in told[:2]]
    assert samples[0] == samples[1]  # the same weights, prompts and seeds
    assert len({sample["text"] for sample in samples[0]}) > 1


def test_a_finished_run_is_not_trained_again_and_a_torn_line_is(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "proof"
    _, _, told = prove(small(), out, policy="bf16")
    results = out / "results.jsonl"
    whole = results.read_text()
    _, findings, again = prove(small(), out, policy="bf16")
    assert again == []
    assert results.read_text() == whole
    results.write_text(whole[:-40])
    _, same, again = prove(small(), out, policy="bf16")
    assert [(r["arm"], r["seed"]) for r in again] == [("control", 1)]
    assert timeless(again[0]) == timeless(told[-1])
    assert same == findings


@pytest.mark.parametrize("arm", ["candidate", "control"])
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(small: Small, tmp_path: Path, arm: str) -> None:
    config = with_seed(small("policy=bf16"), 1)
    whole = run(Job(arm, 1, config.model_dump(exclude_none=True), tmp_path / "whole", 1))
    job = Job(arm, 1, config.model_dump(exclude_none=True), tmp_path / "torn", 1)
    if arm == "candidate":
        session = Session.start(config, job.path, Listener())
        for record in session.train():
            if record["step"] == 3:
                session._stopping = True  # as a signal does
        assert session.interrupted
    else:
        from mezzo.proof import run as module

        class Torn(module.Perturbed):
            def step(self) -> Any:
                if self.precision.steps == 3:
                    raise KeyboardInterrupt
                return super().step()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "Perturbed", Torn)
            with pytest.raises(KeyboardInterrupt):
                run(job)
    assert timeless(run(job)) == timeless(whole)


def test_two_processes_give_what_one_gives(small: Small, tmp_path: Path) -> None:
    _, _, alone = prove(small(), tmp_path / "one", policy="bf16")
    proof = Parity(small(), "bf16", "fp32", Plan.of(2, 0.01), tmp_path / "two", jobs=2)
    proof.threads = 1
    both: list[dict[str, Any]] = []
    list(proof.train(lambda result, so_far: both.append(result)))
    key = lambda result: (result["arm"], result["seed"])  # noqa: E731
    assert [timeless(r) for r in sorted(both, key=key)] == [timeless(r) for r in sorted(alone, key=key)]


def test_it_stops_at_the_first_look_that_decides(small: Small, tmp_path: Path) -> None:
    _, findings, told = prove(small(), tmp_path / "proof", plan=Plan.of(4, 0.01, looks=[2, 4]))
    assert [(f.n, f.verdict) for f in findings] == [(2, "equivalent")]
    assert len(told) == 6


def test_the_plan_is_fixed_before_the_first_run(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "proof"
    Parity(small(), "bf16", "fp32", Plan.of(2, 0.01), out, jobs=1)
    for config, policy, plan, named in (
        (small(), "bf16", Plan.of(3, 0.01), "plan.seeds was 2, now 3"),
        (small(), "bf16", Plan.of(2, 0.02), "plan.margin was 0.01, now 0.02"),
        (small(), "fp16", Plan.of(2, 0.01), "arms.candidate.policy was 'bf16', now 'fp16'"),
        (small("train.steps=7"), "bf16", Plan.of(2, 0.01), "train.steps was 6, now 7"),
    ):
        with pytest.raises(RunError, match="was begun otherwise") as error:
            Parity(config, policy, "fp32", plan, out, jobs=1)
        assert named in str(error.value)


def test_a_folder_with_something_else_is_left_alone(small: Small, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="holds no parity proof"):
        Parity(small(), "bf16", "fp32", Plan.of(2, 0.01), tmp_path, jobs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_candidate_that_cannot_be_trained_is_worse_and_such_a_reference_is_an_error(
    small: Small, tmp_path: Path
) -> None:
    config = small("train.steps=14")
    proof, findings, _ = prove(config, tmp_path / "one", policy=HOPELESS)
    assert findings[-1].verdict == "worse"
    assert "2 of 2 runs could not be trained" in findings[-1].note
    proof.write()
    with pytest.raises(MezzoError, match="the reference of seed 0 could not be trained"):
        prove(config, tmp_path / "two", policy="fp32", against=HOPELESS)


def test_the_phases_of_the_config_are_the_candidates_alone(small: Small, tmp_path: Path) -> None:
    proof, _, told = prove(small(phase="bf16-finish", policy="mxfp8"), tmp_path / "proof", policy=None)
    assert proof.configs["reference"].phase is None
    by = {result["arm"]: result for result in told}
    assert len(by["candidate"]["phases"]) == 2
    assert by["candidate"]["policy"] == "bf16"  # where the run ended
    assert by["reference"]["phases"] == []


def test_an_unknown_policy_is_an_error_before_anything_is_written(small: Small, tmp_path: Path) -> None:
    for policy, against in (("bf61", "fp32"), ("bf16", "fp23")):
        with pytest.raises(ConfigError, match="unknown recipe"):
            Parity(small(), policy, against, Plan.of(2, 0.01), tmp_path / "proof", jobs=1)
    with pytest.raises(ConfigError, match="jobs is at least 1"):
        Parity(small(), "bf16", "fp32", Plan.of(2, 0.01), tmp_path / "proof", jobs=-1)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("def f(x):\n    return x\nclass", True),  # the unfinished last line does not count
        ("def f(x):\n    return (\n", False),
        ("import os\n", True),
        ("import os", False),  # no whole line
        ("\n\n\n", False),
        ("x = '\\d'\n", True),  # warns, and warnings are errors here
        ("a\x00b\n", False),
        ("class A:\n", False),
    ],
)
def test_a_sample_parses_if_its_whole_lines_do(text: str, accepted: bool) -> None:
    assert parses(text) is accepted
