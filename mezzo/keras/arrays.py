"""The namespace of `mezzo.formats.portable` over TensorFlow tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from mezzo.formats.portable.arrays import Array, Size


class TensorflowArrays:
    """`Arrays` over tf.Tensor; see mezzo/formats/portable/arrays.py for what each does."""

    fuses = False

    def dtype(self, x: Array) -> str:
        return str(x.dtype.name)

    def shape(self, x: Array) -> tuple[Size, ...]:
        if x.shape.rank is None:
            raise ValueError("a tensor needs a known number of dimensions")
        if x.shape.is_fully_defined():
            return tuple(x.shape)
        sizes = tf.shape(x)
        return tuple(sizes[i] if n is None else n for i, n in enumerate(x.shape))

    def array(self, value: Any, dtype: str) -> Array:
        return tf.cast(value, dtype) if tf.is_tensor(value) else tf.constant(value, dtype)

    def cast(self, x: Array, dtype: str) -> Array:
        return tf.cast(x, dtype)

    def bitcast(self, x: Array, dtype: str) -> Array:
        return tf.bitcast(x, dtype)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return tf.where(condition, *_pair(x, y))

    def minimum(self, x: Array, y: Array) -> Array:
        return tf.minimum(*_pair(x, y))

    def maximum(self, x: Array, y: Array) -> Array:
        return tf.maximum(*_pair(x, y))

    def shift_left(self, x: Array, by: Array) -> Array:
        return tf.bitwise.left_shift(*_pair(x, by))

    def shift_right(self, x: Array, by: Array) -> Array:
        return tf.bitwise.right_shift(*_pair(x, by))

    def rint(self, x: Array) -> Array:
        return tf.round(x)  # ties to even

    def amax(self, x: Array, axes: tuple[int, ...]) -> Array:
        return tf.maximum(tf.reduce_max(x, axes, keepdims=True), 0)

    def reshape(self, x: Array, shape: Sequence[Size]) -> Array:
        return tf.reshape(x, shape)

    def moveaxis(self, x: Array, source: int, destination: int) -> Array:
        order = list(range(x.shape.rank))
        order.insert(destination % len(order), order.pop(source))
        return x if order == sorted(order) else tf.transpose(x, order)

    def pad(self, x: Array, after: Sequence[Size]) -> Array:
        return tf.pad(x, [[0, n] for n in after])

    def stack(self, arrays: Sequence[Array], axis: int) -> Array:
        return tf.stack(arrays, axis=axis)

    def arange(self, count: Size) -> Array:
        return tf.cast(tf.range(count), "uint32")

    def is_known(self, x: Array) -> bool:
        return not tf.is_tensor(x) or hasattr(x, "numpy")


def _pair(x: Array, y: Array) -> tuple[Array, Array]:
    """A Python number in the dtype of the other."""
    if not tf.is_tensor(x):
        return tf.constant(x, y.dtype), y
    return x, y if tf.is_tensor(y) else tf.constant(y, x.dtype)
