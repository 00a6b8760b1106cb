"""Rounding in torch: `cast(x, fmt)` gives the format's carrier tensor, rounded once, to nearest, ties to even.

A carrier is the torch dtype that holds a format's values: bfloat16 and float16 carry themselves, tf32 lives in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mezzo.formats import Format

CARRIERS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def carrier(fmt: Format) -> torch.dtype:
    """The dtype whose tensors hold values of `fmt`."""
    return CARRIERS[fmt.name]


def cast(x: Tensor, fmt: Format) -> Tensor:
    """Round `x` to `fmt` and return it in the format's carrier dtype; `x` itself where nothing changes.

    x         floating-point tensor of any shape
    returns   tensor of the same shape; overflow becomes infinity, NaN stays NaN
    """
    if x.dtype is carrier(fmt) and fmt.name != "tf32":
        return x
    if torch.compiler.is_compiling():
        # Inductor deletes x.to(bfloat16).float(); it cannot look inside an operator of ours.
        return torch.ops.mezzo.cast(x, fmt.name)  # type: ignore[no-any-return]
    return _cast(x, fmt)


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype that holds all its values."""
    if torch.compiler.is_compiling() and x.dtype in (torch.bfloat16, torch.float16) and x.dtype is not dtype:
        # As above: a bfloat16 result of the operation before, widened again, would never have been rounded.
        return torch.ops.mezzo.widen(x, dtype)  # type: ignore[no-any-return]
    return x.to(dtype)


def _cast(x: Tensor, fmt: Format) -> Tensor:
    if x.dtype is torch.float64 and fmt.mantissa_bits < 23:
        x = _round_float64(x, fmt)  # torch casts float64 to 16 bits through float32: two roundings
    elif fmt.name == "tf32":
        x = _round_tf32(x.float())
    return x.to(carrier(fmt))


def _round_float64(x: Tensor, fmt: Format) -> Tensor:
    """Values of `fmt` in float64; the cast that follows is then exact but for overflow, which it takes to infinity."""
    _, exponent = torch.frexp(x)  # |x| = m * 2**exponent with 0.5 <= m < 1
    grid = torch.clamp(exponent - 1, min=1 - fmt.bias) - fmt.mantissa_bits
    rounded = torch.ldexp(torch.round(torch.ldexp(x, -grid)), grid)  # torch.round takes ties to even
    rounded = torch.where(rounded.abs() > fmt.max, torch.copysign(torch.full_like(x, float("inf")), x), rounded)
    return torch.where(torch.isfinite(x), rounded, x)


def _round_tf32(x: Tensor) -> Tensor:
    """Drop the low 13 bits of a float32 with the usual carry; infinities and NaN pass."""
    bits = x.view(torch.int32)
    carry = ((bits >> 13) & 1) + 0xFFF
    return torch.where(torch.isfinite(x), ((bits + carry) & ~0x1FFF).view(torch.float32), x)


@torch.library.custom_op("mezzo::cast", mutates_args=())
def _cast_op(x: Tensor, fmt: str) -> Tensor:
    from mezzo.formats import FORMATS

    out = _cast(x, FORMATS[fmt])
    return out.clone() if out is x else out


@_cast_op.register_fake
def _(x: Tensor, fmt: str) -> Tensor:
    return torch.empty_like(x, dtype=CARRIERS[fmt])


@torch.library.custom_op("mezzo::widen", mutates_args=())
def _widen_op(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


@_widen_op.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)
