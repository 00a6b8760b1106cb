"""Scaled dot-product attention with its operands rounded as the table says.

Three algorithms, chosen by table and machine:
    native      operands in their format go to torch's own kernel (its own rounding of the probabilities)
    flash       CPU: operands rounded, float32 flash attention (probabilities stay float32), result rounded once;
                what is kept for the backward pass is the rounded operands
    explicit    where a rule speaks of fprop.probs: two products with a float32 softmax between them, the
                probabilities rounded as the rule says
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mezzo.formats import FLOAT32, FLOAT64
from mezzo.policy import Spec
from mezzo.policy.roles import SHOWN_RESULT, SHOWN_SCORES, explicit_attention
from mezzo.torch.products import Enter, Leave, Matmul, float32_kernels
from mezzo.torch.rounding import carrier
from mezzo.torch.table import SiteSpec

_OPERANDS = ("query", "key", "value")
LOGITS = 1 << 20  # of them held at a time where they are measured
HIDDEN = -1e4  # what is added to logits so that no weight is left: -inf, or a large number as some models take
_AXES = (-1, -1, -2)  # what the two products sum over: scores over E, the result over S


def algorithm(spec: SiteSpec, device: torch.device) -> str:
    """Which of the three algorithms attention at this site takes."""
    if "fprop.probs" in spec.formats:
        return "explicit"
    # One dtype runs through a native kernel, so the result and the gradient that comes back must have it too.
    if spec.route(*(f"fprop.{name}" for name in _OPERANDS), "fprop.out", "dgrad.dout") == "native":
        return "native"
    return "flash" if device.type == "cpu" and spec.acc is torch.float32 else "emulated"


def attention(
    spec: SiteSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch.nn.functional.scaled_dot_product_attention, under the table.

    query       (..., heads, T, E);  key, value (..., heads or kv_heads, S, E)
    returns     (..., heads, T, E) in the carrier of fprop.out
    """
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if not torch.compiler.is_compiling() and spec.hooks.logits and spec.scales.training:
        largest = largest_logit(query, _repeat(key, groups), attn_mask, is_causal, scale)
        for listener in spec.hooks.logits:
            listener(spec.path, largest)
    how = algorithm(spec, query.device)
    if how == "explicit":
        key, value = _repeat(key, groups), _repeat(value, groups)
        return _explicit(spec, query, key, value, attn_mask, dropout_p, is_causal, scale)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(spec.acc if how != "native" else carrier(spec.formats["fprop.query"]))
    fits = (
        query.dim() == 4
        and dropout_p == 0.0
        and query.shape[-1] == value.shape[-1]
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] == key.shape[1] * groups == value.shape[1] * groups
        and attn_mask is None
        and 0 not in (*query.shape, *key.shape)
    )
    if how == "flash" and fits:
        return FlashCPU.apply(query, key, value, is_causal, scale, groups, spec)  # type: ignore[no-any-return]
    dtype = carrier(spec.formats["fprop.query"]) if how == "native" else spec.acc
    q, k, v = (
        Enter.apply(x, spec, f"fprop.{name}", f"dgrad.{name}", dtype, axis)
        for name, x, axis in zip(_OPERANDS, (query, key, value), _AXES, strict=True)
    )
    k, v = _repeat(k, groups), _repeat(v, groups)
    with float32_kernels(spec.formats["fprop.query"].name if how == "native" else "float32", query.device):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    return Leave.apply(out, spec, "dgrad.dout")  # type: ignore[no-any-return]


@torch.no_grad()
def largest_logit(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Largest magnitude of query·keyᵀ·scale + mask over the pairs that attend, 0-d float32; LOGITS of them at a time.

    query   (..., T, E);  key (..., S, E);  attn_mask broadcasts to (..., T, S)
    """
    with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
        query, key = query.detach().float(), key.detach().float()
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        lead, t, s = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2]
        query, key = (one.expand(*lead, -1, -1).reshape(-1, *one.shape[-2:]) for one in (query, key))
        if attn_mask is not None:
            attn_mask = attn_mask.detach().expand(*lead, t, s).reshape(-1, t, s)
        largest = torch.zeros((), device=query.device)
        if 0 in (*query.shape, *key.shape):
            return largest
        together, rows = max(1, LOGITS // (t * s)), max(1, min(t, LOGITS // s))
        columns = torch.arange(s, device=query.device)
        for first in range(0, len(query), together):
            for row in range(0, t, rows):
                at = slice(first, first + together), slice(row, row + rows)
                logits = query[at].matmul(key[at[0]].mT).mul_(scale)
                if is_causal:
                    later = columns > torch.arange(row, min(t, row + rows), device=query.device)[:, None]
                    logits.masked_fill_(later, 0.0)
                if attn_mask is not None:
                    mask = attn_mask[at]
                    hidden = ~mask if mask.dtype is torch.bool else mask <= HIDDEN
                    logits = logits if mask.dtype is torch.bool else logits.add_(mask.float())
                    logits.masked_fill_(hidden, 0.0)
                largest = torch.maximum(largest, logits.abs_().amax())
        return largest


class FlashCPU(torch.autograd.Function):
    """torch's float32 flash attention for the CPU between rounded operands; keeps q, k, v and out as rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        scale: float | None,
        groups: int,
        spec: SiteSpec,
    ) -> Tensor:
        q, k, v = (
            spec.cast(f"fprop.{name}", x, axis)
            for name, x, axis in zip(_OPERANDS, (query, key, value), _AXES, strict=True)
        )
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_dense(spec, groups, q, k, v), 0.0, causal, attn_mask=None, scale=scale
        )
        out = spec.cast("fprop.out", out)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.spec, ctx.causal, ctx.scale, ctx.groups = spec, causal, scale, groups
        ctx.dtypes = query.dtype, key.dtype, value.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        spec: SiteSpec = ctx.spec
        g = spec.cast("dgrad.dout", grads[0])
        g, out = _dense(spec, 1, g, out)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, *_dense(spec, ctx.groups, q, k, v), out, logsumexp, 0.0, ctx.causal, attn_mask=None, scale=ctx.scale
        )
        if ctx.groups > 1:  # summed before the rounding
            dk, dv = (d.unflatten(1, (-1, ctx.groups)).sum(2) for d in (dk, dv))
        rounded = (
            spec.cast(f"dgrad.{name}", d).to(dtype)
            for name, d, dtype in zip(_OPERANDS, (dq, dk, dv), ctx.dtypes, strict=True)
        )
        return (*rounded, None, None, None, None)


def _repeat(x: Tensor, groups: int) -> Tensor:
    """Each key or value head once for every query head of its group."""
    return x.repeat_interleave(groups, -3) if groups > 1 else x


def _dense(spec: SiteSpec, groups: int, query: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
    """Tensors as the flash kernel wants them: float32, one head each, and dense rows, for which it does not look."""
    wide = (spec.wide(query), *(_repeat(spec.wide(x), groups) for x in keys))
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in wide)


def _explicit(
    spec: SiteSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """softmax(q·kᵀ·scale + mask)·v as two products."""
    scores_spec, out_spec = _explicit_specs(spec)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = Matmul.apply(query, key.mT, scores_spec).to(spec.acc) * scale
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask.to(spec.acc)
    probs = F.dropout(torch.softmax(scores, -1), dropout_p)
    return Matmul.apply(probs, value, out_spec)  # type: ignore[no-any-return]


def _explicit_specs(spec: SiteSpec) -> tuple[SiteSpec, SiteSpec]:
    """The two products of explicit attention, their operands' formats taken from attention's own roles."""
    inner = Spec(FLOAT64 if spec.acc is torch.float64 else FLOAT32)
    scores, out = explicit_attention(spec.specs, inner)
    return (
        SiteSpec(spec.path, spec.call, scores, spec.native, spec.hooks, spec.scales, SHOWN_SCORES, "scores"),
        SiteSpec(spec.path, spec.call, out, spec.native, spec.hooks, spec.scales, SHOWN_RESULT, "result"),
    )
