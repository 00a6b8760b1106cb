"""What a rounding lost, on the device: `mezzo/formats/measure.py` is the text that this translates.

tap ──► take: sums (8), histogram (256), blocks (6 + 256), as tensors ──► read: one copy to the host for all sites
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mezzo.formats import AnyFormat, ScaledFormat
from mezzo.formats.blocks import Groups
from mezzo.formats.measure import BINS, Blocks, Measure, bound, has_blocks
from mezzo.torch import helper
from mezzo.torch.groups import amax_scales, divide
from mezzo.torch.helper.tensors import dense

PIECE = 1 << 22  # elements that have copies in double at a time
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
    known: bool = True

    def unknown(self) -> Taken:
        """The same where nothing is known of what was lost."""
        return self._replace(blocks=None, known=False)


@torch.no_grad()
def take(x: Tensor, y: Tensor, fmt: AnyFormat, axis: int = -1, scale: Tensor | None = None) -> Taken:
    """Measure `x`, which was rounded to `y`.

    fmt     the format of y; axis as in `quantize`
    scale   the one that was given; None: `fmt` takes its scales from the tensor itself
    """
    x, y = x.detach(), y.detach()
    sums, histogram = elements(x, y, _limit(fmt, scale))
    if not isinstance(fmt, ScaledFormat) or not x.numel():
        return Taken(sums, histogram, None)
    clips = scale is None and fmt.scaling in ("floor", "nvfp4")
    if not (clips or has_blocks(fmt)):
        return Taken(sums, histogram, None)
    groups = Groups(tuple(x.shape), fmt, axis)
    found = _blocks(x, y, groups, fmt, axis)
    if clips:
        sums[4] += _clipped(x, y, groups, found.amax, fmt)
    return Taken(sums, histogram, _summary(found) if has_blocks(fmt) else None)


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
            whole = [int(figure) for figure in detail[:3]]
            blocks = Blocks(whole[0], whole[1], whole[2], (worst, median, best), detail[6:].astype("int64"))
        histogram = histogram.copy()
        histogram[0] = max(0, histogram[0] - zeros)
        counts = count, zeros, nonfinite, underflowed, overflowed
        found.append(Measure(*counts, amax, signal, noise, histogram, blocks, one.known))
    return found


def _limit(fmt: AnyFormat, scale: Tensor | None) -> float | Tensor:
    """The magnitude from which on elements have overflowed, where one holds for the whole tensor."""
    if not isinstance(fmt, ScaledFormat):
        return bound(fmt)
    # A scale that follows the tensor's own amax leaves nothing above the largest value.
    return math.inf if scale is None else bound(fmt.element) * scale


def _compiled(x: Tensor, y: Tensor) -> helper.Helper | None:
    """The helper, where it can measure these and is worth it."""
    fits = x.device.type == "cpu" and x.numel() >= HELPER_FROM and torch.float64 not in (x.dtype, y.dtype)
    return helper.load() if fits else None


def elements(x: Tensor, y: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    """Sums and histogram of `Taken`; from `limit` on a magnitude has overflowed."""
    compiled = _compiled(x, y)
    if compiled is not None:
        if x.stride() != y.stride() or not dense(x):
            x, y = x.contiguous(), y.contiguous()
        return compiled.measure(x, y, float(limit))
    pieces = zip(x.reshape(-1).split(PIECE), y.reshape(-1).split(PIECE), strict=True)
    several = [_piece(before, after, limit) for before, after in pieces]
    if not several:
        several = [_piece(x.reshape(-1), y.reshape(-1), limit)]
    sums = torch.stack([one for one, _ in several])
    total = sums.sum(0)
    total[5] = sums[:, 5].amax()
    return total, torch.stack([one for _, one in several]).sum(0)


def _piece(x: Tensor, y: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    """`elements` of at most PIECE of them, in doubles all at once."""
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


class _PerBlock(NamedTuple):
    """(outer, R, C) of each: amax, in what scales are computed in; sums in float64; whether a value underflowed."""

    amax: Tensor
    signal: Tensor
    noise: Tensor
    lossy: Tensor


def _blocks(x: Tensor, y: Tensor, groups: Groups, fmt: ScaledFormat, axis: int) -> _PerBlock:
    compiled = _compiled(x, y)
    if compiled is not None:
        *outer, height, width = groups.moved
        shape = math.prod(outer), -(-height // groups.rows), -(-width // groups.columns)
        found = compiled.measure_blocks(x.contiguous(), y.contiguous(), fmt, axis)
        return _PerBlock(*(one.view(shape) for one in found))
    rows = [
        _PerBlock(
            before.abs().amax((1, 3)).to(x.dtype if x.dtype is torch.float64 else torch.float32),
            before.square().sum((1, 3)),
            (before - after).square().sum((1, 3)),
            ((before != 0) & (after == 0)).any(3).any(1),
        )
        for before, after in _rows(divide(groups, x), divide(groups, y))
    ]
    count = math.prod(groups.moved[:-2])
    return _PerBlock(*(torch.cat(column).unflatten(0, (count, -1)) for column in zip(*rows, strict=True)))


def _rows(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(R, r, C, c) of each in double, so that squares of small gradients do not vanish; about PIECE elements at a time.

    x, y   (outer, R, r, C, c)
    """
    step = _step(x)
    for before, after in zip(x.flatten(0, 1).split(step), y.flatten(0, 1).split(step), strict=True):
        yield before.double(), after.double()


def _step(x: Tensor) -> int:
    """How many rows of blocks hold about PIECE elements."""
    return max(1, PIECE // max(1, math.prod(x.shape[2:])))


def _clipped(x: Tensor, y: Tensor, groups: Groups, amax: Tensor, fmt: ScaledFormat) -> Tensor | int:
    """How many finite elements that stayed finite lie beyond what their block's scale lets the elements hold."""
    found = amax_scales(amax[:, :, None, :, None], fmt)
    # In double, where the product of the scales and the bound does not round.
    scales = found.scales.double() if found.tensor is None else found.scales.double() * found.tensor.double()
    # Under a scale that rounded to zero nothing overflows: everything underflows.
    limit = bound(fmt.element) * torch.where(torch.isfinite(scales) & (scales > 0), scales, math.inf)
    if x.device.type != "cpu":
        divided = divide(groups, x)
        rows, limits = _rows(divided, divide(groups, y)), limit.flatten(0, 1).split(_step(divided))
        counts = [
            (torch.isfinite(before) & torch.isfinite(after) & (before.abs() > most)).sum()
            for (before, after), most in zip(rows, limits, strict=True)
        ]
        return torch.stack(counts).sum()
    above = amax.double() > limit[:, :, 0, :, 0]  # never where amax is not finite: the limit is infinite there
    if not bool(above.any()):
        return 0
    before, after = (divide(groups, side).transpose(2, 3)[above] for side in (x, y))
    return (torch.isfinite(after) & (before.abs().double() > limit[:, :, 0, :, 0][above][:, None, None])).sum()


def _summary(found: _PerBlock) -> Tensor:
    """`Taken.blocks`."""
    amax = found.amax
    finite = torch.isfinite(amax) & (amax > 0)
    ratio = torch.where(finite, found.signal / found.noise, math.nan).flatten()
    known = ~torch.isnan(ratio)
    worst, best = torch.where(known, ratio, math.inf).amin(), torch.where(known, ratio, -math.inf).amax()
    sqnr = torch.where(known.any(), 10 * torch.log10(torch.stack([worst, ratio.nanmedian(), best])), math.nan)
    counts = [torch.full_like(worst, amax.numel()), (amax == 0).sum(), found.lossy.sum()]
    histogram = _histogram(amax[finite] if amax.device.type == "cpu" else torch.where(finite, amax, 0.0))
    if amax.device.type != "cpu":
        histogram[0] -= (~finite).sum()
    return torch.cat([torch.stack([count.double() for count in counts]), sqnr, histogram.double()])
