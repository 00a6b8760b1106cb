"""What engines other than torch's share: a run's way through its phases, and words for a step that was skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mezzo.errors import ConfigError
from mezzo.policy import Phase, Policy, Schedule
from mezzo.policy.phases import Position


class Switched:
    """`mezzo.train.engine.Moves`.

    switch    takes the next policy over
    """

    def __init__(self, schedule: Schedule, switch: Callable[[Policy], None]) -> None:
        self.schedule, self._switch = schedule, switch
        self.position, self.step = schedule.start(), 0
        switch(self.phase.policy)

    @property
    def phase(self) -> Phase:
        return self.schedule.phases[self.position.index]

    @property
    def number(self) -> int:
        """Of the phase, from 1."""
        return self.position.index + 1

    @property
    def lr(self) -> float:
        """Factor of the learning rate."""
        return self.phase.lr

    def ends_at(self, step: int) -> bool:
        """Whether a phase ends after this step for certain."""
        return step in self.schedule.ends

    def after(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Take note of a step; go on to the next phase where this one ends.

        returns   what belongs into the record: "phase" (of this step), and on entering another "entered" and "ended_by"
        """
        more: dict[str, Any] = {"phase": self.number}
        self.step = record["step"]
        before, end = self.phase, self.schedule.ends[self.position.index]
        self.position = self.schedule.after(self.position, record)
        if self.number != more["phase"]:
            more["entered"] = self.number
            more["ended_by"] = f"step {end}" if end is not None and self.step >= end else str(before.when)
            self._switch(self.phase.policy)
        return more

    def state_dict(self) -> dict[str, Any]:
        """The position as plain data, as under torch."""
        return self.position.to_dict() | {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was taken; the engine's scales are loaded after this."""
        self.position, self.step = Position.from_dict(dict(state)), state["step"]
        if self.position.index >= len(self.schedule.phases):
            raise ConfigError(f"the saved run is in phase {self.number}, the schedule has {len(self.schedule.phases)}")
        self._switch(self.phase.policy)


def gradients(finite: Mapping[str, Any]) -> str:
    """Which gradients were not finite, in torch's words.

    finite    parameter → whether its gradient is
    """
    bad = [name for name, good in finite.items() if not bool(good)]
    if not bad:
        return "the sum over all gradients"
    return f"the gradient of {', '.join(bad[-3:])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
