"""Schedules of phases: where a run is after each step, as a pure function of the records, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from mezzo.errors import ConfigError
from mezzo.policy import Phase, Policy, Schedule, Site
from mezzo.policy.phases import NAMED, Position, high_precision, named, of
from mezzo.policy.site import STATE_ROLES
from mezzo.policy.trigger import Skipped, Stall

LOW, HIGH = Policy("fp16"), Policy("fp32")


def record(step: int, skipped: bool = False, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.0, "skipped": skipped, "loss_scale": 1024.0, **more}


def walk(schedule: Schedule, records: list[dict[str, Any]]) -> list[int]:
    """The index of the phase that each step was in."""
    position, found = schedule.start(), []
    for one in records:
        found.append(position.index)
        position = schedule.after(position, one)
    return found


def test_a_phase_ends_after_the_step_that_it_names() -> None:
    schedule = Schedule((Phase(LOW, until=3), Phase(HIGH, until=5), Phase(LOW)), 8)
    assert walk(schedule, [record(n) for n in range(1, 9)]) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert schedule.ends == (3, 5, None)


def test_a_share_is_of_the_whole_run_and_rounds_to_a_step() -> None:
    assert Schedule((Phase(LOW, until=0.75), Phase(HIGH, until=0.8), Phase(LOW)), 1000).ends == (750, 800, None)
    assert Schedule((Phase(LOW, until=0.5), Phase(HIGH)), 7).ends == (4, None), "3.5 rounds to even"
    assert Schedule((Phase(LOW, until=1.0),), 7).ends == (7,)
    assert Schedule((Phase(LOW, until=1), Phase(HIGH)), 7).ends == (1, None), "without a point it is a step"
    assert Schedule((Phase(LOW, until=0.0), Phase(HIGH)), 7).ends == (0, None)


def test_a_phase_of_no_steps_is_passed_over() -> None:
    schedule = Schedule((Phase(LOW, until=0), Phase(HIGH, until=2), Phase(HIGH, until=2), Phase(LOW)), 4)
    assert schedule.start() == Position(1, 0)
    assert walk(schedule, [record(n) for n in range(1, 5)]) == [1, 1, 3, 3]


def test_a_trigger_ends_a_phase_and_the_next_begins_after_that_step() -> None:
    schedule = Schedule((Phase(LOW, until=6, when=Skipped(above=1, window=3)), Phase(HIGH)), 9)
    skips = [record(n, skipped=n in (2, 4)) for n in range(1, 10)]
    assert walk(schedule, skips) == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert walk(schedule, [record(n) for n in range(1, 10)]) == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_a_trigger_forgets_what_was_in_the_phase_before() -> None:
    when = Skipped(above=1, window=10)
    schedule = Schedule((Phase(LOW, when=when), Phase(HIGH, when=when), Phase(LOW)), 20)
    skips = [record(n, skipped=n in (1, 2, 3)) for n in range(1, 10)]
    assert walk(schedule, skips) == [0, 0, 1, 1, 1, 1, 1, 1, 1], "one skip in the second phase is not two"


def test_only_as_many_records_as_the_trigger_needs_are_remembered() -> None:
    schedule = Schedule((Phase(LOW, when=Skipped(above=2, window=3)), Phase(HIGH)), 20)
    position = schedule.start()
    for n in range(1, 9):
        position = schedule.after(position, record(n, skipped=n == 8))
    assert position == Position(0, 0, ({"skipped": False}, {"skipped": False}, {"skipped": True}))


def test_the_transition_changes_nothing_that_it_is_given() -> None:
    schedule = Schedule((Phase(LOW, when=Stall(1)), Phase(HIGH)), 20)
    position = schedule.after(schedule.start(), record(1, val_loss=3.0))
    before, one = copy.deepcopy(position), record(2, val_loss=3.0)
    given = copy.deepcopy(one)
    assert schedule.after(position, one) == schedule.after(position, one) == Position(1, 2)
    assert (position, one) == (before, given)


def test_a_position_survives_json() -> None:
    for position in (Position(), Position(2, 17, ({"skipped": True}, {"skipped": False}))):
        assert Position.from_dict(json.loads(json.dumps(position.to_dict()))) == position


def test_the_position_after_some_steps_is_known_if_no_trigger_fires() -> None:
    schedule = Schedule((Phase(LOW, until=3), Phase(HIGH, until=5, when=Skipped(above=0)), Phase(LOW)), 8)
    assert [schedule.at(step).index for step in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), "a schedule needs at least one phase"),
        ((Phase(LOW, until=5), Phase(HIGH, until=4), Phase(LOW)),
         "phase 2 ends at step 4, before the one ahead of it does (5): they overlap; give it a later until"),
        ((Phase(LOW), Phase(HIGH)), "phase 1 never ends; give it until = STEP or SHARE, or a trigger with when"),
        ((Phase(LOW, until=5), Phase(HIGH, until=6)),
         "phase 2, the last one, ends at step 6 of 10; leave its until out"),
        ((Phase(LOW, until=5), Phase(HIGH, when=Stall())),
         "phase 2 is the last one: its trigger would be for a phase that does not follow"),
        ((Phase(LOW, until=5), Phase(HIGH, calibrate=True)), "phase 2 is the last one: its calibration would be"),
        ((Phase(LOW, lr=0.0),), "phase 1: lr is a factor above 0, got 0"),
        ((Phase(LOW, lr=float("nan")),), "phase 1: lr is a factor above 0, got nan"),
        ((Phase(LOW, until=11), Phase(HIGH)), "phase 1 ends at step 11, but the run has 10 steps"),
        ((Phase(LOW, until=-1), Phase(HIGH)), "phase 1 ends at step -1, but the run has 10 steps"),
        ((Phase(LOW, until=1.5), Phase(HIGH)), "phase 1: until = 1.5 is no share from 0.0 to 1.0; write a step"),
        ((Phase(LOW, until=float("nan")), Phase(HIGH)), "phase 1: until = nan is no share"),
    ],
)  # fmt: skip
def test_phases_that_cannot_be_are_an_error_that_names_one(phases: tuple[Phase, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule(phases, 10)
    assert message in str(caught.value)


RECIPES = ["bf16", "fp16", "fp32", "fp8", "fp8-block", "nvfp4", "mxfp8", "bf16-pure", "bf16-pure-split", "fp64"]


@pytest.mark.parametrize("recipe", [*RECIPES, "bf16; *:state=e4m3@1x128; head:master=bfloat16 kahan"])
def test_named_schedules_keep_how_weights_and_moments_are_stored(recipe: str) -> None:
    low = Policy.parse(recipe)
    for name in NAMED:
        for phase in named(name, low):
            assert Policy.parse(str(phase.policy)) == phase.policy
            for role in ("master", *STATE_ROLES):
                for path in ("blocks.0.mlp.up", "head"):
                    assert phase.policy.spec(Site(path, role)) == low.spec(Site(path, role)), (name, role)


def test_dmp_is_low_then_a_calibration_in_fp32_then_low_with_wide_forward_operands() -> None:
    first, middle, last = named("dmp", Policy("nvfp4"))
    assert (first, middle) == (Phase(Policy("nvfp4"), until=0.75), Phase(HIGH, until=0.8, calibrate=True))
    assert str(last.policy) == "nvfp4; *:fprop.a=bfloat16; *:fprop.b=bfloat16"
    assert Schedule((first, middle, last), 1000).ends == (750, 800, None)
    _, middle, last = named("dmp", Policy("fp16"))
    assert str(last.policy) == "fp16; *:fprop.a=float32; *:fprop.b=float32", "16 bits are not wide beside 16"
    assert last.policy.loss_scaling == Policy("fp16").loss_scaling
    _, middle, last = named("dmp", Policy("bf16-pure"))
    assert str(middle.policy) == "fp32; *:master=bfloat16 stochastic; *:state=bfloat16 stochastic"


def test_dmp_makes_no_operand_narrower_than_it_was() -> None:
    low = Policy.parse("fp8; head:*=float32; *.up:input=e4m3@1x128")
    last = named("dmp", low)[-1].policy
    formats = {path: [str(last.format(Site(path, role))) for role in ("fprop.a", "fprop.b", "dgrad.a")]
               for path in ("head", "blocks.0.up", "blocks.0.down")}  # fmt: skip
    assert formats["head"] == ["float32", "float32", "float32"]
    assert formats["blocks.0.up"] == formats["blocks.0.down"] == ["bfloat16", "bfloat16", str(Policy("fp8").format(
        Site("blocks.0.up", "dgrad.a")))]  # fmt: skip


def test_bf16_finish_is_bf16_for_the_last_18_percent() -> None:
    low = Policy.parse("nvfp4")
    assert named("bf16-finish", low) == (Phase(low, until=0.82), Phase(Policy("bf16")))
    assert Schedule(named("bf16-finish", low), 1000).ends == (820, None)


def test_high_precision_has_no_loss_scale_and_rounds_no_operand() -> None:
    policy = high_precision(Policy.parse("fp16; *:state=bfloat16 stochastic"))
    assert str(policy) == "fp32; *:state=bfloat16 stochastic"
    assert policy.loss_scaling is None


def test_phases_are_given_by_name_or_as_they_are() -> None:
    assert of("dmp", LOW) == named("dmp", LOW)
    assert of([Phase(LOW)], HIGH) == (Phase(LOW),)
    with pytest.raises(ConfigError, match=r"unknown schedule of phases 'dpm'; known: dmp, bf16-finish, or a list of"):
        of("dpm", LOW)


def test_more_rules_take_the_place_of_rules_for_the_same_sites() -> None:
    policy = Policy.parse("bf16; head:*=float32; *.up:input=fp16")
    more = policy.with_rules(*Policy.parse("fp32; head:*=bfloat16").rules)
    assert str(more) == "bf16; *.up:input=float16; head:*=bfloat16"
    assert str(policy) == "bf16; head:*=float32; *.up:input=float16"


def test_what_a_calibration_measures_for_is_the_first_phase_with_steps_after_it():
    fp8, fp32, fp16 = map(Policy, ("fp8", "fp32", "fp16"))
    phases = (Phase(fp8, until=3), Phase(fp32, until=5, calibrate=True), Phase(fp16, until=5), Phase(fp8))
    assert Schedule(phases, 9).following(1).policy == fp8
    assert Schedule((*phases[:2], Phase(fp16, until=6), Phase(fp8)), 9).following(1).policy == fp16
