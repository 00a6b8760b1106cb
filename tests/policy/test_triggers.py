"""Triggers fire exactly when they say, and mean the same after a round trip through a config."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mezzo.errors import ConfigError
from mezzo.policy import Phase, Policy, Schedule, Site
from mezzo.policy.trigger import LossScaleBelow, Parts, Skipped, Stall, Trigger, Underflow, held_out, trigger


def fired(when: Trigger, records: list[dict[str, Any]]) -> int | None:
    """The number of the record after which the trigger first fires."""
    schedule = Schedule((Phase(Policy("fp16"), when=when), Phase(Policy("fp32"))), 1000)
    position = schedule.start()
    for number, record in enumerate(records, 1):
        base = {"step": number, "loss": 2.0, "skipped": False, "loss_scale": 1.0}
        position = schedule.after(position, base | record)
        if position.index:
            return number
    return None


def under(*shares: float | None) -> list[dict[str, Any]]:
    return [{} if share is None else {"underflow": {"*:grad_output": share}} for share in shares]


def test_underflow_compares_the_mean_of_a_full_window() -> None:
    when = Underflow("*:grad_output", above=0.1, window=3)
    assert fired(when, under(0.9, 0.9, 0.0, 0.0)) == 3
    assert fired(when, under(0.9, 0.9)) is None, "the window is not full"
    assert fired(when, under(0.0, 0.0, 0.2, 0.2)) == 4, "0.4 / 3 is more than 0.1, 0.2 / 3 is not"
    assert fired(when, under(0.0, None, 0.2, None, 0.2)) == 5, "steps without a measurement do not count"
    assert fired(Underflow("*:grad_output", above=0.25, window=2), under(0.25, 0.25)) is None, "above, not at"
    assert fired(when, [{"underflow": {"head:grad_output": 0.9}}] * 9) is None, "other sites are no concern"


def test_underflow_speaks_of_the_sites_that_a_rule_would() -> None:
    when = Underflow("blocks.*:grad_output", above=0.1)
    matched = [site for site in (Site("blocks.0.up", "dgrad.a"), Site("blocks.0.up", "wgrad.a"),
               Site("blocks.0.up", "fprop.a"), Site("head", "dgrad.a")) if when.matches(site)]  # fmt: skip
    assert [str(site) for site in matched] == ["blocks.0.up:dgrad.a", "blocks.0.up:wgrad.a"]


def skips(*numbers: int, of: int = 12) -> list[dict[str, Any]]:
    return [{"skipped": n in numbers} for n in range(1, of + 1)]


def test_skipped_counts_the_last_steps() -> None:
    when = Skipped(above=2, window=5)
    assert fired(when, skips(1, 2)) is None
    assert fired(when, skips(1, 2, 3)) == 3, "more than two are more than two, window full or not"
    assert fired(when, skips(1, 3, 6, 7)) == 7, "the first has left the window when the third comes"
    assert fired(when, skips(1, 2, 6, 11)) is None
    assert fired(Skipped(above=0), skips(9)) == 9


def test_the_loss_scale_has_collapsed_when_it_is_below() -> None:
    scales = [{"loss_scale": scale} for scale in (64.0, 16.0, 8.0, 64.0)]
    assert fired(LossScaleBelow(16.0), scales) == 3
    assert fired(LossScaleBelow(8), scales) is None


def losses(*values: float | None, key: str = "val_loss") -> list[dict[str, Any]]:
    return [{} if value is None else {key: value} for value in values]


def test_stall_is_so_many_evaluations_in_a_row_without_an_improvement_on_the_best_before() -> None:
    when = Stall(evaluations=2, margin=0.1)
    assert fired(when, losses(4.0, 3.0, 2.0, 1.9)) is None
    assert fired(when, losses(4.0, 3.0, 2.0, 1.9, None, 1.85)) == 6, "1.8 would have been an improvement on 2.0"
    assert fired(when, losses(4.0, 3.0, 2.0, 1.9, None, 1.79)) is None
    assert fired(when, losses(4.0, 3.9)) is None, "two evaluations and one before them"
    assert fired(when, losses(4.0, 3.9, 3.8)) == 3
    assert fired(Stall(evaluations=1, margin=0.0), losses(3.0, 2.0, 2.0)) == 3
    assert fired(Stall(evaluations=1), losses(3.0, math.nan)) == 2, "a loss that is no number is no improvement"


def test_the_held_out_loss_in_float32_counts_where_there_is_one() -> None:
    assert held_out({"val_loss": 3.0}) == 3.0
    assert held_out({"val_loss": 3.0, "val_loss_fp32": 2.0}) == 2.0
    assert held_out({}) is None


def gaps(*values: float | None) -> list[dict[str, Any]]:
    return [{} if value is None else {"reference_gap": {"runs/a": value, "runs/b": 9.0}} for value in values]


def test_parts_is_so_many_gaps_in_a_row() -> None:
    when = Parts("runs/a", above=0.01, evaluations=2)
    assert fired(when, gaps(0.5, 0.0, 0.5, None, 0.02)) == 5
    assert fired(when, gaps(0.5, 0.01, 0.5, 0.01)) is None, "above, not at"
    assert fired(when, gaps(0.5)) is None
    assert fired(Parts("runs/a", 0.01, 1), gaps(None, math.nan)) == 2, "a loss that is no number has parted"


EVERY = [
    Underflow("*:grad_output", 0.01, 5, 3),
    Skipped(3, 50),
    LossScaleBelow(16.0),
    Stall(4, 0.01),
    Parts("runs/reference", 0.005, 3),
]


@pytest.mark.parametrize("when", EVERY, ids=lambda when: when.name)
def test_a_trigger_survives_its_table(when: Trigger) -> None:
    assert trigger(when.to_dict()) == when
    assert when.to_dict()["trigger"] == when.name
    assert str(when)
    assert not when.fires(())


def test_defaults_may_be_left_out() -> None:
    assert trigger({"trigger": "stall"}) == Stall(3, 0.001)
    assert trigger({"trigger": "underflow", "sites": "head:input", "above": 0}) == Underflow("head:input", 0, 10, 10)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "a phase's when needs trigger = one of underflow, skipped, loss_scale, stall, parts; got None"),
        ({"trigger": "stal"}, "one of underflow, skipped, loss_scale, stall, parts; got 'stal'"),
        ({"trigger": ["stall"]}, "got ['stall']"),
        ({"trigger": "stall", "window": 3}, "unknown key 'window' of the trigger stall; known: evaluations, margin"),
        ({"trigger": "skipped"}, "the trigger skipped needs above"),
        ({"trigger": "underflow", "window": 3}, "the trigger underflow needs sites, above"),
        ({"trigger": "skipped", "above": "3"}, "the trigger skipped: above is a whole number, got '3'"),
        ({"trigger": "skipped", "above": 3.0}, "the trigger skipped: above is a whole number, got 3.0"),
        ({"trigger": "skipped", "above": True}, "the trigger skipped: above is a whole number, got True"),
        ({"trigger": "skipped", "above": 0, "window": 0}, "the trigger skipped: window is at least 1, got 0"),
        ({"trigger": "skipped", "above": -1}, "the trigger skipped: above is from 0 to window - 1 = 99, got -1"),
        ({"trigger": "skipped", "above": 5, "window": 5}, "above is from 0 to window - 1 = 4, got 5"),
        ({"trigger": "stall", "evaluations": 0}, "the trigger stall: evaluations is at least 1, got 0"),
        ({"trigger": "stall", "margin": 1.0}, "the trigger stall: margin is a share from 0 to 1, got 1"),
        ({"trigger": "parts", "run": 3, "above": 0.1}, "the trigger parts: run is a string, got 3"),
        ({"trigger": "parts", "run": "a", "above": math.nan}, "the trigger parts: above is a finite number, got nan"),
        ({"trigger": "loss_scale", "below": math.inf}, "the trigger loss_scale: below is a finite number, got inf"),
        ({"trigger": "underflow", "sites": "*:input", "above": 1.0}, "above is a share from 0 to 1, got 1"),
        ({"trigger": "underflow", "sites": "*:input", "above": 0.1, "every": 0}, "every is at least 1, got 0"),
        ({"trigger": "underflow", "sites": "head", "above": 0.1}, "sites is PATH:ROLE, such as *:grad_output; got"),
        ({"trigger": "underflow", "sites": "*:grad_outputs", "above": 0.1}, "unknown role 'grad_outputs'"),
        ({"trigger": "underflow", "sites": "*:master", "above": 0.1}, "*:master speaks of master, which no product"),
        ({"trigger": "underflow", "sites": "*:compute", "above": 0.1}, "*:compute speaks of compute, which no"),
    ],
)
def test_a_trigger_that_means_nothing_is_an_error(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trigger(table)
    assert message in str(caught.value)
