"""The phases of a run: where it stands, what its triggers compare with, what goes into its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mezzo.errors import ConfigError, RunError
from mezzo.policy import Phase, Policy, Schedule
from mezzo.policy.trigger import Parts, Underflow, held_out
from mezzo.train.config import Config
from mezzo.train.engine import Engine, Pair
from mezzo.train.listeners import Record
from mezzo.train.rundir import RunDir
from mezzo.train.stored import text_of

Curve = tuple[tuple[int, float], ...]  # (step, held-out loss) in order


class PhasedRun:
    """A run's way through the phases of its config; a config without any is one phase.

    probe, held_out  as of `Engine.phases`
    corpus           SHA-256 of the text, which references must share
    raises           ConfigError if a phase cannot be carried out; RunError if a reference cannot be read
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        corpus: str,
        probe: Callable[[], Pair],
        held_out: Callable[[], Iterable[Pair]],
    ) -> None:
        schedule = config.schedule() or Schedule((Phase(engine.policy),), config.train.steps)
        self.several = len(schedule.phases) > 1
        if config.train.compile:
            _refuse_uncounted(schedule)
        self.references = reference_curves(schedule, corpus)
        self.phases = engine.phases(schedule, probe, held_out)
        self.lines = describe(schedule) if self.several else []

    @property
    def lr(self) -> float:
        """Factor of the learning rate."""
        return self.phases.lr

    def due(self, step: int) -> bool:
        """Whether the record of this step must be read before the next one begins: a phase may end after it."""
        return self.phases.phase.when is not None or self.phases.ends_at(step)

    def after(self, record: Record) -> str | None:
        """Take note of a step's record and add to it; returns what a person should read on entering a phase."""
        if not self.several:
            return None
        if found := gaps(self.references, record):
            record["reference_gap"] = found
        record |= self.phases.after(record)
        if "entered" not in record:
            return None
        line = self.lines[record["entered"] - 1]
        return f"after step {record['step']:,} ({record['ended_by']}): {line}{_measured(record)}"

    def unreached(self) -> str | None:
        """What a person should read after the last step if phases are left."""
        left = len(self.phases.schedule.phases) - self.phases.number
        if not left:
            return None
        when = self.phases.phase.when or "its end"
        return f"the run ended in phase {self.phases.number} of {len(self.lines)}: {when} never came"

    @property
    def policies(self) -> list[Policy]:
        """Of every phase, in order."""
        return [phase.policy for phase in self.phases.schedule.phases]

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint's manifest."""
        return {"schedule": self._schedule(), **self.phases.state_dict()} if self.several else {}

    def _schedule(self) -> list[Any]:
        """The phases as plain data: what makes a checkpoint's the same."""
        found = zip(self.phases.schedule.phases, self.phases.schedule.ends, strict=True)
        return [[str(p.policy), p.lr, end, p.when.to_dict() if p.when else None, p.calibrate] for p, end in found]

    def load(self, state: dict[str, Any] | None, step: int) -> str | None:
        """Go to where a checkpoint was taken; returns what a person should read if the phases are others now."""
        if not self.several:
            return None
        if state and state.get("schedule") == self._schedule():
            self.phases.load_state_dict(state)
            return None
        position = self.phases.schedule.at(step)
        self.phases.load_state_dict({**position.to_dict(), "step": step})
        return f"the phases are not those of the checkpoint; the run goes on in phase {self.phases.number}"


def describe(schedule: Schedule) -> list[str]:
    """A line for each phase."""
    lines = []
    for number, (phase, end) in enumerate(zip(schedule.phases, schedule.ends, strict=True), 1):
        ends = [f"to step {end:,}" if end is not None else "", f"until {phase.when}" if phase.when else ""]
        till = " or ".join(filter(None, ends)) or "to the end"
        extra = (f", learning rate × {phase.lr:g}" if phase.lr != 1 else "") + (
            ", calibrates" if phase.calibrate else ""
        )
        lines.append(f"phase {number} of {len(schedule.phases)}, {phase.policy}, {till}{extra}")
    return lines


def _measured(record: Record) -> str:
    found = record.get("calibration", {})
    parts = []
    if "val_loss_low" in found:
        low, high = found["val_loss_low"], found["val_loss_high"]
        parts.append(
            f"held-out loss {low:.4f} under the policy before, {high:.4f} under this one ({low / high - 1:+.3%})"
        )
    if "gradient_cosine" in found:
        parts.append(f"cosine of their gradients {found['gradient_cosine']:.5f}")
    if "loss_scale" in found:
        parts.append(f"loss scale measured: {found['loss_scale']:g}")
    return "; at the same weights: " + ", ".join(parts) if parts else ""


def _refuse_uncounted(schedule: Schedule) -> None:
    for number, phase in enumerate(schedule.phases, 1):
        if isinstance(phase.when, Underflow):
            raise ConfigError(
                f"phase {number}: underflow is counted while the model runs uncompiled; set train.compile = false, or "
                "take another trigger"
            )


def reference_curves(schedule: Schedule, corpus: str) -> dict[str, Curve]:
    """Held-out losses of the runs that triggers compare with, by run directory.

    raises    RunError if a run does not exist, was never evaluated or was trained on other text
    """
    curves: dict[str, Curve] = {}
    for run in (phase.when.run for phase in schedule.phases if isinstance(phase.when, Parts)):
        reference = RunDir.open(run)
        found = [(record["step"], held_out(record)) for record in reference.records()]
        curves[run] = tuple((step, loss) for step, loss in found if loss is not None)
        if text_of(reference) != corpus:
            raise RunError(f"the reference {run} was trained on other text, so the losses cannot be compared")
        if not curves[run]:
            raise RunError(f"the reference {run} was never evaluated: its steps.jsonl has no val_loss")
    return curves


def gaps(curves: dict[str, Curve], record: Record) -> dict[str, float]:
    """How far a record's held-out loss is above each reference's at the same step, relative.

    Between two evaluations of the reference the line between them counts; before its first and after its last there is
    no gap.
    """
    loss, step, found = held_out(record), record["step"], {}
    for run, curve in curves.items():
        if loss is not None and curve[0][0] <= step <= curve[-1][0]:
            steps, losses = [at for at, _ in curve], [value for _, value in curve]
            found[run] = loss / float(np.interp(step, steps, losses)) - 1
    return found
