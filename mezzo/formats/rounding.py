"""Rounding to a format in NumPy, whole arrays at a time: the reference that every adapter is held against.

`scalar.py` says the same once more, slowly and in exact arithmetic; `tests/formats` holds the two together.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mezzo.errors import ConfigError
from mezzo.formats.philox import bits
from mezzo.formats.scaled import AnyFormat, ScaledFormat, get_format
from mezzo.formats.spec import FLOAT32, FORMATS, Format

Rounding = Literal["nearest", "stochastic", "toward_zero"]
Overflow = Literal["saturate", "cast"]
Key = tuple[int, int, int | str]
F64 = npt.NDArray[np.float64]

ROUNDINGS = ("nearest", "stochastic", "toward_zero")
OVERFLOWS = ("saturate", "cast")


@np.errstate(all="ignore")
def quantize(
    x: npt.ArrayLike,
    fmt: str | AnyFormat,
    *,
    axis: int = -1,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    key: Key | None = None,
    scale: npt.ArrayLike | None = None,
) -> npt.NDArray[Any]:
    """Round `x` to the values that `fmt` can hold, once.

    x         array of any shape, float16, bfloat16 (of ml_dtypes), float32 or float64
    axis      for scaled formats: the axis that products sum over, along which blocks lie; a last block may be short
    rounding  "nearest" (ties to even), "toward_zero", or "stochastic": away from zero with the probability that makes
              the expectation x, to within 2**-32 of the gap
    overflow  "saturate": what is beyond the largest value, infinities too, becomes the largest value; "cast": it
              becomes what the format's cast makes of it: infinity, NaN if there is none (float8_e4m3fn), or the largest
              value if there is neither (6 and 4 bits, int8). Truncating, a finite number never leaves the range.
    key       (seed, step, site) of `mezzo.formats.philox.bits`, for stochastic rounding: element i takes word i
    scale     for formats scaled by a float32, the scale or one for each group, instead of the one that amax gives
    returns   array of x's shape, every element a value of fmt (times its scales). Its dtype is that of x if it can
              hold the values of fmt, else float32 (float64 for fmt float64); for scaled formats float32, or float64
              where x is float64.
              NaN stays NaN in every format; signed zeros stay where the format has them (not in int8).
    raises    ConfigError if an argument is unknown or missing, or x is not floating point
    source    IEEE 754-2019, section 4.3; OCP OFP8 v1.0, section 5.2.1; OCP Microscaling v1.0, section 6.3
    """
    fmt = get_format(fmt)
    array = as_float(x)
    check(fmt, rounding, overflow, key, scale is not None)
    words = random_words(array.size, key).reshape(array.shape) if rounding == "stochastic" else None
    if isinstance(fmt, ScaledFormat):
        from mezzo.formats.blocks import split

        return split(array, fmt, axis, rounding, overflow, words, scale).values()
    own = FORMATS[array.dtype.name]
    rounded = round_elements(array.astype(np.float64), fmt, rounding, overflow, words)
    return rounded.astype(array.dtype if own.holds(fmt) else np.float32 if FLOAT32.holds(fmt) else np.float64)


def as_float(x: npt.ArrayLike) -> npt.NDArray[Any]:
    """`x` as an array of one of the four input formats."""
    array = np.asarray(x)
    if array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise ConfigError(f"quantize takes float16, bfloat16, float32 or float64 arrays, got {array.dtype}")
    return array


def check(fmt: AnyFormat, rounding: str, overflow: str, key: Key | None, scale_given: bool) -> None:
    """Refuse arguments of `quantize` that are unknown or do not go together."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDINGS)}")
    if overflow not in OVERFLOWS:
        raise ConfigError(f"unknown overflow {overflow!r}; known: {', '.join(OVERFLOWS)}")
    if rounding == "stochastic" and key is None:
        raise ConfigError("stochastic rounding needs key=(seed, step, site), which its random bits are drawn from")
    if rounding != "stochastic" and key is not None:
        raise ConfigError(f"key is for stochastic rounding; the rounding is {rounding!r}")
    if scale_given and not (isinstance(fmt, ScaledFormat) and fmt.scaling == "free"):
        raise ConfigError(f"a scale can be given to formats scaled by a float32, such as e4m3@tensor; not to {fmt}")


def random_words(count: int, key: Key | None) -> npt.NDArray[np.uint32]:
    assert key is not None
    seed, step, site = key
    return bits(seed, step, site, count)


@np.errstate(all="ignore")
def round_elements(
    x: F64, fmt: Format, rounding: Rounding, overflow: Overflow, words: npt.NDArray[np.uint32] | None = None
) -> F64:
    """Round float64 values to an element format.

    words    one random word an element for stochastic rounding: away from zero if word < floor(fraction · 2**32)
    """
    if fmt.is_scale:
        return _round_scale(x, rounding, overflow, words)
    finite = np.where(np.isfinite(x), np.abs(x), 0.0)
    if fmt.mantissa_bits >= 52:
        rounded = finite
    else:
        exponent = np.frexp(finite)[1] - 1  # |x| = m * 2**exponent with 1 <= m < 2; frexp knows subnormals
        grid = np.maximum(exponent, fmt.min_exponent) - fmt.mantissa_bits
        # Scaling by a power of two is exact; so is scaling back, but for what overflows float64.
        rounded = np.ldexp(_round_whole(np.ldexp(finite, -grid), rounding, words), grid)
    return _bound(x, rounded, fmt, rounding, overflow)


def _bound(x: F64, rounded: F64, fmt: Format, rounding: Rounding, overflow: Overflow) -> F64:
    """Give the rounded magnitudes of finite x their sign, their limits, and what x holds that is not finite."""
    limit = np.where(np.signbit(x), -fmt.min, fmt.max)
    stays = overflow == "saturate" or not fmt.nan
    beyond = limit if stays else np.full_like(limit, np.inf if fmt.infinity else np.nan)
    large = limit if rounding == "toward_zero" else beyond
    rounded = np.where(np.isinf(x), beyond, np.where(rounded > limit, large, rounded))
    signed = np.copysign(rounded, x)
    if fmt.is_integer:
        signed = signed + 0.0  # -0 + 0 is 0
    return np.where(np.isnan(x), np.nan, signed)


def _round_whole(scaled: F64, rounding: Rounding, words: npt.NDArray[np.uint32] | None) -> F64:
    """Numbers >= 0 to whole numbers."""
    if rounding == "nearest":
        return np.rint(scaled)
    down = np.floor(scaled)
    if rounding == "toward_zero":
        return down
    assert words is not None
    return down + (words < np.floor(np.ldexp(scaled - down, 32)))


def _round_scale(x: F64, rounding: Rounding, overflow: Overflow, words: npt.NDArray[np.uint32] | None) -> F64:
    """To a power of two (float8_e8m0fnu): no zero, no sign, ties upward.

    With one digit of precision both neighbours of a tie are odd, and IEEE 754-2019, 4.3.1 takes the larger one.
    Saturating, 0 becomes the smallest value; else NaN. Negative numbers are NaN either way.
    """
    from mezzo.formats.spec import E8M0

    positive = np.where((x > 0) & np.isfinite(x), x, 1.0)
    mantissa, exponent = np.frexp(positive)  # 0.5 <= mantissa < 1
    if rounding == "nearest":
        up = mantissa >= 0.75
    elif rounding == "toward_zero":
        up = np.zeros(x.shape, bool)
    else:
        assert words is not None
        up = words < np.floor(np.ldexp(2 * mantissa - 1, 32))
    power = exponent - 1 + up
    saturates = overflow == "saturate"
    top = E8M0.max if saturates else np.nan
    rounded = np.ldexp(1.0, np.clip(power, E8M0.min_exponent, E8M0.max_exponent))
    over = power > E8M0.max_exponent
    if rounding != "toward_zero":
        rounded = np.where(over, top, rounded)
    rounded = np.where(x == 0, E8M0.min if saturates else np.nan, rounded)
    rounded = np.where(np.isposinf(x), top, rounded)
    return np.where((x < 0) | np.isnan(x), np.nan, rounded)
