"""Who listens to a run: the loop hands out records and events and does not know what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mezzo.errors import require
from mezzo.policy import Policy
from mezzo.train.rundir import RunDir

Record = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """What trains, for listeners that measure.

    precision  the framework's own, such as a `mezzo.torch.Precision`
    policy     gives the one at work now
    message    tells people something
    losses     step (1 is the first) → for each of its micro-batches a function that runs the uncompiled model on it
    """

    precision: Any
    run: RunDir
    policy: Callable[[], Policy]
    message: Callable[[str], None]
    losses: Callable[[int], Sequence[Callable[[], Any]]]


class Listens(Protocol):
    """What a listener can do; `Listener` says when."""

    def attached(self, training: Training) -> None: ...
    def started(self, info: Record) -> None: ...
    def add(self, record: Record) -> None: ...
    def record(self, record: Record) -> None: ...
    def message(self, text: str) -> None: ...
    def failed(self, error: BaseException) -> None: ...
    def ended(self, outcome: str) -> None: ...


class Listener:
    """Does nothing; override what you need.

    A record has the keys step, loss, lr, grad_norm, loss_scale, skipped, tokens, tokens_per_s, mfu, memory, and where
    they apply: sparsity (if weights are pruned), site (of a skipped step), val_loss (under the policy), val_loss_fp32,
    val_bits_per_byte (of the latter), sample. A run with phases adds phase (that the step was in, from 1), underflow
    (sites → share, where a trigger counts it), reference_gap (run → gap, at an evaluation), entered (the phase that
    begins after this step), ended_by (what ended the one before) and calibration (what `mezzo.torch.calibrate.compare`
    found then, the loss scale measured). A listener may add to it: incident (what went wrong in the step).
    """

    def attached(self, training: Training) -> None:
        """Once, before `started`: what trains, for those who measure. They must leave it as it is."""

    def started(self, info: Record) -> None:
        """Once, before the first step: steps, first_step, parameters, policy, device, routes, advice, …"""

    def add(self, record: Record) -> None:
        """Add to a record what was measured: at once after the step, before evaluation and checkpoint."""

    def record(self, record: Record) -> None:
        """After each step, in order; on a GPU one step late."""

    def message(self, text: str) -> None:
        """Something a person should read: a checkpoint saved or failed, a warning."""

    def failed(self, error: BaseException) -> None:
        """The training ends with an exception; `ended` follows."""

    def ended(self, outcome: str) -> None:
        """Once: finished, interrupted or failed."""


class Listeners(Listener):
    """Several listeners as one."""

    def __init__(self, listeners: Sequence[Listens]) -> None:
        self.listeners = listeners

    def attached(self, training: Training) -> None:
        for listener in self.listeners:
            listener.attached(training)

    def started(self, info: Record) -> None:
        for listener in self.listeners:
            listener.started(info)

    def add(self, record: Record) -> None:
        for listener in self.listeners:
            listener.add(record)

    def record(self, record: Record) -> None:
        for listener in self.listeners:
            listener.record(record)

    def message(self, text: str) -> None:
        for listener in self.listeners:
            listener.message(text)

    def failed(self, error: BaseException) -> None:
        for listener in self.listeners:
            listener.failed(error)

    def ended(self, outcome: str) -> None:
        for listener in self.listeners:
            listener.ended(outcome)


class RunLog(Listener):
    """Appends each record to the run's steps.jsonl."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def record(self, record: Record) -> None:
        self.run.append(record)


class TensorBoard(Listener):
    """Writes the numbers of each record as TensorBoard scalars, samples as text.

    raises    MissingExtraError if tensorboardX is not installed
    """

    def __init__(self, folder: Path) -> None:
        self.module = require("tensorboardX", extra="tensorboard", option="train.tensorboard")
        self.folder = folder
        self.writer: Any = None

    def started(self, info: Record) -> None:
        # What an interrupted run wrote after the checkpoint that we go on from is taken back. The suffix keeps apart
        # two starts within one second, which would have one file name.
        first = info["first_step"]
        self.writer = self.module.SummaryWriter(str(self.folder), purge_step=first + 1, filename_suffix=f".{first:06d}")

    def record(self, record: Record) -> None:
        step = record["step"]
        for key, value in record.items():
            if key == "sample":
                self.writer.add_text(key, value, step)
            elif key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, float(value), step)

    def ended(self, outcome: str) -> None:
        if self.writer is not None:
            self.writer.close()
