"""Incidents: what went wrong in a run, kept with what is needed to look at that step again.

    runs/NAME/incidents/step-000317/
      incident.json       what happened, where, under which policy, scales and random state; the worst sites
      rng.safetensors     torch's random state at the beginning of the step

At most `most` are kept: the first ones, where the trouble began, and the last ones.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from mezzo.errors import RunError
from mezzo.storage import from_json, to_json, write_atomically

Record = dict[str, Any]

KINDS = ("nonfinite", "loss_scale", "loss_spike", "exception")
MOST = 20
LISTED_STEPS = 100  # of one incident
WINDOW = 200  # steps that the loss scale is compared with
COLLAPSE = 256.0  # the loss scale's fall within them
SPIKE_WINDOW = 50  # steps that a loss is compared with, once there are SPIKE_FROM
SPIKE_FROM = 20
SPIKE_SIGMAS = 6.0  # above their median; sigma from their median absolute deviation
SPIKE_SHARE = 0.1  # and at least so much of the median


@dataclass
class Incident:
    """One thing that went wrong.

    step    the first it happened in, last the last; steps has all of a run of skipped steps, at most LISTED_STEPS
    what    a line for people
    site    PATH:ROLE where a value first was not finite, or what else is known; rule would spare it
    rng     seed and draws: the key of stochastic rounding in that step. torch's state is in the file beside
    batch   step and accumulate: the data order is a pure function of them and the run's seed
    scales  loss scale, and the delayed scales by site
    sites   PATH:ROLE → measures of the step, where it was run again
    """

    step: int
    kind: str
    what: str
    site: str | None = None
    rule: str | None = None
    steps: list[int] = field(default_factory=list)
    last: int | None = None
    time: float = 0.0
    policy: str = ""
    phase: int | None = None
    loss: float | None = None
    loss_scale: float | None = None
    grad_norm: float | None = None
    rng: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, Any] = field(default_factory=dict)
    traceback: str | None = None

    @property
    def folder(self) -> str:
        return f"step-{self.step:06d}" + ("" if self.kind == "nonfinite" else f"-{self.kind}")


class Watch:
    """Tells from a run's records, one after the other, what goes wrong. A pure function of them."""

    def __init__(self, before: Iterable[Record] = ()) -> None:
        self._scales: deque[float] = deque(maxlen=WINDOW)
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._bad = self._spiked = False
        for record in before:
            self.note(record)
            self.passed(record)

    def passed(self, record: Record) -> None:
        """The record is complete: after a change of phase the loss scale may be another."""
        if "entered" in record:
            self._scales.clear()

    def note(self, record: Record) -> list[tuple[str, str]]:
        """(kind, what a person should read) of what begins in this step; a run of skipped steps begins once."""
        found = [self._nonfinite(record), self._collapse(record), self._spike(record)]
        return [one for one in found if one is not None]

    @property
    def bad(self) -> bool:
        """Whether the last step was not finite."""
        return self._bad

    def _nonfinite(self, record: Record) -> tuple[str, str] | None:
        finite = math.isfinite(record["loss"])
        before, self._bad = self._bad, bool(record["skipped"]) or not finite
        if not self._bad or before:
            return None
        what = "a gradient" if finite else "the loss"
        return "nonfinite", f"{what} was not finite; " + (
            "the step was skipped" if record["skipped"] else "it was taken"
        )

    def _collapse(self, record: Record) -> tuple[str, str] | None:
        scale = float(record["loss_scale"])
        if scale == 1.0:  # no loss scaling, as after a change of policy
            self._scales.clear()
            return None
        top = max(self._scales, default=scale)
        if scale > top / COLLAPSE:
            self._scales.append(scale)
            return None
        self._scales.clear()  # one incident for one collapse
        self._scales.append(scale)
        return "loss_scale", f"the loss scale fell from {top:g} to {scale:g} within {WINDOW} steps"

    def _spike(self, record: Record) -> tuple[str, str] | None:
        loss = float(record["loss"])
        if not math.isfinite(loss):
            return None
        there = len(self._losses) >= SPIKE_FROM
        median = statistics.median(self._losses) if there else loss
        sigma = 1.4826 * statistics.median(abs(one - median) for one in self._losses) if there else 0.0
        high = loss > median + max(SPIKE_SIGMAS * sigma, SPIKE_SHARE * abs(median))
        self._losses.append(loss)
        before, self._spiked = self._spiked, high
        if not high or before:
            return None
        return "loss_spike", f"the loss is {loss:.4g}, the median of the steps before it {median:.4g}"


class Incidents:
    """The incidents of one run directory, at most `most` of them."""

    def __init__(self, run: Path, most: int = MOST) -> None:
        self.path, self.most = run / "incidents", most

    def keep(self, incident: Incident, rng: Any = None) -> None:
        """Write an incident, or write it again; drops one if there are too many.

        rng       uint8 array: torch's random state at the beginning of the step
        raises    RunError if it cannot be written
        """
        folder = self.path / incident.folder
        body = {key: value for key, value in asdict(incident).items() if value not in (None, {}, [], "")}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if rng is not None:
                write_atomically(folder / "rng.safetensors", save({"torch": rng}))
            write_atomically(folder / "incident.json", to_json(body, what="incident", indent=1).encode())
            kept = sorted(self.path.glob("step-*"), key=_number)
            for surplus in kept[self.most // 2 : len(kept) - (self.most - self.most // 2)]:
                shutil.rmtree(surplus)
        except OSError as error:
            raise RunError(f"cannot write the incident {folder}: {error.strerror or error}") from error


def _number(folder: Path) -> tuple[int, str]:
    number = folder.name.split("-")[1]
    return int(number) if number.isdecimal() else 0, folder.name


def read(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The incidents of a run directory as plain data, in the order of steps, and the folders that cannot be read."""
    found, broken = [], []
    for folder in sorted((run / "incidents").glob("step-*")):
        try:
            body = from_json((folder / "incident.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            body = None
        if isinstance(body, dict) and type(body.get("step")) is int and isinstance(body.get("kind"), str):
            found.append(body)
        else:
            broken.append(folder.name)
    return sorted(found, key=lambda one: (one["step"], one["kind"])), broken
