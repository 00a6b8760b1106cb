"""The listener of a run: measures sites now and then into sites.jsonl, and keeps what went wrong as incidents."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzo.observe.incidents import LISTED_STEPS, MOST, Incident, Incidents, Record, Watch
from mezzo.observe.records import TEXT, Training, told
from mezzo.policy import Policy
from mezzo.policy.roles import SCALED
from mezzo.policy.sample import Measured, Sample, ranked
from mezzo.policy.site import Site
from mezzo.torch import Observer, Precision, Step
from mezzo.torch.observer import EVERY, Collector
from mezzo.torch.switch import undisturbed

LOG = "sites.jsonl"
WORST = 40  # sites of an incident


@dataclass(frozen=True)
class Start:
    """Where a step began: what is needed to run it once more."""

    policy: Policy
    draws: Tensor
    loss_scale: Tensor
    delayed: Tensor
    rng: Tensor
    cuda: Tensor | None

    @classmethod
    def of(cls, precision: Precision) -> Start:
        scales, on_cuda = precision.scales, precision.device.type == "cuda"
        return cls(
            precision.policy,
            scales.draws.clone(),
            scales.loss.scale.clone(),
            scales.wanted.clone(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(precision.device) if on_cuda else None,
        )


class RunObserver:
    """Listens to a run (`mezzo.train.listeners.Listener`).

    every      steps between two samples of all sites; 0: none
    whatif     further policies to measure at the same tensors
    incidents  the most that are kept; 0: none
    """

    watches = False  # a step that was not finite is run again

    def __init__(self, every: int = EVERY, whatif: Iterable[str] = (), incidents: int = MOST) -> None:
        self.every, self.whatif, self.most = every, tuple(whatif), incidents
        self.observer: Observer | None = None
        self._starts: dict[int, Start] = {}
        self._open: Incident | None = None  # a run of skipped steps
        self._new: list[Incident] = []  # of the step whose record is being made

    # --- the listener ---

    def attached(self, training: Training) -> None:
        self.training = training
        self.precision: Precision = training.precision
        self.watch = Watch(training.run.records())
        self.store = Incidents(training.run.path, self.most)
        self._done = self.precision.steps
        if self.most:
            self.precision.attach(self)
            self._starts = {self.precision.steps + 1: Start.of(self.precision)}
        if self.every:
            self.observer = Observer(self.precision, self.every, self.whatif, watches=False)

    def started(self, info: Record) -> None:
        pass

    def add(self, record: Record) -> None:
        """Write down the step's sample, if there is one; find what went wrong.

        Adds `incident`, and `site` where running the step again found it.
        """
        sample = None if self.observer is None else self.observer.of(record["step"])
        if sample is not None:
            with told(self.training.message):
                self.training.run.append(sample.to_dict(), LOG)
        if not self.most:
            return
        before = self.watch.bad
        for kind, what in self.watch.note(record):
            record.setdefault("incident", kind)
            self._keep(kind, what, record)
        if self.watch.bad and before and self._open is not None:
            if len(self._open.steps) < LISTED_STEPS:
                self._open.steps.append(record["step"])
            self._open.last = record["step"]
            with told(self.training.message):
                self.store.keep(self._open)
        elif not self.watch.bad:
            self._open = None

    def record(self, record: Record) -> None:
        """The record is complete: incidents of this step learn its phase."""
        for incident in self._new:
            incident.phase = record.get("phase")
            if incident.phase is not None:
                with told(self.training.message):
                    self.store.keep(incident)
        self._new = []
        self._done = record["step"]
        self.watch.passed(record)

    def message(self, text: str) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        """The training ends with an exception."""
        if not self.most or not isinstance(error, Exception):
            return
        step = self._done + 1  # the one that has no record
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        text = "".join(traceback.format_exception(error))[-TEXT:]
        self._write(Incident(step, "exception", what[:500], steps=[step], traceback=text), step)

    def ended(self, outcome: str) -> None:
        self.close()

    def close(self) -> None:
        if self.observer is not None:
            self.observer.close()
        self.precision.release(self)

    # --- the steps ---

    def updating(self, parameters: list[Tensor]) -> None:
        pass

    def stepped(self, step: Step) -> None:
        """Remember where the next step begins; that of the last ones too, whose records may come late."""
        self._starts[step.index + 1] = Start.of(self.precision)
        for old in [*self._starts][:-3]:
            del self._starts[old]

    def restarted(self) -> None:
        """The next step begins under another policy, with other scales."""
        self._starts[self.precision.steps + 1] = Start.of(self.precision)

    # --- incidents ---

    def _keep(self, kind: str, what: str, record: Record) -> None:
        step = record["step"]
        incident = Incident(
            step, kind, what, record.get("site"), steps=[step], loss=record["loss"],
            loss_scale=record["loss_scale"], grad_norm=record["grad_norm"],
        )  # fmt: skip
        if kind == "nonfinite":
            self._open = incident
            sample = self._again(step)
            if sample is not None:
                self._name(incident, sample, self._starts[step])
                record["site"] = incident.site
        self._write(incident, step)
        self._new.append(incident)

    def _name(self, incident: Incident, sample: Sample, start: Start) -> None:
        """Put what the step showed when it was run again into the incident."""
        findings = [one for one in sample.findings if one.kind in ("nonfinite", "overflow")]
        if findings:
            site = incident.site = findings[0].site
            at, one = next(entry for entry in sample.sites.items() if str(entry[0]) == site)
            incident.what += f"; first at {site}: {findings[0].text}"
            scaling = start.policy.loss_scaling
            if scaling is not None and at.role in SCALED:
                then = "take a smaller loss_scale" if scaling.is_constant else "the loss scale falls after it"
                incident.what += f" (a gradient, times the loss scale {float(start.loss_scale):g}: {then})"
            elif one.spec.fmt.name == "float16":  # where bfloat16 and float32 end, no other format goes on
                incident.rule = f"{at.path}:*=float32"
        named = {one.site for one in findings[:WORST]}
        kept: dict[Site, Measured] = {site: one for site, one in sample.sites.items() if str(site) in named}
        kept |= dict(ranked(sample.sites)[: WORST - len(kept)])
        incident.sites = {str(site): one.to_dict() for site, one in kept.items()}

    def _write(self, incident: Incident, step: int) -> None:
        start = self._starts.get(step)
        incident.time = time.time()
        rng = None
        if start is not None:
            scales, rng = self.precision.scales, start.rng.numpy()
            incident.policy = str(start.policy)
            incident.batch = {"step": step, "accumulate": len(self.training.losses(step))}
            with suppress(RuntimeError):  # a device that failed tells nothing any more
                delayed = dict(zip(scales.rows, start.delayed.tolist(), strict=False))
                incident.rng = {"seed": scales.seed, "draws": int(start.draws)}
                incident.scales = {"loss_scale": float(start.loss_scale), "delayed": delayed}
        with told(self.training.message):
            self.store.keep(incident, rng)

    def _again(self, step: int) -> Sample | None:
        """Run a step's forward and backward passes once more, uncompiled and measured; nothing of the training changes.

        None if its beginning is not remembered, or the passes fail.
        """
        start = self._starts.get(step)
        if start is None:
            return None
        precision = self.precision
        with undisturbed(precision), precision.using(start.policy), _as_at(precision, start):
            collector = Collector(precision)
            collector.open()
            losses = self.training.losses(step)
            try:
                for loss in losses:
                    precision.backward(loss() / len(losses))
                return collector.pending.read(step)
            except Exception as error:  # such as too little memory: it must not end the training
                self.training.message(f"step {step:,} could not be run again to find the site: {error}")
                return None
            finally:
                collector.close()


@contextmanager
def _as_at(precision: Precision, start: Start) -> Iterator[None]:
    """Scales and random state as they were at the beginning of a step; in `undisturbed`, which restores the others."""
    scales = precision.scales
    state, wanted = scales.loss.state, scales.wanted
    scales.loss.state = replace(state, scale=start.loss_scale)
    scales.wanted = torch.cat([start.delayed, wanted[len(start.delayed) :]])
    scales.draws.copy_(start.draws)
    torch.set_rng_state(start.rng)
    if start.cuda is not None:
        torch.cuda.set_rng_state(start.cuda, precision.device)
    try:
        yield
    finally:
        scales.loss.state, scales.wanted = state, wanted
