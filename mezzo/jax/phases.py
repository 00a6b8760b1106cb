"""`Phases`: precision that changes as training goes, in anybody's JAX loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mezzo.errors import ConfigError
from mezzo.jax import scaling
from mezzo.jax.precision import Precision
from mezzo.jax.scaling import State
from mezzo.policy import LossScaling, Phase, Policy, Schedule
from mezzo.policy import phases as known
from mezzo.policy.phases import Position
from mezzo.policy.support import refuse_phases

Made = TypeVar("Made")
_FIELDS = ("scale", "good", "bad", "at_floor")


class Phases:
    """Move a training through the phases of a schedule: one `Precision`, so one compiled step, for each policy.

        phases = mezzo.jax.Phases("bf16-finish", policy="nvfp4", steps=1000)
        for step, batch in enumerate(batches, 1):
            train_step = phases.each(make_step)       # make_step(precision) → a jitted step; made once a policy
            params, opt_state, loss = train_step(params, opt_state, batch, lr_at(step) * phases.lr)
            opt_state = phases.after({"step": step}, opt_state)

    phases    Phase objects, or the name of a schedule: "dmp", "bf16-finish"
    policy    the low policy that a named schedule is for
    steps     of the whole run
    seed      of random words
    raises    ConfigError on phases that overlap, never end or cannot be carried out, naming the phase
    """

    def __init__(
        self, phases: str | Sequence[Phase], policy: str | Policy = "fp32", *, steps: int, seed: int = 0
    ) -> None:
        self.schedule = Schedule(known.of(phases, Policy.of(policy)), steps)
        refuse_phases(self.schedule.phases, "jax")
        self.position = self.schedule.start()
        policies = dict.fromkeys(phase.policy for phase in self.schedule.phases)
        self._precisions = {policy: Precision(policy, seed=seed) for policy in policies}
        self._made: dict[tuple[Any, Policy], Any] = {}
        self._losses: dict[LossScaling | None, tuple[float, int, int, int]] = {}

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

    @property
    def precision(self) -> Precision:
        return self._precisions[self.phase.policy]

    def each(self, make: Callable[[Precision], Made]) -> Made:
        """What `make`, the same function at each call, gives for the present policy; called once for each policy."""
        key = (make, self.phase.policy)
        if key not in self._made:
            self._made[key] = make(self.precision)
        found: Made = self._made[key]
        return found

    def after(self, record: Mapping[str, Any], opt_state: Any) -> Any:
        """Take note of a step; returns the optimizer's state to go on with, handed over where a phase ends.

        record     "step" (steps done so far), and what the triggers ask for: "skipped", "loss_scale", "val_loss"
        raises     ConfigError if a key is missing
        """
        if type(record.get("step")) is not int:
            raise ConfigError('after() takes a record with an integer "step": the steps done so far')
        before = self.phase.policy
        try:
            self.position = self.schedule.after(self.position, record)
        except KeyError as error:
            raise ConfigError(f"the trigger of phase {self.number} needs {error} in after()'s record") from error
        return self.hand_over(before, opt_state)

    def hand_over(self, before: Policy, opt_state: Any) -> Any:
        """Weights, moments and counters stay; a policy's loss scale goes on where its own stopped, or begins."""
        if before == self.phase.policy:
            return opt_state
        state = scaling.state_of(opt_state)
        self._losses[before.loss_scaling] = tuple(getattr(state, name).item() for name in _FIELDS)
        fresh = scaling.initial(self.phase.policy)
        scale, good, bad, _ = self._losses.get(
            self.phase.policy.loss_scaling, tuple(getattr(fresh, name).item() for name in _FIELDS)
        )
        now = state._replace(
            scale=jnp.asarray(scale, jnp.float32),
            good=jnp.asarray(good, jnp.int32),
            bad=jnp.asarray(bad, jnp.int32),
            at_floor=jnp.zeros((), jnp.int32),
            bad_run=jnp.zeros((), jnp.int32),
        )
        return replaced(opt_state, now)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """The position, and the loss scales of policies that wait, as plain data (JSON)."""
        waiting = [
            [None if scaling is None else scaling.to_dict(), list(values)] for scaling, values in self._losses.items()
        ]
        return self.position.to_dict() | {"loss_scales": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was taken.

        raises    ConfigError if the schedule has fewer phases
        """
        position = Position.from_dict(dict(state))
        if position.index >= len(self.schedule.phases):
            raise ConfigError(
                f"the saved run is in phase {position.index + 1}, the schedule has {len(self.schedule.phases)}"
            )
        self.position = position
        self._losses = {
            None if key is None else LossScaling(**key): tuple(values) for key, values in state.get("loss_scales", [])
        }


def replaced(tree: Any, state: State) -> Any:
    """An optimizer's state with another `State` in its place."""

    return jax.tree.map(lambda x: state if isinstance(x, State) else x, tree, is_leaf=lambda x: isinstance(x, State))
