"""Rounding to a format in NumPy: the reference that every adapter is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mezzo.errors import ConfigError
from mezzo.formats.spec import Format, get_format


def quantize(x: npt.ArrayLike, fmt: str | Format) -> npt.NDArray[Any]:
    """Round `x` to the values that `fmt` can hold: nearest, ties to even; overflow as the format's cast defines it.

    x         array of any shape, float16, float32 or float64 (bfloat16 through ml_dtypes)
    returns   array of the same shape and dtype as x, every element a value of fmt; |x| from halfway past fmt.max
              upward becomes infinity; signed zeros, infinities and NaN stay
    raises    ConfigError if fmt is unknown or x is not floating point
    source    IEEE 754-2019, section 4.3.1 (roundTiesToEven)
    """
    fmt = get_format(fmt)
    x = np.asarray(x)
    if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
        raise ConfigError(f"quantize takes floating-point arrays, got {x.dtype}")
    wide = x.astype(np.float64)
    if fmt.mantissa_bits >= 52:
        return x.copy()
    with np.errstate(all="ignore"):
        finite = np.where(np.isfinite(wide), wide, 0.0)
        exponent = np.frexp(finite)[1] - 1  # |x| = m * 2**exponent with 1 <= m < 2; frexp knows subnormals
        exponent = np.maximum(exponent, 1 - fmt.bias)  # below the smallest normal the grid stops shrinking
        grid = exponent - fmt.mantissa_bits
        # Scaling by a power of two is exact; rint rounds ties to even; scaling back is exact.
        rounded = np.ldexp(np.rint(np.ldexp(finite, -grid)), grid)
        rounded = np.where(np.abs(rounded) > fmt.max, np.copysign(np.inf, wide), rounded)
        rounded = np.copysign(rounded, wide)
        return np.where(np.isfinite(wide), rounded, wide).astype(x.dtype)
