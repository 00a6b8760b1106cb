"""Phases: a run in parts, each with a policy of its own and an end. Pure data and a pure transition.

    low ──► high-precision calibration ──► low, tuned for quality          the schedule `dmp`
    low ──────────────────────────────────► bf16 for the last 18%          the schedule `bf16-finish`

source: NVIDIA 2025, arXiv 2509.25149, appendix D: a last phase in bfloat16 closes most of NVFP4's gap, and moving only
the forward operands takes most of the gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mezzo.errors import ConfigError
from mezzo.policy.policy import Policy
from mezzo.policy.rule import Rule
from mezzo.policy.site import STATE_ROLES
from mezzo.policy.spec import Spec
from mezzo.policy.trigger import Record, Trigger

FORWARD = ("fprop.a", "fprop.b")


@dataclass(frozen=True)
class Phase:
    """One part of a run.

    policy      what it trains under
    lr          factor of the learning rate
    until       where it ends: a step (int), or a share of the run (float); None: where the trigger says
    when        a trigger that may end it earlier
    calibrate   measure the scales that the next phase starts with
    """

    policy: Policy
    lr: float = 1.0
    until: int | float | None = None
    when: Trigger | None = None
    calibrate: bool = False


@dataclass(frozen=True)
class Position:
    """Where a run is in its schedule: everything that the transition remembers.

    index     of the phase, from 0
    begin     the step after which it began
    memory    what its trigger remembers of the records since
    """

    index: int = 0
    begin: int = 0
    memory: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"index": self.index, "begin": self.begin, "memory": list(self.memory)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Position:
        return cls(data["index"], data["begin"], tuple(data["memory"]))


@dataclass(frozen=True)
class Schedule:
    """Phases in order, over a run of `steps` steps.

    raises    ConfigError on phases that overlap, never end, or leave steps without a policy
    """

    phases: tuple[Phase, ...]
    steps: int
    ends: tuple[int | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConfigError("a schedule needs at least one phase")
        object.__setattr__(self, "ends", tuple(self._end(i, phase) for i, phase in enumerate(self.phases, 1)))
        last, latest = len(self.phases), 0
        for number, (phase, end) in enumerate(zip(self.phases, self.ends, strict=True), 1):
            if not phase.lr > 0:
                raise ConfigError(f"phase {number}: lr is a factor above 0, got {phase.lr:g}")
            if end is not None and end < latest:
                raise ConfigError(f"phase {number} ends at step {end}, before the one ahead of it does ({latest}): "
                                  "they overlap; give it a later until")  # fmt: skip
            if number < last and end is None and phase.when is None:
                raise ConfigError(f"phase {number} never ends; give it until = STEP or SHARE, or a trigger with when")
            latest = latest if end is None else end
        final = self.phases[-1]
        if self.ends[-1] not in (None, self.steps):
            raise ConfigError(
                f"phase {last}, the last one, ends at step {self.ends[-1]} of {self.steps}; leave its until out"
            )
        if final.when is not None or final.calibrate:
            what = "trigger" if final.when is not None else "calibration"
            raise ConfigError(f"phase {last} is the last one: its {what} would be for a phase that does not follow")

    def _end(self, number: int, phase: Phase) -> int | None:
        until = phase.until
        if until is None:
            return None
        if isinstance(until, float) and not 0 <= until <= 1:
            raise ConfigError(
                f"phase {number}: until = {until:g} is no share from 0.0 to 1.0; write a step without a point"
            )
        end = round(until * self.steps) if isinstance(until, float) else until
        if not 0 <= end <= self.steps:
            raise ConfigError(f"phase {number} ends at step {end}, but the run has {self.steps} steps")
        return end

    def start(self) -> Position:
        """The position before the first step."""
        return self._settle(Position(), 0)

    def after(self, position: Position, record: Record) -> Position:
        """The position after the step that `record` tells of; pure."""
        when = self.phases[position.index].when
        if when is not None and (kept := when.remembered(record)) is not None:
            memory = (*position.memory, kept)[-when.span :]
            position = Position(position.index, position.begin, memory)
        return self._settle(position, record["step"])

    def at(self, step: int) -> Position:
        """The position after `step` steps in which no trigger fired."""
        return self._settle(Position(), step)

    def following(self, index: int) -> Phase:
        """The phase that comes after one: the first that is not over by the time it ends."""
        now = self.ends[index] or 0
        later = zip(self.phases[index + 1 :], self.ends[index + 1 :], strict=True)
        return next(phase for phase, end in later if end is None or end > now)

    def _settle(self, position: Position, step: int) -> Position:
        while position.index < len(self.phases) - 1:
            end, when = self.ends[position.index], self.phases[position.index].when
            if not ((end is not None and step >= end) or (when is not None and when.fires(position.memory))):
                break
            position = Position(position.index + 1, step)
        return position


def high_precision(low: Policy) -> Policy:
    """fp32 with the stored weights and moments that `low` has: what a phase of `low` can change into."""
    stored: dict[str, Rule] = {}
    for rule in low.all_rules():
        if rule.role in ("master", "state", *STATE_ROLES):
            stored[rule.site] = rule
    base = {rule.site: rule.spec for rule in Policy("fp32").all_rules()}
    return Policy("fp32", tuple(rule for site, rule in stored.items() if base.get(site) != rule.spec))


def dmp(low: Policy) -> tuple[Phase, ...]:
    """Three-phase dynamic mixed precision: low for speed, a calibration in fp32, low again with wide forward operands.

    Wide is bfloat16 for a policy below 16 bits, else float32; what the policy's own rules keep wider stays so.
    """
    bits = min((rule.fmt.bits for rule in low.all_rules() if "fprop.a" in rule.roles()), default=32)
    wide = Spec.parse("bfloat16" if bits < 16 else "float32")
    widened = [Rule("*", role, wide) for role in FORWARD]
    widened += [
        Rule(rule.path, role, rule.spec)
        for rule in low.rules
        for role in FORWARD
        if role in rule.roles() and rule.fmt.bits > wide.fmt.bits
    ]
    last = {rule.site: rule for rule in widened}  # of two for one site the later
    return (
        Phase(low, until=0.75),
        Phase(high_precision(low), until=0.80, calibrate=True),
        Phase(low.with_rules(*last.values())),
    )


def bf16_finish(low: Policy) -> tuple[Phase, ...]:
    """One way: low, then bf16 for the last 18% of the steps."""
    high = high_precision(low)
    return (Phase(low, until=0.82), Phase(Policy("bf16", high.rules)))


NAMED = {"dmp": dmp, "bf16-finish": bf16_finish}


def named(name: str, low: Policy) -> tuple[Phase, ...]:
    """The phases of a named schedule for a low policy.

    raises    ConfigError on an unknown name
    """
    if name not in NAMED:
        raise ConfigError(f"unknown schedule of phases {name!r}; known: {', '.join(NAMED)}, or a list of [[phase]]")
    return NAMED[name](low)


def of(phases: str | Sequence[Phase], low: Policy) -> tuple[Phase, ...]:
    """Phases as they are, or those that a name means."""
    return named(phases, low) if isinstance(phases, str) else tuple(phases)
