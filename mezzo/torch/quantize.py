"""`quantize` in torch: to the bit what `mezzo.formats.quantize` gives, eager and compiled, on any device.

x ──► C++ helper (CPU, if there is a compiler)     one pass, in place if asked
  └─► torch operations                              the same bits, several passes
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat, Format, ScaledFormat, get_format, philox
from mezzo.formats.blocks import FLOAT32_MAX, MIN_SCALE, Groups, max_scale
from mezzo.formats.rounding import Key, Overflow, Rounding, check
from mezzo.formats.spec import BFLOAT16, E8M0, FLOAT16, FLOAT32, FLOAT64
from mezzo.torch import helper
from mezzo.torch.philox import bits

INPUTS = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32, torch.float64: FLOAT64}
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
        scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if torch.compiler.is_compiling():
        step = torch.as_tensor(step)
        y = torch.ops.mezzo.quantize(x, str(fmt), axis, rounding, overflow, _signed(seed), step, site, scale)
    elif torch.is_grad_enabled() and x.requires_grad:
        if out is not None:
            raise ConfigError("out= is for tensors whose gradient is not recorded; use torch.no_grad()")
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
    if out.requires_grad and torch.is_grad_enabled():
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
    return y if out is None else out.copy_(y)


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
    key = (seed % (1 << 64), step, site)
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


def round_elements(
    x: Tensor, fmt: Format, rounding: Rounding, overflow: Overflow, words: Tensor | None = None
) -> Tensor:
    """Round to an element format in torch operations: the values, in float32 or float64."""
    if x.dtype is not torch.float64:
        if fmt.holds(INPUTS[x.dtype]) and overflow == "cast":
            return x
        x = x.float()
        if rounding == "nearest" and fmt not in (FLOAT32, FLOAT64, E8M0):
            return _nearest_float32(x, fmt, overflow)
    return _round_float64(x.double(), fmt, rounding, overflow, words)


def _nearest_float32(x: Tensor, fmt: Format, overflow: Overflow) -> Tensor:
    """Ties to even, from float32, in float32."""
    if overflow == "saturate" or not fmt.nan:
        x = x.clamp(fmt.min, fmt.max)  # both are values of the format, so what lies between rounds to no more
    if fmt is BFLOAT16 or fmt is FLOAT16:
        return x.to(torch.bfloat16 if fmt is BFLOAT16 else torch.float16).float()
    raw = x.view(torch.int32)
    if fmt.exponent_bits == 8:  # tf32: too close to the top for the sum below
        drop = 23 - fmt.mantissa_bits
        carry = ((raw >> drop) & 1) + ((1 << drop - 1) - 1)
        return torch.where(torch.isfinite(x), ((raw + carry) >> drop << drop).view(torch.float32), x)
    # Adding 2**(exponent + 23 - mantissa_bits) pushes what is below the grid out of float32, with its rounding.
    exponent = (raw & 0x7F800000).clamp_((fmt.min_exponent + 127) << 23, (fmt.max_exponent + 128) << 23)
    push = exponent.add_((23 - fmt.mantissa_bits) << 23).view(torch.float32)
    y = x.abs().add_(push).sub_(push)
    if overflow == "cast" and fmt.nan:
        y = torch.where(y > fmt.max, math.inf if fmt.infinity else math.nan, y)
    y = torch.copysign(y, x)
    return y + 0.0 if fmt.is_integer else y


def _round_float64(x: Tensor, fmt: Format, rounding: Rounding, overflow: Overflow, words: Tensor | None) -> Tensor:
    """As `mezzo.formats.rounding.round_elements`."""
    finite = torch.where(torch.isfinite(x), x.abs(), 0.0)
    exponent = (finite.view(torch.int64) >> 52) - 1023  # -1023 for subnormal numbers, below every format's grid
    if fmt.is_scale:
        return _round_scale(x, finite, exponent, rounding, overflow, words)
    if fmt.mantissa_bits >= 52:
        rounded = finite
    else:
        grid = exponent.clamp_(min=fmt.min_exponent) - fmt.mantissa_bits
        rounded = _whole(finite * _power(-grid), rounding, words) * _power(grid)
    # Of two Python numbers torch.where would make a float32.
    limit = torch.where(torch.signbit(x), torch.full_like(x, -fmt.min), fmt.max)
    stays = overflow == "saturate" or not fmt.nan
    beyond = limit if stays else torch.full_like(limit, math.inf if fmt.infinity else math.nan)
    large = limit if rounding == "toward_zero" else beyond
    rounded = torch.where(torch.isinf(x), beyond, torch.where(rounded > limit, large, rounded))
    rounded = torch.where(torch.isnan(x), x, torch.copysign(rounded, x))
    return rounded + 0.0 if fmt.is_integer else rounded


def _power(exponent: Tensor) -> Tensor:
    """2.0**exponent exactly, for -1022 … 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _whole(scaled: Tensor, rounding: Rounding, words: Tensor | None) -> Tensor:
    if rounding == "nearest":
        return torch.round(scaled)  # ties to even
    down = torch.floor(scaled)
    if rounding == "toward_zero":
        return down
    assert words is not None
    return down + (words < torch.floor((scaled - down) * 2.0**32))


def _round_scale(
    x: Tensor, finite: Tensor, exponent: Tensor, rounding: Rounding, overflow: Overflow, words: Tensor | None
) -> Tensor:
    """To a power of two, as `mezzo.formats.rounding` says."""
    fraction = finite.view(torch.int64) & ((1 << 52) - 1)
    if rounding == "nearest":
        up = fraction >= 1 << 51
    elif rounding == "toward_zero":
        up = torch.zeros_like(fraction, dtype=torch.bool)
    else:
        assert words is not None
        up = words < fraction >> 20
    power = exponent + up
    top = E8M0.max if overflow == "saturate" else math.nan
    rounded = _power(power.clamp(E8M0.min_exponent, E8M0.max_exponent))
    if rounding != "toward_zero":
        rounded = torch.where(power > E8M0.max_exponent, top, rounded)
    rounded = torch.where(x == 0, E8M0.min if overflow == "saturate" else math.nan, rounded)
    rounded = torch.where(torch.isposinf(x), top, rounded)
    return torch.where((x < 0) | torch.isnan(x), math.nan, rounded)


def round_groups(
    x: Tensor,
    fmt: ScaledFormat,
    axis: int,
    rounding: Rounding,
    overflow: Overflow,
    words: Tensor | None,
    given: Tensor | None,
) -> Tensor:
    """Round to a scaled format in torch operations; `mezzo/formats/blocks.py` is the text that this translates."""
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    groups = Groups(tuple(x.shape), fmt, axis)
    if x.numel() == 0:
        return x.to(work)
    blocks = _divide(groups, x.to(work))
    if given is not None:
        scales = _given(given, groups, blocks).to(work)
        blocks = torch.where(torch.isfinite(blocks), blocks, math.nan)
        scaled = blocks / scales
    else:
        amax = blocks.abs().amax(dim=(2, 4), keepdim=True)
        amax = torch.where(torch.isfinite(amax), amax, math.nan)
        if fmt.scaling == "nvfp4":
            encode, tensor_scale = _nvfp4_tensor_scales(amax.float().amax())
            # Divisors are tensors throughout: dividing by a Python number may multiply by its reciprocal.
            scales = amax.float() / torch.full_like(encode, 6) * encode
            scales = round_elements(scales, fmt.scale, "nearest", "saturate")
            back = (torch.ones_like(encode) / (scales * tensor_scale)).clamp(max=FLOAT32_MAX)
            scaled = blocks * back.to(work)
            elements = round_elements(scaled, fmt.element, rounding, overflow, _divided(groups, words)).to(work)
            return _join(groups, elements * scales.to(work) * tensor_scale.to(work))
        if fmt.scaling == "free":
            top = torch.full_like(amax, fmt.element.max)
            scales = (amax / top).float().clamp(MIN_SCALE, max_scale(fmt.element.max)).to(work)
        else:
            scales = _power_scales(amax, fmt).to(work)
        scaled = blocks / scales
    elements = round_elements(scaled, fmt.element, rounding, overflow, _divided(groups, words)).to(work)
    return _join(groups, elements * scales)


def _divided(groups: Groups, words: Tensor | None) -> Tensor | None:
    return None if words is None else _divide(groups, words)


def _divide(groups: Groups, x: Tensor) -> Tensor:
    """As `Groups.divide`."""
    x = x.reshape(groups.flat).movedim(groups.axis, -1).reshape(-1, *groups.moved[-2:])
    short = -x.shape[1] % groups.rows, -x.shape[2] % groups.columns
    if any(short):
        x = F.pad(x, (0, short[1], 0, short[0]))
    tall, wide = x.shape[1] // groups.rows, x.shape[2] // groups.columns
    return x.reshape(x.shape[0], tall, groups.rows, wide, groups.columns)


def _join(groups: Groups, x: Tensor) -> Tensor:
    """As `Groups.join`."""
    outer, tall, rows, wide, columns = x.shape
    x = x.reshape(outer, tall * rows, wide * columns)[:, : groups.moved[-2], : groups.moved[-1]]
    if len(groups.flat) > 1:
        x = x.reshape(groups.moved).movedim(-1, groups.axis)
    return x.reshape(groups.shape).contiguous()


def _given(scale: Tensor, groups: Groups, blocks: Tensor) -> Tensor:
    """As in `mezzo.formats.blocks`; the values are not looked at, which would wait for the device."""
    if scale.dim() == 0:
        return scale.reshape(1, 1, 1, 1, 1)
    if tuple(scale.shape) != groups.scales_shape:
        raise ConfigError(
            f"the scale must have the shape () or {groups.scales_shape}, one for each group, not {tuple(scale.shape)}"
        )
    if len(groups.flat) == 1:
        return scale.reshape(1, 1, 1, -1, 1)
    moved = scale.movedim(groups.axis, -1)
    return moved.reshape(-1, *moved.shape[-2:])[:, :, None, :, None]


def _power_scales(amax: Tensor, fmt: ScaledFormat) -> Tensor:
    """As `mezzo.formats.blocks.power_scales`."""
    finite = torch.where(torch.isnan(amax), 0.0, amax).double()
    raw = finite.view(torch.int64)
    mantissa, exponent = raw & ((1 << 52) - 1), (raw >> 52) - 1023
    top, top_exponent = math.frexp(fmt.element.max)
    power = exponent - (top_exponent - 1)
    if fmt.scaling == "pow2":
        power = power + (mantissa > int((2 * top - 1) * 2**52))
    power = torch.where(finite == 0, E8M0.min_exponent, power.clamp(E8M0.min_exponent, E8M0.max_exponent))
    return torch.where(torch.isnan(amax), math.nan, _power(power))


def _nvfp4_tensor_scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    """As `mezzo.formats.blocks.nvfp4_tensor_scales`."""
    encode = (torch.full_like(amax, 448 * 6) / amax).clamp(max=FLOAT32_MAX)
    encode = torch.where(amax == 0, torch.ones_like(encode), encode)
    return encode, torch.ones_like(encode) / encode
