"""`mezzo parity`: what it prints, its exit codes, going on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import Mezzo

RUN = ("--seeds", "2", "--jobs", "1", "--set", "train.steps=4", "--set", "train.warmup=1")


@pytest.mark.parametrize(
    ("more", "code", "verdict"),
    [
        (("--policy", "fp32"), 0, "verdict: equivalent at a margin of 0.250%, after 2 pairs"),
        (("--policy", "fp16; loss_scale=16777216", "--set", "train.steps=14"), 3, "verdict: worse"),
        (("--policy", "mxfp4", "--margin", "0.00000001%"), 4, "verdict: not enough evidence"),
    ],
)
def test_the_exit_code_is_the_verdict(
    mezzo: Mezzo, config: str, more: tuple[str, ...], code: int, verdict: str
) -> None:
    done = mezzo("parity", config, *RUN[:4], *(() if "train.steps=14" in more else RUN[4:]), *more, "--out", "proof")
    assert (done.code, done.err) == (code, "")
    assert verdict in done.out
    if code == 4:
        assert "would settle it" in done.out or "settles it" in done.out
    assert {"plan.json", "results.jsonl", "parity.json", "gaps.png"} <= {p.name for p in Path("proof").iterdir()}


def test_the_same_command_goes_on_and_trains_nothing_twice(mezzo: Mezzo, config: str) -> None:
    command = ("parity", config, *RUN, "--policy", "bf16", "--out", "proof")
    first = mezzo(*command)
    assert first.out.count("seed 0") == 4  # three arms, and the samples' title
    again = mezzo(*command)
    assert again.code == first.code
    assert again.out.count("seed 0") == 1
    assert json.loads(Path("proof/parity.json").read_text())["arms"]["candidate"]["seeds"] == 2
    other = mezzo(*command[:3], "3", *command[4:])
    assert other.code == 1
    assert "plan.seeds was 2, now 3" in other.err


def test_phases_are_named_and_samples_stand_side_by_side(mezzo: Mezzo, config: str) -> None:
    done = mezzo("parity", config, *RUN, "--policy", "mxfp8", "--set", "phase=bf16-finish", "--out", "proof")
    assert done.err == ""
    assert "candidate mxfp8 → bf16" in done.out
    assert "samples of seed 0, the same prompts and draws" in done.out
    assert "parsed" not in done.out  # the text is no Python


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seeds", "1"), "at least 2 seeds"),
        (("--margin", "0"), "margin is a relative gap above 0"),
        (("--margin", "0.25% or so"), "--margin is a share such as 0.25% or 0.0025"),
        (("--against", "fp23"), "unknown recipe 'fp23'"),
        (("--jobs", "0"), "--jobs is at least 1"),
        (("--set", "phase=dpm"), "unknown schedule of phases 'dpm'"),
    ],
)
def test_what_cannot_be_decided_is_refused_in_one_line(
    mezzo: Mezzo, config: str, more: tuple[str, ...], said: str
) -> None:
    done = mezzo("parity", config, *more, "--out", "proof")
    assert done.code == 1
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("proof").exists()
