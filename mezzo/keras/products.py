"""Products with each operand of each of the three products rounded as the table says.

y = a·b;  da = dy·bᵀ (dgrad);  db = aᵀ·dy (wgrad).  The rounded operands are multiplied in float32 (float64 if a format
is float64) and the result is rounded once; it goes on in the dtype of the operands. `docs/numerics.md` is the contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from mezzo.errors import ConfigError
from mezzo.keras.scope import suspended
from mezzo.keras.table import SiteSpec, Tensor


def product(spec: SiteSpec, a: Tensor, b: Tensor, weight: bool = False) -> Tensor:
    """a (…, M, K) · b (…, K, N) → (…, M, N), batch dimensions broadcast.

    weight    b is a weight (K, N), which torch would hold as (N, K)
    """
    order = (1, 0) if weight and b.shape.rank == 2 else None

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(a: Tensor, b: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        with suspended():
            a_f, b_f = spec.cast("fprop.a", a), spec.cast("fprop.b", b, -2, order)
            y = _multiply(spec, "fprop", a_f, b_f)

        def gradients(g: Tensor) -> Any:
            with suspended():
                g = spec.arriving(g)
                g_d = spec.again("dgrad.a", g, g) if spec.arrives_rounded else spec.cast("dgrad.a", g)
                if spec.shared("dgrad.b", "fprop.b"):
                    b_d = spec.again("dgrad.b", b, b_f)
                else:
                    b_d = spec.cast("dgrad.b", b, -1, order)
                da = _multiply(spec, "dgrad", g_d, b_d, like=a, transpose_b=True)
                if spec.shared("wgrad.a", "dgrad.a"):
                    g_w = spec.again("wgrad.a", g, g_d, -2)
                else:
                    g_w = spec.cast("wgrad.a", g, -2)
                if spec.shared("wgrad.b", "fprop.a"):
                    a_w = spec.again("wgrad.b", a, a_f, -2)
                else:
                    a_w = spec.cast("wgrad.b", a, -2)
                db = _multiply(spec, "wgrad", a_w, g_w, like=b, transpose_a=True)
                return _once(da), _once(db)

        return y, gradients

    return run(a, b)


def _multiply(
    spec: SiteSpec, name: str, a: Tensor, b: Tensor, like: Tensor | None = None, **transposed: bool
) -> Tensor:
    """The product of rounded operands, summed over batches that `like` does not have, rounded once to `name`.out."""
    y = tf.linalg.matmul(tf.cast(a, spec.acc), tf.cast(b, spec.acc), **transposed)
    if like is not None:
        y = _sum_to(y, like)
    return tf.cast(spec.cast(f"{name}.out", y), a.dtype)


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Undo broadcasting over the batch dimensions."""
    if x.shape.rank == like.shape.rank and x.shape[:-2] == like.shape[:-2] and x.shape[:-2].is_fully_defined():
        return x
    have, want = tf.shape(x)[:-2], tf.shape(like)[:-2]
    axes = tf.raw_ops.BroadcastGradientArgs(s0=want, s1=have).r0
    return tf.reshape(tf.reduce_sum(x, axes, keepdims=False), tf.concat([want, tf.shape(x)[-2:]], 0))


@tf.custom_gradient  # type: ignore[untyped-decorator]
def _once(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """`x`, which cannot be differentiated again: the rounded copies know nothing of the graph."""

    def refuse(_: Tensor) -> Any:
        raise ConfigError(
            "a gradient through rounded products was differentiated again; run that part of the model under fp32, for "
            "instance with precision.using('fp32')"
        )

    return tf.identity(x), refuse


def enter(spec: SiteSpec, x: Tensor, role: str, grad_role: str, axis: int, order: Sequence[int] | None) -> Tensor:
    """`x` rounded on its way into an operation that TensorFlow differentiates, its gradient on the way out."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        def back(g: Tensor) -> Tensor:
            with suspended():
                return _once(spec.cast(grad_role, g))

        with suspended():
            return tf.identity(spec.cast(role, x, axis, order)), back

    return run(x)


def leave(spec: SiteSpec, y: Tensor, grad_role: str, order: Sequence[int] | None) -> Tensor:
    """The result of such an operation, rounded, and the gradient that comes back to it."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        def back(g: Tensor) -> Tensor:
            with suspended():
                return _once(spec.cast(grad_role, spec.arriving(g), -1, order))

        with suspended():
            return tf.identity(spec.cast("fprop.out", y)), back

    return run(y)


def bilinear(
    spec: SiteSpec,
    op: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    w: Tensor,
    orders: tuple[Sequence[int] | None, Sequence[int] | None],
) -> Tensor:
    """Any operation that is linear in `x` and in `w` (convolutions), each of its three products on operands of its own.

    orders    of axes in which torch has x and the result, and w
    """
    of_x, of_w = orders

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        def wide(role: str, value: Tensor, order: Sequence[int] | None) -> Tensor:
            return tf.cast(spec.cast(role, value, -1, order), spec.acc)

        with suspended():
            x_f, w_f = wide("fprop.a", x, of_x), wide("fprop.b", w, of_w)
            y = tf.cast(spec.cast("fprop.out", op(x_f, w_f)), x.dtype)

        def gradients(g: Tensor) -> Any:
            with suspended():
                g = spec.arriving(g)
                g_d = wide("dgrad.a", g, of_x)
                w_d = w_f if spec.shared("dgrad.b", "fprop.b") else wide("dgrad.b", w, of_w)
                x_w = x_f if spec.shared("wgrad.b", "fprop.a") else wide("wgrad.b", x, of_x)
                g_w = g_d if spec.shared("wgrad.a", "dgrad.a") else wide("wgrad.a", g, of_x)
                # The gradient of x does not depend on x, nor that of w on w: in a graph the forward ops fall away.
                with tf.GradientTape() as tape:
                    tape.watch(x_f)
                    z = op(x_f, w_d)
                dx = spec.cast("dgrad.out", tape.gradient(z, x_f, output_gradients=g_d))
                with tf.GradientTape() as tape:
                    tape.watch(w_f)
                    z = op(x_w, w_f)
                dw = spec.cast("wgrad.out", tape.gradient(z, w_f, output_gradients=g_w))
                return _once(tf.cast(dx, x.dtype)), _once(tf.cast(dw, w.dtype))

        return y, gradients

    return run(x, w)


class Contraction(NamedTuple):
    """A two-operand einsum by the kinds of its labels: in both and the result; in both only; in one and the result."""

    batch: str
    summed: str
    free_a: str
    free_b: str
    a: str
    b: str
    out: str


def contraction(equation: str, ranks: tuple[int, int]) -> Contraction | None:
    """What an einsum equation contracts; None where it is no product, or one of a tensor's diagonal.

    ranks     of the two operands; an ellipsis stands for as many axes as are left
    """
    left, _, out = equation.replace(" ", "").partition("->")
    a, b = left.split(",")
    spare = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBAzyxwvutsrqponmlkjihgfedcba" if c not in equation]
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip((a, b), ranks, strict=True)
    ]
    dots = "".join(spare[: max(hidden)])
    a, b = (term.replace("...", dots[len(dots) - n :]) for term, n in zip((a, b), hidden, strict=True))
    out = out.replace("...", dots)
    if any(len(set(term)) < len(term) for term in (a, b, out)) or set(a + b) != {*out, *(set(a) & set(b))}:
        return None
    batch = "".join(c for c in a if c in b and c in out)
    summed = "".join(c for c in a if c in b and c not in out)
    free_a, free_b = "".join(c for c in a if c not in b), "".join(c for c in b if c not in a)
    return Contraction(batch, summed, free_a, free_b, a, b, out) if summed else None


def einsum(spec: SiteSpec, of: Contraction, a: Tensor, b: Tensor, weight: bool) -> Tensor:
    """The contraction as one product of (batch, M, K) and (batch, K, N), or of two matrices without a batch."""
    sizes = dict(zip(of.b, _sizes(b), strict=True)) | dict(zip(of.a, _sizes(a), strict=True))
    # A label of size 1 in one operand and n in the other is n.
    sizes |= {c: n for c, n in zip(of.b, _sizes(b), strict=True) if c not in of.a or _is_one(sizes[c])}
    lead = [sizes[c] for c in of.batch]
    m, k, n = (_many(sizes[c] for c in labels) for labels in (of.free_a, of.summed, of.free_b))
    batch = [_many(lead)] if lead else []
    a = tf.reshape(_arranged(a, of.a, of.batch + of.free_a + of.summed, sizes), [*batch, m, k])
    b = tf.reshape(_arranged(b, of.b, of.batch + of.summed + of.free_b, sizes), [*batch, k, n])
    y = product(spec, a, b, weight)
    found = of.batch + of.free_a + of.free_b
    y = tf.reshape(y, [sizes[c] for c in found])
    return y if found == of.out else tf.transpose(y, [found.index(c) for c in of.out])


def _arranged(x: Tensor, labels: str, wanted: str, sizes: dict[str, Any]) -> Tensor:
    """`x` with its axes in the wanted order; axes of size 1 that the other operand has n of are repeated."""
    if any(_is_one(have) and not _is_one(sizes[c]) for c, have in zip(labels, _sizes(x), strict=True)):
        x = tf.broadcast_to(x, [sizes[c] for c in labels])
    return x if labels == wanted else tf.transpose(x, [labels.index(c) for c in wanted])


def _sizes(x: Tensor) -> list[Any]:
    """Sizes of the axes: numbers where they are known, else scalars of the graph."""
    if x.shape.is_fully_defined():
        return list(x.shape)
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _many(sizes: Iterable[Any]) -> Any:
    return math.prod(sizes)
