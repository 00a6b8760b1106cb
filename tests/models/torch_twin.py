"""What torch's GPT computes for weights, tokens and targets, all NumPy: the other frameworks are held to it."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mezzo.models.gpt_torch import GPT
from mezzo.models.shapes import GPTConfig

# An epsilon large enough that a misplaced one shows.
SMALL = GPTConfig(vocab_size=61, layers=2, d_model=32, heads=4, seq_len=24, norm_eps=0.01)
VARIANTS = {
    "llama": SMALL,
    "gpt2": replace(SMALL, norm="layernorm", positions="learned", mlp="gelu", bias=True),
    "grouped": replace(SMALL, kv_heads=2, qk_norm=True, tied=False),
    "one key head": replace(SMALL, kv_heads=1, norm="layernorm", mlp="gelu", qk_norm=True, tied=False),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
CHUNK_ROWS = 13  # of 48 rows: three whole chunks and a shorter one


@dataclass(frozen=True)
class Twin:
    weights: dict[str, NDArray[np.float32]]
    idx: NDArray[np.int32]  # (B, T)
    targets: NDArray[np.int32]  # (B, T)
    logits: NDArray[np.float32]  # (B, T, V)
    loss: float
    gradients: dict[str, NDArray[np.float32]]


def twin(config: GPTConfig) -> Twin:
    """Weights so large that the residual stream hides no part; no target in the whole first chunk of the loss."""
    generator = torch.Generator().manual_seed(5)
    model = GPT(config, generator=generator, loss_chunk_rows=CHUNK_ROWS)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.05)
    idx_BT, targets_BT = (torch.randint(61, (2, config.seq_len), generator=generator) for _ in range(2))
    targets_BT[0, :CHUNK_ROWS] = -100
    loss = model(idx_BT, targets_BT)
    loss.backward()
    named = dict(model.named_parameters())
    return Twin(
        weights={name: p.detach().numpy() for name, p in named.items()},
        idx=idx_BT.int().numpy(),
        targets=targets_BT.int().numpy(),
        logits=model(idx_BT).detach().numpy(),
        loss=loss.item(),
        gradients={name: p.grad.numpy() for name, p in named.items() if p.grad is not None},
    )


def assert_same(found: Any, expected: Any, *, sums: int, name: str = "") -> None:
    """Equal but for float32 roundings, relative to the largest element.

    A sum of n products has a relative rounding error of about eps · sqrt n, its roundings being independent; `sums`
    such sums follow one another, here with n at most 128 (hidden width; rows and vocabulary are less), and both sides
    have such an error: eps · sqrt(2 · sums · 128).
    """
    expected = np.asarray(expected)
    error = np.abs(np.asarray(found) - expected).max()
    assert error <= 2.0**-23 * (2 * sums * 128) ** 0.5 * np.abs(expected).max(), name


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: array.shape for name, array in found.items()} == {n: a.shape for n, a in expected.items()}
    for name, array in expected.items():
        assert_same(found[name], array, sums=80, name=name)  # 40 sums forward, as many backward
