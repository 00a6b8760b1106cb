"""The loss scale's controller with its state on the device: no transition waits for the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mezzo.policy import LossScaling, ScaleState
from mezzo.policy.scale import initial, update

SCALE_KEYS = ("scale", "good", "bad", "at_floor")  # of a state_dict


class LossScaler:
    """Holds the scale as tensors and moves it by `mezzo.policy.scale.update`.

    scaling   None keeps the scale at 1 for good
    """

    def __init__(self, scaling: LossScaling | None, device: torch.device) -> None:
        self.scaling = scaling
        self.device = device
        start = initial(scaling) if scaling else ScaleState(1.0, 0, 0, 0)
        self.state = self._on_device(start.scale, start.good, start.bad, start.at_floor)

    def _on_device(self, scale: float, good: int, bad: int, at_floor: int) -> ScaleState:
        def whole(n: int) -> Tensor:
            return torch.tensor(n, dtype=torch.int32, device=self.device)

        return ScaleState(
            torch.tensor(scale, dtype=torch.float32, device=self.device), whole(good), whole(bad), whole(at_floor)
        )

    @property
    def scale(self) -> Tensor:
        return self.state.scale  # type: ignore[no-any-return]

    def update(self, overflow: Tensor) -> None:
        """Move on after a step; `overflow` is a 0-d boolean tensor."""
        if self.scaling is not None:
            self.state = update(self.scaling, self.state, overflow, torch.where)

    def begin(self, scale: float) -> None:
        """Start anew from a scale that was measured, kept between floor and ceiling."""
        if self.scaling is not None:
            self.state = self._on_device(min(max(scale, self.scaling.floor), self.scaling.ceiling), 0, 0, 0)

    def forgive(self) -> None:
        """Begin the count of overflows at the floor anew."""
        self.state = replace(self.state, at_floor=torch.zeros_like(self.state.at_floor))

    def state_dict(self) -> dict[str, Tensor]:
        s = self.state
        return {key: getattr(s, key) for key in SCALE_KEYS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaling is None:
            return  # saved under a policy that scales the loss
        self.state = self._on_device(*(state[key].item() for key in SCALE_KEYS))
