"""Dynamic loss scaling as a pure state machine, the same for NumPy scalars and for tensors on any device.

Start at 2^16; a step with a nonfinite gradient is skipped and halves the scale; 2000 good steps in a row double it.
The scale has a floor and a ceiling: unfloored, a float32 scale of 2^16 reaches zero after 166 halvings.
source: Micikevicius et al. 2017 (arXiv 1710.03740), section 3.2; the defaults are those of torch.amp.GradScaler, plus
the floor, the ceiling, the hysteresis and the patience, which it lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from mezzo.errors import ConfigError


@dataclass(frozen=True)
class LossScaling:
    """How the loss scale moves.

    init             first scale
    growth_factor    multiplies the scale after `growth_interval` good steps in a row
    backoff_factor   multiplies it after `hysteresis` overflows in a row
    growth_interval  good steps between growths
    floor, ceiling   the scale never leaves them
    hysteresis       overflows in a row that it takes to back off; 1 backs off at once
    patience         overflows in a row at the floor that stop the training
    """

    init: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    floor: float = 1.0
    ceiling: float = 2.0**24
    hysteresis: int = 1
    patience: int = 10

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = (int,) if f.type == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(
                    f"loss_scale.{f.name} is {'a whole' if kinds == (int,) else 'a'} number, got {value!r}"
                )
        if not 0 < self.floor <= self.init <= self.ceiling < float("inf"):
            raise ConfigError(
                f"loss_scale needs 0 < floor <= init <= ceiling, got floor {self.floor:g}, init {self.init:g}, "
                f"ceiling {self.ceiling:g}"
            )
        if not (self.growth_factor > 1 > self.backoff_factor > 0):
            raise ConfigError(
                f"loss_scale needs growth_factor > 1 > backoff_factor > 0, got {self.growth_factor:g} and "
                f"{self.backoff_factor:g}"
            )
        for name in ("growth_interval", "hysteresis", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loss_scale.{name} is at least 1, got {getattr(self, name)}")

    @classmethod
    def constant(cls, scale: float) -> LossScaling:
        """A scale that never moves; a nonfinite gradient still skips the step."""
        return cls(init=scale, floor=scale, ceiling=scale)

    @property
    def is_constant(self) -> bool:
        return self.floor == self.ceiling

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ScaleState:
    """What the controller remembers; each field a Python number or a 0-d array or tensor of one framework.

    scale     float32: what the loss is multiplied by
    good      int32: good steps since the last change
    bad       int32: overflows in a row
    at_floor  int32: overflows in a row while the scale was at its floor
    """

    scale: Any
    good: Any
    bad: Any
    at_floor: Any


def initial(scaling: LossScaling) -> ScaleState:
    return ScaleState(scale=scaling.init, good=0, bad=0, at_floor=0)


def update(scaling: LossScaling, state: ScaleState, overflow: Any, where: Callable[[Any, Any, Any], Any]) -> ScaleState:
    """The state after one step.

    overflow  boolean (Python, array or tensor): some gradient was not finite
    where     the framework's `where(condition, a, b)`; nothing here waits for a device
    """
    bad = where(overflow, state.bad + 1, 0 * state.bad)
    backs_off = bad >= scaling.hysteresis
    good = where(overflow, 0 * state.good, state.good + 1)
    grows = good >= scaling.growth_interval
    lower = where(state.scale * scaling.backoff_factor < scaling.floor, 0 * state.scale + scaling.floor,
                  state.scale * scaling.backoff_factor)  # fmt: skip
    higher = where(state.scale * scaling.growth_factor > scaling.ceiling, 0 * state.scale + scaling.ceiling,
                   state.scale * scaling.growth_factor)  # fmt: skip
    at_floor = where(overflow & (state.scale <= scaling.floor), state.at_floor + 1, 0 * state.at_floor)
    return ScaleState(
        scale=where(backs_off, lower, where(grows, higher, state.scale)),
        good=where(grows, 0 * good, good),
        bad=where(backs_off, 0 * bad, bad),
        at_floor=at_floor,
    )
