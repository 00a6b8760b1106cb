"""Scaled formats in torch operations; `mezzo/formats/blocks.py` is the text that this translates."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats import ScaledFormat
from mezzo.formats.blocks import FLOAT32_MAX, MIN_SCALE, Groups, max_scale
from mezzo.formats.rounding import Overflow, Rounding
from mezzo.formats.spec import E8M0
from mezzo.torch.elements import power_of_two, round_elements


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
    blocks = divide(groups, x.to(work))
    found = group_scales(groups, blocks, fmt, given)
    if given is not None:
        blocks = torch.where(torch.isfinite(blocks), blocks, math.nan)
    scaled = blocks / found.scales if found.back is None else blocks * found.back
    elements = round_elements(scaled, fmt.element, rounding, overflow, _divided(groups, words)).to(work)
    y = elements * found.scales
    return join(groups, y if found.tensor is None else y * found.tensor)


class GroupScales(NamedTuple):
    """(outer, R, 1, C, 1) scales; for nvfp4 also what elements are multiplied by, and the tensor's scale."""

    scales: Tensor
    back: Tensor | None
    tensor: Tensor | None


def group_scales(groups: Groups, blocks: Tensor, fmt: ScaledFormat, given: Tensor | None) -> GroupScales:
    """The scales of an array that was divided into groups; NaN for a group that holds an infinity or a NaN."""
    if given is not None:
        return GroupScales(_given(given, groups, blocks).to(blocks.dtype), None, None)
    return amax_scales(blocks.abs().amax(dim=(2, 4), keepdim=True), fmt)


def amax_scales(amax: Tensor, fmt: ScaledFormat) -> GroupScales:
    """The scales of groups whose largest magnitudes are `amax`, (outer, R, 1, C, 1), in the dtype to work in."""
    work = amax.dtype
    amax = torch.where(torch.isfinite(amax), amax, math.nan)
    if fmt.scaling == "nvfp4":
        encode, tensor = _nvfp4_tensor_scales(amax.float().amax())
        # Divisors are tensors throughout: dividing by a Python number may multiply by its reciprocal.
        scales = amax.float() / torch.full_like(encode, 6) * encode
        scales = round_elements(scales, fmt.scale, "nearest", "saturate")
        back = (torch.ones_like(encode) / (scales * tensor)).clamp(max=FLOAT32_MAX)
        return GroupScales(scales.to(work), back.to(work), tensor.to(work))
    if fmt.scaling == "free":
        top = torch.full_like(amax, fmt.element.max)
        scales = (amax / top).float().clamp(MIN_SCALE, max_scale(fmt.element.max))
    else:
        scales = _power_scales(amax, fmt)
    return GroupScales(scales.to(work), None, None)


def _divided(groups: Groups, words: Tensor | None) -> Tensor | None:
    return None if words is None else divide(groups, words)


def divide(groups: Groups, x: Tensor) -> Tensor:
    """As `Groups.divide`."""
    x = x.reshape(groups.flat).movedim(groups.axis, -1).reshape(-1, *groups.moved[-2:])
    short = -x.shape[1] % groups.rows, -x.shape[2] % groups.columns
    if any(short):
        x = F.pad(x, (0, short[1], 0, short[0]))
    tall, wide = x.shape[1] // groups.rows, x.shape[2] // groups.columns
    return x.reshape(x.shape[0], tall, groups.rows, wide, groups.columns)


def join(groups: Groups, x: Tensor) -> Tensor:
    """As `Groups.join`."""
    outer, tall, rows, wide, columns = x.shape
    x = x.reshape(outer, tall * rows, wide * columns)[:, : groups.moved[-2], : groups.moved[-1]]
    if len(groups.flat) > 1:
        x = x.reshape(groups.moved).movedim(-1, groups.axis)
    return x.reshape(groups.shape).contiguous()


def _given(scale: Tensor, groups: Groups, blocks: Tensor) -> Tensor:
    """As in `mezzo.formats.blocks`; on other devices the values are not looked at, which would wait for them."""
    if (
        type(scale) is Tensor
        and scale.device.type == "cpu"
        and not bool(torch.all((scale > 0) & torch.isfinite(scale)))
    ):
        raise ConfigError("a given scale must be positive and finite")
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
    return torch.where(torch.isnan(amax), math.nan, power_of_two(power))


def _nvfp4_tensor_scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    """As `mezzo.formats.blocks.nvfp4_tensor_scales`."""
    encode = (torch.full_like(amax, 448 * 6) / amax).clamp(max=FLOAT32_MAX)
    encode = torch.where(amax == 0, torch.ones_like(encode), encode)
    return encode, torch.ones_like(encode) / encode
