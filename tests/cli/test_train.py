"""`mezzo train` as a person uses it: what it prints, what it leaves, and how it refuses."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from in_process import Mezzo, refused, write_text

from mezzo.cli.train import _skipped
from mezzo.train import auto
from mezzo.train.config import load
from mezzo.train.rundir import RunDir


def test_a_run_from_a_config_prints_what_it_does_and_what_to_type_next(mezzo: Mezzo, config: str) -> None:
    settings = [f"--set={key}" for key in ("data.cache=c", "train.eval_every=2", "train.sample_every=4")]
    done = mezzo("train", config, "--out", "runs/first", *settings)
    assert (done.code, done.err) == (0, "")
    lines = [line for line in done.out.splitlines() if not line.startswith("advice")]  # where bf16 is emulated
    patterns = [
        r"reading text …",
        r"training the tokenizer …",
        r"encoding …",
        r"model     26,720 parameters",
        r"training  4 steps, 256 tokens: 0\.\d times the text, 0\.0 for each parameter",
        r"policy    bf16   \(bfloat16 (emulated|native), float32 native on cpu\)",
        r"text      [\d,]+ tokens to train on, \d+ held out; SHA-256 [0-9a-f]{16}…",
        r"run       runs/first",
        r"step 2/4  loss \d\.\d{4}  val \d\.\d{4}  [\d,]+ tok/s  mfu \d+%  -?\d+ [KM]iB  \d:\d\d left",
        r"step 4/4  loss \d\.\d{4}  val \d\.\d{4}  [\d,]+ tok/s  mfu \d+%  -?\d+ [KM]iB  0:00 left",
        r"    'the cat.*'",
        r"saved runs/first/checkpoints/step-000004",
        r"done; try: mezzo generate runs/first --prompt 'the cat'",
        r"      or:  mezzo report runs/first",
    ]
    assert len(lines) == len(patterns), done.out
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"


def test_advice_is_printed_once_before_the_first_step(mezzo: Mezzo, config: str) -> None:
    done = mezzo("train", config, "--policy", "fp32; head:grad_output=int8@row", "--out", "run")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("advice ")]
    assert [lines[i].split(": ")[0] for i in at] == [
        "advice    head:dgrad.a, head:wgrad.a",
        "advice    emulated on this CPU",
    ]
    assert lines[at[0] - 1] == "run       run"
    assert lines[at[-1] + 1].startswith("step ")


def test_a_policy_that_cannot_train_is_refused_and_leaves_no_run(mezzo: Mezzo, config: str) -> None:
    """Nothing is left that would be in the way of a better try."""
    policy = "bf16; *:wgrad.a=bf16 hadamard"
    refused(mezzo("train", config, "--policy", policy, "--out", "run"), "so both need the same block")
    assert not Path("run/config.toml").exists()
    assert mezzo("train", config, "--policy", "bf16; *:wgrad.?=bf16 hadamard", "--out", "run").code == 0


def test_a_second_run_on_the_same_text_takes_the_tokens_of_the_first(mezzo: Mezzo, config: str) -> None:
    assert "encoding …" in mezzo("train", config, "--out", "one", "--set", "train.steps=1", "--set", "data.cache=c").out
    assert (
        "encoding" not in mezzo("train", config, "--out", "two", "--set", "train.steps=1", "--set", "data.cache=c").out
    )


def test_the_options_win_over_the_config(mezzo: Mezzo, config: str, tmp_path: Path) -> None:
    write_text(tmp_path / "other [b].txt", seed=5)
    done = mezzo("train", config, "--out", "run", "--policy", "fp16; hea[bd]:*=float32", "--data", "other [b].txt")
    assert done.code == 0, done.err
    assert "policy    fp16; hea[bd]:*=float32   (" in done.out, "brackets are not taken for markup"
    kept = load("run/config.toml")
    assert (kept.policy, kept.data.corpus) == ("fp16; hea[bd]:*=float32", str(tmp_path / "other [b].txt"))
    assert kept.model.vocab_size == 320


def test_without_out_a_run_gets_a_folder_of_its_own_below_runs(mezzo: Mezzo, config: str, tmp_path: Path) -> None:
    assert mezzo("train", config, "--set", "train.steps=1").code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"train-\d{8}-\d{6}", run.name)


@pytest.mark.parametrize("flops", [20e9, 200e9])
def test_without_a_config_a_model_is_chosen_and_the_reason_printed(
    mezzo: Mezzo, config: str, monkeypatch: pytest.MonkeyPatch, flops: float
) -> None:
    monkeypatch.setattr(auto, "measured_flops", lambda *arguments: flops)
    monkeypatch.setattr("mezzo.train.session.Session.train", lambda self: iter(()))
    done = mezzo("train", "--data", "book.txt", "--set", "data.vocab_size=300", "--out", "run", "--policy", "fp16")
    assert done.code == 0, done.err
    reason = next(line for line in done.out.splitlines() if line.startswith("chosen    "))
    assert f"measured: {flops / 1e9:.0f} GFLOP/s in training steps under fp16; a model of " in reason
    kept = load("run/config.toml")
    assert f"({kept.model.layers} layers, d {kept.model.d_model})" in reason
    assert f"{kept.train.steps * kept.train.batch * 128:,} in all" in reason


def test_model_or_steps_that_were_given_are_not_chosen_over(
    mezzo: Mezzo, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "measured_flops", lambda *arguments: pytest.fail("measured"))
    tiny = [f"--set={key}" for key in ("model.preset=gpt-tiny", "model.seq_len=32", "train.steps=1", "train.batch=2")]
    assert mezzo("train", "--data", "book.txt", "--set", "data.vocab_size=300", *tiny, "--out", "run").code == 0


def test_resume_goes_on_says_so_and_has_nothing_to_do_at_the_end(mezzo: Mezzo, config: str) -> None:
    assert mezzo("train", config, "--out", "run").code == 0
    done = mezzo("train", "--resume", "run")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("nothing to do: run has its 4 steps; add some with --set train.steps=…\n")
    assert load("run/config.toml").train.steps == 4
    done = mezzo("train", "--resume", "run", "--set", "train.steps=3", "--policy", "fp16")
    assert done.out.endswith("do: run has 4 steps, more than the 3 asked for; add some with --set train.steps=…\n")
    assert load("run/config.toml").train.steps == 4, "nothing ran under the new config"
    done = mezzo("train", "--resume", "run", "--set", "train.steps=6", "--policy", "fp16")
    assert done.code == 0, done.err
    assert "the policy was bf16, now fp16: a new loss scale begins\n" in done.out
    assert "resumed   after step 4\n" in done.out
    assert [record["step"] for record in RunDir.open("run").records()] == [1, 2, 3, 4, 5, 6]
    assert mezzo("train", "--resume", "run").out.endswith("has its 6 steps; add some with --set train.steps=…\n")


REFUSED = {
    "no config": (["train", "none.toml"], "no config file none.toml; without one `mezzo train` chooses a model"),
    "bad TOML": (["train", "bad.toml"], r"bad.toml is not a config: .*at line 1"),
    "unknown key": (["--set", "train.stpes=5"], r"unknown key 'train.stpes'; did you mean train.steps\?"),
    "wrong type": (["--set", "train.steps=soon"], "train.steps: Input should be a valid integer, got 'soon'"),
    "heads": (["--set", "model.heads=3"], "heads = 3 does not divide d_model = 32; choose heads from 1, 2, 4, 8, 16"),
    "policy": (["--policy", "bf17"], r"unknown recipe 'bf17'; known: .*; did you mean bf16\?"),
    "role": (["--policy", "bf16; head:wieght=float32"], "unknown role 'wieght' in the rule for 'head'; known: input,"),
    "rule": (["--policy", "bf16; hed:*=float32"], r"the rule 'hed:\*=float32' matches nothing .* did you mean head"),
    "set twice": (["--set", "train.lr=1", "--set", "train.lr=2"], "--set train.lr is given twice"),
    "policy twice": (["--policy", "bf16", "--set", "policy=fp16"], "--policy and --set policy say the same thing"),
    "policy's part": (["--policy", "bf16", "--set", "policy.recipe=fp16"], "--policy and --set policy.recipe say"),
    "data twice": (["--data", "x", "--set", "data.corpus=y"], "--data and --set data.corpus say the same thing"),
    "no data": (["--data", "none.txt"], 'none.txt: no such file or folder; .* or "stdlib"'),
    "no match": (["--data", "*.nothing"], "the pattern matches no file"),
    "empty": (["--data", "empty.txt"], "empty.txt: no text found .*1 empty files"),
    "binary": (["--data", "binary.txt"], "binary.txt: binary .*NUL bytes"),
    "one document": (["--data", "one.txt"], "one.txt: the text is a single document, but training and validation"),
    "short": (["--set", "model.seq_len=900"], "fewer than the 901 that one sequence of 900 .* need; give more text"),
    "not JSON": (["--data", "bad.jsonl"], "bad.jsonl:2: not JSON"),
    "no key": (["--data", "keys.jsonl"], r"keys.jsonl:1: no text under 'text', its keys are \['body'\]"),
    "tokenizer": (["--set", "data.tokenizer=none.json"], "none.json: cannot be read"),
    "cache": (["--set", "data.cache=book.txt/cache"], "book.txt/cache: cannot write token shards .* choose another"),
    "GPU": (["--set", "train.device=cuda"], "train.device = 'cuda', but .*; take device = 'cpu'"),
    "resume and out": (["--resume", "run"], "--resume goes on with a run's own config; drop CONFIG and --out"),
    "no set": (["--set", "train.steps"], "--set takes key=value, such as train.steps=200; got 'train.steps'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_error(
    mezzo: Mezzo, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("mezzo.hardware.gpu_status", lambda: ("cpu", "there is no GPU"))
    (tmp_path / "bad.toml").write_text("[train\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "one.txt").write_text("just a line")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"')
    (tmp_path / "keys.jsonl").write_text('{"body": "a"}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    given, message = REFUSED[case]
    arguments = given if given[0] == "train" else ["train", config, *given]
    done = mezzo(*arguments, "--out", "run")
    refused(done, message)
    assert done.err.count("\n") == 1
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in left if name != "run"] == before
    if "run" in left:
        assert not (tmp_path / "run/config.toml").exists()
        assert mezzo("train", config, "--set", "train.steps=1", "--out", "run").code == 0, "the folder can be used"


def test_a_run_that_is_there_is_not_overwritten(mezzo: Mezzo, config: str, tmp_path: Path) -> None:
    assert mezzo("train", config, "--out", "run", "--set", "train.steps=1").code == 0
    refused(mezzo("train", config, "--out", "run"), r"holds a run already: go on with it \(mezzo train --resume run\)")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    refused(mezzo("train", config, "--out", "mine"), r"mine is not empty and is not a run \(it holds thesis.txt\)")


def test_a_resume_that_cannot_be_is_refused(mezzo: Mezzo, config: str, tmp_path: Path, trained: Path) -> None:
    refused(mezzo("train", "--resume", "none"), "none is not a run: it has no config.toml")
    (tmp_path / "empty").mkdir()
    refused(mezzo("train", "--resume", "empty"), "empty is not a run")
    shutil.copytree(trained, "run")
    refused(mezzo("train", "--resume", "run", "--set", "train.steps=40"), r"book.txt: no such file or folder")
    refused(mezzo("train", "--resume", "run", "--set", "train.batch=9"), r"cannot change train.batch \(was 2, now 9\)")
    refused(mezzo("train", "--resume", "run", "--set", "model.layers=9"), r"change model.layers \(was 1, now 9\)")
    write_text(tmp_path / "other.txt", seed=7)
    refused(mezzo("train", "--resume", "run", "--data", "other.txt"), "was trained on other text .* with --data")
    write_text(tmp_path / "same.txt")
    done = mezzo("train", "--resume", "run", "--data", "same.txt", "--set", "train.steps=31")
    assert done.code == 0, done.err


def test_a_run_that_another_process_trains_is_refused(mezzo: Mezzo, trained: Path) -> None:
    shutil.copytree(trained, "run")
    with RunDir.open("run", lock=True):
        refused(mezzo("train", "--resume", "run"), rf"run is in use: another process \(pid {os.getpid()} on .*\)")


def test_training_that_fails_ends_with_1_the_site_and_the_last_good_weights(
    mezzo: Mezzo, config: str, tmp_path: Path
) -> None:
    policy = "fp16; loss_scale=dynamic; loss_scale.init=16777216; loss_scale.floor=16777216; loss_scale.patience=3"
    done = mezzo("train", config, "--out", "run", "--policy", policy)
    refused(done, r"3 steps in a row had nonfinite gradients .* first nonfinite at head:dgrad.out. The weights")
    assert "step 1 skipped: nonfinite at head:dgrad.a, loss scale was 1.67772e+07\n" in done.out
    assert "saved run/checkpoints/step-000002\n" in done.out
    assert mezzo("generate", "run", "--tokens", "2").code == 0


@pytest.mark.parametrize(("in_fp32", "why"), [(5.5, "in float32 it is 5.5000, so"), (float("nan"), "in float32 too")])
def test_a_held_out_loss_that_is_no_number_is_an_error_at_the_end(
    mezzo: Mezzo, config: str, monkeypatch: pytest.MonkeyPatch, in_fp32: float, why: str
) -> None:
    found = {"val_loss": float("nan"), "val_loss_fp32": in_fp32, "val_bits_per_byte": 1.0}
    monkeypatch.setattr("mezzo.train.session.Session.evaluate", lambda self: dict(found))
    done = mezzo("train", config, "--out", "run")
    refused(done, rf"the held-out loss is nan: {why}.*; see mezzo incidents run$")
    assert "saved run/checkpoints/step-000004\n" in done.out
    assert "done;" not in done.out


def test_skipped_steps_are_counted_at_the_end(mezzo: Mezzo, config: str) -> None:
    policy = "fp16; loss_scale=dynamic; loss_scale.init=16777216; loss_scale.patience=30"
    done = mezzo("train", config, "--out", "run", "--policy", policy)
    assert done.code == 0, done.err
    skipped = sum(record["skipped"] for record in RunDir.open("run").records())
    assert skipped > 0
    assert f"\n{skipped} of 4 steps were skipped; see mezzo incidents run\ndone; " in done.out


def test_what_is_said_of_skipped_steps() -> None:
    good, bad = [False], [True]
    assert _skipped([]) is None
    assert _skipped(good * 89 + bad * 10 + good) is None
    assert _skipped(good * 88 + bad * 11 + good) == "11 of 100 steps were skipped"
    assert _skipped(good * 99 + bad) is None, "a loss scale that grows skips one now and then"
    assert _skipped(good * 98 + bad * 2) == "2 of 100 steps were skipped, the last ones"
    assert _skipped(bad + good * 97 + bad * 2) == "3 of 100 steps were skipped, the last 2 among them"


def test_a_full_disk_at_the_end_is_an_error_with_the_reason(
    mezzo: Mezzo, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mezzo.train.saver.write_file", full)
    done = mezzo("train", config, "--out", "run", "--set", "train.checkpoint_every=2")
    refused(done, "the checkpoint of step 4 was not saved in run/checkpoints: No space left on device")
    assert "NOT SAVED: the checkpoint of step 2 was not saved" in done.out


def test_invalid_utf8_is_counted_and_shown(mezzo: Mezzo, config: str, tmp_path: Path) -> None:
    text = (tmp_path / "book.txt").read_bytes()
    (tmp_path / "book.txt").write_bytes(text[:900] + b"\xff\xfe\xff" + text[900:])
    done = mezzo("train", config, "--out", "run", "--set", "train.steps=1")
    assert "\n          3 invalid UTF-8 sequences replaced by U+FFFD\n" in done.out


def test_a_folder_of_mixed_files_is_trained_on_and_what_was_not_read_is_said(
    mezzo: Mezzo, config: str, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_text(folder / "a.txt", seed=3)
    (folder / "chinese.jsonl").write_text(
        "\n".join(json.dumps({"text": "春眠不觉晓，处处闻啼鸟。" * n}) for n in (9, 8))
    )
    (folder / "more.txt.gz").write_bytes(gzip.compress(("夜来风雨声，花落知多少。" * 50).encode()))
    (folder / "picture.bin").write_bytes(bytes(range(256)))
    (folder / "sound.bin").write_bytes(bytes(999))
    done = mezzo("train", config, "--out", "run", "--data", "texts", "--set", "train.steps=1")
    assert done.code == 0, done.err
    assert "\n          not read: picture.bin: binary (it holds NUL bytes)" in done.out
    assert ", and 1 more\n" in done.out


def test_tensorboard_without_its_package_says_how_to_install_it(
    mezzo: Mezzo, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("mezzo.errors.importlib.import_module", missing)
    done = mezzo("train", config, "--out", "run", "--set", "train.tensorboard=true")
    refused(
        done,
        r"train.tensorboard needs the package 'tensorboardX', which is not installed; run: pip install tensorboardX",
    )


# --- frameworks ---


def test_the_framework_is_one_key_of_the_config_and_what_it_lacks_is_an_error(mezzo: Mezzo, config: str) -> None:
    both = mezzo("train", config, "--framework", "jax", "--set", "train.framework=jax")
    refused(both, "--framework and --set train.framework say the same thing; drop one of them")
    refused(mezzo("train", config, "--framework", "mxnet"), r"train.framework: .*'torch', 'jax' or 'tensorflow'")
    lacking = mezzo("train", config, "--framework", "jax", "--set", "train.prune=magnitude", "--out", "run")
    refused(lacking, r"jax cannot carry out train.prune \(set it to 'none'\); or take --framework torch")
    assert not Path("run").exists()
