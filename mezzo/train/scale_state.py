"""Loss scale and counters as every framework writes and reads them: the group `precision` of a checkpoint.

    scale                          float32, 0-d
    good, bad, at_floor            int32: of the loss scale, see mezzo.policy.scale
    steps, skipped, bad_run, draws int64: steps so far, skipped ones, those in a row; how often gradients were computed
    loss_scale.NUMBERS.KEY         the first four, of loss scales that wait for their policy to come back

torch keeps more there, which others leave to it: amax histories of delayed scales, moments in low precision, masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mezzo.errors import CheckpointError
from mezzo.policy import LossScaling, Policy, ScaleState
from mezzo.policy.scale import initial
from mezzo.train.arrays import Array, Named

SCALE = {"scale": np.float32, "good": np.int32, "bad": np.int32, "at_floor": np.int32}
COUNTS = ("steps", "skipped", "bad_run", "draws")
WAITING = "loss_scale."


@dataclass(frozen=True)
class Scales:
    """All of it as plain numbers.

    waiting    loss scaling → where it stopped
    """

    scale: float = 1.0
    good: int = 0
    bad: int = 0
    at_floor: int = 0
    steps: int = 0
    skipped: int = 0
    bad_run: int = 0
    draws: int = 0
    waiting: tuple[tuple[str, ScaleState], ...] = ()

    @classmethod
    def begin(cls, policy: Policy) -> Scales:
        """Before the first step."""
        return cls().at(_first(policy.loss_scaling))

    def at(self, state: ScaleState) -> Scales:
        """With another loss scale."""
        return replace(self, scale=float(state.scale), good=int(state.good), bad=int(state.bad),
                       at_floor=int(state.at_floor))  # fmt: skip

    def switch(self, before: Policy, after: Policy) -> Scales:
        """Go on under another policy: its loss scale begins, or goes on where it stopped; counters stay."""
        waiting = dict(self.waiting)
        if before.loss_scaling is not None:
            waiting[_numbers(before.loss_scaling)] = ScaleState(self.scale, self.good, self.bad, self.at_floor)
        wanted = after.loss_scaling
        found = None if wanted is None else waiting.pop(_numbers(wanted), None)
        on = self.at(found or _first(wanted))
        return replace(on, at_floor=0, bad_run=0, waiting=tuple(waiting.items()))

    def to_disk(self) -> dict[str, Array]:
        found: dict[str, Array] = {key: np.array(getattr(self, key), kind) for key, kind in SCALE.items()}
        for numbers, state in self.waiting:
            found |= {f"{WAITING}{numbers}.{key}": np.array(getattr(state, key), kind) for key, kind in SCALE.items()}
        return found | {key: np.array(getattr(self, key), np.int64) for key in COUNTS}

    @classmethod
    def from_disk(cls, arrays: Named, saved: str, now: Policy) -> tuple[Scales, list[str]]:
        """The scales to go on with under a policy, and what a person should read.

        saved     the policy that the checkpoint was saved under: another one begins a new loss scale
        raises    CheckpointError if something is missing
        """
        if missing := [key for key in (*SCALE, *COUNTS) if key not in arrays]:
            raise CheckpointError(f"the checkpoint's group precision has no {', '.join(missing)}")
        steps, skipped, bad_run, draws = (int(arrays[key]) for key in COUNTS)
        if saved != str(now):
            begun = replace(cls.begin(now), steps=steps, skipped=skipped, draws=draws)
            return begun, [f"the policy was {saved}, now {now}: a new loss scale begins"]
        names = dict.fromkeys(key[len(WAITING) :].rpartition(".")[0] for key in arrays if key.startswith(WAITING))
        waiting = tuple((numbers, _state(arrays, f"{WAITING}{numbers}.")) for numbers in names)
        own = _first(None) if now.loss_scaling is None else _state(arrays)
        counts = cls(steps=steps, skipped=skipped, bad_run=bad_run, draws=draws, waiting=waiting)
        return counts.at(own), []


def _first(scaling: LossScaling | None) -> ScaleState:
    return ScaleState(1.0, 0, 0, 0) if scaling is None else initial(scaling)


def _state(arrays: Named, prefix: str = "") -> ScaleState:
    return ScaleState(
        float(arrays[f"{prefix}scale"]), *(int(arrays[prefix + key]) for key in ("good", "bad", "at_floor"))
    )


def _numbers(scaling: LossScaling) -> str:
    """As torch's state names a loss scale."""
    return ",".join(map(str, scaling.to_dict().values()))
