"""The listener of a run under a framework that measures no sites: incidents, from what the records say."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mezzo.errors import RunError
from mezzo.observe.incidents import LISTED_STEPS, MOST, Incident, Incidents, Record, Watch
from mezzo.policy import Policy

TEXT = 20_000  # characters of a traceback


class Run(Protocol):
    """What is needed of a run directory."""

    @property
    def path(self) -> Path: ...
    def append(self, record: Record, log: str) -> None: ...
    def records(self) -> list[Record]: ...


class Training(Protocol):
    """What is needed of a training, of any framework."""

    @property
    def precision(self) -> Any: ...
    @property
    def run(self) -> Run: ...
    @property
    def policy(self) -> Callable[[], Policy]: ...
    @property
    def message(self) -> Callable[[str], None]: ...
    @property
    def losses(self) -> Callable[[int], Sequence[Callable[[], Any]]]: ...


class RecordObserver:
    """Listens to a run (`mezzo.train.listeners.Listener`); the site of an incident is the record's own, if it has one.

    incidents  the most that are kept; 0: none
    """

    def __init__(self, incidents: int = MOST) -> None:
        self.most = incidents
        self._open: Incident | None = None  # a run of skipped steps
        self._new: list[Incident] = []  # of the step whose record is being made
        self._done = 0

    def attached(self, training: Training) -> None:
        self.training = training
        before = training.run.records()
        self.watch = Watch(before)
        self.store = Incidents(training.run.path, self.most)
        self._done = before[-1]["step"] if before else 0

    def started(self, info: Record) -> None:
        pass

    def add(self, record: Record) -> None:
        """Find what went wrong; adds `incident`."""
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
            self._write(self._open)
        elif not self.watch.bad:
            self._open = None

    def _keep(self, kind: str, what: str, record: Record) -> None:
        step, site = record["step"], record.get("site")
        incident = Incident(
            step, kind, what if site is None else f"{what}; first at {site}", site, steps=[step],
            loss=record["loss"], loss_scale=record["loss_scale"], grad_norm=record["grad_norm"],
        )  # fmt: skip
        if kind == "nonfinite":
            self._open = incident
        self._describe(incident)
        self._write(incident)
        self._new.append(incident)

    def _describe(self, incident: Incident) -> None:
        incident.time = time.time()
        incident.policy = str(self.training.policy())
        incident.batch = {"step": incident.step, "accumulate": len(self.training.losses(incident.step))}
        if incident.loss_scale is not None:
            incident.scales = {"loss_scale": incident.loss_scale}

    def record(self, record: Record) -> None:
        """The record is complete: incidents of this step learn its phase."""
        for incident in self._new:
            incident.phase = record.get("phase")
            if incident.phase is not None:
                self._write(incident)
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
        incident = Incident(step, "exception", what[:500], steps=[step], traceback=text)
        self._describe(incident)
        self._write(incident)

    def ended(self, outcome: str) -> None:
        pass

    def _write(self, incident: Incident) -> None:
        with told(self.training.message):
            self.store.keep(incident)


@contextmanager
def told(message: Callable[[str], None]) -> Iterator[None]:
    """What cannot be written, such as on a full disk, is told of and ends no training."""
    try:
        yield
    except RunError as error:
        message(f"NOT WRITTEN: {error}")
