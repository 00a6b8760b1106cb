"""`quantize` over a namespace of arrays."""

from __future__ import annotations

import math
from typing import Any

from mezzo.errors import ConfigError
from mezzo.formats.portable.arrays import Array, Arrays
from mezzo.formats.portable.elements import WORD32, WORD64, from_bits, raw_bits, result_dtype, round_elements, widen
from mezzo.formats.portable.groups import round_groups
from mezzo.formats.portable.philox import bits
from mezzo.formats.rounding import Overflow, Rounding, check
from mezzo.formats.scaled import AnyFormat, ScaledFormat
from mezzo.formats.spec import FLOAT64

DTYPES = ("float16", "bfloat16", "float32", "float64")

# (seed, step, site); the step may be an array of no dimensions.
Key = tuple[int, Any, int | str]


def quantize(
    xp: Arrays,
    x: Array,
    fmt: AnyFormat,
    axis: int,
    rounding: Rounding,
    overflow: Overflow,
    key: Key | None,
    scale: Array | None,
) -> Array:
    """`mezzo.formats.quantize` of an array of the namespace.

    scale     a float32 array; None where there is none
    """
    dtype, shape = xp.dtype(x), xp.shape(x)
    if dtype not in DTYPES:
        raise ConfigError(f"quantize takes float16, bfloat16, float32 or float64 arrays, got {dtype}")
    check(fmt, rounding, overflow, None if key is None else (key[0], 0, key[2]), scale is not None)
    raw, word = raw_bits(xp, x)
    words = None
    if key is not None:
        words = xp.reshape(bits(xp, *key, math.prod(shape)), shape)
    if isinstance(fmt, ScaledFormat):
        if any(isinstance(n, int) and n == 0 for n in shape):
            return from_bits(xp, raw, word, word.floating)
        return from_bits(
            xp, round_groups(xp, raw, word, fmt, axis, rounding, overflow, words, scale), word, word.floating
        )
    if fmt is FLOAT64 and word is WORD32:
        raw, word = widen(xp, raw), WORD64
    y = round_elements(xp, raw, word, fmt, rounding, overflow, words)
    return from_bits(xp, y, word, result_dtype(dtype, fmt))
