"""The statistics of a verdict: equivalence by two one-sided tests on paired gaps, with looks on the way.

    gap of a seed   (held-out loss under the policy) / (under the reference) - 1, same weights and same data
    equivalent      both one-sided tests reject: the gap is not ≥ +margin, and not ≤ -margin
    worse           the one-sided test rejects that the gap is ≤ +margin
    else            not enough evidence, and how many seeds would settle it

Each test has level alpha over all looks together. Looking early spends part of it (Lan and DeMets 1983, with the
spending function that resembles O'Brien and Fleming's boundary); the normal boundary of each look becomes a level of
Student's t (Jennison and Turnbull 2000, section 3.8), a little sharper for few pairs: `tests/proof` simulates it.
source: Schuirmann 1987 (two one-sided tests)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, sqrt
from typing import Any, Literal

import numpy as np

from mezzo.errors import ConfigError, require

Verdict = Literal["equivalent", "worse", "not enough evidence"]
ALPHA = 0.05
# The share of alpha that several looks spend by normal theory. Student's t of few pairs is less regular: with all of
# alpha, 8 pairs and looks at 4, 6 and 8 would err in 5.45% of plans, 32 pairs in 5.10% (400,000 plans simulated each).
SPENT = 0.9
POWER = 0.8  # of the number of seeds that is said to settle it
MOST = 100_000  # seeds that nobody will run


def _scipy(module: str) -> Any:
    return require(f"scipy.{module}", extra="proof", option="a verdict")


@dataclass(frozen=True)
class Plan:
    """What is decided before the first run, and not changed after.

    seeds    pairs at the end
    margin   relative gap that does not matter, 0.0025 for 0.25%
    alpha    level of each one-sided test over all looks
    looks    numbers of pairs after which a verdict may be given, the last one `seeds`
    levels   level of each one-sided test at each look
    """

    seeds: int
    margin: float
    alpha: float
    looks: tuple[int, ...]
    levels: tuple[float, ...]

    @classmethod
    def of(cls, seeds: int, margin: float, alpha: float = ALPHA, looks: Sequence[int] | None = None) -> Plan:
        """A plan that looks at all pairs, and before at half and three quarters of them where these are 4 or more.

        raises    ConfigError if there is nothing to decide
        """
        if seeds < 2:
            raise ConfigError(
                f"one pair of runs has no spread, so it decides nothing; take at least 2 seeds, got {seeds}"
            )
        if not 0 < margin < inf:
            raise ConfigError(
                f"the margin is a relative gap above 0, such as 0.25%; got {margin:g}: no two runs are equal"
            )
        if not 0 < alpha < 0.5:
            raise ConfigError(f"alpha is an error rate between 0 and 0.5, got {alpha:g}")
        if looks is not None and (list(looks) != sorted(set(looks)) or not looks or looks[0] < 2 or looks[-1] != seeds):
            raise ConfigError(f"looks are numbers of pairs that grow from 2 or more to {seeds}, got {list(looks)}")
        if looks is None:
            early = {ceil(seeds / 2), ceil(3 * seeds / 4)}
            looks = [*sorted(n for n in early if 4 <= n < seeds), seeds]
        spend = alpha if len(looks) == 1 else SPENT * alpha
        return cls(seeds, margin, alpha, tuple(looks), _levels([n / seeds for n in looks], spend))


def _levels(times: Sequence[float], alpha: float) -> tuple[float, ...]:
    """Nominal one-sided levels at these shares of the information, so that together they spend alpha.

    A Brownian motion that has not crossed an earlier boundary has a density on a grid; each boundary is where the mass
    above it is what the spending function allows (Armitage, McPherson and Rowe 1969).
    """
    norm, brentq = _scipy("stats").norm, _scipy("optimize").brentq
    spent = [2 * float(norm.sf(norm.ppf(1 - alpha / 2) / sqrt(t))) for t in times]
    levels = [spent[0]]
    grid = np.linspace(-8 * sqrt(times[0]), float(norm.isf(spent[0])) * sqrt(times[0]), 2001)
    density = norm.pdf(grid, scale=sqrt(times[0]))
    for k in range(1, len(times)):
        step, wanted = sqrt(times[k] - times[k - 1]), spent[k] - spent[k - 1]

        def above(b: float, grid: Any = grid, density: Any = density, step: float = step) -> float:
            return float(np.trapezoid(density * norm.sf((b - grid) / step), grid))

        bound = brentq(lambda b, above=above, wanted=wanted: above(b) - wanted, 0.0, 8.0, xtol=1e-10)
        levels.append(float(norm.sf(bound / sqrt(times[k]))))
        new = np.linspace(-8 * sqrt(times[k]), bound, 2001)
        kernel = norm.pdf((new[:, None] - grid[None, :]) / step) / step
        grid, density = new, np.trapezoid(kernel * density[None, :], grid, axis=1)
    return tuple(levels)


@dataclass(frozen=True)
class Finding:
    """What a number of paired gaps say.

    gap         their mean;  sd: their standard deviation;  n: how many
    low, high   interval of level 1 - 2·(level of this look): inside ±margin means equivalent
    verdict     by the plan; "not enough evidence" between looks
    more        seeds that would settle it with a power of 80% if gap and spread are as they look now; 0 where it is
                settled, None where no number of seeds that anybody would run does
    note        what a person should know beside it, or ""
    """

    gap: float
    sd: float
    n: int
    low: float
    high: float
    verdict: Verdict
    more: int | None
    note: str = ""


def find(gaps: Sequence[float], plan: Plan, failed: int = 0) -> Finding:
    """The verdict on the gaps so far.

    gaps      relative, of the pairs whose runs both ended
    failed    pairs in which only the policy's run could not be trained to its end: that is a loss
    """
    n = len(gaps)
    assert all(map(isfinite, gaps)), "a run without a finite loss has failed"
    if failed:
        gap = statistics.fmean(gaps) if gaps else inf
        return Finding(
            gap, inf, n + failed, -inf, inf, "worse", 0, f"{failed} of {n + failed} runs could not be trained"
        )
    if n < 2:
        gap = gaps[0] if gaps else float("nan")
        return Finding(gap, inf, n, -inf, inf, "not enough evidence", None)
    mean, sd = statistics.fmean(gaps), statistics.stdev(gaps)
    at = max((k for k, look in enumerate(plan.looks) if look <= n), default=0)
    level = plan.levels[at]
    half = float(_scipy("stats").t.isf(level, n - 1)) * sd / sqrt(n)
    low, high = mean - half, mean + half
    verdict: Verdict = "not enough evidence"
    if n in plan.looks:
        if -plan.margin < low and high < plan.margin:
            verdict = "equivalent"
        elif low > plan.margin:
            verdict = "worse"
    note = ""
    if high < -plan.margin:
        note = "it ended below the reference by more than the margin: not the same, but nothing was lost"
    more = 0 if verdict != "not enough evidence" else seeds_to_settle(mean, sd, plan.margin, plan.alpha)
    return Finding(mean, sd, n, low, high, verdict, more, note)


def power(n: int, gap: float, sd: float, margin: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Chance of the verdicts (equivalent, worse) with n pairs in one look, if the true gap and spread are these.

    The first is a lower bound: 1 - (chance that one test fails) - (chance that the other does).
    """
    t, nct = _scipy("stats").t, _scipy("stats").nct
    q, scale = float(t.isf(alpha, n - 1)), sqrt(n) / sd

    def rejects(distance: float) -> float:
        # scipy's noncentral t gives NaN far out, where there is no doubt left
        delta = distance * scale
        found = float(nct.sf(q, n - 1, delta)) if abs(delta) < 30 else float(delta > 0)
        return found if isfinite(found) else float(delta > q)

    equivalent = rejects(margin - gap) + rejects(margin + gap) - 1
    return max(0.0, equivalent), rejects(gap - margin)


def seeds_to_settle(gap: float, sd: float, margin: float, alpha: float = ALPHA) -> int | None:
    """Pairs that a new plan with one look needs for a power of 80%; None above 100,000, or if nothing was lost."""
    if gap <= -margin:
        return None
    if sd == 0:
        return 2
    which = 0 if gap < margin else 1

    def enough(n: int) -> bool:
        return power(n, gap, sd, margin, alpha)[which] >= POWER

    n = 2
    while not enough(n):
        n *= 2
        if n > MOST:
            return None
    low = n // 2
    while n - low > 1:
        middle = (low + n) // 2
        low, n = (low, middle) if enough(middle) else (middle, n)
    return max(2, n)
