"""`quantize`, `bits` and `hadamard` for JAX: to the bit what `mezzo.formats` gives, eager, under jit, vmap and grad."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat, get_format
from mezzo.formats.portable import hadamard as portable_hadamard
from mezzo.formats.portable import philox
from mezzo.formats.portable.elements import needs_float64
from mezzo.formats.portable.quantize import DTYPES, Key
from mezzo.formats.portable.quantize import quantize as portable_quantize
from mezzo.formats.rounding import Overflow, Rounding
from mezzo.jax.arrays import JaxArrays

_XP = JaxArrays()


def quantize(
    x: Any,
    fmt: str | AnyFormat,
    *,
    axis: int = -1,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    key: Key | None = None,
    scale: Any = None,
) -> Array:
    """Round `x` to the values that `fmt` can hold, once: `mezzo.formats.quantize` for JAX arrays.

    The gradient passes straight through: that of x is that of the result.

    x         array of any shape, float16, bfloat16, float32 or float64
    key       (seed, step, site) for stochastic rounding; step may be a traced integer array of no dimensions
    scale     for formats scaled by a float32: of no dimensions, or one for each group. Where its values are known only
              when the program runs, groups whose scale is not positive and finite become NaN.
    returns   array of x's shape, dtype as in `mezzo.formats.quantize`
    raises    ConfigError if an argument is unknown or missing, x is not floating point, or float64 is needed and off
    """
    fmt = get_format(fmt)
    x = _array(x)
    if needs_float64(x.dtype.name, fmt):
        _check_float64(f"rounding {x.dtype.name} to {fmt}")
    if scale is not None:
        scale = _scale(scale)
    return _straight(x, portable_quantize(_XP, lax.stop_gradient(x), fmt, axis, rounding, overflow, key, scale))


def bits(seed: int, step: Any, site: int | str, count: int) -> Array:
    """Random words of the elements 0 … count - 1 of one site at one step: `mezzo.formats.philox.bits`.

    step      int, or a traced integer array of no dimensions
    returns   (count,) uint32
    raises    ConfigError if a number is out of its range
    """
    words: Array = philox.bits(_XP, seed, step, site, count)
    return words


def hadamard(x: Any, *, axis: int = -1, block: int = 16, seed: int = 0, inverse: bool = False) -> Array:
    """Multiply each block along an axis by diag(signs)·H / sqrt(block); see `mezzo.formats.hadamard`.

    x         (…, n, …) floating point, n a multiple of block along `axis`
    returns   float32 array of x's shape; float64 where x is float64. Differentiable; subnormal tangents are zero.
    raises    ConfigError if the block is no power of four or does not divide the axis
    """
    x = _array(x)
    if x.dtype.name not in DTYPES:
        raise ConfigError(f"hadamard takes floating-point arrays, got {x.dtype.name}")
    return _hadamard(x, axis, block, seed, inverse)


@jax.custom_jvp
def _straight(x: Array, y: Array) -> Array:
    return y


@_straight.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    _, y = primals
    return y, tangents[0].astype(y.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _hadamard(x: Array, axis: int, block: int, seed: int, inverse: bool) -> Array:
    y: Array = portable_hadamard.hadamard(_XP, x, axis, block, seed, inverse)
    return y


@_hadamard.defjvp
def _(
    axis: int, block: int, seed: int, inverse: bool, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y = _hadamard(x, axis, block, seed, inverse)
    # Float arithmetic alone, which JAX can transpose.
    return y, portable_hadamard.plain(_XP, dx.astype(y.dtype), axis, block, seed, inverse)


def _array(x: Any) -> Array:
    if not isinstance(x, jax.Array):
        if isinstance(x, np.ndarray | np.generic) and x.dtype == np.float64:
            _check_float64("a float64 array")  # JAX would make it float32
        return jnp.asarray(x)
    return x


def _check_float64(what: str) -> None:
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ConfigError(f'{what} needs 64-bit numbers, which are off: jax.config.update("jax_enable_x64", True)')


def _scale(scale: Any) -> Array:
    known = not isinstance(scale, jax.core.Tracer)
    if known and not bool(np.all((np.asarray(scale) > 0) & np.isfinite(np.asarray(scale)))):
        raise ConfigError("a given scale must be positive and finite")
    # By NumPy where it can be: JAX takes subnormal numbers for zero on the way from float64.
    return jnp.asarray(np.asarray(scale, np.float32)) if known else lax.stop_gradient(scale).astype(jnp.float32)
