"""The verdict keeps its promises: simulated pairs with known gaps, and every branch by hand."""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
import pytest
from scipy.stats import t

from mezzo.errors import ConfigError
from mezzo.proof.statistics import Plan, find, power, seeds_to_settle

MARGIN = 0.0025
DRAWS = 100_000


def verdicts(plan: Plan, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(equivalent, worse) for each row of gaps (draws, seeds), stopping at the first verdict: written anew."""
    equivalent = np.zeros(len(gaps), bool)
    worse = np.zeros(len(gaps), bool)
    for look, level in zip(plan.looks, plan.levels, strict=True):
        seen = gaps[:, :look]
        mean, error = seen.mean(1), seen.std(1, ddof=1) / sqrt(look)
        half = t.isf(level, look - 1) * error
        open_ = ~(equivalent | worse)
        equivalent |= open_ & (mean - half > -plan.margin) & (mean + half < plan.margin)
        worse |= open_ & (mean - half > plan.margin)
    return equivalent, worse


def simulated(plan: Plan, gap: float, sd: float, draws: int = DRAWS) -> tuple[float, float]:
    rng = np.random.default_rng(7)
    equivalent, worse = verdicts(plan, rng.normal(gap, sd, (draws, plan.seeds)))
    return float(equivalent.mean()), float(worse.mean())


@pytest.mark.parametrize("seeds", [2, 3, 4, 6, 8, 12, 16, 32])
@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0])
def test_a_gap_of_the_margin_is_called_equivalent_or_worse_in_at_most_one_case_of_twenty(
    seeds: int, spread: float
) -> None:
    above = 0.05 + 3 * sqrt(0.05 * 0.95 / DRAWS)  # three sigma of the binomial
    for gap in (MARGIN, -MARGIN):
        equivalent, worse = simulated(Plan.of(seeds, MARGIN), gap, spread * MARGIN)
        assert equivalent <= above
        assert worse <= above


@pytest.mark.parametrize("gap", [0.0, 0.3, 0.6, 1.4, 2.0])
def test_the_power_of_one_look_is_what_is_promised(gap: float) -> None:
    plan = Plan.of(8, MARGIN, looks=[8])
    for spread in (0.3, 0.7, 1.2):
        equivalent, worse = simulated(plan, gap * MARGIN, spread * MARGIN)
        low, bound = power(8, gap * MARGIN, spread * MARGIN, MARGIN)
        sigma = 3 * sqrt(0.25 / DRAWS)
        assert equivalent >= low - sigma  # a lower bound, close where the power is of use
        assert low < 0.5 or equivalent <= low + 0.01 + sigma
        assert abs(worse - bound) <= sigma


def test_looking_early_costs_little_power_and_saves_runs() -> None:
    looks, once = Plan.of(8, MARGIN), Plan.of(8, MARGIN, looks=[8])
    with_looks, _ = simulated(looks, 0.0, 0.7 * MARGIN)
    without, _ = simulated(once, 0.0, 0.7 * MARGIN)
    assert without - 0.06 < with_looks <= without + 0.01
    gaps = np.random.default_rng(1).normal(0.0, 0.2 * MARGIN, (2000, 8))
    early, _ = verdicts(Plan(4, MARGIN, 0.05, looks.looks[:1], looks.levels[:1]), gaps[:, :4])
    assert early.mean() > 0.5


def test_find_decides_as_the_simulation_does() -> None:
    rng = np.random.default_rng(3)
    plan = Plan.of(8, MARGIN)
    gaps = np.concatenate([rng.normal(gap, sd, (60, 8)) for gap in (0.0, 0.002, 0.005) for sd in (0.0005, 0.002)])
    equivalent, worse = verdicts(plan, gaps)
    said = []
    for row in gaps:
        found = [find(list(row[:look]), plan).verdict for look in plan.looks]
        said.append(next((v for v in found if v != "not enough evidence"), found[-1]))
    assert [v == "equivalent" for v in said] == equivalent.tolist()
    assert [v == "worse" for v in said] == worse.tolist()
    assert len(set(said)) == 3


def test_between_looks_there_is_no_verdict() -> None:
    plan = Plan.of(8, MARGIN)
    assert plan.looks == (4, 6, 8)
    assert find([1e-6, 2e-6, 0.0, 1e-6], plan).verdict == "equivalent"
    assert find([1e-6, 2e-6, 0.0, 1e-6, 1e-6], plan).verdict == "not enough evidence"


def test_levels_spend_alpha_by_normal_theory() -> None:
    # O'Brien and Fleming's boundary in Lan and DeMets' form for looks at 1/2 and 1, one-sided 2.5%: 2.963 and 1.969
    # (Jennison and Turnbull 2000, table 7.1; Proschan, Lan and Wittes 2006)
    from scipy.stats import norm

    from mezzo.proof.statistics import _levels

    first, last = (float(norm.isf(level)) for level in _levels([0.5, 1.0], 0.025))
    assert abs(first - 2.963) < 1e-3
    assert abs(last - 1.969) < 1e-3


def test_the_number_of_seeds_is_the_smallest_with_that_power() -> None:
    for gap, sd in ((0.0, 0.003), (0.0015, 0.003), (0.004, 0.003), (0.01, 0.012)):
        n = seeds_to_settle(gap, sd, MARGIN)
        assert n is not None
        which = 0 if gap < MARGIN else 1
        assert power(n, gap, sd, MARGIN)[which] >= 0.8 > power(n - 1, gap, sd, MARGIN)[which]
    assert seeds_to_settle(0.0, 0.0, MARGIN) == 2
    assert seeds_to_settle(MARGIN, 0.001, MARGIN) is None
    assert seeds_to_settle(-2 * MARGIN, 0.001, MARGIN) is None


def test_identical_runs_are_equivalent_and_constant_gaps_are_what_they_are() -> None:
    plan = Plan.of(3, MARGIN)
    assert find([0.0, 0.0, 0.0], plan).verdict == "equivalent"
    assert find([0.01, 0.01, 0.01], plan).verdict == "worse"
    found = find([-0.01, -0.0101, -0.0099], plan)
    assert found.verdict == "not enough evidence"
    assert "nothing was lost" in found.note
    assert found.more is None


def test_a_run_that_cannot_be_trained_is_a_loss() -> None:
    found = find([0.0, 0.0], Plan.of(3, MARGIN), failed=1)
    assert found.verdict == "worse"
    assert "1 of 3 runs could not be trained" in found.note


def test_one_pair_says_nothing() -> None:
    found = find([0.0], Plan.of(2, MARGIN))
    assert found.verdict == "not enough evidence"
    assert (found.low, found.high) == (-inf, inf)


@pytest.mark.parametrize(
    ("seeds", "margin", "alpha", "said"),
    [
        (1, MARGIN, 0.05, "at least 2 seeds, got 1"),
        (8, 0.0, 0.05, "margin is a relative gap above 0"),
        (8, -0.1, 0.05, "margin is a relative gap above 0"),
        (8, inf, 0.05, "margin is a relative gap above 0"),
        (8, float("nan"), 0.05, "margin is a relative gap above 0"),
        (8, MARGIN, 0.5, "alpha is an error rate"),
    ],
)
def test_a_plan_that_decides_nothing_is_refused(seeds: int, margin: float, alpha: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Plan.of(seeds, margin, alpha)
