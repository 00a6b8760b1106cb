"""Linear layers and matrix products with each operand of each of the three products rounded as the table says.

Route "native": the operands go to the device's own kernel in their format. Route "emulated": the rounded operands are
multiplied exactly in float32 (float64 if an operand is float64) and the result is rounded once. A bias is rounded like
the weight and added before that rounding. `docs/numerics.md` is the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mezzo.torch import float8
from mezzo.torch.float8 import Float8Linear
from mezzo.torch.rounding import CARRIERS, carrier, cast, widen
from mezzo.torch.table import Kept, SiteSpec


@contextmanager
def float32_kernels(fmt: str, device: torch.device) -> Iterator[None]:
    """On CUDA, products of float32 tensors use TF32 tensor cores exactly where the table says tf32."""
    if device.type != "cuda" or fmt not in ("float32", "tf32"):
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = fmt == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def multiply(
    spec: SiteSpec,
    product: str,
    a: Tensor,
    b: Tensor,
    op: Callable[[Tensor, Tensor], Tensor] = torch.mm,
    bias: Tensor | None = None,
) -> Tensor:
    """`op(a, b)` on operands already rounded for `product`, plus the bias, its result rounded once to `product`.out.

    bias    only with torch.mm
    """
    operands = f"{product}.a", f"{product}.b"
    fmt = spec.formats[operands[0]].name
    if spec.result_route(f"{product}.out", *operands) != "native":
        if a.is_cuda and spec.route(*operands) == "native" and op is torch.mm:
            # Tensor cores sum in float32 and can deliver it: no rounding of the result to 16 bits on the way.
            y = torch.mm(a, b, out_dtype=torch.float32)
            return spec.cast(f"{product}.out", y if bias is None else y + bias)
        if a.is_cuda and op is torch.mm and spec.exact_in_bfloat16(*operands):
            # The tensor cores' 16-bit product, sums in float32: nothing is lost, and it is far faster than float32's.
            y = torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)
            return spec.cast(f"{product}.out", y if bias is None else y + bias)
        a, b, fmt = spec.wide(a), spec.wide(b), "float32"
    with float32_kernels(fmt, a.device):
        y = op(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b)
    return spec.cast(f"{product}.out", y)


def _gradients(spec: SiteSpec, g: Tensor, wgrad: bool) -> tuple[Tensor, Tensor]:
    """The incoming gradient rounded for dgrad and for wgrad; widened once where both are emulated from one rounding.

    wgrad    whether it is needed rounded for wgrad: if not, it is given back as it came
    """
    g_d, g_w = spec.cast("dgrad.a", g), spec.cast("wgrad.a", g, axis=0) if wgrad else g
    if (
        g_d is g_w
        and not g.is_cuda
        and "native" not in (spec.route("dgrad.a", "dgrad.b"), spec.route("wgrad.a", "wgrad.b"))
    ):
        g_d = g_w = spec.wide(g_d)
    return g_d, g_w


def _keep(
    ctx: Any, gradient: int, spec: SiteSpec, role: str, x: Tensor, axis: int, rounded: Tensor | None
) -> tuple[tuple[Tensor, ...], Kept]:
    """As `SiteSpec.keep`, but nothing where the gradient of input `gradient`, which needs it, is not asked for."""
    return spec.keep(role, x, axis, rounded) if ctx.needs_input_grad[gradient] else ((), Kept("nothing"))


class Linear(torch.autograd.Function):
    """y = x·wᵀ + bias;  dx = dy·w;  dw = dyᵀ·x.  x (rows, in), w (out, in), bias (out,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: SiteSpec) -> Tensor:
        a = spec.cast("fprop.a", x)
        b = spec.cast("fprop.b", weight)
        tensors, ctx.kept = _keep(ctx, 1, spec, "wgrad.b", x, 0, a if spec.shared("wgrad.b", "fprop.a") else None)
        # The master is kept, not its rounded copy: rounding it again in backward is 1% of the step, the copy is memory.
        ctx.save_for_backward(weight, *tensors)
        ctx.spec, ctx.x_dtype = spec, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        rounded = None if bias is None else _round_bias(spec, bias)
        return multiply(spec, "fprop", a, b.t(), bias=rounded)

    @staticmethod
    @once_differentiable  # the rounded copies it keeps know nothing of the graph
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        spec: SiteSpec = ctx.spec
        dx = dw = db = None
        # Sums over the rows of a transform are not those of the gradient: the bias then takes it unrounded.
        turned = bool(spec.specs["wgrad.a"].hadamard)
        g_d, g_w = _gradients(spec, grads[0], ctx.needs_input_grad[1] or (ctx.needs_input_grad[2] and not turned))
        if ctx.needs_input_grad[0]:
            dx = multiply(spec, "dgrad", g_d, spec.cast("dgrad.b", weight, axis=0)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dw = multiply(spec, "wgrad", g_w.t(), spec.take("wgrad.b", tensors, ctx.kept, 0)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = spec.cast("wgrad.out", (grads[0] if turned else g_w).sum(0, dtype=spec.acc)).to(ctx.bias_dtype)
        return dx, dw, db, None


def _round_bias(spec: SiteSpec, bias: Tensor) -> Tensor:
    """Like the weight down to 16 bits; below that a bias stays as it is, as hardware keeps it."""
    like = spec.specs["fprop.b"]
    if like.fmt.name not in CARRIERS:
        return bias
    return cast(bias, like.fmt) if like.hadamard else spec.cast("fprop.b", bias)  # a transform is the product's affair


def linear(spec: SiteSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As torch.nn.functional.linear under the table: x (..., in), weight (out, in) → (..., out)."""
    rows = x.reshape(-1, x.shape[-1])
    function = Float8Linear if float8.fits(spec) else Linear
    return function.apply(rows, weight, bias, spec).view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo broadcasting over the batch dimensions."""
    return x if x.shape == shape else x.sum_to_size(shape)


class Matmul(torch.autograd.Function):
    """y = a·b of at least two dimensions each, batch dimensions broadcast; da = dy·bᵀ is dgrad, db = aᵀ·dy is wgrad.

    In wgrad the operands are stored as the table names them: a is the gradient, b is the first factor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, spec: SiteSpec) -> Tensor:
        a, b = spec.cast("fprop.a", x), spec.cast("fprop.b", y, axis=-2)
        of_x, ctx.kept_x = _keep(ctx, 1, spec, "wgrad.b", x, -2, a if spec.shared("wgrad.b", "fprop.a") else None)
        of_y, ctx.kept_y = _keep(ctx, 0, spec, "dgrad.b", y, -1, b if spec.shared("dgrad.b", "fprop.b") else None)
        ctx.save_for_backward(*of_x, *of_y)
        ctx.spec, ctx.dtypes, ctx.shapes, ctx.split = spec, (x.dtype, y.dtype), (x.shape, y.shape), len(of_x)
        return multiply(spec, "fprop", a, b, torch.matmul)

    @staticmethod
    @once_differentiable  # the rounded copies it keeps know nothing of the graph
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_y = ctx.saved_tensors[: ctx.split], ctx.saved_tensors[ctx.split :]
        spec: SiteSpec = ctx.spec
        dx = dy = None
        if ctx.needs_input_grad[0]:
            g = spec.cast("dgrad.a", grads[0])
            b = spec.take("dgrad.b", of_y, ctx.kept_y, -1)
            dx = multiply(spec, "dgrad", g, b, lambda p, q: _sum_to(torch.matmul(p, q.mT), ctx.shapes[0]))
            dx = dx.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            g = spec.cast("wgrad.a", grads[0], axis=-2)
            a = spec.take("wgrad.b", of_x, ctx.kept_x, -2)
            dy = multiply(spec, "wgrad", g, a, lambda p, q: _sum_to(torch.matmul(q.mT, p), ctx.shapes[1]))
            dy = dy.to(ctx.dtypes[1])
        return dx, dy, None


class Enter(torch.autograd.Function):
    """Round an operand on its way into an operation that torch differentiates, and its gradient on the way out."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, spec: SiteSpec, role: str, grad_role: str, dtype: torch.dtype, axis: int = -1
    ) -> Tensor:
        ctx.spec, ctx.grad_role, ctx.dtype = spec, grad_role, x.dtype
        y = widen(spec.cast(role, x, axis), dtype)
        return y.view_as(y) if y is x else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.spec.cast(ctx.grad_role, grads[0]).to(ctx.dtype), None, None, None, None, None


def _enter_bias(spec: SiteSpec, bias: Tensor, dtype: torch.dtype) -> Tensor:
    if spec.formats["fprop.b"].name not in CARRIERS:
        return bias.to(dtype)
    return Enter.apply(bias, spec, "fprop.b", "wgrad.out", dtype)  # type: ignore[no-any-return]


class Leave(torch.autograd.Function):
    """Round the result of such an operation, and the gradient that comes back to it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, spec: SiteSpec, grad_role: str) -> Tensor:
        ctx.spec, ctx.grad_role, ctx.dtype = spec, grad_role, y.dtype
        out = spec.cast("fprop.out", y)
        return out.view_as(out) if out is y else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return widen(ctx.spec.cast(ctx.grad_role, grads[0]), ctx.dtype), None, None


def bilinear(spec: SiteSpec, op: Callable[..., Tensor], a: Tensor, b: Tensor, bias: Tensor | None, what: str) -> Tensor:
    """Any operation that is linear in `a` and in `b` (convolutions, einsum), differentiated by torch itself.

    op    called as op(a, b, bias) with all three in one dtype
    """
    spec.require_same(what, "fprop.a", "wgrad.b")
    spec.require_same(what, "fprop.b", "dgrad.b")
    spec.require_same(what, "dgrad.a", "wgrad.a")
    # One dtype runs through a native kernel, so the result and the gradient that comes back must have it too.
    native = spec.route("fprop.a", "fprop.b", "fprop.out", "dgrad.a") == "native"
    dtype = carrier(spec.formats["fprop.a"]) if native else spec.acc
    x = Enter.apply(a, spec, "fprop.a", "dgrad.out", dtype)
    w = Enter.apply(b, spec, "fprop.b", "wgrad.out", dtype)
    c = None if bias is None else _enter_bias(spec, bias, dtype)
    with float32_kernels(spec.formats["fprop.a"].name if native else "float32", a.device):
        return Leave.apply(op(x, w, c), spec, "dgrad.a")  # type: ignore[no-any-return]
