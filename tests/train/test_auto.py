"""What `mezzo train` chooses when it is told nothing: a model that this machine can train well in ten minutes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mezzo.models.shapes import GPTConfig, flops_per_token, padded_vocab, parameter_count
from mezzo.policy import Policy
from mezzo.train import auto
from mezzo.train.config import load

CPU = torch.device("cpu")


def chosen(monkeypatch: pytest.MonkeyPatch, flops: float, *settings: str) -> tuple[Any, GPTConfig, str]:
    monkeypatch.setattr(auto, "measured_flops", lambda *arguments: flops)
    choice = auto.choose(load(None, settings), CPU)
    return choice.config.train, choice.config.model.resolve(vocab_size=choice.config.data.vocab_size), choice.reason


@pytest.mark.parametrize("flops", [9e9, 30e9, 120e9, 3e12, 4e14])
def test_the_model_sees_20_tokens_a_parameter_in_at_most_ten_minutes_and_the_next_size_would_not(
    monkeypatch: pytest.MonkeyPatch, flops: float
) -> None:
    train, shape, _ = chosen(monkeypatch, flops)
    tokens = train.steps * train.batch * train.accumulate * shape.seq_len
    assert tokens == pytest.approx(20 * parameter_count(shape), rel=0.01)
    assert tokens * flops_per_token(shape) / flops <= 600 * 1.01
    wider = [width for width in auto._WIDTHS if width > shape.d_model]
    if wider:
        larger = auto.shape_of(wider[0], shape.vocab_size, shape.seq_len)
        assert 20 * parameter_count(larger) * flops_per_token(larger) / flops > 600
    else:
        assert flops > 1e14, "only a GPU's speed reaches the end of the ladder"


def test_a_faster_machine_gets_a_larger_model_and_the_slowest_still_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [parameter_count(chosen(monkeypatch, flops)[1]) for flops in (1e6, 15e9, 50e9, 5e11, 5e13)]
    assert counts == sorted(set(counts))
    _, _, reason = chosen(monkeypatch, 1e6)
    assert "in about" in reason
    assert int(reason.rsplit("about ", 1)[1].split()[0]) > 10, "it says that this takes longer than ten minutes"


def test_every_size_of_the_ladder_is_a_model() -> None:
    for width in auto._WIDTHS:
        assert auto.shape_of(width, padded_vocab(4096), 128).head_dim % 2 == 0


def test_the_reason_names_speed_policy_size_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    train, shape, reason = chosen(monkeypatch, 100e9, "policy=fp16")
    tokens = train.steps * train.batch * shape.seq_len
    assert reason.startswith(
        f"measured: 100 GFLOP/s in training steps under fp16; a model of {parameter_count(shape):,} parameters "
        f"({shape.layers} layers, d {shape.d_model}) then sees 20 tokens a parameter, {tokens:,} in all, in about "
    )


def test_what_was_given_is_kept_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("train.batch=4", "train.accumulate=3", "train.eval_every=7", "train.lr=0.5", "data.vocab_size=600")
    train, shape, _ = chosen(monkeypatch, 50e9, *given)
    assert (train.batch, train.accumulate, train.eval_every, train.lr, shape.vocab_size) == (4, 3, 7, 0.5, 600)
    assert train.steps * 4 * 3 * shape.seq_len == pytest.approx(20 * parameter_count(shape), rel=0.01)


def test_the_speed_is_that_of_real_training_steps_on_this_machine() -> None:
    flops = auto.measured_flops(GPTConfig(vocab_size=64, layers=1, d_model=32, heads=1, seq_len=16), 2,
                                Policy.parse("bf16"), CPU)  # fmt: skip
    assert 1e5 < flops < 1e13
