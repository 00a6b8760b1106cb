"""The namespace of `mezzo.formats.portable` over JAX arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mezzo.formats.portable.arrays import Array, Size


class JaxArrays:
    """`Arrays` over JAX; see mezzo/formats/portable/arrays.py for what each does."""

    fuses = True

    def dtype(self, x: Array) -> str:
        return str(x.dtype.name)

    def shape(self, x: Array) -> tuple[Size, ...]:
        return tuple(x.shape)

    def array(self, value: Any, dtype: str) -> Array:
        return jnp.asarray(value, dtype=dtype)

    def cast(self, x: Array, dtype: str) -> Array:
        return lax.convert_element_type(x, jnp.dtype(dtype))

    def bitcast(self, x: Array, dtype: str) -> Array:
        return lax.bitcast_convert_type(x, jnp.dtype(dtype))

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return jnp.where(condition, x, y)

    def minimum(self, x: Array, y: Array) -> Array:
        return jnp.minimum(x, y)

    def maximum(self, x: Array, y: Array) -> Array:
        return jnp.maximum(x, y)

    def shift_left(self, x: Array, by: Array) -> Array:
        return jnp.left_shift(x, by)

    def shift_right(self, x: Array, by: Array) -> Array:
        return jnp.right_shift(x, by)

    def rint(self, x: Array) -> Array:
        return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)

    def amax(self, x: Array, axes: tuple[int, ...]) -> Array:
        return jnp.max(x, axis=axes, keepdims=True, initial=0)

    def reshape(self, x: Array, shape: Sequence[Size]) -> Array:
        return jnp.reshape(x, tuple(shape))

    def moveaxis(self, x: Array, source: int, destination: int) -> Array:
        return jnp.moveaxis(x, source, destination)

    def pad(self, x: Array, after: Sequence[Size]) -> Array:
        return jnp.pad(x, [(0, n) for n in after])

    def stack(self, arrays: Sequence[Array], axis: int) -> Array:
        return jnp.stack(arrays, axis=axis)

    def arange(self, count: Size) -> Array:
        return jnp.arange(count, dtype="uint32")

    def is_known(self, x: Array) -> bool:
        return not isinstance(x, jax.core.Tracer)
