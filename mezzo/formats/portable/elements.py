"""Element formats in integer arithmetic: to the bit what `mezzo/formats/rounding.py` does.

A number is worked on as the integer that its bits are; a magnitude without its sign is a "mag", in the order of the
numbers. Taken apart it is sig · 2**(e - fraction) with the significand 2**fraction <= sig < 2**(fraction + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mezzo.formats.portable.arrays import Array, Arrays
from mezzo.formats.rounding import Overflow, Rounding
from mezzo.formats.spec import E8M0, FLOAT32, FLOAT64, FORMATS, Format


@dataclass(frozen=True)
class Word:
    """The numbers that are worked in and the integers of their size.

    fraction   bits of the fraction
    bias       what the exponent field is counted from
    """

    floating: str
    integer: str
    fraction: int
    bias: int

    @property
    def bits(self) -> int:
        return 32 if self.integer == "int32" else 64

    @property
    def sign(self) -> int:
        return -(1 << self.bits - 1)

    @property
    def one(self) -> int:
        """The lowest bit of the exponent field, and the hidden bit of a significand."""
        return 1 << self.fraction

    @property
    def infinity(self) -> int:
        return (2 * self.bias + 1) << self.fraction

    @property
    def nan(self) -> int:
        return self.infinity | self.one >> 1

    def mag(self, value: float) -> int:
        """The bits of a number >= 0 that the word holds."""
        return int(np.array(value, self.floating).view(self.integer))


WORD32 = Word("float32", "int32", 23, 127)
WORD64 = Word("float64", "int64", 52, 1023)


def result_dtype(dtype: str, fmt: Format) -> str:
    """The dtype of the result of rounding an array of `dtype` to an element format."""
    return dtype if FORMATS[dtype].holds(fmt) else "float32" if FLOAT32.holds(fmt) else "float64"


def raw_bits(xp: Arrays, x: Array) -> tuple[Array, Word]:
    """The bits of `x` in the word that it is worked on in: float64 in its own, the others in float32's."""
    dtype = xp.dtype(x)
    if dtype == "float64":
        return xp.bitcast(x, "int64"), WORD64
    if dtype == "float32":
        return xp.bitcast(x, "int32"), WORD32
    # Not by the framework's conversion: a compiler may leave out one that another conversion goes before.
    raw = xp.cast(xp.bitcast(x, "int16"), "int32")
    if dtype == "bfloat16":
        return xp.shift_left(raw, 16), WORD32
    mag = raw & 0x7FFF
    subnormal = xp.bitcast(xp.cast(mag, "float32") * 2.0**-24, "int32")
    wide = xp.shift_left(mag, 13) + (112 << 23)  # the biases are 112 apart, and so are the fields of infinity
    wide = xp.where(mag < 0x7C00, wide, wide + (112 << 23))
    wide = xp.where(mag < 0x400, subnormal, wide)
    return wide | (raw & WORD32.sign), WORD32


def from_bits(xp: Arrays, raw: Array, word: Word, dtype: str) -> Array:
    """The array of `dtype`, which holds the numbers, with these bits in the word."""
    if dtype == "bfloat16":
        return xp.bitcast(xp.cast(xp.shift_right(raw, 16), "int16"), "bfloat16")
    y = xp.bitcast(raw, word.floating)
    return y if dtype == word.floating else xp.cast(y, dtype)


def widen(xp: Arrays, raw: Array) -> Array:
    """The bits in float64 of numbers whose bits in float32 are `raw`."""
    mag = raw & ~WORD32.sign
    subnormal = xp.cast(mag, "float64") * 2.0**-149
    y = xp.bitcast(xp.where(mag < WORD32.one, subnormal, xp.cast(xp.bitcast(mag, "float32"), "float64")), "int64")
    return xp.where(raw < 0, y | WORD64.sign, y)


def parts(xp: Arrays, mag: Array, word: Word) -> tuple[Array, Array]:
    """(sig, e) of magnitudes that are taken for normal numbers: of what is smaller, some e below the normal ones."""
    return (mag & word.one - 1) | word.one, xp.shift_right(mag, word.fraction) - word.bias


def normal_parts(xp: Arrays, mag: Array) -> tuple[Array, Array]:
    """(sig, e) of float32 magnitudes, subnormal ones too; of zero, 2**-276, which any rounding here takes for zero."""
    subnormal = mag < WORD32.one
    lifted = xp.bitcast(xp.cast(mag, "float32"), "int32")  # mag is a whole number of 2**-149
    sig, e = parts(xp, xp.where(subnormal, lifted, mag), WORD32)
    return sig, xp.where(subnormal, e - 149, e)


def whole(xp: Arrays, x: Array, drop: Array, word: Word, rounding: Rounding, words: Array | None = None) -> Array:
    """x / 2**drop to whole numbers, for integers x >= 0.

    drop    at least 1; an int, or an array, and then x is below 2**(fraction + 4) and drop is cut to what matters
    words   one random word an element for stochastic rounding: up if word < floor(fraction · 2**32)
    """
    if isinstance(drop, int):
        shift: Array = drop
        below: Array = (1 << drop - 1) - 1
    else:
        shift = xp.minimum(drop, word.fraction + 6)  # below a quarter: to nearest, and downward, zero
        below = xp.shift_left(1, shift - 1) - 1 if rounding == "nearest" else None
    down = xp.shift_right(x, shift)
    if rounding == "nearest":
        return xp.shift_right(x + below + (down & 1), shift)
    if rounding == "toward_zero":
        return down
    assert words is not None
    low = x - xp.shift_left(down, shift)
    if isinstance(drop, int):
        share = xp.shift_left(low, 32 - drop) if drop <= 32 else xp.shift_right(low, drop - 32)
    else:
        left = xp.shift_left(low, xp.maximum(32 - drop, 0))
        right = xp.shift_right(low, xp.minimum(xp.maximum(drop - 32, 0), word.bits - 1))
        share = xp.where(drop <= 32, left, right)
    return down + xp.cast(words < xp.cast(share, "uint32"), word.integer)


def round_elements(
    xp: Arrays, raw: Array, word: Word, fmt: Format, rounding: Rounding, overflow: Overflow, words: Array | None
) -> Array:
    """The bits of numbers rounded to an element format, from their bits in the word."""
    sign, mag = raw & word.sign, raw & ~word.sign
    if fmt is E8M0:
        return _round_scale(xp, sign, mag, word, rounding, overflow, words)
    if fmt.mantissa_bits >= word.fraction:
        y = mag
    elif fmt.exponent_bits == 8 and word is WORD32:
        # The grid is that of float32 with fewer digits, subnormal numbers too.
        drop = word.fraction - fmt.mantissa_bits
        y = xp.shift_left(whole(xp, mag, drop, word, rounding, words), drop)
    else:
        y = round_parts(xp, *parts(xp, mag, word), word, fmt, rounding, words)
    y = bound(xp, y, sign, mag, word, fmt, rounding, overflow)
    return signed(xp, y, sign, fmt)


def round_parts(
    xp: Arrays, sig: Array, e: Array, word: Word, fmt: Format, rounding: Rounding, words: Array | None
) -> Array:
    """The magnitudes sig · 2**(e - fraction) on the grid of a format, beyond its largest value something beyond it."""
    e = xp.minimum(e, max(fmt.max_exponent + 1, fmt.min_exponent))
    grid = xp.maximum(e, fmt.min_exponent) - fmt.mantissa_bits
    n = whole(xp, sig, grid - e + word.fraction, word, rounding, words)
    step = xp.bitcast(xp.shift_left(grid + word.bias, word.fraction), word.floating)
    return xp.bitcast(xp.cast(n, word.floating) * step, word.integer)  # exact, and normal


def bound(
    xp: Arrays,
    y: Array,
    sign: Array,
    mag: Array | None,
    word: Word,
    fmt: Format,
    rounding: Rounding,
    overflow: Overflow,
) -> Array:
    """Rounded magnitudes within the format's limits.

    mag    the magnitudes that they come from, to see what is not finite; None if all is
    """
    limit: Array = word.mag(fmt.max)
    if fmt.min != -fmt.max:
        limit = limit + (xp.shift_right(sign, word.bits - 1) & word.mag(-fmt.min) - limit)
    if overflow == "saturate" or not fmt.nan:
        y = xp.minimum(y, limit)  # infinities are beyond it too
    else:
        beyond = word.infinity if fmt.infinity else word.nan
        y = xp.where(y > limit, limit if rounding == "toward_zero" else beyond, y)
        if mag is not None:
            y = xp.where(mag == word.infinity, beyond, y)
    return y if mag is None else xp.where(mag > word.infinity, word.nan, y)


def signed(xp: Arrays, y: Array, sign: Array, fmt: Format) -> Array:
    """Magnitudes with their signs."""
    return xp.where(y == 0, y, y | sign) if fmt.is_integer else y | sign


def _round_scale(
    xp: Arrays,
    sign: Array,
    mag: Array,
    word: Word,
    rounding: Rounding,
    overflow: Overflow,
    words: Array | None,
) -> Array:
    """To a power of two, as `mezzo.formats.rounding` says."""
    e_low = 0 * mag
    if word is WORD32:  # 2**-127 is subnormal: one doubling brings it among the normal ones
        subnormal = mag < word.one
        mag = xp.where(subnormal, xp.shift_left(mag, 1), mag)
        e_low = xp.cast(subnormal, word.integer)
    sig, e = parts(xp, mag, word)
    fraction = sig - word.one
    power = e - e_low
    if rounding == "nearest":
        power = power + xp.cast(fraction >= word.one >> 1, word.integer)
    elif rounding == "stochastic":
        share = xp.shift_left(fraction, 32 - 23) if word is WORD32 else xp.shift_right(fraction, 52 - 32)
        power = power + xp.cast(words < xp.cast(share, "uint32"), word.integer)
    top = word.mag(E8M0.max) if overflow == "saturate" else word.nan
    kept = xp.minimum(xp.maximum(power, E8M0.min_exponent), E8M0.max_exponent)
    y = xp.shift_left(kept + word.bias, word.fraction)
    if word is WORD32:
        y = xp.where(kept < -126, word.one >> 1, y)
    if rounding != "toward_zero":
        y = xp.where(power > E8M0.max_exponent, top, y)
    y = xp.where(mag == word.infinity, top, y)
    y = xp.where((mag > word.infinity) | (sign < 0), word.nan, y)
    return xp.where(mag == 0, word.mag(E8M0.min) if overflow == "saturate" else word.nan, y)


def needs_float64(dtype: str, fmt: object) -> bool:
    """Whether rounding an array of `dtype` to fmt works in float64."""
    return dtype == "float64" or fmt == FLOAT64
