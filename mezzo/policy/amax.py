"""Delayed tensor scales as a pure state machine, the same for NumPy arrays and for tensors on any device.

The scale of this step comes from the largest magnitudes of the steps before, so that a tensor can be rounded while it
is made. A step whose amax is not finite is not remembered: one NaN would stay the maximum for good.
source: Micikevicius et al. 2022 (arXiv 2209.05433), section 3.3; the history is Transformer Engine's DelayedScaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat, ScaledFormat
from mezzo.formats.blocks import MIN_SCALE, max_scale


@dataclass(frozen=True)
class DelayedScaling:
    """How the scale follows the amax.

    history  how many steps are remembered
    margin   the scale is 2**margin larger than the history asks for: room for growth, at the price of small values
    """

    history: int = 16
    margin: int = 0

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ConfigError(f"delayed scaling remembers at least one step, got history {self.history}")
        if not 0 <= self.margin <= 16:
            raise ConfigError(f"the margin of delayed scaling is in 0 … 16, got {self.margin}")


def remember(history: Any, amax: Any, xp: Any) -> Any:
    """The history after one step.

    history   (…, steps) float32, newest first; zeros where nothing was seen yet
    amax      (…) float32: the largest magnitude of this step's tensor
    xp        numpy or torch; nothing here waits for a device
    """
    newest = amax[..., None]
    moved = xp.concatenate([newest, history[..., :-1]], -1)
    return xp.where(xp.isfinite(newest), moved, history)


def scale(scaling: DelayedScaling, history: Any, fmt: AnyFormat, xp: Any) -> Any:
    """The scale to give to `quantize`: max(history) · 2**margin / the element's largest value; 1 for an empty history.

    history   (…, steps) float32
    returns   (…) float32, positive and finite
    raises    ConfigError if the format takes no float32 scale
    """
    if not isinstance(fmt, ScaledFormat) or fmt.scaling != "free":
        raise ConfigError(f"delayed scaling is for formats scaled by a float32, such as e4m3@tensor; not for {fmt}")
    amax = xp.amax(history, -1)
    top = xp.full_like(amax, fmt.element.max)  # dividing by a Python number may multiply by its reciprocal
    room = 2.0**scaling.margin
    # The ceiling before the margin: after it, what is too large may have overflowed already.
    wanted = xp.clip(amax / top, MIN_SCALE, max_scale(fmt.element.max) / room) * room
    return xp.where(amax == 0, xp.ones_like(amax), wanted)
