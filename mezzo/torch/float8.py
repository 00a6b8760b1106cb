"""Linear layers whose three products run on float8 matrix units: route "native" for one float32 scale a tensor.

    x ── q = float8(x / s) ──► scaled_mm(q_a, q_b, s_a, s_b) ──► s_a·s_b·Σ q_a·q_b, float32 sums, rounded once to .out

The operands are those of the emulated route to the bit; what differs is where the scales are multiplied in: after the
sum instead of before, one rounding in float32 instead of one for each term. Fast accumulation (14 bits on Hopper) is
off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mezzo.formats import ScaledFormat
from mezzo.formats.blocks import MIN_SCALE, max_scale
from mezzo.formats.spec import E4M3, E5M2
from mezzo.hardware import FLOAT8, scaled_product
from mezzo.policy import Spec
from mezzo.torch.pack import CONTAINERS
from mezzo.torch.table import SiteSpec

PAIRS = (("fprop.a", "fprop.b"), ("dgrad.a", "dgrad.b"), ("wgrad.a", "wgrad.b"))
STEP = 16  # the matrix units take multiples of it


def fits(spec: SiteSpec) -> bool:
    """Whether all three products of a linear layer can take this route on the machine of `spec`."""
    return (
        "float8" in spec.native
        and spec.acc is torch.float32
        and all(
            all(map(_is_float8, pair)) and any(one.fmt.element is E4M3 for one in pair)  # type: ignore[union-attr]
            for pair in ([spec.specs[role] for role in pair] for pair in PAIRS)
        )
    )


def _is_float8(spec: Spec) -> bool:
    return spec.fmt.name in FLOAT8 and spec.rounding == "nearest" and not spec.hadamard


def encode(spec: SiteSpec, role: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in the element's own dtype, and the scale, 0-d float32: `quantize` of `x` is their product."""
    fmt = spec.specs[role].fmt
    assert isinstance(fmt, ScaledFormat)
    given = spec.delayed_scale(role, x) if spec.specs[role].delayed else None
    codes, scale = torch.ops.mezzo.float8_codes(x, fmt.element is E4M3, given)
    _tell(spec, role, x, codes, scale)
    return codes, scale


# An operator, since Inductor would make another division of this one.
@torch.library.custom_op("mezzo::float8_codes", mutates_args=())
def _codes(x: Tensor, e4m3: bool, given: Tensor | None) -> tuple[Tensor, Tensor]:
    element = E4M3 if e4m3 else E5M2
    top = element.max
    wide = x.float()
    if given is not None:
        scale = given.clone()  # a result may not be an argument
        wide = torch.where(torch.isfinite(wide), wide, torch.nan)
    else:
        amax = wide.abs().amax() if x.numel() else wide.new_zeros(())
        scale = (amax / torch.full_like(amax, top)).clamp(MIN_SCALE, max_scale(top))
        scale = torch.where(torch.isfinite(amax), scale, torch.nan)
    return (wide / scale).clamp_(-top, top).to(CONTAINERS[element]), scale


@_codes.register_fake
def _(x: Tensor, e4m3: bool, given: Tensor | None) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=CONTAINERS[E4M3 if e4m3 else E5M2])
    return codes, x.new_empty((), dtype=torch.float32)


def _tell(spec: SiteSpec, role: str, x: Tensor, codes: Tensor, scale: Tensor) -> None:
    if not torch.compiler.is_compiling() and spec.hooks.active:
        spec.tell(role, x, codes.float() * scale, scale=scale)


def _encode_again(
    spec: SiteSpec, role: str, x: Tensor, other: str, codes: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As `encode`, from what `x` was encoded to for the role `other` where both are the same."""
    if not spec.shared(role, other):
        return encode(spec, role, x)
    _tell(spec, role, x, codes, scale)
    return codes, scale


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (rows, K) · b (K, columns) in float8, times both scales; sizes that are not multiples of 16 are filled with 0.

    dtype    of the result: bfloat16, float16 or float32
    """
    rows, columns = a.shape[0], b.shape[1]
    a, b = _filled(a.contiguous(), True), _filled(b.t().contiguous(), False)  # b as (columns, K): column by column
    return scaled_product(a, b.t(), scale_a, scale_b, dtype)[:rows, :columns]


def _filled(x: Tensor, any_rows: bool) -> Tensor:
    """Zeros up to multiples of 16: along the sum always, and along the rows of the second operand."""
    more = -x.shape[1] % STEP, 0 if any_rows else -x.shape[0] % STEP
    if not any(more):
        return x
    # torch pads no float8; the bytes of zero are zero.
    return F.pad(x.view(torch.uint8), (0, more[0], 0, more[1])).view(x.dtype)


class Float8Linear(torch.autograd.Function):
    """As `mezzo.torch.products.Linear`; the input is kept as its codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: SiteSpec) -> Tensor:
        a, scale_a = encode(spec, "fprop.a", x)
        b, scale_b = encode(spec, "fprop.b", weight)
        y = _product(spec, "fprop", a, b.t(), scale_a, scale_b, bias)
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            kept = _encode_again(spec, "wgrad.b", x, "fprop.a", a, scale_a)
        ctx.save_for_backward(weight, *kept)
        ctx.spec, ctx.x_dtype = spec, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        spec: SiteSpec = ctx.spec
        dx = dw = db = None
        g, scale_g = encode(spec, "dgrad.a", grads[0])
        if ctx.needs_input_grad[0]:
            w, scale_w = encode(spec, "dgrad.b", weight)
            dx = _product(spec, "dgrad", g, w, scale_g, scale_w).to(ctx.x_dtype)
        g, scale_g = _encode_again(spec, "wgrad.a", grads[0], "dgrad.a", g, scale_g)
        if ctx.needs_input_grad[1]:
            x, scale_x = kept
            dw = _product(spec, "wgrad", g.t(), x, scale_g, scale_x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = spec.cast("wgrad.out", g.float().sum(0) * scale_g).to(ctx.bias_dtype)
        return dx, dw, db, None


def _product(
    spec: SiteSpec, product: str, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The product with its result rounded once to `product`.out, a bias added before that."""
    name = spec.formats[f"{product}.out"].name
    narrow = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    y = scaled_mm(a, b, scale_a, scale_b, torch.float32 if narrow is None or bias is not None else narrow)
    return spec.cast(f"{product}.out", y if bias is None else y + bias)
