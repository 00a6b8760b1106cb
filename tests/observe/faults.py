"""Faults planted in a small GPT while it trains, and what each has to be called."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzo.observe.listener import RunObserver
from mezzo.train.config import Config, load
from mezzo.train.listeners import Listeners
from mezzo.train.session import Session

GOOD_STEPS = 2
WORDS = "the cat sat on a mat and saw rain fall over green hills while birds sang old songs of stone water light"
MODES = {"eager": (), "checkpointed": ("train.checkpoint_activations=true",), "compiled": ("train.compile=true",)}


@dataclass(frozen=True)
class Fault:
    """plant(model, block) breaks a block of the model; site, with {block} in it, is where that has to be found."""

    name: str
    plant: Callable[[nn.Module, nn.Module], Any]
    site: str
    policies: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp8")


class _NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.nan


def _feed_forward_overflow(model: nn.Module, block: Any) -> None:
    block.mlp.up.weight.data.mul_(3e3)
    block.mlp.down.weight.data.mul_(1e4)


def _zeros(model: nn.Module, block: Any) -> None:
    block.norm2.register_forward_hook(lambda module, args, out: out * 0)


def _zero_weight(model: nn.Module, block: Any) -> None:
    block.attn.out.weight.data.zero_()


def _logits(model: nn.Module, block: Any) -> None:
    block.attn.qkv.weight.data.mul_(500)


def _nan_row(model: nn.Module, block: Any) -> None:
    def spoil(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        rows = torch.zeros(len(out), device=out.device)
        rows[1] = torch.nan
        return out + rows[:, None, None]

    block.norm1.register_forward_hook(spoil)


def _inf_weight(model: nn.Module, block: Any) -> None:
    block.mlp.up.weight.data[3, 5] = torch.inf


def _nan_gain(model: nn.Module, block: Any) -> None:
    block.norm2.weight.data[7] = torch.nan


def _backward(model: nn.Module, block: Any) -> None:
    block.mlp.down.register_forward_hook(lambda module, args, out: _NaNGradient.apply(out))


FAULTS = (
    Fault("overflow in a feed-forward output", _feed_forward_overflow, "blocks.{block}.mlp.down:fprop.out", ("fp16",)),
    Fault("an all-zero activation", _zeros, "blocks.{block}.mlp.gate:fprop.a"),
    Fault("an all-zero weight", _zero_weight, "blocks.{block}.attn.out:fprop.b"),
    Fault("an exploding attention logit", _logits, "blocks.{block}.attn"),
    Fault("NaN in one batch row", _nan_row, "blocks.{block}.attn.qkv:fprop.a"),
    Fault("Inf in one weight", _inf_weight, "blocks.{block}.mlp.up:fprop.b"),
    Fault("NaN in a norm's gain", _nan_gain, "blocks.{block}.mlp.gate:fprop.a"),
    Fault("NaN in backward only", _backward, "blocks.{block}.mlp.down:dgrad.a"),
)


def config(folder: Path, policy: str, *settings: str) -> Config:
    """Of a model that takes milliseconds a step, its text and cache in `folder`."""
    text = folder / "book.txt"
    if not text.exists():
        rng, words = random.Random(1), WORDS.split()
        text.write_text("\n\n".join(" ".join(rng.choice(words) for _ in range(60)) + "." for _ in range(12)))
    base = {
        "policy": policy,
        "model": {"preset": "gpt-tiny", "layers": 2, "d_model": 32, "heads": 2, "seq_len": 32, "qk_norm": False},
        "data": {"corpus": str(text), "vocab_size": 300, "cache": str(folder / "corpora")},
        "train": {"steps": 6, "batch": 2, "accumulate": 2, "warmup": 2, "checkpoint_every": 100, "eval_every": 100,
                  "eval_batches": 2},
    }  # fmt: skip
    return load(None, settings, base)


def found(session: Session, fault: Fault, block: int) -> tuple[str | None, dict[str, Any]]:
    """(what the first record after the fault, or the step's sample, calls it; that record)."""
    steps = session.train()
    for record in steps:
        if record["step"] == GOOD_STEPS:
            model: Any = session.model
            fault.plant(model, model.blocks[block])
        if record["step"] == GOOD_STEPS + 1:
            samples = [one for one in session.run.records("sites.jsonl") if one["step"] == record["step"]]
            steps.close()
            if "site" in record:
                return record["site"], record
            findings = samples[0]["findings"] if samples else []
            return (findings[0]["site"] if findings else None), record
    raise AssertionError("the run ended before the fault")


def try_fault(folder: Path, out: Path, fault: Fault, policy: str, mode: str, block: int) -> tuple[str | None, str]:
    """(what it was called, what it should have been called) in a run that is sampled at the step of the fault."""
    settings = MODES[mode]
    listener = Listeners([RunObserver(every=GOOD_STEPS + 1)])
    session = Session.start(config(folder, policy, *settings), out, listener)
    return found(session, fault, block)[0], fault.site.format(block=block)
