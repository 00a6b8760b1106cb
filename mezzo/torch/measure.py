"""What a rounding lost, on the device: `mezzo/formats/measure.py` is the text that this translates.

tap ──► take: sums (8), histogram (256), blocks (6 + 256), as tensors ──► read: one copy to the host for all sites
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mezzo.formats import AnyFormat, ScaledFormat
from mezzo.formats.blocks import Groups
from mezzo.formats.measure import BINS, Blocks, Measure, bound, has_blocks
from mezzo.torch import helper
from mezzo.torch.groups import divide, group_scales
from mezzo.torch.helper.tensors import dense

HELPER_FROM = 2048  # elements: below, torch's own operations are as fast


class Taken(NamedTuple):
    """Measures of one tensor that are still on the device.

    sums        (8,) float64: count, zeros, nonfinite, underflowed, overflowed, amax, signal, noise
    histogram   (256,) int64, zeros in bin 0
    blocks      None, or (6 + 256,) float64: count, zero, lossy, worst, median, best SQNR, and the histogram
    """

    sums: Tensor
    histogram: Tensor
    blocks: Tensor | None


@torch.no_grad()
def take(x: Tensor, y: Tensor, fmt: AnyFormat, axis: int = -1, scale: Tensor | None = None) -> Taken:
    """Measure `x`, which was rounded to `y`.

    fmt     the format of y; axis as in `quantize`
    scale   the one that was given; None: `fmt` takes its scales from the tensor itself
    """
    x, y = x.detach(), y.detach()
    limit = _limit(fmt, scale)
    sums, histogram = _elements(x, y, limit)
    if isinstance(fmt, ScaledFormat) and scale is None and fmt.scaling in ("floor", "nvfp4") and x.numel():
        sums[4] = _clipped(x, fmt, axis)
    return Taken(sums, histogram, _blocks(x, y, fmt, axis) if has_blocks(fmt) and x.numel() else None)


def read(taken: Sequence[Taken]) -> list[Measure]:
    """The measures, on the host."""
    if not taken:
        return []
    sums = torch.stack([one.sums for one in taken]).cpu().numpy()
    histograms = torch.stack([one.histogram for one in taken]).cpu().numpy()
    detailed = [one.blocks for one in taken if one.blocks is not None]
    details = iter(torch.stack(detailed).cpu().numpy()) if detailed else iter(())
    found = []
    for one, row, histogram in zip(taken, sums.tolist(), histograms, strict=True):
        count, zeros, nonfinite, underflowed, overflowed = map(int, row[:5])
        amax, signal, noise = row[5:]
        blocks = None
        if one.blocks is not None:
            detail = next(details)
            worst, median, best = detail[3:6].tolist()
            counts = [int(figure) for figure in detail[:3]]
            blocks = Blocks(counts[0], counts[1], counts[2], (worst, median, best), detail[6:].astype("int64"))
        histogram = histogram.copy()
        histogram[0] = max(0, histogram[0] - zeros)
        found.append(Measure(count, zeros, nonfinite, underflowed, overflowed, amax, signal, noise, histogram, blocks))
    return found


def _limit(fmt: AnyFormat, scale: Tensor | None) -> float | Tensor:
    """The magnitude from which on elements have overflowed, where one holds for the whole tensor."""
    if not isinstance(fmt, ScaledFormat):
        return bound(fmt)
    # A scale that follows the tensor's own amax leaves nothing above the largest value.
    return math.inf if scale is None else bound(fmt.element) * scale


def _elements(x: Tensor, y: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type == "cpu" and x.numel() >= HELPER_FROM and torch.float64 not in (x.dtype, y.dtype):
        compiled = helper.load()
        if compiled is not None:
            if x.stride() != y.stride() or not dense(x):
                x, y = x.contiguous(), y.contiguous()
            return compiled.measure(x, y, float(limit))
    wide, rounded = x.double(), y.double()
    finite, there = torch.isfinite(wide), torch.isfinite(rounded)
    magnitude = torch.where(finite, wide.abs(), 0.0)
    both = finite & there
    error = torch.where(both, wide - torch.where(there, rounded, 0.0), 0.0)
    zero = wide == 0
    counts = [
        torch.full((), x.numel(), dtype=torch.float64, device=x.device),
        zero.sum(),
        (~finite).sum(),
        (finite & ~zero & (rounded == 0)).sum(),
        (finite & ((magnitude > limit) | ~there)).sum(),
        magnitude.amax() if x.numel() else wide.new_zeros(()),
        torch.where(both, magnitude, 0.0).square().sum(),
        error.square().sum(),
    ]
    histogram = _histogram(magnitude)
    histogram[0] -= (~finite).sum()
    return torch.stack([count.double() for count in counts]), histogram


def _histogram(magnitude: Tensor) -> Tensor:
    """Finite magnitudes by their float32 exponent."""
    exponents = (magnitude.float().contiguous().view(torch.int32) >> 23).clamp(max=BINS - 2).flatten().long()
    return torch.zeros(BINS, dtype=torch.int64, device=magnitude.device).scatter_add_(
        0, exponents, torch.ones_like(exponents)
    )


def _divided(x: Tensor, fmt: ScaledFormat, axis: int) -> tuple[Groups, Tensor]:
    groups = Groups(tuple(x.shape), fmt, axis)
    return groups, divide(groups, x if x.dtype is torch.float64 else x.float())


def _clipped(x: Tensor, fmt: ScaledFormat, axis: int) -> Tensor:
    """How many finite elements lie beyond what their block's scale lets the elements hold."""
    groups, blocks = _divided(x, fmt, axis)
    found = group_scales(groups, blocks, fmt, None)
    scales = found.scales if found.tensor is None else found.scales * found.tensor
    limit = bound(fmt.element) * torch.where(torch.isfinite(scales), scales, math.inf)
    # Compared in double: the product of two float32 scales and the limit must not round.
    return (torch.isfinite(blocks) & (blocks.abs().double() > limit.double())).sum().double()


def _blocks(x: Tensor, y: Tensor, fmt: AnyFormat, axis: int) -> Tensor:
    assert isinstance(fmt, ScaledFormat)
    _, before = _divided(x, fmt, axis)
    _, after = _divided(y, fmt, axis)
    amax = before.abs().amax((2, 4))
    finite = torch.isfinite(amax) & (amax > 0)
    lossy = ((before != 0) & (after == 0)).any(4).any(2).sum()
    # In units of the block's amax, so that squares of small gradients do not vanish in float32.
    unit = torch.where(finite, amax, 1.0)[:, :, None, :, None]
    signal = (before / unit).square().sum((2, 4), dtype=torch.float64)
    noise = ((before - after) / unit).square().sum((2, 4), dtype=torch.float64)
    sqnr = torch.where(finite, 10 * torch.log10(signal / noise), math.nan).flatten()
    known = ~torch.isnan(sqnr)
    worst = torch.where(known, sqnr, math.inf).amin()
    best = torch.where(known, sqnr, -math.inf).amax()
    none = ~known.any()
    figures = [
        torch.full_like(worst, amax.numel()),
        (amax == 0).sum(),
        lossy,
        torch.where(none, math.nan, worst),
        sqnr.nanmedian(),
        torch.where(none, math.nan, best),
    ]
    histogram = _histogram(amax[finite] if x.device.type == "cpu" else torch.where(finite, amax, 0.0))
    if x.device.type != "cpu":
        histogram[0] -= (~finite).sum()
    return torch.cat([torch.stack([figure.double() for figure in figures]), histogram.double()])
