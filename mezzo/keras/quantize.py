"""`quantize`, `bits` and `hadamard` for TensorFlow: to the bit what `mezzo.formats` gives, eager, in a tf.function and
compiled by XLA; a size may be unknown while a function is traced, such as that of a last, short batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mezzo.errors import ConfigError
from mezzo.formats import BFLOAT16, AnyFormat, get_format
from mezzo.formats.portable import hadamard as portable_hadamard
from mezzo.formats.portable import philox
from mezzo.formats.portable.quantize import DTYPES, Key
from mezzo.formats.portable.quantize import quantize as portable_quantize
from mezzo.formats.rounding import Overflow, Rounding
from mezzo.keras.arrays import TensorflowArrays

_XP = TensorflowArrays()
_as_written = tf.autograph.experimental.do_not_convert  # nothing in here depends on values
Tensor = Any  # tf.Tensor: TensorFlow has no types of its own


@_as_written  # type: ignore[untyped-decorator]
def quantize(
    x: Any,
    fmt: str | AnyFormat,
    *,
    axis: int = -1,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    key: Key | None = None,
    scale: Any = None,
) -> Tensor:
    """Round `x` to the values that `fmt` can hold, once: `mezzo.formats.quantize` for tensors.

    The gradient passes straight through: that of x is that of the result.

    x         tensor of any shape, float16, bfloat16, float32 or float64
    key       (seed, step, site) for stochastic rounding; step may be an integer tensor of no dimensions
    scale     for formats scaled by a float32: of no dimensions, or one for each group. Where its values are known only
              when the function runs, groups whose scale is not positive and finite become NaN.
    returns   tensor of x's shape, dtype as in `mezzo.formats.quantize`
    raises    ConfigError if an argument is unknown or missing, or x is not floating point
    """
    fmt = get_format(fmt)
    x = tf.convert_to_tensor(x)
    if key is not None and isinstance(key[1], tf.Variable):
        key = (key[0], tf.convert_to_tensor(key[1]), key[2])
    if scale is not None:
        scale = _scale(scale)

    def forward(x: Tensor) -> Tensor:
        if fmt is BFLOAT16 and (rounding, overflow, x.dtype) == ("nearest", "cast", tf.float32):
            return _to_bfloat16(x)
        return portable_quantize(_XP, x, fmt, axis, rounding, overflow, key, scale)

    return _linear(x, forward, lambda gradient: gradient)


def _to_bfloat16(x: Tensor) -> Tensor:
    """TensorFlow's own conversion, three passes where integer arithmetic takes seven. The way back goes through the
    bits: a compiler may delete a conversion there and back. tests/conformance holds it to every case."""
    raw = tf.cast(tf.bitcast(tf.cast(x, tf.bfloat16), tf.uint16), tf.uint32)
    return tf.bitcast(tf.bitwise.left_shift(raw, 16), tf.float32)


@_as_written  # type: ignore[untyped-decorator]
def bits(seed: int, step: Any, site: int | str, count: int) -> Tensor:
    """Random words of the elements 0 … count - 1 of one site at one step: `mezzo.formats.philox.bits`.

    step      int, or an integer tensor of no dimensions
    returns   (count,) uint32
    raises    ConfigError if a number is out of its range
    """
    return philox.bits(_XP, seed, step, site, count)


@_as_written  # type: ignore[untyped-decorator]
def hadamard(x: Any, *, axis: int = -1, block: int = 16, seed: int = 0, inverse: bool = False) -> Tensor:
    """Multiply each block along an axis by diag(signs)·H / sqrt(block); see `mezzo.formats.hadamard`.

    x         (…, n, …) floating point, n a multiple of block along `axis`
    returns   float32 tensor of x's shape; float64 where x is float64. Differentiable.
    raises    ConfigError if the block is no power of four or does not divide the axis
    """
    x = tf.convert_to_tensor(x)
    if x.dtype.name not in DTYPES:
        raise ConfigError(f"hadamard takes floating-point tensors, got {x.dtype.name}")

    def forward(x: Tensor) -> Tensor:
        return portable_hadamard.hadamard(_XP, x, axis, block, seed, inverse)

    # The matrix is orthogonal: its transpose is its inverse.
    return _linear(x, forward, lambda g: hadamard(g, axis=axis, block=block, seed=seed, inverse=not inverse))


def _linear(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    """forward(x), with backward(gradient) for the gradient of x."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def op(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        y = forward(x)
        y = tf.identity(y) if y is x else tf.ensure_shape(y, x.shape)
        return y, lambda gradient: tf.cast(backward(gradient), x.dtype)

    return op(x)


def _scale(scale: Any) -> Tensor:
    if tf.is_tensor(scale) and not hasattr(scale, "numpy"):
        return tf.stop_gradient(tf.cast(scale, tf.float32))
    known = np.asarray(scale, np.float32)
    if not bool(np.all((known > 0) & np.isfinite(known))):
        raise ConfigError("a given scale must be positive and finite")
    return tf.constant(known)
