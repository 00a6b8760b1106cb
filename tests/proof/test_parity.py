"""Parity proofs on tiny runs: pairs are pairs, nothing is trained twice, a plan does not change, failures count."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
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
from mezzo.train.torch_state import as_tensors

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
    return list(as_tensors(checkpoint.load_group("model")).values())


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
    lines = whole.splitlines(keepends=True)
    for torn in (lines[4][:-40], lines[4][:-1]):  # the second candidate's; the last one lacks only its line break
        results.write_text("".join([*lines[:4], torn]))
        _, same, again = prove(small(), out, policy="bf16")
        assert [(r["arm"], r["seed"]) for r in again] == [("candidate", 1), ("control", 1)]
        assert [timeless(r) for r in again] == [timeless(r) for r in told[-2:]]
        assert same == findings
        assert [timeless(json.loads(line)) for line in results.read_text().splitlines()] == [timeless(r) for r in told]


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
    Parity(small(data={"corpus": "nowhere.txt"}), "bf16", "fp32", Plan.of(2, 0.01), out, jobs=1)
    Parity(small(), "bf16", "fp32", Plan.of(2, 0.01), out, jobs=1)  # nothing was run: the plan may still change
    begun = out / "runs" / "reference-000"
    begun.mkdir(parents=True)
    (begun / "config.toml").write_text("")
    for config, policy, plan, named in (
        (small(), "bf16", Plan.of(3, 0.01), "plan.seeds was 2, now 3"),
        (small(), "bf16", Plan.of(2, 0.02), "plan.margin was 0.01, now 0.02"),
        (small(), "fp16", Plan.of(2, 0.01), "arms.candidate.policy was 'bf16', now 'fp16'"),
        (small("train.steps=7"), "bf16", Plan.of(2, 0.01), "train.steps was 6, now 7"),
    ):
        with pytest.raises(RunError, match="was begun otherwise") as error:
            Parity(config, policy, "fp32", plan, out, jobs=1)
        assert named in str(error.value)


def test_pairs_are_of_one_text_and_one_machine(small: Small, story: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text(story.read_text())
    config = small(f"data.corpus={text}")
    out = tmp_path / "proof"
    prove(config, out, policy="bf16")
    results = out / "results.jsonl"
    first, *_ = results.read_text().splitlines(keepends=True)
    other = json.loads(first)
    other["where"]["torch"] = "1.0"
    results.write_text(json.dumps(other) + "\n")
    with pytest.raises(RunError, match=r"torch: 1\.0 when saved"):
        prove(config, out, policy="bf16")
    results.write_text(first)
    shutil.rmtree(out / "runs")
    text.write_text(story.read_text() + "\n\nMore of it.")
    with pytest.raises(RunError, match="corpus: "):
        prove(config, out, policy="bf16")


def test_a_policy_that_would_not_reach_every_phase_is_refused(small: Small, tmp_path: Path) -> None:
    config = small(phase=[{"until": 3}, {"policy": "fp32"}], policy="mxfp8")
    with pytest.raises(ConfigError, match="would not reach phase 2"):
        Parity(config, "nvfp4", "fp32", Plan.of(2, 0.01), tmp_path / "proof", jobs=1)
    assert Parity(config, None, "fp32", Plan.of(2, 0.01), tmp_path / "proof", jobs=1).candidate.endswith("→ fp32")


def test_a_model_whose_loss_is_not_finite_has_failed(small: Small, tmp_path: Path) -> None:
    proof = Parity(small(), "bf16", "fp32", Plan.of(2, 0.01), tmp_path / "proof", jobs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "evaluate", lambda self, batches=None: {"val_loss": 1.0, "val_loss_fp32": math.nan})
        assert run(proof._job("candidate", 0))["failed"] == "its held-out loss is nan"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_runs_that_are_going(story: Path, proof_cache: Path, tmp_path: Path, number: int) -> None:
    settings = [
        "model.preset=gpt-tiny", "model.layers=1", "model.d_model=32", "model.heads=1", "model.seq_len=32",
        f"data.corpus={story}", "data.vocab_size=300", f"data.cache={proof_cache / 'corpora'}", "train.steps=300",
        "train.batch=2", "train.checkpoint_every=1000",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from mezzo.cli.main import main; main()", "parity"]
    command += ["--policy", "bf16", "--seeds", "2", "--jobs", "2", "--margin", "5%", "--out", str(tmp_path / "proof")]
    command += [word for one in settings for word in ("--set", one)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "proof" / "runs" / "reference-000" / "steps.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size) and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(number)
    out, err = started.communicate(timeout=120)
    assert (started.returncode, err) == (75, ""), out
    assert "stopped and saved" in out
    assert newest(tmp_path / "proof" / "runs" / "reference-000")[0] is not None
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert len((tmp_path / "proof" / "results.jsonl").read_text().splitlines()) == 6


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
