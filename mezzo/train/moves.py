"""What engines other than torch's share: a run's way through its phases, and words for a step that was skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mezzo.errors import ConfigError
from mezzo.policy import Phase, Policy, Schedule
from mezzo.policy.phases import Position
from mezzo.train.engine import Pair


class Switched:
    """`mezzo.train.engine.Moves`.

    switch    takes the next policy over
    compare   (low, high) → what a calibrating phase reports on entering it, see `comparison`
    """

    def __init__(
        self,
        schedule: Schedule,
        switch: Callable[[Policy], None],
        compare: Callable[[Policy, Policy], dict[str, float]],
    ) -> None:
        self.schedule, self._switch, self._compare = schedule, switch, compare
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

        returns   what belongs into the record: "phase" (of this step), and on entering another "entered", "ended_by"
                  and, if that one calibrates, "calibration"
        """
        more: dict[str, Any] = {"phase": self.number}
        self.step = record["step"]
        before, end = self.phase, self.schedule.ends[self.position.index]
        self.position = self.schedule.after(self.position, record)
        if self.number != more["phase"]:
            more["entered"] = self.number
            more["ended_by"] = f"step {end}" if end is not None and self.step >= end else str(before.when)
            if self.phase.calibrate:
                more["calibration"] = self._compare(before.policy, self.phase.policy)
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


def comparison(
    engine: Any, low: Policy, high: Policy, probe: Callable[[], Pair], held_out: Callable[[], Iterable[Pair]]
) -> dict[str, float]:
    """What `low` loses against `high` at the weights as they are, as `mezzo.torch.calibrate.compare` says it.

    engine    with gradient(batch, policy) → all gradients as one float64 vector, and evaluate
    """
    of_low, of_high = (engine.gradient(probe(), policy) for policy in (low, high))
    norms = float(np.linalg.norm(of_low)), float(np.linalg.norm(of_high))
    found = {"gradient_cosine": float(of_low @ of_high) / (norms[0] * norms[1]), "gradient_ratio": norms[0] / norms[1]}
    for name, policy in (("val_loss_low", low), ("val_loss_high", high)):
        found[name] = engine.evaluate(held_out(), str(policy))[0]
    return found


def gradients(finite: Mapping[str, Any]) -> str:
    """Which gradients were not finite, in torch's words.

    finite    parameter → whether its gradient is
    """
    bad = [name for name, good in finite.items() if not bool(good)]
    if not bad:
        return "the sum over all gradients"
    return f"the gradient of {', '.join(bad[-3:])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
