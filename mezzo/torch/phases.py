"""`Phases`: precision that changes as training goes, in mezzo's loop or in anybody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.policy import Phase, Policy, Schedule
from mezzo.policy import phases as known
from mezzo.policy.phases import Position
from mezzo.policy.site import ROOT, SHORTHANDS
from mezzo.policy.trigger import LossScaleBelow, Underflow
from mezzo.torch.calibrate import Calibration, compare
from mezzo.torch.precision import Precision
from mezzo.torch.switch import undisturbed
from mezzo.torch.table import SiteEvent


class Phases:
    """Move a `Precision` through the phases of a schedule.

        phases = mezzo.torch.Phases(precision, "dmp", steps=1000)
        for step, (x, y) in enumerate(batches, 1):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step) * phases.lr
            precision.backward(loss_fn(model(x), y))
            done = precision.step()
            phases.after({"step": step, "skipped": done.skipped_now(), "loss_scale": float(done.loss_scale)})

    precision   it is switched to the first phase's policy at once
    phases      Phase objects, or the name of a schedule: "dmp", "bf16-finish", for the policy that `precision` has
    steps       of the whole run
    loss        returns the loss of a batch, 0-d, with its graph; for the gradient cosine on entering a calibration, and
                to compile each phase before the first step (`warm`)
    evaluate    returns the held-out loss, for the same report
    raises      ConfigError on phases that overlap, never end or cannot be carried out, naming the phase
    """

    def __init__(
        self,
        precision: Precision,
        phases: str | Sequence[Phase],
        steps: int,
        *,
        loss: Callable[[], Tensor] | None = None,
        evaluate: Callable[[], float] | None = None,
    ) -> None:
        self.precision, self.loss, self.evaluate = precision, loss, evaluate
        self.schedule = Schedule(known.of(phases, precision.policy), steps)
        for number, phase in enumerate(self.schedule.phases, 1):
            try:
                precision.prepare(phase.policy)
                _check_trigger(precision, phase)
            except ConfigError as error:
                raise ConfigError(f"phase {number}: {error}") from error
        self.position = self.schedule.start()
        self._calibration: Calibration | None = None
        self._counts: dict[str, list[Tensor]] = {}
        self.step = 0
        precision.switch(self.policy)
        self._listen()

    # --- where the run is ---

    @property
    def phase(self) -> Phase:
        return self.schedule.phases[self.position.index]

    @property
    def number(self) -> int:
        """Of the phase, from 1."""
        return self.position.index + 1

    @property
    def policy(self) -> Policy:
        return self.phase.policy

    @property
    def lr(self) -> float:
        """Factor of the learning rate."""
        return self.phase.lr

    def ends_at(self, step: int) -> bool:
        """Whether a phase ends after this step for certain."""
        return step in self.schedule.ends

    # --- training ---

    def warm(self) -> None:
        """Run the model once under each phase's policy, forward and backward, so that a compiler compiles it now."""
        if self.loss is None:
            raise ConfigError("warm() needs the loss of a batch: Phases(…, loss=lambda: loss_fn(model(x), y))")
        for policy in dict.fromkeys(phase.policy for phase in self.schedule.phases):
            with undisturbed(self.precision), self.precision.using(policy):
                self.precision.backward(self.loss())
        self.precision.mode.recording = None  # compiled code records no sites, and is compiled anew if this changes

    def after(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Take note of a step; go on to the next phase where this one ends. Call it after `Precision.step`.

        record    of the step: "step" (steps done so far), and what the triggers ask for: "skipped", "loss_scale",
                  "val_loss_fp32" or "val_loss", "reference_gap"
        returns   what belongs into the record: "phase" (of this step), "underflow" (if it was measured), and on
                  entering another phase "entered" (its number), "ended_by" (what ended the one before) and
                  "calibration" (what `compare` found)
        """
        if type(record.get("step")) is not int:
            raise ConfigError('after() takes a record with an integer "step": the steps done so far')
        more: dict[str, Any] = {"phase": self.number}
        for sites, counts in self._counts.items():
            if counts:
                more["underflow"] = {sites: _share(counts)}
            elif not self.position.memory:
                raise ConfigError(
                    f"phase {self.number}: no rounding at {sites} was seen in its step. Compiled code tells of none; a "
                    "convolution rounds a tensor once for two products: write input, weight or grad_output"
                )
        calibration = self._calibration
        if calibration is not None and not calibration.told:
            raise ConfigError(
                f"phase {self.number} calibrates, but no rounding of its step was seen: compiled code tells of none. "
                "Run the model uncompiled while phases.phase.calibrate"
            )
        self.step = record["step"]
        before, end = self.phase, self.schedule.ends[self.position.index]
        try:
            self.position = self.schedule.after(self.position, {**record, **more})
        except KeyError as error:
            raise ConfigError(f"the trigger of phase {self.number} needs {error} in after()'s record") from error
        moved = self.number != more["phase"]
        if moved:
            more["entered"] = self.number
            more["ended_by"] = f"step {end}" if end is not None and self.step >= end else str(before.when)
            if self.phase.calibrate:
                more["calibration"] = compare(self.precision, before.policy, self.policy, self.loss, self.evaluate)
            measured = calibration.loss_scale() if calibration is not None else None
            if calibration is not None and calibration.following != self.policy:
                measured = None  # a trigger led elsewhere
            self.precision.switch(self.policy, loss_scale=measured)
            if measured is not None:
                more.setdefault("calibration", {})["loss_scale"] = float(self.precision.scales.loss.scale)
        self._listen(anew=moved)
        return more

    def _listen(self, anew: bool = False) -> None:
        """Attach the taps that the next step needs, and no others.

        anew    what a calibration found so far is done with
        """
        taps = self.precision.hooks.taps
        for mine in (self._calibration, self._count):
            if mine in taps:
                taps.remove(mine)
        self._counts = {}
        phase = self.phase
        if anew or not phase.calibrate:
            self._calibration = None
        if phase.calibrate:
            if self._calibration is None:
                self._calibration = Calibration(self.precision, self.schedule.following(self.position.index).policy)
            taps.append(self._calibration)
        if isinstance(phase.when, Underflow) and self.step % phase.when.every == 0:
            self._counts = {phase.when.sites: []}
            taps.append(self._count)

    def _count(self, event: SiteEvent) -> None:
        site, before, after = event[:3]
        when = self.phase.when
        if not (self.precision.scales.training or site.role in SHORTHANDS["grad_output"]):
            return  # an evaluation between the step and its record
        if isinstance(when, Underflow) and when.matches(site):
            there = before != 0
            self._counts[when.sites].append(torch.stack([((after == 0) & there).sum(), there.sum()]))

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """The position as plain data (JSON); scales are in `Precision.state_dict`."""
        found = self.position.to_dict() | {"step": self.step}
        if self._calibration is not None:
            found["largest_gradient"] = float(self._calibration.largest)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was taken; load `Precision.load_state_dict` after this."""
        self.position, self.step = Position.from_dict(dict(state)), state["step"]
        if self.position.index >= len(self.schedule.phases):
            raise ConfigError(f"the saved run is in phase {self.number}, the schedule has {len(self.schedule.phases)}")
        self.precision.switch(self.policy)
        self._listen(anew=True)
        if "largest_gradient" in state:
            calibration: Calibration | None = self._calibration
            assert calibration is not None, "a calibrating phase has a calibration"
            calibration.largest.fill_(state["largest_gradient"])


def _check_trigger(precision: Precision, phase: Phase) -> None:
    """raises    ConfigError if a trigger speaks of what the model or the policy does not have"""
    when = phase.when
    if isinstance(when, Underflow):
        paths = [path or ROOT for path, _ in precision.model.named_modules()]
        if not any(map(when.rule.matches_path, paths)):
            raise ConfigError(f"the trigger underflow: {when.sites} matches nothing in this model")
    if isinstance(when, LossScaleBelow) and (
        phase.policy.loss_scaling is None or phase.policy.loss_scaling.is_constant
    ):
        raise ConfigError(f"the trigger loss_scale: {phase.policy} has no loss scale that moves; take another trigger")


def _share(counts: list[Tensor]) -> float:
    zero, there = torch.stack(counts).sum(0).tolist()
    return zero / there if there else 0.0
