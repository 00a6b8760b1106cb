"""What a rounding lost: the measures of one tensor before and after it. `measure` is the text that adapters translate.

underflow   values other than zero that became zero
overflow    finite values that lie beyond the largest that the format can hold by more than half of its last step: their
            error comes from the format's range, not from its precision; and those that became infinite or NaN
SQNR        signal-to-quantisation-noise ratio, 10 log10(sum of x^2 / sum of (x - y)^2) in dB
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mezzo.formats.blocks import Groups
from mezzo.formats.scaled import AnyFormat, ScaledFormat
from mezzo.formats.spec import Format

BINS = 256  # the exponents of float32; what it holds as subnormal is in bin 0
BIAS = 127
Array = np.ndarray[Any, Any]


def bound(element: Format) -> float:
    """The magnitude, in units of the scale, from which on a value has overflowed an element format."""
    step = 1.0 if element.is_integer else math.ldexp(element.epsilon, element.max_exponent)
    return element.max + step / 2


@dataclass(frozen=True)
class Blocks:
    """Detail of a format with blocks.

    count, zero   blocks; those that hold zeros only
    lossy         blocks in which a value underflowed
    sqnr          dB of the worst block, the median one, the best one; NaN if all are zero
    amax          (256,) blocks by the exponent of their amax, as `Measure.histogram`
    """

    count: int
    zero: int
    lossy: int
    sqnr: tuple[float, float, float]
    amax: Array

    def __add__(self, other: Blocks) -> Blocks:
        """Both together; the median is the mean of the two medians, each weighted by its blocks."""
        weights = np.array([self.count - self.zero, other.count - other.zero])
        medians = np.array([self.sqnr[1], other.sqnr[1]])
        there = (weights > 0) & ~np.isnan(medians)
        median = float(np.average(medians[there], weights=weights[there])) if there.any() else math.nan
        sqnr = (float(np.fmin(self.sqnr[0], other.sqnr[0])), median, float(np.fmax(self.sqnr[2], other.sqnr[2])))
        counts = (self.count + other.count, self.zero + other.zero, self.lossy + other.lossy)
        return Blocks(*counts, sqnr, self.amax + other.amax)

    def to_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "zero": self.zero,
            "lossy": self.lossy / self.count if self.count else 0.0,
            "sqnr": [_rounded(value) for value in self.sqnr],
            "amax": _trimmed(self.amax),
        }


@dataclass(frozen=True)
class Measure:
    """What the rounding of a tensor, or of several added up, lost.

    count                    elements
    zeros, nonfinite         how many of them were zero, infinite or NaN before
    underflowed, overflowed  how many were lost to the format's range
    amax                     largest finite magnitude before
    signal, noise            sums of x^2 and (x - y)^2 where both are finite
    known                    whether x is what came before any rounding: if not, nothing can be said of what was lost
    histogram                (256,) finite elements but zeros by their float32 exponent: bin k has 2^(k-127) ≤ |x| <
                             2^(k-126), bin 0 what lies below
    """

    count: int
    zeros: int
    nonfinite: int
    underflowed: int
    overflowed: int
    amax: float
    signal: float
    noise: float
    histogram: Array = field(compare=False, repr=False)
    blocks: Blocks | None = None
    known: bool = True

    @property
    def underflow(self) -> float:
        """Share of the values other than zero that became zero."""
        there = self.count - self.zeros - self.nonfinite
        return self.underflowed / there if there else 0.0

    @property
    def overflow(self) -> float:
        """Share of the finite values that overflowed."""
        there = self.count - self.nonfinite
        return self.overflowed / there if there else 0.0

    @property
    def sqnr(self) -> float:
        """dB; infinite where rounding changed nothing, NaN with nothing to compare or a value that is not finite."""
        if not self.signal > 0 or self.nonfinite or not self.known:
            return math.nan
        return 10 * math.log10(self.signal / self.noise) if self.noise > 0 else math.inf

    def __add__(self, other: Measure) -> Measure:
        blocks = self.blocks + other.blocks if self.blocks and other.blocks else self.blocks or other.blocks
        return Measure(
            self.count + other.count,
            self.zeros + other.zeros,
            self.nonfinite + other.nonfinite,
            self.underflowed + other.underflowed,
            self.overflowed + other.overflowed,
            max(self.amax, other.amax),
            self.signal + other.signal,
            self.noise + other.noise,
            self.histogram + other.histogram,
            blocks,
            self.known and other.known,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a log: shares instead of counts, the histogram without its empty ends."""
        found: dict[str, Any] = {
            "count": self.count,
            "zeros": self.zeros,
            "nonfinite": self.nonfinite,
            "amax": self.amax,
            "underflow": self.underflow if self.known else None,
            "overflow": self.overflow if self.known else None,
            "sqnr": _rounded(self.sqnr),
            "histogram": _trimmed(self.histogram),
        }
        return found | ({"blocks": self.blocks.to_dict()} if self.blocks else {})


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3) if math.isfinite(value) else value


def _trimmed(histogram: Array) -> list[Any]:
    """[exponent of the first bin, counts], without empty bins at the ends."""
    there = np.flatnonzero(histogram)
    if not there.size:
        return [0, []]
    first, last = int(there[0]), int(there[-1])
    return [first - BIAS, histogram[first : last + 1].tolist()]


def measure(x: Array, y: Array, fmt: AnyFormat, *, axis: int = -1, limits: Array | float | None = None) -> Measure:
    """What was lost where `x` was rounded to `y`.

    x, y      arrays of one shape, before and after
    fmt       the format of y; axis as in `quantize`
    limits    magnitudes from which on elements have overflowed, in x's shape or 0-d; None: those of `fmt` if it has no
              scales, and none if it has
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if limits is None:
        limits = math.inf if isinstance(fmt, ScaledFormat) else bound(fmt)
    finite, both = np.isfinite(x), np.isfinite(x) & np.isfinite(y)
    there = finite & (x != 0)
    magnitude = np.where(finite, np.abs(x), 0.0)
    error = np.where(both, x - np.where(both, y, 0.0), 0.0)
    blocks = _blocks(x, y, fmt, axis) if has_blocks(fmt) and x.size else None
    return Measure(
        count=x.size,
        zeros=int((x == 0).sum()),
        nonfinite=int((~finite).sum()),
        underflowed=int((there & (y == 0)).sum()),
        overflowed=int((finite & ((magnitude > limits) | ~np.isfinite(y))).sum()),
        amax=float(magnitude.max(initial=0.0)),
        signal=float((magnitude[both] ** 2).sum()),
        noise=float((error**2).sum()),
        histogram=_histogram(magnitude[there]),
        blocks=blocks,
    )


def has_blocks(fmt: AnyFormat) -> bool:
    """Whether scales of `fmt` belong to parts of a tensor."""
    return isinstance(fmt, ScaledFormat) and fmt.group != "tensor"


def _histogram(magnitude: Array) -> Array:
    with np.errstate(over="ignore"):
        exponents = (magnitude.astype(np.float32).view(np.uint32) >> 23).astype(np.int64)
    return np.bincount(np.minimum(exponents, BINS - 2), minlength=BINS)


def _blocks(x: Array, y: Array, fmt: AnyFormat, axis: int) -> Blocks:
    """Blocks that hold an infinity or a NaN have no SQNR."""
    assert isinstance(fmt, ScaledFormat)
    groups = Groups(x.shape, fmt, axis)
    before, after = groups.divide(x), groups.divide(y)
    amax = np.abs(before).max(axis=(2, 4))
    with np.errstate(invalid="ignore", divide="ignore"):
        signal, noise = (before**2).sum(axis=(2, 4)), ((before - after) ** 2).sum(axis=(2, 4))
        sqnr = 10 * np.log10(signal / noise)
    sqnr = sqnr[np.isfinite(amax) & (amax > 0) & ~np.isnan(sqnr)]
    lossy = ((before != 0) & (after == 0)).any(axis=(2, 4))
    worst = (sqnr.min(), np.sort(sqnr)[(sqnr.size - 1) // 2], sqnr.max()) if sqnr.size else (math.nan,) * 3
    finite = amax[np.isfinite(amax) & (amax > 0)]
    return Blocks(
        amax.size,
        int((amax == 0).sum()),
        int(lossy.sum()),
        (float(worst[0]), float(worst[1]), float(worst[2])),
        _histogram(finite),
    )
