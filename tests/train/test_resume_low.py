"""Runs whose weights or moments rest in low precision: resume to the bit, evaluation, generation, another policy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import Heard, Tiny, assert_same_state, logged, saved, train

from mezzo.errors import CheckpointError
from mezzo.models.sampling import generate
from mezzo.train.rundir import RunDir
from mezzo.train.session import Session
from mezzo.train.stored import load_run, read_config

EIGHT = "bf16; *:state.exp_avg=e4m3@1x128; *:state.exp_avg_sq=bfloat16 stochastic"
POLICIES = ["bf16-pure", "bf16-pure-kahan", "bf16-pure-split", "bf16; *:state=e4m3@1x128 stochastic", EIGHT]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, tiny: Tiny, policy: str) -> None:
    config = tiny("train.steps=10", "train.eval_every=4", policy=policy)
    train(Session.start(config, tmp_path / "whole", Heard()))
    stopping = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 4})})
    train(Session.start(stopping, tmp_path / "parts", Heard()), stop_after=7)
    second = Session.resume(tmp_path / "parts", read_config(RunDir.open(tmp_path / "parts")), Heard())
    assert second.first == 4
    train(second)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    losses = [record["loss"] for record in logged(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    assert all(math.isfinite(r["val_loss_fp32"]) for r in logged(tmp_path / "whole") if "val_loss_fp32" in r)


def test_a_checkpoint_holds_both_halves_of_split_weights_and_every_moment(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=3", policy="bf16-pure-split"), tmp_path / "run", Heard())
    train(session)
    _, tensors = saved(tmp_path / "run")
    count = len(list(session.model.parameters()))
    halves = [name for name in tensors if name.endswith(":master|split|0")]
    moments = [name for name in tensors if name.endswith("|bfloat16|0") and ":exp_avg" in name]
    assert (len(halves), len(moments)) == (count, 2 * count)
    assert any(bool(tensors[name].any()) for name in halves)
    assert {name.rpartition(".")[2] for name in tensors if name.startswith("optimizer.")} == {"step"}


@pytest.mark.parametrize("policy", [None, "fp32"])
def test_text_can_be_generated_from_bfloat16_weights(tmp_path: Path, tiny: Tiny, policy: str | None) -> None:
    train(Session.start(tiny("train.steps=3", policy="bf16-pure-split"), tmp_path / "run", Heard()))
    model, tokenizer, precision, _ = load_run(tmp_path / "run", policy)
    assert {p.dtype for p in model.parameters()} == {torch.float32 if policy else torch.bfloat16}
    drawn = generate(model, tokenizer.encode("the cat").tolist(), max_new_tokens=5, vocab_size=tokenizer.vocab_size)
    assert len(list(drawn)) == 5
    assert str(precision.policy) == (policy or "bf16-pure-split")


def test_moments_go_over_to_another_policy_and_weights_of_another_dtype_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.steps=6", "train.schedule=constant", policy=EIGHT), tmp_path / "run", Heard()))
    config = read_config(RunDir.open(tmp_path / "run"))
    more = config.train.model_copy(update={"steps": 8})
    heard = Heard()
    session = Session.resume(tmp_path / "run", config.model_copy(update={"policy": "bf16", "train": more}), heard)
    assert f"the policy was {config.resolved_policy()}, now bf16: a new loss scale begins" in heard.messages
    state = session.optimizer.state[session.model.embed.weight]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(value.dtype is torch.float32 for value in state.values())
    assert bool(state["exp_avg"].any())
    train(session)
    pure = config.model_copy(update={"policy": "bf16-pure", "train": more})
    with pytest.raises(CheckpointError, match=r"embed.weight is float32\[.*\] in the checkpoint, bfloat16\["):
        Session.resume(tmp_path / "run", pure, Heard())
