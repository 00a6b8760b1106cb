"""Values to bit patterns and back, for element formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mezzo.errors import ConfigError
from mezzo.formats.rounding import Overflow, Rounding, as_float, round_elements
from mezzo.formats.scaled import AnyFormat, get_element
from mezzo.formats.spec import Format

_CONTAINERS = {4: np.uint8, 6: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@np.errstate(all="ignore")
def encode(
    x: npt.ArrayLike, fmt: str | AnyFormat, *, rounding: Rounding = "nearest", overflow: Overflow = "saturate"
) -> npt.NDArray[Any]:
    """The codes of `x` rounded to an element format; 6 and 4 bits in the low bits of a byte, the rest zero.

    x         array of any shape, float16, bfloat16, float32 or float64
    rounding  "nearest" or "toward_zero"
    overflow  as in `quantize`
    returns   uint8, uint16, uint32 or uint64 of x's shape; NaN is the positive quiet NaN with the lowest payload
              (float8_e4m3fn and float8_e8m0fnu have only one a sign), with x's sign
    raises    ConfigError if fmt is scaled or unknown, or if x holds NaN and fmt has no code for it
    """
    fmt = get_element(fmt)
    if rounding == "stochastic":
        raise ConfigError("encode rounds to nearest or toward zero; quantize stochastically first, then encode")
    wide = as_float(x).astype(np.float64)
    return codes_of(round_elements(wide, fmt, rounding, overflow), fmt, np.signbit(wide))


def codes_of(values: npt.NDArray[np.float64], fmt: Format, sign: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """The codes of values that are already in the format; `sign` is that of NaN."""
    if not fmt.nan and np.isnan(values).any():
        raise ConfigError(f"{fmt} has no code for NaN, and the array holds {int(np.isnan(values).sum())}")
    container = _CONTAINERS[fmt.bits]
    if fmt.name == "float64":  # 2**52 times a fraction would not fit the int64 below with the sign
        return np.where(np.isnan(values), np.copysign(values, np.where(sign, -1.0, 1.0)), values).view(np.uint64)
    if fmt.is_integer:
        return values.astype(np.int64).astype(np.uint8)
    magnitude = np.where(np.isfinite(values), np.abs(values), 1.0)
    exponent = np.where(magnitude == 0, fmt.min_exponent, np.maximum(np.frexp(magnitude)[1] - 1, fmt.min_exponent))
    if fmt.is_scale:
        code = exponent + fmt.bias
    else:
        # The significand counts in units of the grid; a normal's hidden bit adds one to the exponent field.
        significand = np.ldexp(magnitude, fmt.mantissa_bits - exponent).astype(np.int64)
        code = (exponent.astype(np.int64) - fmt.min_exponent << fmt.mantissa_bits) + significand
    code = np.where(np.isinf(values), _infinity(fmt), code)
    code = np.where(np.isnan(values), _nan(fmt), code)
    if fmt.signed:
        code = code | np.where(np.where(np.isnan(values), sign, np.signbit(values)), 1 << (digits(fmt) - 1), 0)
    else:
        code = np.where(np.isnan(values), _nan(fmt), code)
    return (code << (fmt.bits - digits(fmt))).astype(container)


def decode(codes: npt.ArrayLike, fmt: str | AnyFormat) -> npt.NDArray[Any]:
    """The values of codes.

    codes     integers in 0 … 2**bits - 1, of any shape; for tf32 those of the float32 it lives in
    returns   float64 where fmt is float64, else float32 of the same shape
    raises    ConfigError if fmt is scaled or unknown or a code is out of range
    """
    fmt = get_element(fmt)
    given = np.asarray(codes)
    if given.dtype.kind not in "iu" or (given.size and (given.min() < 0 or int(given.max()) >= 1 << fmt.bits)):
        raise ConfigError(f"codes of {fmt} are whole numbers in 0 … 2**{fmt.bits} - 1")
    if fmt.name == "float64":
        return given.astype(np.uint64).view(np.float64).copy()
    code = given.astype(np.int64) >> (fmt.bits - digits(fmt))
    if fmt.is_integer:
        return np.where(code > 127, code - 256, code).astype(np.float32)
    magnitude = code & ((1 << digits(fmt) - fmt.signed) - 1)
    field, fraction = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    if fmt.is_scale:
        values = np.ldexp(1.0, field - fmt.bias)
    else:
        hidden = np.where(field > 0, 1 << fmt.mantissa_bits, 0)
        values = np.ldexp((hidden + fraction).astype(np.float64), np.maximum(field, 1) - fmt.bias - fmt.mantissa_bits)
    if fmt.infinity:
        values = np.where(field == (1 << fmt.exponent_bits) - 1, np.where(fraction == 0, np.inf, np.nan), values)
    elif fmt.nan:
        values = np.where(magnitude == _nan(fmt), np.nan, values)
    if fmt.signed:
        values = np.where(code >> (digits(fmt) - 1) > 0, -values, values)
    result: npt.NDArray[np.float32] = values.astype(np.float32)
    return result


def digits(fmt: Format) -> int:
    """Bits that say something: 19 of tf32's 32."""
    return fmt.exponent_bits + fmt.mantissa_bits + (1 if fmt.signed else 0)


def _infinity(fmt: Format) -> int:
    return ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits


def _nan(fmt: Format) -> int:
    """The magnitude bits of the quiet NaN: the top bit of the fraction, or all ones where that is the only one."""
    if fmt.infinity:
        return _infinity(fmt) | 1 << (fmt.mantissa_bits - 1)
    return (1 << fmt.exponent_bits + fmt.mantissa_bits) - 1
