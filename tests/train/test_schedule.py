"""The learning rate, step by step, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mezzo.train.schedule import learning_rate


def rates(steps: int, **changes: Any) -> list[float]:
    options = {"peak": 1.0, "warmup": 0, "kind": "cosine", "min_lr": 0.1, "decay": 0.2} | changes
    return [learning_rate(step, steps=steps, **options) for step in range(steps)]


def test_warmup_rises_linearly_and_its_last_step_has_the_peak() -> None:
    assert rates(6, warmup=4, kind="constant", peak=2.0) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_begins_at_the_peak_passes_the_mean_in_the_middle_and_ends_at_the_minimum() -> None:
    assert rates(5, min_lr=0.2) == pytest.approx(
        [1.0, 0.6 + 0.4 * math.cos(math.pi / 4), 0.6, 0.6 - 0.4 * math.cos(math.pi / 4), 0.2], rel=1e-15
    )


def test_wsd_holds_the_peak_and_falls_linearly_over_the_last_share() -> None:
    assert rates(10, kind="wsd", decay=0.4, min_lr=0.0) == pytest.approx([1] * 6 + [0.75, 0.5, 0.25, 0])
    assert rates(10, kind="wsd", decay=0.2, min_lr=0.5) == pytest.approx([1] * 8 + [0.75, 0.5])


def test_no_first_step_is_wasted_on_a_rate_of_zero() -> None:
    for kind in ("cosine", "wsd", "constant"):
        assert rates(8, kind=kind, warmup=3)[0] > 0


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 1, 2, 50])
def test_a_run_shorter_than_its_schedule_has_rates_all_the_same(kind: str, steps: int, warmup: int) -> None:
    found = rates(steps, kind=kind, warmup=warmup, decay=1.0)
    assert all(0 < rate <= 1 for rate in found)
