"""The namespace over NumPy: it holds the algorithms of this package against the reference without a framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mezzo.formats.portable.arrays import Array, Size


def _dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


class NumpyArrays:
    """`Arrays` over NumPy; see arrays.py for what each does."""

    fuses = False

    def dtype(self, x: Array) -> str:
        return str(x.dtype.name)

    def shape(self, x: Array) -> tuple[Size, ...]:
        return tuple(x.shape)

    def array(self, value: Any, dtype: str) -> Array:
        return np.asarray(value, dtype=_dtype(dtype))

    def cast(self, x: Array, dtype: str) -> Array:
        return np.asarray(x).astype(_dtype(dtype))

    def bitcast(self, x: Array, dtype: str) -> Array:
        return np.asarray(x).view(_dtype(dtype))

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return np.where(condition, x, y)

    def minimum(self, x: Array, y: Array) -> Array:
        return np.minimum(x, y)

    def maximum(self, x: Array, y: Array) -> Array:
        return np.maximum(x, y)

    def shift_left(self, x: Array, by: Array) -> Array:
        return np.left_shift(x, by)

    def shift_right(self, x: Array, by: Array) -> Array:
        return np.right_shift(x, by)

    def rint(self, x: Array) -> Array:
        return np.rint(x)

    def amax(self, x: Array, axes: tuple[int, ...]) -> Array:
        return np.max(x, axis=axes, keepdims=True, initial=0)

    def reshape(self, x: Array, shape: Sequence[Size]) -> Array:
        return np.reshape(x, tuple(shape))

    def moveaxis(self, x: Array, source: int, destination: int) -> Array:
        return np.moveaxis(x, source, destination)

    def pad(self, x: Array, after: Sequence[Size]) -> Array:
        return np.pad(x, [(0, n) for n in after])

    def stack(self, arrays: Sequence[Array], axis: int) -> Array:
        return np.stack(arrays, axis=axis)

    def arange(self, count: Size) -> Array:
        return np.arange(count, dtype=np.uint32)

    def is_known(self, x: Array) -> bool:
        return True
