"""The random Hadamard transform of `mezzo.formats.hadamard`, subnormal numbers too."""

from __future__ import annotations

from mezzo.formats.hadamard import check_block, signs
from mezzo.formats.portable.arrays import Array, Arrays
from mezzo.formats.portable.elements import WORD32, Word, from_bits, raw_bits


def hadamard(xp: Arrays, x: Array, axis: int, block: int, seed: int, inverse: bool) -> Array:
    """Multiply each block along an axis by diag(signs)·H / sqrt(block).

    Frameworks take subnormal numbers for zero, so every number is kept twice, as itself and 2**lift times larger:
    sums of small numbers are those of the larger ones. Beside a number that is not small, a subnormal one is less than
    half of a last digit.
    """
    raw, word = raw_bits(xp, x)
    moved = xp.moveaxis(raw, axis, -1)
    shape = xp.shape(moved)
    check_block(block, shape[-1])
    raw = xp.reshape(moved, (-1, block))
    flip = xp.array(signs(block, seed) < 0, word.integer) * word.sign
    if not inverse:
        raw = raw ^ flip
    lift, small_below = (64, 2.0**4) if word is WORD32 else (512, 2.0**-388)  # below 2**-60, 2**-900

    def small(*larger: Array) -> Array:
        found = (larger[0] < small_below) & (larger[0] > -small_below)
        return found if len(larger) == 1 else found & small(*larger[1:])

    sign, mag = raw & word.sign, raw & ~word.sign
    least = 1 - word.bias - word.fraction + lift
    subnormal = xp.bitcast(xp.cast(mag, word.floating) * 2.0**least, word.integer) | sign
    y = xp.bitcast(raw, word.floating)
    larger = xp.where(mag < word.one, xp.bitcast(subnormal, word.floating), y * 2.0**lift)
    half = 1
    while half < block:
        y, larger = (xp.reshape(v, (-1, block // (2 * half), 2, half)) for v in (y, larger))
        tiny = small(larger[:, :, 0], larger[:, :, 1])
        sums = []
        for minus in (False, True):
            usual, large = (v[:, :, 0] - v[:, :, 1] if minus else v[:, :, 0] + v[:, :, 1] for v in (y, larger))
            usual = xp.where(tiny, large * 2.0**-lift, usual)
            sums.append((usual, xp.where(tiny, large, usual * 2.0**lift)))
        y, larger = (xp.reshape(xp.stack(pair, 2), (-1, block)) for pair in zip(*sums, strict=True))
        half *= 2
    raw = _scaled(xp, y, larger, word, lift, block)
    if inverse:
        raw = raw ^ flip
    return from_bits(xp, xp.moveaxis(xp.reshape(raw, shape), -1, axis), word, word.floating)


def _scaled(xp: Arrays, y: Array, larger: Array, word: Word, lift: int, block: int) -> Array:
    """The bits of y / sqrt(block): what becomes subnormal, as whole numbers of the least one."""
    root = block.bit_length() // 2
    usual = xp.bitcast(y * 2.0**-root, word.integer)
    multiple = xp.bitcast(larger, word.integer) & ~word.sign
    multiple = xp.bitcast(multiple, word.floating) * 2.0 ** (word.bias + word.fraction - 1 - lift - root)
    subnormal = multiple < 2.0**word.fraction
    whole = xp.cast(xp.rint(xp.where(subnormal, multiple, 0.0)), word.integer)
    return xp.where(subnormal, whole | xp.bitcast(larger, word.integer) & word.sign, usual)


def plain(xp: Arrays, x: Array, axis: int, block: int, seed: int, inverse: bool) -> Array:
    """The same of float32 or float64 in float arithmetic alone, which may take subnormal numbers for zero."""
    moved = xp.moveaxis(x, axis, -1)
    shape = xp.shape(moved)
    check_block(block, shape[-1])
    y = xp.reshape(moved, (-1, block))
    flip = xp.array(signs(block, seed), xp.dtype(x))
    y = y if inverse else y * flip
    half = 1
    while half < block:
        pairs = xp.reshape(y, (-1, block // (2 * half), 2, half))
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = xp.reshape(xp.stack([first + second, first - second], 2), (-1, block))
        half *= 2
    y = y * block**-0.5
    y = y * flip if inverse else y
    return xp.moveaxis(xp.reshape(y, shape), -1, axis)
