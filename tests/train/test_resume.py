"""Going on where a run stopped: to the bit the run that never stopped, or a refusal that says why."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import OVERFLOWING, Heard, Tiny, assert_same_state, logged, saved, train, write_text

from mezzo.errors import CheckpointError, MezzoError, RunError
from mezzo.train.arrays import Named
from mezzo.train.checkpoint import newest
from mezzo.train.rundir import RunDir
from mezzo.train.saver import save
from mezzo.train.session import Session
from mezzo.train.stored import load_run, read_config
from mezzo.train.torch_state import as_arrays


def resumed(path: Path, *, heard: Heard | None = None, **changes: Any) -> Session:
    config = read_config(RunDir.open(path))
    return Session.resume(path, config.model_copy(update=changes), heard or Heard())


@pytest.mark.parametrize("policy", ["fp32", "bf16", OVERFLOWING], ids=["fp32", "bf16", "fp16"])
def test_a_run_resumed_in_the_middle_of_its_second_epoch_equals_one_that_never_stopped(
    tmp_path: Path, tiny: Tiny, policy: str
) -> None:
    config = tiny("train.steps=16", "train.eval_every=5", "train.sample_every=7", policy=policy)
    draw = {4: lambda: torch.rand(5)}  # moves the random state before the checkpoint
    train(Session.start(config, tmp_path / "whole", Heard()), meanwhile=draw)
    stopping = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 9})})
    first = Session.start(stopping, tmp_path / "parts", Heard())
    assert first.batches.epoch(9, 2) == 1
    assert first.batches.epoch(10, 2) == 1, "step 9 lies inside epoch 2, not at its end"
    train(first, stop_after=11, meanwhile=draw)
    assert [record["step"] for record in logged(tmp_path / "parts")] == list(range(1, 12))

    second = resumed(tmp_path / "parts")
    assert second.first == 9
    assert [record["step"] for record in logged(tmp_path / "parts")] == list(range(1, 10)), "the log is cut back"
    train(second)

    records = logged(tmp_path / "whole")
    assert logged(tmp_path / "parts") == records
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    if policy is OVERFLOWING:
        skipped = [record["step"] for record in records if record["skipped"]]
        assert min(skipped) <= 9
        assert max(skipped) > 9
        assert len({record["loss_scale"] for record in records[9:]}) > 1, "the scale moves after the resume too"


def test_weights_moments_scale_and_counts_are_all_in_a_checkpoint(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny(policy="fp16"), tmp_path / "run", Heard()))
    _, tensors = saved(tmp_path / "run")
    assert {"precision.scale", "precision.good", "precision.steps", "rng.torch", "model.embed.weight"} <= tensors.keys()
    assert sum(name.endswith("exp_avg_sq") for name in tensors) == 9


# --- what is wrong with the newest checkpoint ---


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny("train.steps=6", "train.checkpoint_every=2")
    train(Session.start(config, tmp_path / "whole", Heard()))
    train(Session.start(config, tmp_path / "run", Heard()))
    broken = tmp_path / "run/checkpoints/step-000006/model.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    heard = Heard()
    session = resumed(tmp_path / "run", heard=heard)
    assert session.first == 4
    assert heard.messages == [
        f"not used: {broken.parent}: model.safetensors is corrupt: its SHA-256 is not the manifest's"
    ]
    train(session)
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_when_no_checkpoint_is_good_nothing_is_trained_over_it(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=2"), tmp_path / "run", Heard()))
    (tmp_path / "run/checkpoints/step-000002/manifest.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint of .*run can be used.*\n .*manifest.json is missing"):
        resumed(tmp_path / "run")
    with pytest.raises(RunError, match=r"no usable checkpoint\n .*manifest.json is missing"):
        load_run(tmp_path / "run")
    assert [record["step"] for record in logged(tmp_path / "run")] == [1, 2]


def _rewrite(path: Path, change: Callable[[dict[str, Named]], None]) -> None:
    """Save the newest checkpoint anew with other tensors: its manifest verifies."""
    checkpoint, _ = newest(path)
    assert checkpoint is not None
    groups = {name: checkpoint.load_group(name) for name in checkpoint.groups}
    change(groups)
    with RunDir.open(path, lock=True) as run:
        save(run, checkpoint.step, groups, checkpoint.meta, keep=1)


def _miss(groups: dict[str, Named]) -> None:
    del groups["model"]["norm.weight"]


def _add(groups: dict[str, Named]) -> None:
    groups["model"]["blocks.9.norm1.weight"] = np.zeros(3, np.float32)


def _spoil(groups: dict[str, Named]) -> None:
    groups["model"]["norm.weight"] = np.zeros(31, np.float32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_miss, "missing from the checkpoint: norm.weight"),
        (_add, "not in the model: blocks.9.norm1.weight"),
        (_spoil, r"wrong: norm.weight is float32\[31\] in the checkpoint, float32\[32\] in the model"),
    ],
    ids=["missing", "extra", "wrong"],
)
def test_a_missing_extra_or_wrong_tensor_is_named(tmp_path: Path, tiny: Tiny, change: Any, named: str) -> None:
    train(Session.start(tiny("train.steps=1"), tmp_path / "run", Heard()))
    _rewrite(tmp_path / "run", change)
    with pytest.raises(CheckpointError, match=named):
        resumed(tmp_path / "run")
    with pytest.raises(CheckpointError, match=named):
        load_run(tmp_path / "run")


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=1"), tmp_path / "run", Heard())
    save(session.run, 7, {"model": as_arrays(session.model.state_dict())}, {}, keep=1)
    session.close()
    with pytest.raises(CheckpointError, match="not written by `mezzo train`: it has no optimizer, environment, policy"):
        resumed(tmp_path / "run")


# --- what may not change, and what may ---


def test_changed_model_batch_or_seed_is_refused_by_name(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=1"), tmp_path / "run", Heard()))
    config = read_config(RunDir.open(tmp_path / "run"))
    other = config.model_copy(
        update={
            "model": config.model.model_copy(update={"layers": 2, "qk_norm": True}),
            "train": config.train.model_copy(update={"seed": 1, "batch": 4, "steps": 9}),
        }
    )
    message = (
        r"--resume cannot change model.layers \(was 1, now 2\), model.qk_norm \(was not set, now True\), "
        r"train.batch \(was 2, now 4\), train.seed \(was 0, now 1\) of .*run; start a new run with --out"
    )
    with pytest.raises(RunError, match=message):
        Session.resume(tmp_path / "run", other, Heard())
    assert saved(tmp_path / "run")[0] == 1


@pytest.mark.parametrize("kept", [True, False], ids=["after a checkpoint", "before the first"])
def test_other_text_is_refused(tmp_path: Path, tiny: Tiny, kept: bool) -> None:
    text = write_text(tmp_path / "mine.txt", seed=2)
    config = tiny("train.steps=3", f"data.corpus={text}")
    train(Session.start(config, tmp_path / "run", Heard()), stop_after=None if kept else 1)
    text.write_text(text.read_text() + "\n\none line more")
    with pytest.raises(RunError, match=r"was trained on other text .* give the text it was trained on with --data"):
        resumed(tmp_path / "run")
    write_text(text, seed=2)
    resumed(tmp_path / "run").close()


def test_another_tokenizer_is_refused_and_the_runs_own_is_offered(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=1"), tmp_path / "run", Heard()))
    train(Session.start(tiny("train.steps=1", "data.vocab_size=280"), tmp_path / "other", Heard()))
    config = read_config(RunDir.open(tmp_path / "run"))
    tokenizer = {"tokenizer": str(tmp_path / "other/tokenizer.json")}
    with pytest.raises(RunError, match=r"another tokenizer.* --set data.tokenizer=.*run/tokenizer.json"):
        resumed(tmp_path / "run", data=config.data.model_copy(update=tokenizer))
    tokenizer = {"tokenizer": str(tmp_path / "run/tokenizer.json")}
    resumed(tmp_path / "run", data=config.data.model_copy(update=tokenizer)).close()


def test_another_policy_is_said_and_starts_a_new_scale(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=4", policy=OVERFLOWING), tmp_path / "run", Heard()))
    heard = Heard()
    config = read_config(RunDir.open(tmp_path / "run"))
    more = config.train.model_copy(update={"steps": 6})
    session = resumed(tmp_path / "run", heard=heard, policy="fp16; loss_scale=1024", train=more)
    assert f"the policy was {OVERFLOWING}, now fp16; loss_scale=1024: a new loss scale begins" in heard.messages
    train(session)
    assert [record["loss_scale"] for record in heard.records] == [1024, 1024]
    assert read_config(RunDir.open(tmp_path / "run")).policy == "fp16; loss_scale=1024"
    assert "init = 1024" in RunDir.open(tmp_path / "run").policy_toml()


def test_more_steps_can_be_added_and_are_kept_in_the_config(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny("train.steps=3", "train.schedule=constant")
    train(Session.start(config, tmp_path / "run", Heard()))
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 6})})
    train(Session.start(longer, tmp_path / "whole", Heard()))
    train(resumed(tmp_path / "run", train=longer.train))
    assert read_config(RunDir.open(tmp_path / "run")).train.steps == 6
    losses = [[record["loss"] for record in logged(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == losses[1]
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_a_resume_that_is_not_bitwise_says_why(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=2"), tmp_path / "run", Heard()))
    heard = Heard()
    torch.set_num_threads(2)
    resumed(tmp_path / "run", heard=heard).close()
    assert heard.messages == [], "no step is left"
    more = read_config(RunDir.open(tmp_path / "run")).train.model_copy(update={"steps": 3})
    resumed(tmp_path / "run", heard=heard, train=more).close()
    assert heard.messages == ["this resume is not bitwise: threads: 1 when saved, 2 now"]


def test_a_second_trainer_in_the_same_run_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=2"), tmp_path / "run", Heard())
    with pytest.raises(RunError, match=f"in use: another process .pid {os.getpid()} on"):
        resumed(tmp_path / "run")
    train(session)
    resumed(tmp_path / "run").close()


def test_a_run_can_be_resumed_from_another_folder(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "mine.txt")
    monkeypatch.chdir(tmp_path)
    config = tiny("data.corpus=mine.txt", "data.cache=cache", "train.steps=1")
    train(Session.start(config, "run", Heard()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed(Path("../run")).close()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_config_edited_into_nonsense_is_an_error_that_names_the_file(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=1"), tmp_path / "run", Heard())
    session.close()
    path = tmp_path / "run/config.toml"
    path.write_text(path.read_text().replace("heads = 1", "heads = 5"))
    with pytest.raises(MezzoError, match=r"run/config.toml: heads = 5 does not divide d_model = 32"):
        read_config(RunDir.open(tmp_path / "run"))


def test_a_session_that_cannot_start_leaves_a_folder_that_can_be_used_again(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(MezzoError, match="matches nothing"):
        Session.start(tiny(policy="bf16; nowhere:*=float32"), tmp_path / "run", Heard())
    session = Session.start(tiny("train.steps=1"), tmp_path / "run", Heard())
    assert replace(session.shape).layers == 1
    session.close()
