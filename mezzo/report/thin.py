"""Fewer points that show the same curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

POINTS = 400  # of a curve; a plot is about that many pixels wide on a phone, twice on a desk
SAMPLES = 60  # columns of a heatmap


def number(value: Any, digits: int = 5) -> float | int | str | None:
    """A number as the page's JSON holds it: a few digits, the nonfinite ones as strings, None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def finite(value: Any) -> float | None:
    """The value as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, evenly apart, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def extremes(values: Sequence[float | None], points: int = POINTS) -> list[int]:
    """Indices of at most `points` values that keep every peak: of each stretch the smallest and the largest.

    values    None where there is nothing to draw
    returns   indices in order; the first and the last finite value are among them
    """
    known = [i for i, value in enumerate(values) if value is not None]
    if len(known) <= points:
        return known
    stretches = (points - 2) // 2
    kept = {known[0], known[-1]}
    for k in range(stretches):
        part = known[k * len(known) // stretches : (k + 1) * len(known) // stretches]
        kept.add(min(part, key=lambda i: values[i] or 0.0))
        kept.add(max(part, key=lambda i: values[i] or 0.0))
    return sorted(kept)


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """Mean of about 2% of the values around each, so that it does not lag; gaps stay gaps.

    At the start the window shrinks on both sides, since the loss falls there; at the end it looks back only.
    """
    half = len(values) // 100
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: list[float | None] = []
    for i, value in enumerate(values):
        low, high = i - min(half, i), min(len(values), i + min(half, i) + 1)
        known = counts[high] - counts[low]
        result.append((sums[high] - sums[low]) / known if value is not None and known else None)
    return result


def curve(steps: Sequence[int], values: Sequence[float | None], points: int = POINTS) -> dict[str, list[Any]]:
    """The curve as the page draws it."""
    kept = extremes(values, points)
    return {"x": [steps[i] for i in kept], "y": [number(values[i]) for i in kept]}
