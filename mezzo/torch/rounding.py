"""Rounding at the sites: `cast(x, fmt)` gives a tensor that holds x rounded once, to nearest, ties to even.

A carrier is the torch dtype that a format of 16 bits or more lives in: bfloat16 and float16 carry themselves, tf32 is
kept in float32. Formats below that have none: their values stay in the dtype that `mezzo.torch.quantize` gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat, ScaledFormat, get_element
from mezzo.formats.spec import Format
from mezzo.torch.quantize import quantize

CARRIERS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def carrier(fmt: AnyFormat) -> torch.dtype:
    """The dtype of tensors in `fmt`.

    raises    ConfigError for formats below 16 bits and scaled ones
    """
    if fmt.name not in CARRIERS:
        raise ConfigError(f"{fmt} is a format for operands of products; here one of {', '.join(CARRIERS)} is needed")
    return CARRIERS[fmt.name]


def cast(x: Tensor, fmt: AnyFormat, axis: int = -1) -> Tensor:
    """Round `x` to `fmt` and return it in the format's carrier dtype; `x` itself where nothing changes.

    x         floating-point tensor of any shape
    axis      the axis that the product sums over, for formats with blocks
    returns   tensor of the same shape; overflow becomes infinity in a format with a carrier and saturates in the
              others; NaN stays NaN
    """
    if isinstance(fmt, ScaledFormat) or fmt.name not in CARRIERS:
        return quantize(x, fmt, axis=axis)
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
    if fmt.name == "tf32" or x.dtype is torch.float64:  # torch casts float64 to 16 bits in two roundings
        x = quantize(x.detach(), fmt, overflow="cast")
    return x.to(carrier(fmt))


@torch.library.custom_op("mezzo::cast", mutates_args=())
def _cast_op(x: Tensor, fmt: str) -> Tensor:
    out = _cast(x, get_element(fmt))
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
