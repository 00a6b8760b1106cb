"""Runs that clip and prune by their config: what they record, how they go on, what can be done with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import Heard, Tiny, assert_same_state, logged, saved, train

from mezzo.cli.main import cli
from mezzo.errors import ConfigError
from mezzo.models.gpt_torch import GPT
from mezzo.train.assemble import make_precision, make_pruner
from mezzo.train.checkpoint import newest
from mezzo.train.rundir import RunDir
from mezzo.train.session import Session
from mezzo.train.stored import load_run, read_config

PRUNING = ("train.prune=magnitude", "train.prune_sparsity=0.75", "train.prune_every=3", "train.prune_end=0.75")
WEIGHTS = ["attn.qkv.weight", "attn.out.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"]


def zeros(path: Path) -> dict[str, float]:
    """Parameter → share of zeros in the newest checkpoint."""
    checkpoint, _ = newest(path)
    assert checkpoint is not None
    return {name: float((w == 0).mean()) for name, w in checkpoint.load_group("model").items()}


def resumed(path: Path, *settings: str, heard: Heard | None = None) -> Session:
    config = read_config(RunDir.open(path))
    changes = dict(setting.split("=") for setting in settings)
    values = {key: int(value) if value.isdecimal() else value for key, value in changes.items()}
    config = config.model_copy(update={"train": config.train.model_copy(update=values)})
    return Session.resume(path, config, heard or Heard())


def test_the_config_says_how_gradients_are_clipped(tiny: Tiny) -> None:
    for settings, want in (
        ((), (1.0, None, None)),
        (("train.clip=0", "train.clip_value=0.5"), (None, 0.5, None)),
        (("train.clip=2", "train.clip_adaptive=0.01"), (2.0, None, 0.01)),
    ):
        config = tiny(*settings)
        model = GPT(config.model.resolve())
        clipping = make_precision(model, torch.optim.SGD(model.parameters()), config).clipping
        assert (clipping.max_norm, clipping.max_value, clipping.adaptive) == want


@pytest.mark.parametrize("how", ["train.clip_value=1e-5", "train.clip_adaptive=1e-4"])
def test_clipping_changes_what_is_trained_and_not_the_norm_that_is_recorded(
    tmp_path: Path, tiny: Tiny, how: str
) -> None:
    for name, more in (("plain", ()), ("clipped", (how,))):
        train(Session.start(tiny("train.clip=0", "train.warmup=0", *more), tmp_path / name, Heard()))
    plain, clipped = logged(tmp_path / "plain"), logged(tmp_path / "clipped")
    assert plain[0]["grad_norm"] == clipped[0]["grad_norm"] > 0.1
    assert plain[0]["loss"] == clipped[0]["loss"]
    assert plain[-1]["loss"] != clipped[-1]["loss"]


def test_shares_of_the_run_become_steps(tiny: Tiny) -> None:
    config = tiny("train.steps=40", *PRUNING)
    pruner = make_pruner(GPT(config.model.resolve()), config)
    assert pruner is not None
    assert (pruner.begin, pruner.end, pruner.every, pruner.final) == (4, 30, 3, 0.75)
    config = tiny("train.steps=40", "train.prune=2:4")
    pruner = make_pruner(GPT(config.model.resolve()), config)
    assert pruner is not None
    assert (pruner.kind, pruner.begin, pruner.final) == ("2:4", 4, 0.5)
    assert make_pruner(GPT(config.model.resolve()), tiny()) is None


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_a_pruned_run_resumed_in_the_middle_of_its_schedule_equals_one_that_never_stopped(
    tmp_path: Path, tiny: Tiny, policy: str
) -> None:
    config = tiny("train.steps=16", "train.eval_every=5", "train.clip_value=0.1", "train.clip_adaptive=0.1", *PRUNING,
                  policy=policy)  # fmt: skip
    train(Session.start(config, tmp_path / "whole", Heard()))
    stopping = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 7})})
    train(Session.start(stopping, tmp_path / "parts", Heard()), stop_after=8)
    middle = zeros(tmp_path / "parts")["blocks.0.mlp.up.weight"]
    assert 0 < middle < 0.74, "step 7 lies in the middle"
    train(resumed(tmp_path / "parts"))
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")

    shares = [record["sparsity"] for record in logged(tmp_path / "whole")]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 0.75
    assert len(set(shares)) > 3
    _, tensors = saved(tmp_path / "whole")
    assert sum(name.startswith("precision.prune.mask.") for name in tensors) == 5


def test_matrices_are_pruned_and_embeddings_norms_and_the_head_are_not(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=8", "model.tied=false", *PRUNING), tmp_path / "run", Heard()))
    assert {name: share for name, share in zeros(tmp_path / "run").items() if share > 0.01} == {
        f"blocks.0.{name}": 0.75 for name in WEIGHTS
    }


def test_a_run_that_does_not_prune_records_no_sparsity_and_keeps_no_masks(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=1"), tmp_path / "run", Heard()))
    assert "sparsity" not in logged(tmp_path / "run")[0]
    assert not [name for name in saved(tmp_path / "run")[1] if "prune" in name]


def test_a_pruned_run_generates_and_has_its_zeros_when_it_is_loaded(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.prune=2:4", "train.prune_begin=0.5"), tmp_path / "run", Heard()))
    model, _, _, _ = load_run(tmp_path / "run")
    four = model.get_parameter("blocks.0.attn.qkv.weight").detach().view(-1, 4)
    assert ((four != 0).sum(1) == 2).all()
    result = CliRunner().invoke(cli, ["generate", str(tmp_path / "run"), "--prompt", "the cat", "--tokens", "5"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("the cat")


def test_a_shape_that_2_to_4_cannot_take_is_refused_before_anything_is_trained(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(
        ConfigError, match=r"blocks.0.mlp.down.weight \(32, 30\) has 30 inputs: change the layer's input"
    ):
        Session.start(tiny("train.prune=2:4", "model.hidden=30"), tmp_path / "run", Heard())
    assert not (tmp_path / "run/config.toml").exists()


def test_a_dense_run_can_be_pruned_later_and_a_pruned_one_set_free(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=4", "train.schedule=constant"), tmp_path / "run", Heard()))
    # 0.1 and 0.6 of 10 steps: pruning began at step 1 and ends at step 6
    train(resumed(tmp_path / "run", "steps=10", "prune=magnitude"))
    shares = {record["step"]: record.get("sparsity") for record in logged(tmp_path / "run")}
    assert shares == {1: None, 2: None, 3: None, 4: None, 5: 0, 6: 0.5, 7: 0.5, 8: 0.5, 9: 0.5, 10: 0.5}
    heard = Heard()
    session = resumed(tmp_path / "run", "steps=12", "prune=none", heard=heard)
    assert "train.prune is now 'none': weights that were pruned may move again" in heard.messages
    train(session)
    assert zeros(tmp_path / "run")["blocks.0.mlp.up.weight"] < 0.01


def test_masks_outlast_a_change_of_policy(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=4", "train.schedule=constant", *PRUNING), tmp_path / "run", Heard()))
    config = read_config(RunDir.open(tmp_path / "run"))
    more = config.train.model_copy(update={"steps": 6})
    train(Session.resume(tmp_path / "run", config.model_copy(update={"train": more, "policy": "bf16"}), Heard()))
    assert [record["sparsity"] for record in logged(tmp_path / "run")][-3:] == [0.75] * 3
    assert zeros(tmp_path / "run")["blocks.0.mlp.up.weight"] == 0.75
