"""What the roundings of one step lost, by the NumPy text `mezzo/formats/measure.py`: exact and eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mezzo.formats import ScaledFormat, decode, encode_scaled
from mezzo.formats.blocks import Groups
from mezzo.formats.measure import Array, Measure, bound
from mezzo.formats.measure import measure as measured
from mezzo.keras.precision import Precision
from mezzo.keras.table import Event
from mezzo.policy import Site
from mezzo.policy.sample import Measured, Sample


def measure(precision: Precision, x: Any, y: Any, loss: Callable[[Any, Any], Any]) -> Sample:
    """Run the model forward and backward on one batch, and measure every rounding; nothing is trained.

    x, y      one batch, as `fit` takes it
    loss      called with (y, the model's result in training), as Keras' losses; the mean over what it gives is
              differentiated, times the loss scale
    returns   the measures by site. Several products of one site are added up
    """
    found: dict[Site, Measured] = {}

    def told(event: Event) -> None:
        one = of_event(event)
        before = found.get(event.site)
        found[event.site] = one if before is None else Measured(event.spec, before.measure + one.measure)

    model = precision.model
    passing = [(v, v.numpy()) for v in model.non_trainable_variables]  # moving averages, dropout's random state
    try:
        with precision.events(told), tf.GradientTape() as tape:
            total = tf.reduce_mean(loss(y, model(x, training=True))) * precision.state.scale
            tape.gradient(total, [v.value for v in model.trainable_variables])
    finally:
        for variable, value in passing:
            variable.assign(value)
    return Sample(precision.state.count("steps") + 1, str(precision.policy), found)


def of_event(event: Event) -> Measured:
    """The measure of one rounding."""
    x, y, fmt = event.before, event.after, event.spec.fmt
    taken: Measure = measured(x, y, fmt, axis=event.axis, limits=_limits(x, event))
    return Measured(event.spec, taken)


def _limits(x: Array, event: Event) -> Array | None:
    """Magnitudes from which on elements have overflowed; None: the format decides."""
    fmt = event.spec.fmt
    if not isinstance(fmt, ScaledFormat) or fmt.scaling not in ("floor", "nvfp4") or not np.isfinite(x).all():
        return None  # other scales follow the largest value, so nothing lies above what they can hold
    coded = encode_scaled(x, fmt, axis=event.axis)
    scales = decode(coded.scales, fmt.scale).astype(np.float64)
    if coded.tensor_scale is not None:
        scales = scales * np.float64(coded.tensor_scale)
    groups = Groups(x.shape, fmt, event.axis)
    # Under a scale that rounded to zero nothing overflows: everything underflows.
    most = bound(fmt.element) * np.where(scales > 0, scales, np.inf)
    divided = groups.divide(np.zeros(x.shape))
    limits: Array = groups.join(np.broadcast_to(groups.unscales(most), divided.shape))
    return limits
