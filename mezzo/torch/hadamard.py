"""The random Hadamard transform in torch: the same bits as `mezzo.formats.hadamard`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats.hadamard import check_block, signs


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _signs(block: int, seed: int) -> tuple[float, ...]:
    # Dynamo cannot trace the hash and the integers behind the signs, which are constants of the graph.
    return tuple(signs(block, seed).tolist())


def _flip(block: int, seed: int, dtype: torch.dtype, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or type(x) is not Tensor:  # a fake tensor, kept, would outlive its mode
        return torch.tensor(_signs(block, seed), dtype=dtype, device=x.device)
    return _kept_flip(block, seed, dtype, x.device)


@functools.lru_cache(maxsize=64)
def _kept_flip(block: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: a copy from the host at each rounding would wait for the device."""
    return torch.tensor(_signs(block, seed), dtype=dtype, device=device)


def hadamard(x: Tensor, *, axis: int = -1, block: int = 16, seed: int = 0, inverse: bool = False) -> Tensor:
    """Multiply each block along an axis by diag(signs)·H / sqrt(block); see `mezzo.formats.hadamard`.

    x         (…, n, …) floating point, n a multiple of block along `axis`
    returns   float32 tensor of x's shape; float64 where x is float64. Differentiable.
    raises    ConfigError if the block is no power of four or does not divide the axis
    """
    if not x.is_floating_point():
        raise ConfigError(f"hadamard takes floating-point tensors, got {x.dtype}")
    moved = x.movedim(axis, -1)
    check_block(block, moved.shape[-1])
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = moved.to(work).reshape(-1, block)
    flip = _flip(block, seed, work, x)
    if not inverse:
        y = y * flip
    half = 1
    while half < block:
        pairs = y.reshape(-1, block // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([first + second, first - second], dim=2).reshape(-1, block)
        half *= 2
    y = y * block**-0.5  # a power of two
    if inverse:
        y = y * flip
    result: Tensor = y.reshape(moved.shape).movedim(-1, axis)
    return result
