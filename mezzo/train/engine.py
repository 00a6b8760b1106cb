"""What a framework does for a training session. The session knows text, batches, logs and checkpoints; an engine knows
the model, its optimizer and its precision, under one framework.

    Session ── batches as int64 arrays, a learning rate ──► Engine.step ──► Outcome
            ── batches ──► evaluate, sample
            ◄── state: groups of arrays by name, plain data ── load ──►

Whatever the framework, names, shapes, dtypes and layout on disk are the same (see mezzo.train.adamw_state for the
optimizer, mezzo.train.scale_state for the scales), so a run goes on under another one from the same checkpoint.

No framework is imported here; mezzo.train.frameworks says which engines there are and what each cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mezzo.policy import Phase, Policy, Schedule
from mezzo.train.arrays import Groups, Named

Pair = tuple[NDArray[np.int64], NDArray[np.int64]]  # x, y of shape (B, T)


class Outcome(Protocol):
    """What one step did. Reading anything but `tokens` may wait for the device.

    tokens      targets in the step's batches
    loss        mean over the micro-batches
    grad_norm   total norm of the unscaled gradients, before clipping
    loss_scale  that this step's loss was multiplied by
    skipped     a gradient was not finite: weights and moments stayed
    site        of a skipped step: where a value first was not finite, in words
    sparsity    share of the prunable weights that are masked; None if nothing is pruned
    """

    @property
    def tokens(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def loss_scale(self) -> float: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def site(self) -> str | None: ...
    @property
    def sparsity(self) -> float | None: ...
    def wait(self) -> None:
        """Return when the device has done this step and all before it."""


class Steps(Protocol):
    """What the loop needs."""

    @property
    def late(self) -> bool:
        """Whether `step` returns before the device is done: records are then read one step late."""

    def step(self, batches: Iterable[Pair], rate: float) -> Outcome:
        """One step over its micro-batches, whose mean is the loss, at this learning rate.

        raises    NonfiniteError when steps keep being skipped
        """

    def memory(self) -> int:
        """Bytes at the highest point so far, less those before the model was made."""


class Moves(Protocol):
    """The phases of a run, as `mezzo.torch.Phases` has them: what each step's record does to them."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def number(self) -> int: ...
    @property
    def lr(self) -> float: ...
    def ends_at(self, step: int) -> bool: ...
    def after(self, record: dict[str, Any]) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Engine(Steps, Protocol):
    """A framework's model, optimizer and precision: `Engine(config, shape)`.

    config, shape   of the run; the model's vocabulary is that of shape
    raises          ConfigError if the config cannot be carried out: device, policy, shapes

    advice          what to know before training
    peak_flops      dense peak of the device, that MFU is a share of; 0: unknown
    model, optimizer, precision   the framework's own objects
    """

    advice: list[str]
    peak_flops: float

    @property
    def device(self) -> Any:
        """Where it trains; str() of it is for people."""

    @property
    def policy(self) -> Policy:
        """The one at work now."""

    @property
    def model(self) -> Any: ...
    @property
    def optimizer(self) -> Any: ...
    @property
    def precision(self) -> Any: ...

    def phases(self, schedule: Schedule, probe: Callable[[], Pair], held_out: Callable[[], Iterable[Pair]]) -> Moves:
        """Take the first phase's policy; `step` and `evaluate` follow the phases from now on.

        probe      the next step's first batch
        held_out   the batches of an evaluation
        raises     ConfigError if a phase cannot be carried out, naming it
        """

    def ready(self) -> None:
        """Called once when everything is made: fix what the process decides (determinism), and the random state."""

    def warm(self) -> None:
        """Compile now what would else be compiled in the first steps, if it takes long."""

    def evaluate(self, batches: Iterable[Pair], policy: str | None = None) -> tuple[float, int]:
        """Mean loss over all targets, and how many there were; under another policy than the one at work, if given."""

    def sample(self, prompt: Sequence[int], *, tokens: int, seed: int, eot: int, vocab_size: int) -> Iterator[int]:
        """Draw a continuation at temperature 0.8 from the 50 likeliest; nothing of the training changes.

        raises    NonfiniteError if the logits are not finite
        """

    def loss(self, batch: Pair) -> Any:
        """The loss of a batch as the framework's own 0-d value, for listeners that measure."""

    def damaged(self) -> str | None:
        """The first parameter that is not finite: such weights must not take a good checkpoint's place."""

    def routes(self, policies: Iterable[Policy]) -> dict[str, str]:
        """Format → "native" or "emulated" on this machine, of all formats that the policies name."""

    def environment(self, routes: dict[str, str]) -> dict[str, Any]:
        """What a resume must share to be bitwise, as plain data; "framework" says which one this is."""

    def state(self) -> tuple[Groups, dict[str, Any]]:
        """The groups model, optimizer and precision (and what else it needs), and the optimizer's meta.

        The arrays may be those that the next step changes.
        """

    def load(self, group: Callable[[str], Named], groups: Sequence[str], meta: dict[str, Any]) -> list[str]:
        """Put a checkpoint in place, whichever framework saved it.

        group     name → its arrays
        groups    names of those there are
        meta      of the checkpoint: optimizer, policy, …
        returns   what a person should read
        raises    CheckpointError that names what does not fit; then nothing was changed
        """

    def close(self) -> None:
        """Undo `ready`. May be called twice."""
