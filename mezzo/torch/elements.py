"""Rounding to element formats in torch operations: to the bit what `mezzo/formats/rounding.py` does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mezzo.formats import Format
from mezzo.formats.rounding import Overflow, Rounding
from mezzo.formats.spec import BFLOAT16, E8M0, FLOAT16, FLOAT32, FLOAT64

INPUTS = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32, torch.float64: FLOAT64}


def round_elements(
    x: Tensor, fmt: Format, rounding: Rounding, overflow: Overflow, words: Tensor | None = None
) -> Tensor:
    """Round to an element format in torch operations: the values, in float32 or float64."""
    if x.dtype is not torch.float64:
        if fmt.holds(INPUTS[x.dtype]) and overflow == "cast":
            return x
        x = x.float()
        if rounding == "nearest" and fmt not in (FLOAT32, FLOAT64, E8M0):
            return _nearest_float32(x, fmt, overflow)
    return _round_float64(x.double(), fmt, rounding, overflow, words)


def _nearest_float32(x: Tensor, fmt: Format, overflow: Overflow) -> Tensor:
    """Ties to even, from float32, in float32."""
    if overflow == "saturate" or not fmt.nan:
        x = x.clamp(fmt.min, fmt.max)  # both are values of the format, so what lies between rounds to no more
    if fmt is BFLOAT16 or fmt is FLOAT16:
        return x.to(torch.bfloat16 if fmt is BFLOAT16 else torch.float16).float()
    raw = x.view(torch.int32)
    if fmt.exponent_bits == 8:  # tf32: too close to the top for the sum below
        drop = 23 - fmt.mantissa_bits
        carry = ((raw >> drop) & 1) + ((1 << drop - 1) - 1)
        return torch.where(torch.isfinite(x), ((raw + carry) >> drop << drop).view(torch.float32), x)
    # Adding 2**(exponent + 23 - mantissa_bits) pushes what is below the grid out of float32, with its rounding.
    exponent = (raw & 0x7F800000).clamp_((fmt.min_exponent + 127) << 23, (fmt.max_exponent + 128) << 23)
    push = exponent.add_((23 - fmt.mantissa_bits) << 23).view(torch.float32)
    y = x.abs().add_(push).sub_(push)
    if overflow == "cast" and fmt.nan:
        y = torch.where(y > fmt.max, math.inf if fmt.infinity else math.nan, y)
    y = torch.copysign(y, x)
    return y + 0.0 if fmt.is_integer else y


def _round_float64(x: Tensor, fmt: Format, rounding: Rounding, overflow: Overflow, words: Tensor | None) -> Tensor:
    """As `mezzo.formats.rounding.round_elements`."""
    finite = torch.where(torch.isfinite(x), x.abs(), 0.0)
    exponent = (finite.view(torch.int64) >> 52) - 1023  # -1023 for subnormal numbers, below every format's grid
    if fmt.is_scale:
        return _round_scale(x, finite, exponent, rounding, overflow, words)
    if fmt.mantissa_bits >= 52:
        rounded = finite
    else:
        grid = exponent.clamp_(min=fmt.min_exponent) - fmt.mantissa_bits
        rounded = _whole(finite * power_of_two(-grid), rounding, words) * power_of_two(grid)
    # Of two Python numbers torch.where would make a float32.
    limit = torch.where(torch.signbit(x), torch.full_like(x, -fmt.min), fmt.max)
    stays = overflow == "saturate" or not fmt.nan
    beyond = limit if stays else torch.full_like(limit, math.inf if fmt.infinity else math.nan)
    large = limit if rounding == "toward_zero" else beyond
    rounded = torch.where(torch.isinf(x), beyond, torch.where(rounded > limit, large, rounded))
    rounded = torch.where(torch.isnan(x), x, torch.copysign(rounded, x))
    return rounded + 0.0 if fmt.is_integer else rounded


def power_of_two(exponent: Tensor) -> Tensor:
    """2.0**exponent exactly, for -1022 … 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _whole(scaled: Tensor, rounding: Rounding, words: Tensor | None) -> Tensor:
    if rounding == "nearest":
        return torch.round(scaled)  # ties to even
    down = torch.floor(scaled)
    if rounding == "toward_zero":
        return down
    assert words is not None
    return down + (words < torch.floor((scaled - down) * 2.0**32))


def _round_scale(
    x: Tensor, finite: Tensor, exponent: Tensor, rounding: Rounding, overflow: Overflow, words: Tensor | None
) -> Tensor:
    """To a power of two, as `mezzo.formats.rounding` says."""
    fraction = finite.view(torch.int64) & ((1 << 52) - 1)
    if rounding == "nearest":
        up = fraction >= 1 << 51
    elif rounding == "toward_zero":
        up = torch.zeros_like(fraction, dtype=torch.bool)
    else:
        assert words is not None
        up = words < fraction >> 20
    power = exponent + up
    top = E8M0.max if overflow == "saturate" else math.nan
    rounded = power_of_two(power.clamp(E8M0.min_exponent, E8M0.max_exponent))
    if rounding != "toward_zero":
        rounded = torch.where(power > E8M0.max_exponent, top, rounded)
    rounded = torch.where(x == 0, E8M0.min if overflow == "saturate" else math.nan, rounded)
    rounded = torch.where(torch.isposinf(x), top, rounded)
    return torch.where((x < 0) | torch.isnan(x), math.nan, rounded)
