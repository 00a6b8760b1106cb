"""`quantize` in torch: to the bit what `mezzo.formats.quantize` gives, eager and compiled, on any device.

x ──► C++ helper (CPU, if there is a compiler)     one pass, in place if asked
  └─► torch operations                              the same bits, several passes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat, Format, ScaledFormat, get_format, philox
from mezzo.formats.rounding import Key, Overflow, Rounding, check
from mezzo.formats.spec import E8M0, FLOAT32, FLOAT64
from mezzo.torch import helper
from mezzo.torch.elements import INPUTS, round_elements
from mezzo.torch.groups import round_groups
from mezzo.torch.philox import bits

# Below this the call into the helper costs more than the passes it saves.
HELPER_FROM = 2048


def quantize(
    x: Tensor,
    fmt: str | AnyFormat,
    *,
    axis: int = -1,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    key: Key | tuple[int, Tensor, int | str] | None = None,
    scale: Tensor | float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Round `x` to the values that `fmt` can hold, once: `mezzo.formats.quantize` for tensors.

    The gradient passes straight through: that of x is that of the result.

    x         tensor of any shape, float16, bfloat16, float32 or float64
    key       (seed, step, site) for stochastic rounding; step may be a 0-d int64 tensor
    scale     for formats scaled by a float32: 0-d, or one for each group
    out       where the result goes: x itself, or a tensor of x's shape in a dtype that holds every value of fmt, such
              as bfloat16 for float8_e4m3fn; not where gradients are recorded
    returns   tensor of x's shape, dtype as in `mezzo.formats.quantize`; out if that is given
    raises    ConfigError if an argument is unknown or missing, x is not floating point or out does not fit
    """
    fmt = get_format(fmt)
    if x.dtype not in INPUTS:
        raise ConfigError(f"quantize takes float16, bfloat16, float32 or float64 tensors, got {x.dtype}")
    check(fmt, rounding, overflow, None if key is None else (key[0], 0, key[2]), scale is not None)
    dtype = result_dtype(x.dtype, fmt)
    if out is not None:
        _check_out(x, fmt, out)
    seed, step, site = (0, 0, 0) if key is None else key
    site = _site_id(site) if isinstance(site, str) else site
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device).detach()
    if torch.compiler.is_compiling():
        step = torch.as_tensor(step)
        y = torch.ops.mezzo.quantize(x, str(fmt), axis, rounding, overflow, _signed(seed), step, site, scale)
    elif torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, fmt, axis, rounding, overflow, (seed, step, site), scale)  # type: ignore
    else:
        return _quantize(x, fmt, axis, rounding, overflow, (seed, step, site), scale, dtype, out)
    return y if out is None else out.copy_(y)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _site_id(name: str) -> int:
    # Dynamo cannot trace a hash; of a name, which is a constant of the graph, it need not.
    return philox.site_id(name)


def result_dtype(dtype: torch.dtype, fmt: AnyFormat) -> torch.dtype:
    """The dtype of `quantize`'s result for an input of `dtype`."""
    if isinstance(fmt, ScaledFormat):
        return torch.float64 if dtype is torch.float64 else torch.float32
    if INPUTS[dtype].holds(fmt):
        return dtype
    return torch.float32 if FLOAT32.holds(fmt) else torch.float64


def _check_out(x: Tensor, fmt: AnyFormat, out: Tensor) -> None:
    needed: Format = INPUTS[result_dtype(x.dtype, fmt)]
    holds = out.dtype in INPUTS and (
        INPUTS[out.dtype].holds(fmt) if isinstance(fmt, Format) else INPUTS[out.dtype].holds(needed)
    )
    if out.shape != x.shape or out.device != x.device or not holds:
        raise ConfigError(
            f"out must have the shape {tuple(x.shape)}, the device {x.device} and a dtype that holds every value of "
            f"{fmt} (such as {str(result_dtype(x.dtype, fmt)).removeprefix('torch.')}); "
            f"it has {tuple(out.shape)}, {out.device}, {out.dtype}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ConfigError("out= is for tensors whose gradient is not recorded; use torch.no_grad()")


def _quantize(
    x: Tensor,
    fmt: AnyFormat,
    axis: int,
    rounding: Rounding,
    overflow: Overflow,
    key: tuple[int, int | Tensor, int],
    scale: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    x = x.detach()
    if _fits_helper(x, fmt, rounding, out) and (compiled := helper.load()) is not None:
        if isinstance(fmt, ScaledFormat):
            x = x.contiguous()
        target = torch.empty_like(x, dtype=dtype) if out is None else out  # with x's strides
        drawn = (key[0], int(key[1]), key[2]) if rounding == "stochastic" else None
        if isinstance(fmt, ScaledFormat):
            compiled.blocks(x, target, fmt, axis, rounding, overflow, drawn, scale)
        else:
            compiled.elements(x, target, fmt, rounding, overflow, drawn)
        return target
    words = bits(*key, x.numel(), x.device).reshape(x.shape) if rounding == "stochastic" else None
    if isinstance(fmt, ScaledFormat):
        y = round_groups(x, fmt, axis, rounding, overflow, words, scale)
    else:
        y = round_elements(x, fmt, rounding, overflow, words).to(dtype)
    if out is not None:
        return out.copy_(y)
    return y.clone() if y is x else y  # where there was nothing to round


def _fits_helper(x: Tensor, fmt: AnyFormat, rounding: str, out: Tensor | None) -> bool:
    # Elements are rounded in the order of memory, which matters only to the words of stochastic rounding.
    ordered = x.is_contiguous() or isinstance(fmt, ScaledFormat)
    dense = rounding != "stochastic" and out is None and x.dim() > 1 and x.mT.is_contiguous()
    return (
        type(x) is Tensor  # not a fake one, which has no data
        and x.device.type == "cpu"
        and x.numel() >= HELPER_FROM
        and x.dtype is not torch.float64
        and (ordered or dense)
        and (out is None or (out.is_contiguous() and out.dtype is not torch.float64))
        and fmt not in (FLOAT64, E8M0)
    )


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fmt: AnyFormat, axis: int, rounding: Any, overflow: Any, key: Any, scale: Any
    ) -> Tensor:
        ctx.dtype = x.dtype
        return _quantize(x, fmt, axis, rounding, overflow, key, scale, result_dtype(x.dtype, fmt), None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.dtype), None, None, None, None, None, None


# Inductor would simplify a rounding that it can look into; it cannot look into an operator of ours.
@torch.library.custom_op("mezzo::quantize", mutates_args=())
def _quantize_op(
    x: Tensor,
    fmt: str,
    axis: int,
    rounding: str,
    overflow: str,
    seed: int,
    step: Tensor,
    site: int,
    scale: Tensor | None,
) -> Tensor:
    found = get_format(fmt)
    # A step that is a number and changes comes through an int32: 2**31 and more are negative here.
    key = (seed % (1 << 64), step % (1 << 32), site)
    dtype = result_dtype(x.dtype, found)
    return _quantize(x.contiguous(), found, axis, rounding, overflow, key, scale, dtype, None)  # type: ignore[arg-type]


@_quantize_op.register_fake
def _(
    x: Tensor,
    fmt: str,
    axis: int,
    rounding: str,
    overflow: str,
    seed: int,
    step: Tensor,
    site: int,
    scale: Tensor | None,
) -> Tensor:
    return torch.empty(x.shape, dtype=result_dtype(x.dtype, get_format(fmt)), device=x.device)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad.to(ctx.dtype), *[None] * 8)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


_quantize_op.register_autograd(_backward, setup_context=_setup)


def _signed(seed: int) -> int:
    """A 64-bit number as the int64 that operators take."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
