"""The plot of the paired differences."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from mezzo.errors import require

if TYPE_CHECKING:
    from mezzo.proof.parity import Parity


def plot(parity: Parity, path: Path) -> Path:
    """Each pair's gap in percent, candidate and control, the margin as a band, and the verdict's interval."""
    figure_of = require("matplotlib.figure", extra="proof", option="the plot of a parity proof").Figure
    figure = figure_of(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    margin = 100 * parity.plan.margin
    axes.axhspan(-margin, margin, color="tab:green", alpha=0.12, label=f"margin ±{margin:g}%")
    axes.axhline(0, color="grey", linewidth=0.8)
    width = 0
    for arm, marker, colour in (("control", "x", "grey"), ("candidate", "o", "tab:blue")):
        gaps = parity.gaps(arm)
        width = max(width, *gaps) if gaps else width
        name = "reference, perturbed by 1e-7" if arm == "control" else parity.candidate
        axes.plot(list(gaps), [100 * gap for gap in gaps.values()], marker, color=colour, label=name)
    found = parity.finding()
    at = width + 1
    if isfinite(found.low):
        below, over = 100 * (found.gap - found.low), 100 * (found.high - found.gap)
        axes.errorbar([at], [100 * found.gap], [[below], [over]], fmt="D", color="tab:blue", capsize=5)
    axes.set_xticks([*range(width + 1), at], [*map(str, range(width + 1)), "mean"])
    axes.set_xlabel("pair (seed)")
    axes.set_ylabel("held-out loss over the reference's, %")
    axes.set_title(f"{found.verdict} at a margin of {margin:g}%, {found.n} pairs")
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=150)
    return path
