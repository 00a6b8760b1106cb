"""`mezzo whatif` and `mezzo incidents`: what they say of a run, a checkpoint and a batch."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from in_process import Mezzo, refused, write_text

from mezzo.observe.incidents import Incident, Incidents


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> str:
    """A copy of a finished run, with its text."""
    shutil.copytree(trained, "run")
    config = (tmp_path / "run" / "config.toml").read_text()
    text = write_text(tmp_path / "book.txt")
    (tmp_path / "run" / "config.toml").write_text(re.sub(r'corpus = "[^"]*"', f'corpus = "{text}"', config))
    return "run"


def rows(text: str) -> list[list[str]]:
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("site"))
    return [line.split() for line in lines[first + 1 :] if re.match(r"\S+:\S+ ", line)]


def test_the_worst_sites_come_first_and_the_rules_below_spare_them(mezzo: Mezzo, run: str) -> None:
    done = mezzo("whatif", run, "--policy", "nvfp4", "--spare", "2")
    assert done.code == 0, done.err
    sqnr = [float(re.findall(r"\d+\.\d", " ".join(row[1:]))[0]) for row in rows(done.out)]
    assert sqnr == sorted(sqnr)
    assert "(--all)" in done.out
    policy = json.loads(done.out.splitlines()[-1].removeprefix("  --policy "))
    assert policy.startswith("nvfp4; blocks.0.")
    spared = json.loads(mezzo("whatif", run, "--policy", policy, "--json").out)
    for rule in policy.split("; ")[1:]:
        path, role = rule.removesuffix("=bfloat16").split(":")
        for operand in "ab":
            assert spared["sites"][f"{path}:{role.replace('[ab]', operand)}"]["format"] == "bfloat16"
    assert min(float(one["sqnr"]) for one in spared["sites"].values() if one["sqnr"] is not None) >= sqnr[0]
    everything = mezzo("whatif", run, "--policy", "nvfp4", "--all")
    assert len(rows(everything.out)) > len(sqnr) == 20


def test_a_checkpoint_and_a_batch_are_enough(mezzo: Mezzo, trained: Path, tmp_path: Path) -> None:
    (checkpoint,) = list((trained / "checkpoints").iterdir())[-1:]
    np.save("ids.npy", np.arange(2 * 33).reshape(2, 33) % 250)
    inside = mezzo("whatif", str(checkpoint), "--policy", "mxfp8", "--batch", "ids.npy", "--json")
    assert inside.code == 0, inside.err
    shutil.copytree(checkpoint, "alone")
    refused(mezzo("whatif", "alone", "--policy", "mxfp8", "--batch", "ids.npy"), "lies in no run.* give --config FILE")
    shutil.copy(trained / "config.toml", "model.toml")
    alone = mezzo("whatif", "alone", "--policy", "mxfp8", "--batch", "ids.npy", "--config", "model.toml", "--json")
    assert json.loads(alone.out)["sites"] == json.loads(inside.out)["sites"]


def test_what_cannot_be_asked_says_why(mezzo: Mezzo, trained: Path) -> None:
    np.save("words.npy", np.full((2, 9), 100_000))
    np.save("flat.npy", np.arange(9))
    Path("text.npy").write_text("the cat")
    refused(mezzo("whatif", str(trained), "--policy", "fp8"), "book.txt.* not needed with --batch FILE")
    wrong = {"words": "from 0 to", "flat": r"shape \(9,\)", "text": "no .npy array", "none": "none.npy"}
    for name, why in wrong.items():
        refused(mezzo("whatif", str(trained), "--policy", "fp8", "--batch", f"{name}.npy"), why)
    refused(mezzo("whatif", str(trained), "--policy", "fp9"), "fp9")
    Path("empty").mkdir()
    refused(mezzo("whatif", "empty", "--policy", "fp8"), "empty is not a run")
    refused(mezzo("whatif", str(trained), "--policy", "fp8", "--config", "x.toml"), "--config is for a CHECKPOINT")


def test_a_run_of_another_framework_is_shown_as_torch_would_run_it(
    mezzo: Mezzo, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mezzo.train.stored.framework_of", lambda meta: "jax")
    said = "shown as PyTorch would run it; this run was last trained under jax\n"
    assert mezzo("whatif", run, "--policy", "nvfp4").out.startswith(said)
    done = mezzo("whatif", run, "--policy", "nvfp4", "--json")
    assert (done.err, json.loads(done.out)["step"]) == (said, 30)


def test_sixteen_bits_leave_nothing_to_spare(mezzo: Mezzo, run: str) -> None:
    done = mezzo("whatif", run, "--policy", "bf16")
    assert "nothing to spare" in done.out
    assert "--policy" not in done.out


def test_incidents_are_listed_with_site_and_rule(mezzo: Mezzo, trained: Path) -> None:
    shutil.copytree(trained, "run")
    shutil.rmtree("run/incidents", ignore_errors=True)
    assert mezzo("incidents", "run").out == "no incidents\n"
    store = Incidents(Path("run"))
    site = "blocks.1.mlp.down:fprop.out"
    store.keep(Incident(3, "nonfinite", "a gradient was not finite", site, "blocks.1.mlp.down:*=float32",
                        [3, 4], 4, policy="fp16", loss_scale=512.0, loss=float("nan")))  # fmt: skip
    store.keep(Incident(9, "loss_spike", "the loss is 9, the median of the steps before it 3"))
    done = mezzo("incidents", "run")
    assert "step 3 to 4  nonfinite  a gradient was not finite\n" in done.out
    assert f"policy fp16, loss scale 512, at {site}\n" in done.out
    assert 'to spare it: --policy "fp16; blocks.1.mlp.down:*=float32"\n' in done.out
    assert "step 9  loss_spike  the loss is 9" in done.out
    first, second = json.loads(mezzo("incidents", "run", "--json").out)["incidents"]
    assert (first["site"], first["loss"], second["kind"]) == (site, "NaN", "loss_spike")
    refused(mezzo("incidents", "none"), "none is not a run")
