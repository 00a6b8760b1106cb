"""A session: what looking at a run may not change, and what happens when values or disks fail."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import Heard, Tiny, assert_same_state, logged, saved, train, write_text

from mezzo.data.batches import bits_per_byte
from mezzo.errors import CheckpointError, ConfigError, DataError, NonfiniteError
from mezzo.models.shapes import flops_per_token, padded_vocab, parameter_count
from mezzo.train import saver
from mezzo.train.assemble import choose_device
from mezzo.train.checkpoint import newest
from mezzo.train.rundir import RunDir
from mezzo.train.session import Session
from mezzo.train.stored import load_run


def losses(path: Path) -> list[float]:
    return [record["loss"] for record in logged(path)]


# --- looking does not disturb ---


@pytest.mark.parametrize(
    "look",
    [
        ("train.eval_every=1", "train.eval_batches=1"),
        ("train.sample_every=1", "train.sample_prompt=the cat"),
        ("train.checkpoint_every=1",),
        ("train.tensorboard=true",),
        ("train.checkpoint_activations=true",),
    ],
    ids=["evaluation", "samples", "checkpoints", "tensorboard", "activation checkpointing"],
)
@pytest.mark.parametrize("policy", ["fp16", "fp32"])
def test_looking_at_a_run_does_not_change_a_bit_of_it(
    tmp_path: Path, tiny: Tiny, look: tuple[str, ...], policy: str
) -> None:
    train(Session.start(tiny(policy=policy), tmp_path / "plain", Heard()))
    train(Session.start(tiny(*look, policy=policy), tmp_path / "looked", Heard()))
    assert losses(tmp_path / "looked") == losses(tmp_path / "plain")
    assert_same_state(tmp_path / "looked", tmp_path / "plain")


def test_the_seed_decides_and_nothing_before_it(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny(), tmp_path / "one", Heard()))
    torch.randn(17)
    np.random.default_rng().random()
    train(Session.start(tiny(), tmp_path / "two", Heard()))
    train(Session.start(tiny("train.seed=1"), tmp_path / "other", Heard()))
    assert losses(tmp_path / "one") == losses(tmp_path / "two") != losses(tmp_path / "other")
    assert_same_state(tmp_path / "one", tmp_path / "two")


def test_training_learns(tmp_path: Path, tiny: Tiny) -> None:
    heard = Heard()
    train(Session.start(tiny("train.steps=40", "train.lr=0.01", policy="bf16"), tmp_path / "run", heard))
    assert heard.records[-1]["loss"] < heard.records[0]["loss"] - 1
    assert heard.outcome == "finished"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own, when imported
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # Dynamo's own too
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_compiled_run_has_nearly_the_losses_of_one_that_is_not(tmp_path: Path, tiny: Tiny, policy: str) -> None:
    """Inductor sums in another order; in bf16 (eps 2^-8) a rounding may flip, and the loss of about 5.7 is the mean of
    128 targets: 2^-8 of it is far above what that moves, and far below what a wrong product would."""
    train(Session.start(tiny("train.steps=4", policy=policy), tmp_path / "plain", Heard()))
    train(Session.start(tiny("train.steps=4", "train.compile=true", policy=policy), tmp_path / "compiled", Heard()))
    tolerance = 2**-8 if policy == "bf16" else 2**-17
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


# --- what is recorded ---


def test_an_evaluation_says_the_loss_under_the_policy_in_float32_and_in_bits_per_byte(
    tmp_path: Path, tiny: Tiny
) -> None:
    session = Session.start(tiny("train.steps=4", "train.eval_every=2", policy="bf16"), tmp_path / "run", Heard())
    train(session)
    records = logged(tmp_path / "run")
    assert ["val_loss" in record for record in records] == [False, True, False, True]
    last = records[-1]
    assert last["val_loss"] != last["val_loss_fp32"], "two tables, two losses"
    assert last["val_loss"] == pytest.approx(last["val_loss_fp32"], rel=2**-8)
    with torch.no_grad(), session.precision.using("fp32"):
        pairs = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in session.valid()]
        total = sum(float(session.model(x, y)) * y.numel() for x, y in pairs)
    count = sum(y.numel() for _, y in pairs)
    assert last["val_loss_fp32"] == total / count
    text = sum(len(session.corpus.tokenizer.decode(y.flatten().numpy()).encode()) for _, y in pairs)
    assert last["val_bits_per_byte"] == pytest.approx(bits_per_byte(total / count, count, text), rel=1e-12)


def test_samples_begin_with_the_prompt_and_come_every_so_many_steps_and_at_the_end(tmp_path: Path, tiny: Tiny) -> None:
    train(Session.start(tiny("train.sample_every=4", "train.sample_prompt=the "), tmp_path / "run", Heard()))
    samples = {record["step"]: record["sample"] for record in logged(tmp_path / "run") if "sample" in record}
    assert list(samples) == [4, 6]
    assert all(text.startswith("the ") and len(text) > 4 for text in samples.values())


def test_what_is_said_before_the_first_step_adds_up(tmp_path: Path, tiny: Tiny) -> None:
    heard = Heard()
    session = Session.start(tiny("train.steps=2", policy="fp16"), tmp_path / "run", heard)
    train(session)
    info = heard.info
    assert info["parameters"] == sum(p.numel() for p in session.model.parameters()) == parameter_count(session.shape)
    assert info["tokens"] == heard.records[-1]["tokens"] == 2 * 2 * 2 * 32
    assert info["corpus"] == session.corpus.sha256
    assert session.shape.vocab_size == padded_vocab(session.corpus.tokenizer.vocab_size)
    record = heard.records[0]
    assert record["mfu"] == pytest.approx(
        flops_per_token(session.shape) * record["tokens_per_s"] / session.engine.peak_flops, rel=1e-12
    )


def test_norms_and_biases_do_not_decay(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("model.bias=true", "train.weight_decay=0.3"), tmp_path / "run", Heard())
    session.close()
    decays = {id(p): group["weight_decay"] for group in session.optimizer.param_groups for p in group["params"]}
    for name, parameter in session.model.named_parameters():
        expected = 0.3 if parameter.dim() == 2 else 0.0
        assert decays[id(parameter)] == expected, name


# --- values that fail ---


def test_fp16_that_stays_nonfinite_ends_with_the_site_and_the_last_good_weights(tmp_path: Path, tiny: Tiny) -> None:
    policy = "fp16; loss_scale=dynamic; loss_scale.init=16777216; loss_scale.floor=16777216; loss_scale.patience=3"
    heard = Heard()
    session = Session.start(tiny("train.lr=1e-9", policy=policy), tmp_path / "run", heard)
    weights = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    with pytest.raises(
        NonfiniteError, match=r"3 steps in a row .* loss scale of 1.67772e\+07; first nonfinite at head:"
    ):
        train(session)
    assert heard.outcome == "failed"
    assert [record["skipped"] for record in logged(tmp_path / "run")] == [True, True]
    assert [record["site"] for record in logged(tmp_path / "run")] == ["head:dgrad.out"] * 2
    model, _, _, checkpoint = load_run(tmp_path / "run")
    assert checkpoint.step == 2
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_nan_in_the_gradients_of_bf16_is_skipped_ten_times_and_then_named(tmp_path: Path, tiny: Tiny) -> None:
    heard = Heard()
    session = Session.start(tiny("train.steps=30", policy="bf16"), tmp_path / "run", heard)
    weights = {}

    def damage() -> None:
        weights.update({name: p.detach().clone() for name, p in session.model.named_parameters()})
        session.model.blocks[0].norm1.register_forward_hook(lambda *args: args[-1] * float("nan"))

    with pytest.raises(NonfiniteError, match=r"10 steps in a row .*; first nonfinite at blocks.0.attn.qkv:"):
        train(session, meanwhile={3: damage})
    assert saved(tmp_path / "run")[0] == 12, "nine skipped steps are recorded, the tenth ends the run"
    model, _, _, _ = load_run(tmp_path / "run")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_nan_planted_in_the_weights_ends_the_run_and_damaged_weights_are_not_saved_over_good_ones(
    tmp_path: Path, tiny: Tiny, policy: str
) -> None:
    heard = Heard()
    config = tiny("train.steps=40", "train.checkpoint_every=2", "train.sample_every=5", policy=policy)
    session = Session.start(config, tmp_path / "run", heard)
    with pytest.raises(NonfiniteError, match=r"first nonfinite at blocks.0.mlp.up:fprop.out"):
        train(session, meanwhile={2: lambda: session.model.blocks[0].mlp.up.weight.data[3, 4].fill_(torch.nan)})
    assert "NOT SAVED at step 4: blocks.0.mlp.up.weight is not finite; older checkpoints stay" in heard.messages
    assert "the weights themselves are not finite, first blocks.0.mlp.up.weight; lower" in heard.messages[-1]
    assert any(message.startswith("no sample: ") for message in heard.messages)
    model, _, _, checkpoint = load_run(tmp_path / "run")
    assert checkpoint.step == 2
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_weights_that_turn_nonfinite_in_the_last_step_are_an_error_too(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=3", "train.checkpoint_every=2"), tmp_path / "run", Heard())
    with pytest.raises(NonfiniteError, match=r"after step 3 the weights themselves are not finite, first norm.weight"):
        train(session, meanwhile={3: lambda: session.model.norm.weight.data[0].fill_(torch.inf)})
    assert saved(tmp_path / "run")[0] == 2


def test_a_sample_that_cannot_be_drawn_does_not_end_the_training(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NonfiniteError("the logits are NaN")

    monkeypatch.setattr("mezzo.train.torch_engine.generate", fail)
    heard = Heard()
    train(Session.start(tiny("train.sample_every=3"), tmp_path / "run", heard))
    assert heard.messages.count("no sample: the logits are NaN") == 2
    assert heard.outcome == "finished"


# --- disks that fail ---


def _full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_by(monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    """Write tensors in another way from now on: what was submitted before is still written in the old one."""
    for thread in threading.enumerate():
        if thread.name.startswith("mezzo-save-"):
            thread.join()
    monkeypatch.setattr(saver, "write_file", write)


def test_a_disk_that_is_full_for_a_while_is_loud_and_training_goes_on(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    session = Session.start(tiny("train.steps=8", "train.checkpoint_every=2"), tmp_path / "run", heard)
    write = saver.write_file
    train(
        session,
        meanwhile={
            1: lambda: _write_by(monkeypatch, _full_disk),
            5: lambda: _write_by(monkeypatch, write),
        },
    )
    loud = [message for message in heard.messages if message.startswith("NOT SAVED: ")]
    assert len(loud) == 2
    assert "the checkpoint of step 2 was not saved in" in loud[0]
    assert "No space left on device" in loud[0]
    assert saved(tmp_path / "run")[0] == 8
    assert len(losses(tmp_path / "run")) == 8


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    session = Session.start(tiny("train.steps=4", "train.checkpoint_every=2"), tmp_path / "run", heard)
    with pytest.raises(CheckpointError, match=r"step 4 was not saved .*No space left on device; .* are untouched"):
        train(session, meanwhile={3: lambda: _write_by(monkeypatch, _full_disk)})
    assert heard.outcome == "failed"
    found, problems = newest(tmp_path / "run")
    assert (found is not None and found.step, problems) == (2, [])


def test_a_full_disk_does_not_hide_why_training_failed(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    policy = "fp16; loss_scale=dynamic; loss_scale.init=16777216; loss_scale.floor=16777216; loss_scale.patience=2"
    session = Session.start(tiny(policy=policy), tmp_path / "run", heard)
    monkeypatch.setattr(saver, "write_file", _full_disk)
    with pytest.raises(NonfiniteError):
        train(session)
    assert "No space left on device" in heard.messages[-1]


# --- what cannot start ---


def test_a_text_shorter_than_a_sequence_is_an_error_and_leaves_no_run(tmp_path: Path, tiny: Tiny) -> None:
    text = write_text(tmp_path / "short.txt", paragraphs=7)
    with pytest.raises(DataError, match=r"the training text has 450 tokens, fewer than the 1,001 that one sequence"):
        Session.start(tiny(f"data.corpus={text}", "model.seq_len=1000"), tmp_path / "run", Heard())
    assert not (tmp_path / "run/config.toml").exists()


def test_a_vocabulary_larger_than_the_model_is_an_error(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size = 100 is smaller than the tokenizer's 300; leave it out"):
        Session.start(tiny("model.vocab_size=100"), tmp_path / "run", Heard())


def test_a_gpu_that_is_not_there_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzo.hardware.gpu_status", lambda: ("cpu", "there is no GPU"))
    with pytest.raises(ConfigError, match=r"train.device = 'cuda', but there is no GPU; take device = 'cpu'"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_the_run_directory_holds_all_that_its_docstring_promises(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=1", policy="bf16; head:*=float32"), tmp_path / "run", Heard())
    train(session)
    run = RunDir.open(tmp_path / "run")
    found = {path.name for path in run.path.iterdir() if not path.name.startswith(".")}
    assert found == {"config.toml", "policy.toml", "steps.jsonl", "checkpoints", "tokenizer.json", "corpus.json"}
    assert 'site = "head:*"' in run.policy_toml()
    assert (run.path / "tokenizer.json").read_text() == session.corpus.tokenizer.to_json()
