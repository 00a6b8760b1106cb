"""Scaled formats in integer arithmetic; `mezzo/formats/blocks.py` is the text that this translates.

A scale is taken apart like an element: sig · 2**(e - 23), both int32, with 2**23 <= sig < 2**24.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mezzo.errors import ConfigError
from mezzo.formats.blocks import FLOAT32_MAX, MIN_SCALE, Groups, max_scale
from mezzo.formats.portable.arrays import Array, Arrays, Size
from mezzo.formats.portable.elements import (
    WORD32,
    WORD64,
    Word,
    bound,
    normal_parts,
    parts,
    round_parts,
    signed,
    whole,
)
from mezzo.formats.rounding import Overflow, Rounding
from mezzo.formats.scaled import ScaledFormat
from mezzo.formats.spec import E4M3, E8M0, FLOAT32


class Scale(NamedTuple):
    sig: Array
    e: Array


def round_groups(
    xp: Arrays,
    raw: Array,
    word: Word,
    fmt: ScaledFormat,
    axis: int,
    rounding: Rounding,
    overflow: Overflow,
    words: Array | None,
    given: Array | None,
) -> Array:
    """The bits of numbers rounded to a scaled format, from their bits in the word; nothing may be empty."""
    layout = Layout(xp, xp.shape(raw), fmt, axis)
    blocks = layout.divide(raw)
    sign, mag = blocks & word.sign, blocks & ~word.sign
    sig, e = _parts(xp, mag, word)
    ordered = None if words is None else layout.divide(words)
    infinite = None  # of quotients; those by a scale that amax gave are finite

    # What follows does not overflow as the reference's W does, nor become subnormal there. That would be zero in every
    # element format, whichever way it is rounded.
    if fmt.scaling == "nvfp4":
        amax = _to_float32(xp, xp.amax(mag, layout.group_axes), word)
        whole_amax = xp.amax(amax, tuple(range(layout.dims)))
        bad = whole_amax >= WORD32.infinity
        block, back, scale = _nvfp4_scales(xp, amax, whole_amax)
        sig, e = _ratio(xp, xp.cast(sig, word.floating) * xp.cast(back.sig, word.floating), e, back.e - 23, word)
    else:
        block = None
        if given is not None:
            scale, bad = _given(xp, given, layout)
            bad = bad | (mag >= word.infinity)
        else:
            amax = xp.amax(mag, layout.group_axes)
            bad = amax >= word.infinity
            find = _free_scale if fmt.scaling == "free" else _power_scale
            scale = find(xp, Scale(*_parts(xp, amax, word)), word, fmt)
        if fmt.scaling == "free":
            # By a constant, or by one number that many are divided by, XLA would not divide: it would multiply by the
            # reciprocal, which is another rounding. So each has a divisor of its own, as far as XLA can see.
            divisor = xp.where(mag > word.infinity, WORD32.one, scale.sig)
            quotient = xp.cast(sig, word.floating) / xp.cast(divisor, word.floating)
            sig, e = _ratio(xp, quotient, e, 23 - scale.e, word)
        else:
            e = e - xp.cast(scale.e, word.integer)
        if given is not None:
            infinite = xp.where(e > word.bias, word.infinity, mag & 0)

    q = round_parts(xp, sig, e, word, fmt.element, rounding, ordered)
    q = bound(xp, q, sign, infinite, word, fmt.element, rounding, overflow)
    if block is not None:
        q = xp.bitcast(xp.bitcast(q, word.floating) * xp.cast(block, word.floating), word.integer)  # exact
    y = signed(xp, product(xp, q, scale, word), sign, fmt.element)
    return layout.join(xp.where(bad, word.nan, y))


def _parts(xp: Arrays, mag: Array, word: Word) -> tuple[Array, Array]:
    # Subnormal float64 are beyond what any scale makes of them: as numbers of 2**-1023, they round to the same.
    return normal_parts(xp, mag) if word is WORD32 else parts(xp, mag, word)


def _ratio(xp: Arrays, x: Array, e: Array, moved: Array, word: Word) -> tuple[Array, Array]:
    """(sig, e) of x · 2**(e - fraction + moved), for normal x."""
    sig, power = parts(xp, xp.bitcast(x, word.integer), word)
    return sig, e + power + xp.cast(moved - word.fraction, word.integer)


def product(xp: Arrays, q: Array, scale: Scale, word: Word) -> Array:
    """The magnitudes q, of at most seven significant bits, times a scale: rounded once, to nearest even."""
    if word is WORD64:  # exact and normal
        step = xp.bitcast(xp.shift_left(xp.cast(scale.e, "int64") - 23 + word.bias, word.fraction), "float64")
        return xp.bitcast(xp.bitcast(q, "float64") * (xp.cast(scale.sig, "float64") * step), "int64")
    sig, e = parts(xp, q, word)
    exact = xp.shift_right(sig, 17) * scale.sig  # 2**29 <= exact < 2**31
    e = e - 6 + scale.e - 23  # q · scale = exact · 2**e
    rounded = xp.bitcast(xp.cast(exact, "float32"), "int32")
    field = xp.shift_right(rounded, 23) + e
    y = xp.where(field > 254, word.infinity, rounded + xp.shift_left(e, 23))
    # Below 2**-126 a whole number of 2**-149. Of the last four bits only whether there are any matters there.
    few = xp.shift_right(exact, 4) | xp.minimum(exact & 15, 1)
    subnormal = whole(xp, few, xp.maximum(-149 - e - 4, 1), word, "nearest")
    y = xp.where(field < 1, subnormal, y)
    return xp.where((q == 0) | (q >= word.infinity), q, y)


def _free_scale(xp: Arrays, a: Scale, word: Word, fmt: ScaledFormat) -> Scale:
    """amax / element.max in W, then in float32, within its limits."""
    odd, twos = _odd(fmt.element.max)
    width = odd.bit_length()
    by = xp.where(a.sig >= odd << word.fraction - width + 1, width - 1, (a.e & 0) + width)
    dividend = xp.shift_left(a.sig, by)
    quotient = dividend // odd
    # Of an odd divisor there are no ties.
    quotient = quotient + xp.cast((dividend - quotient * odd) * 2 > odd, word.integer)
    if word is WORD64:
        quotient = whole(xp, quotient, word.fraction - 23, word, "nearest")
    e = xp.minimum(xp.maximum(a.e - by - twos, -127), 127)
    raw = xp.cast(xp.shift_left(e + 127, 23) + (quotient - (1 << 23)), "int32")
    raw = xp.minimum(xp.maximum(raw, WORD32.mag(MIN_SCALE)), WORD32.mag(max_scale(fmt.element.max)))
    return Scale(*parts(xp, raw, WORD32))


def _odd(value: float) -> tuple[int, int]:
    """An odd number and the power of two that it is multiplied by."""
    odd, below = value.as_integer_ratio()
    twos = (odd & -odd).bit_length() - 1
    return odd >> twos, twos - below.bit_length() + 1


def _power_scale(xp: Arrays, a: Scale, word: Word, fmt: ScaledFormat) -> Scale:
    """As `mezzo.formats.blocks.power_scales`."""
    top, top_exponent = math.frexp(fmt.element.max)
    power = a.e - (top_exponent - 1)
    if fmt.scaling == "pow2":
        power = power + xp.cast(a.sig > int(2 * top * word.one), word.integer)
    power = xp.cast(xp.minimum(xp.maximum(power, E8M0.min_exponent), E8M0.max_exponent), "int32")
    return Scale((power & 0) + WORD32.one, power)


def _to_float32(xp: Arrays, amax: Array, word: Word) -> Array:
    """Magnitudes in float32, as their bits; what is not finite there is the infinity or beyond it."""
    if word is WORD32:
        return amax
    y = round_parts(xp, *parts(xp, amax, word), word, FLOAT32, "nearest", None)
    tiny = word.mag(2.0**-126)
    multiple = xp.bitcast(xp.minimum(y, tiny), "float64") * 2.0**149
    usual = xp.shift_right(xp.minimum(y, word.mag(2.0**128)) - tiny, 52 - 23) + WORD32.one
    small = xp.where(y < tiny, xp.cast(multiple, "int32"), xp.cast(usual, "int32"))
    return xp.where(amax >= word.infinity, WORD32.infinity, small)


def _nvfp4_scales(xp: Arrays, amax: Array, whole_amax: Array) -> tuple[Array, Scale, Scale]:
    """(scales of the groups in float32, what elements are multiplied by, the tensor's scale)."""
    one, word = WORD32.one, WORD32
    sig, e = normal_parts(xp, whole_amax)
    encode = _over(xp, 448.0 * 6.0, Scale(sig, e))
    none = whole_amax == 0
    encode = Scale(xp.where(none, one, encode.sig), xp.where(none, 0, encode.e))

    # 1 / encode may be subnormal, and then it is rounded from the exact quotient: what the rounded one leaves over,
    # 2**46 or 2**47 less its product with encode, is small enough to be right modulo 2**32.
    tensor = _over(xp, 1.0, encode)
    left = 0 - tensor.sig * encode.sig
    sticky = xp.cast(left > 0, "int32") - xp.cast(left < 0, "int32")
    drop = xp.minimum(xp.maximum(-126 - tensor.e, 0), 2)
    sig = xp.shift_left(whole(xp, tensor.sig * 4 + sticky, drop + 2, word, "nearest"), drop)
    carry = sig >= 2 * one
    tensor = Scale(xp.where(carry, one, sig), tensor.e + xp.cast(carry, "int32"))

    # amax / 6, which may be subnormal too, is a third of the significand, with two bits for what is left over.
    sig, e = normal_parts(xp, amax)
    by = xp.where(sig >= 3 << 22, 1, (e & 0) + 2)
    dividend = xp.shift_left(sig, by)
    third = dividend // 3
    left = dividend - third * 3
    e = e - by - 1
    drop = xp.minimum(xp.maximum(-126 - e, 0), 26)
    sig = xp.shift_left(whole(xp, third * 4 + left + xp.shift_right(left, 1), drop + 2, word, "nearest"), drop)
    sig, e = _ratio(xp, xp.cast(sig, "float32") * xp.cast(encode.sig, "float32"), e, encode.e - 23, word)
    block = xp.minimum(round_parts(xp, sig, e, word, E4M3, "nearest", None), word.mag(E4M3.max))

    inner = product(xp, block, tensor, word)
    return xp.bitcast(block, "float32"), _over(xp, 1.0, Scale(*normal_parts(xp, inner))), tensor


def _over(xp: Arrays, value: float, x: Scale) -> Scale:
    """value / x, at most float32's largest number."""
    # Twice the number, since TensorFlow makes 1 / x a reciprocal, which Eigen does not round correctly.
    sig, e = parts(xp, xp.bitcast(2 * value / xp.cast(x.sig, "float32"), "int32"), WORD32)
    e = e + 22 - x.e
    top, top_e = WORD32.mag(FLOAT32_MAX) & WORD32.one - 1 | WORD32.one, 127
    return Scale(xp.where(e > top_e, top, sig), xp.minimum(e, top_e))


def _given(xp: Arrays, scale: Array, layout: Layout) -> tuple[Scale, Array]:
    """Scales that the caller gave, float32, and whether they cannot be: where that is not known before the program
    runs, their groups become NaN."""
    raw = xp.bitcast(scale, "int32")
    bad = (raw <= 0) | (raw >= WORD32.infinity)
    shape = xp.shape(scale)
    if len(shape) == 0:
        raw, bad = xp.reshape(raw, (1,)), xp.reshape(bad, (1,))
    else:
        layout.check_scales(shape)
        raw, bad = layout.unscales(raw), layout.unscales(bad)
    return Scale(*normal_parts(xp, raw & ~WORD32.sign)), bad


class Layout:
    """`Groups` for arrays of which a size may be known only when the program runs.

    Divided, an array of several axes is (outer, C, c), or (outer, R, r, C, c) for blocks of several rows, or flat for
    one group of all.
    """

    def __init__(self, xp: Arrays, shape: tuple[Size, ...], fmt: ScaledFormat, axis: int) -> None:
        self.xp, self.shape, self.fmt = xp, shape, fmt
        known = tuple(n if isinstance(n, int) else 1 for n in shape)
        self.groups = Groups(known, fmt, axis)  # refuses what cannot be
        self.flat = fmt.group == "tensor"
        if self.flat:
            self.dims = 1
            self.group_axes: tuple[int, ...] = (0,)
            return
        self.axis = axis % len(shape)
        self.moved = [n for i, n in enumerate(shape) if i != self.axis] + [shape[self.axis]]
        self.rows = self.groups.rows
        self.columns: Size = self.moved[-1] if fmt.group == "row" else self.groups.columns
        self.dims, self.group_axes = (3, (2,)) if self.rows == 1 else (5, (2, 4))

    def divide(self, x: Array) -> Array:
        """As `Groups.divide`."""
        if self.flat:
            return self.xp.reshape(x, (-1,))
        x = self.xp.moveaxis(x, self.axis, -1)
        if self.rows == 1:
            x = self._padded(self.xp.reshape(x, (-1, self.moved[-1])), [0, -self.moved[-1] % self.columns])
            return self.xp.reshape(x, (-1, self._wide, self.columns))
        x = self.xp.reshape(x, (-1, *self.moved[-2:]))
        x = self._padded(x, [0, -self.moved[-2] % self.rows, -self.moved[-1] % self.columns])
        return self.xp.reshape(x, (-1, self._tall, self.rows, self._wide, self.columns))

    def join(self, x: Array) -> Array:
        """As `Groups.join`."""
        if not self.flat:
            if self.rows == 1:
                x = self.xp.reshape(x, (-1, self._wide * self.columns))[:, : self.moved[-1]]
            else:
                x = self.xp.reshape(x, (-1, self._tall * self.rows, self._wide * self.columns))
                x = x[:, : self.moved[-2], : self.moved[-1]]
            x = self.xp.moveaxis(self.xp.reshape(x, self.moved), -1, self.axis)
        return self.xp.reshape(x, self.shape)

    def unscales(self, x: Array) -> Array:
        """Numbers of `Groups.scales_shape` beside the divided array."""
        x = self.xp.moveaxis(x, self.axis, -1)
        if self.rows == 1:
            return self.xp.reshape(x, (-1, self._wide, 1))
        return self.xp.reshape(x, (-1, self._tall, 1, self._wide, 1))

    def check_scales(self, shape: tuple[Size, ...]) -> None:
        """Refuse scales of a shape that is known to be another one."""
        want = self.groups.scales_shape
        known = all(isinstance(n, int) for n in (*shape, *self.shape))
        if len(shape) != len(want) or (known and tuple(shape) != want):
            raise ConfigError(f"the scale must have the shape () or {want}, one for each group, not {tuple(shape)}")

    def _padded(self, x: Array, after: list[Size]) -> Array:
        return self.xp.pad(x, after) if any(not isinstance(n, int) or n for n in after) else x

    @property
    def _wide(self) -> Size:
        return (self.moved[-1] + self.columns - 1) // self.columns

    @property
    def _tall(self) -> Size:
        return (self.moved[-2] + self.rows - 1) // self.rows
