"""Products with each operand of each of the three products rounded as the table says.

Canonical form: a (M, K) · b (N, K)ᵀ → y (M, N), or with a leading axis of batches on all three. dx = dy·b is dgrad,
dw = dyᵀ·a is wgrad. Rounded operands are multiplied exactly, with float32 sums, and the result is rounded once.
`docs/numerics.md` is the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mezzo.jax.rounding import HALVES, SiteSpec, round_to

Array = Any


def _multiply(site: SiteSpec, product: str, a: Array, b: Array, sum_a: int, sum_b: int) -> Array:
    """Product over axis `sum_a` of a and `sum_b` of b (counted from the end), batches first, with float32 sums.

    Route native: operands of one 16-bit format go to the device's own 16-bit product, which loses nothing of them.
    """
    batch = tuple(range(a.ndim - 2))
    dims = (((a.ndim + sum_a,), (b.ndim + sum_b,)), (batch, batch))
    acc = a.dtype
    if (narrow := site.native_dtype(product)) is not None:
        a, b = a.astype(narrow), b.astype(narrow)
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=acc)


def _round_b(site: SiteSpec, role: str, b: Array, axis: int, draws: Array) -> Array:
    """b (…, N, K), its random words in the order of the tensor as it came: (K, N) if it is no weight."""
    if site.weight or site.specs[role].rounding != "stochastic":
        return site.round(role, b, axis, draws)
    other = -1 if axis == -2 else -2
    return jnp.swapaxes(site.round(role, jnp.swapaxes(b, -1, -2), other, draws), -1, -2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(site: SiteSpec, a: Array, b: Array, draws: Array) -> Array:
    """a (M, K) · b (N, K)ᵀ, or both with batches in front, under the table; float32, or float64.

    draws    0-d integer: how often gradients were computed so far, for stochastic rounding
    """
    return _forward(site, a, b, draws)[0]


@partial(jax.jit, static_argnums=0)  # where nobody else compiles, too: operation by operation it takes seconds
def _forward(site: SiteSpec, a: Array, b: Array, draws: Array) -> tuple[Array, Any]:
    ra, rb = site.round("fprop.a", a, -1, draws), _round_b(site, "fprop.b", b, -1, draws)
    y = result(site, "fprop.out", _multiply(site, "fprop", ra, rb, -1, -1), draws)
    kept = ra.astype(HALVES[site.specs["wgrad.b"].fmt.name]) if _keeps_rounded(site) else a
    return y, (kept, b, draws, jnp.zeros((), a.dtype))


def _keeps_rounded(site: SiteSpec) -> bool:
    """Whether a is kept as it was rounded, in 16 bits: rounding it again would change nothing."""
    once = site.listener is None and site.shared("wgrad.b", "fprop.a")
    return once and site.specs["wgrad.b"].fmt.name in HALVES


@partial(jax.jit, static_argnums=0)
def _backward(site: SiteSpec, kept: Any, g: Array) -> tuple[Array, Array, None]:
    a, b, draws, like_a = kept
    g = incoming(site, g)
    g_d, g_w = site.round("dgrad.a", g, -1, draws), site.round("wgrad.a", g, -2, draws)
    da = _multiply(site, "dgrad", g_d, _round_b(site, "dgrad.b", b, -2, draws), -1, -2)
    a_w = a.astype(site.acc) if _keeps_rounded(site) else site.round("wgrad.b", a, -2, draws)
    db = _multiply(site, "wgrad", g_w, a_w, -2, -2)
    da, db = result(site, "dgrad.out", da, draws), result(site, "wgrad.out", db, draws)
    return da.astype(like_a.dtype), db.astype(b.dtype), None


product.defvjp(_forward, _backward)


def result(site: SiteSpec, role: str, y: Array, draws: Array) -> Array:
    """A product's result, rounded once."""
    return site.round(role, y, -1, draws)


def incoming(site: SiteSpec, g: Array) -> Array:
    """The gradient that comes back to a result of 16 bits has those 16 bits."""
    return round_to(site.specs["fprop.out"], g, -1) if site.rounds_to_16_bits("fprop.out") else g


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def bilinear(site: SiteSpec, op: Callable[[Array, Array], Array], a: Array, b: Array, draws: Array) -> Array:
    """`op(a, b)`, linear in each of both (a convolution), under the table; no formats with blocks."""
    return _forward_bilinear(site, op, a, b, draws)[0]


def _forward_bilinear(
    site: SiteSpec, op: Callable[[Array, Array], Array], a: Array, b: Array, draws: Array
) -> tuple[Array, Any]:
    y = op(site.round("fprop.a", a, -1, draws), site.round("fprop.b", b, -1, draws))
    return result(site, "fprop.out", y, draws), (a, b, draws)


def _backward_bilinear(
    site: SiteSpec, op: Callable[[Array, Array], Array], kept: Any, g: Array
) -> tuple[Array, Array, None]:
    a, b, draws = kept
    g = incoming(site, g)
    b_d, a_w = site.round("dgrad.b", b, -1, draws), site.round("wgrad.b", a, -1, draws)
    (da,) = jax.linear_transpose(lambda x: op(x, b_d), a_w)(site.round("dgrad.a", g, -1, draws))
    (db,) = jax.linear_transpose(lambda w: op(a_w, w), b_d)(site.round("wgrad.a", g, -1, draws))
    da, db = result(site, "dgrad.out", da, draws), result(site, "wgrad.out", db, draws)
    return da.astype(a.dtype), db.astype(b.dtype), None


bilinear.defvjp(_forward_bilinear, _backward_bilinear)
