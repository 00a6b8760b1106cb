"""The config that `mezzo train` takes when it is given none: what this machine can train well in ten minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mezzo.models.shapes import GPTConfig, flops_per_token, parameter_count
from mezzo.policy import Policy
from mezzo.train.config import Config, ModelSection
from mezzo.train.frameworks import make_engine

if TYPE_CHECKING:
    import torch

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 (Chinchilla), arXiv 2203.15556: about where compute is best spent
BUDGET = 600.0  # seconds
_WIDTHS = (32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)


@dataclass(frozen=True)
class Choice:
    """A config and, in words, why."""

    config: Config
    reason: str


def shape_of(width: int, vocab_size: int, seq_len: int) -> GPTConfig:
    """The ladder's rung of that width: layers and heads grow with it."""
    return GPTConfig(
        vocab_size=vocab_size, layers=max(2, width // 64), d_model=width, heads=max(1, width // 32), seq_len=seq_len
    )


def choose(base: Config, device: torch.device | None, budget: float = BUDGET) -> Choice:
    """The largest model of the ladder that sees 20 tokens a parameter within `budget` seconds at the measured speed.

    base     policy, data and train settings that were given; they are kept
    device   where torch trains; other frameworks choose it themselves
    """
    vocab_size, seq_len = base.data.vocab_size, 128
    policy = base.resolved_policy()
    batch = (
        base.train.batch
        if "batch" in base.train.model_fields_set
        else 16
        if device is None or device.type == "cpu"
        else 64
    )
    shape = shape_of(128, vocab_size, seq_len)
    flops = engine_flops(base, shape, batch) if device is None else measured_flops(shape, batch, policy, device)
    chosen, seconds = None, 0.0
    for width in _WIDTHS:
        shape = shape_of(width, vocab_size, seq_len)
        needed = TOKENS_PER_PARAMETER * parameter_count(shape) * flops_per_token(shape) / flops
        if chosen is None or needed <= budget:
            chosen, seconds = shape, needed
    assert chosen is not None
    count = parameter_count(chosen)
    tokens_a_step = batch * base.train.accumulate * seq_len
    steps = max(1, round(TOKENS_PER_PARAMETER * count / tokens_a_step))
    model = ModelSection(
        preset="gpt-proof", layers=chosen.layers, d_model=chosen.d_model, heads=chosen.heads, seq_len=seq_len
    )
    chosen_here = {"steps": steps, "batch": batch, "warmup": min(100, steps // 10 + 1),
                   "eval_every": max(1, steps // 5), "checkpoint_every": max(1, steps // 5),
                   "sample_every": max(1, steps // 2)}  # fmt: skip
    given = base.train.model_fields_set
    train = base.train.model_copy(update={key: value for key, value in chosen_here.items() if key not in given})
    minutes = max(1, round(seconds / 60))
    reason = (
        f"measured: {flops / 1e9:.0f} GFLOP/s in training steps under {policy}; a model of {count:,} parameters "
        f"({chosen.layers} layers, d {chosen.d_model}) then sees {TOKENS_PER_PARAMETER} tokens a parameter, "
        f"{steps * tokens_a_step:,} in all, in about {minutes} minute{'s' * (minutes > 1)}"
    )
    return Choice(base.model_copy(update={"model": model, "train": train}), reason)


def measured_flops(shape: GPTConfig, batch: int, policy: Policy, device: torch.device) -> float:
    """Useful operations per second in real training steps: the best of three after one to warm up."""
    import torch

    from mezzo.models.gpt_torch import GPT
    from mezzo.torch import Precision

    model = GPT(replace(shape)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    precision = Precision(model, optimizer, policy)
    idx = torch.randint(shape.vocab_size, (batch, shape.seq_len + 1), device=device)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        precision.backward(model(idx[:, :-1], idx[:, 1:]))
        bool(precision.step().skipped)  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return flops_per_token(shape) * batch * shape.seq_len / best


def engine_flops(base: Config, shape: GPTConfig, batch: int) -> float:
    """The same under any framework: the best of three steps after one that compiles."""
    train = base.train.model_copy(update={"batch": batch, "accumulate": 1})
    engine = make_engine(base.model_copy(update={"train": train, "phase": None}), shape)
    idx = np.random.default_rng(0).integers(shape.vocab_size, size=(batch, shape.seq_len + 1))
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        engine.step([(idx[:, :-1], idx[:, 1:])], 0.0).wait()
        best = min(best, time.perf_counter() - begin)
    return flops_per_token(shape) * batch * shape.seq_len / best
