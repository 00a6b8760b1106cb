"""What a Precision remembers between steps, in TensorFlow variables: the loss scale, and counts.

Nothing here waits for the device; the transitions of the loss scale are those of `mezzo/policy/scale.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mezzo.keras.table import Tensor
from mezzo.policy import LossScaling, ScaleState
from mezzo.policy.scale import initial, update

SCALE_KEYS = ("scale", "good", "bad", "at_floor")
COUNTS = ("steps", "skipped", "bad_run", "draws")
_INT32 = ("good", "bad", "at_floor")  # as torch and the other adapters store them
LOSS_PREFIX = "loss_scale."  # of loss scales that wait for their policy to come back
Array = np.ndarray[Any, Any]


class State:
    """The variables, and what moves them.

    scaling  how the loss scale moves; None keeps it at 1
    ran      generation of the table that the last step ran under, -1 if there was none
    bad      (variables,) whose gradient was not finite in the last step that was skipped
    """

    def __init__(self, scaling: LossScaling | None) -> None:
        with tf.init_scope():
            self.scale = tf.Variable(1.0, trainable=False, name="loss_scale")
            # Whole numbers are int64: TensorFlow keeps int32 variables off the GPU.
            self.whole = {
                name: tf.Variable(0, trainable=False, dtype=tf.int64, name=name)
                for name in (*COUNTS, *SCALE_KEYS[1:], "ran")
            }
        self.scaling = scaling
        self.flags: Tensor | None = None
        self.names: list[str] = []
        self.running: list[Any] = []  # variables that a skipped step must not change, and their values before it
        self.kept: list[Tensor] = []
        self._others: dict[str, Array] = {}
        self.whole["ran"].assign(-1)
        self._begin(initial(scaling) if scaling else ScaleState(1.0, 0, 0, 0))

    def _begin(self, state: ScaleState) -> None:
        self.scale.assign(state.scale)
        for name in SCALE_KEYS[1:]:
            self.whole[name].assign(getattr(state, name))

    def watch(self, names: Sequence[str]) -> None:
        """Make room for which of these variables had a gradient that was not finite."""
        with tf.init_scope():
            self.names = list(names)
            self.flags = tf.Variable(np.zeros(len(names), bool), trainable=False, name="nonfinite")

    def remember(self, running: Sequence[Any]) -> None:
        """Keep the values of variables that forward passes write, as they are now."""
        with tf.init_scope():
            if [id(v) for v in running] != [id(v) for v in self.running]:
                self.running = list(running)
                self.kept = [tf.Variable(v.value, trainable=False, name="kept") for v in running]
                return
            for variable, kept in zip(self.running, self.kept, strict=True):
                kept.assign(variable.value)

    def step(self, overflow: Tensor, flags: Tensor, generation: int) -> None:
        """Move on after a step; a skipped one leaves no trace in what the forward pass wrote.

        overflow   0-d bool;  flags (variables,) bool: whose gradient was not finite
        """
        for variable, kept in zip(self.running, self.kept, strict=True):
            value = tf.where(overflow, kept, variable.value)
            variable.value.assign(value)
            kept.assign(value)
        if self.flags is not None:
            self.flags.assign(tf.where(overflow, flags, self.flags))
        one = tf.cast(overflow, tf.int64)
        w = self.whole
        w["steps"].assign_add(1)
        w["draws"].assign_add(1)
        w["skipped"].assign_add(one)
        w["bad_run"].assign((w["bad_run"] + 1) * one)
        w["ran"].assign(generation)
        if self.scaling is not None:
            now = ScaleState(*(tf.convert_to_tensor(v) for v in (self.scale, w["good"], w["bad"], w["at_floor"])))
            self._begin(update(self.scaling, now, overflow, tf.where))

    def count(self, name: str) -> int:
        return int(self.whole[name].numpy())

    def nonfinite(self) -> list[str]:
        """Names of the variables whose gradient was not finite in the last step that was skipped."""
        return [] if self.flags is None else [n for n, bad in zip(self.names, self.flags.numpy(), strict=True) if bad]

    def switch(self, scaling: LossScaling | None, scale: float | None = None) -> None:
        """Go on with another loss scale; one that was used before goes on where it stopped.

        scale    measured: begin with this one
        """
        if scaling != self.scaling:
            self._others |= {_loss_name(self.scaling, key): value for key, value in self._scale_dict().items()}
            self.scaling = scaling
            saved = [self._others.pop(_loss_name(scaling, key), None) for key in SCALE_KEYS]
            if all(value is not None for value in saved):
                self._begin(ScaleState(*saved))
            else:
                self._begin(initial(scaling) if scaling else ScaleState(1.0, 0, 0, 0))
        if scale is not None and scaling is not None:
            self._begin(ScaleState(min(max(scale, scaling.floor), scaling.ceiling), 0, 0, 0))
        for name in ("at_floor", "bad_run"):
            self.whole[name].assign(0)
        self.whole["ran"].assign(-1)

    def _scale_dict(self) -> dict[str, Array]:
        whole = {name: np.asarray(self.count(name), np.int32) for name in _INT32}
        return {"scale": np.asarray(self.scale.numpy())} | whole

    def state_dict(self) -> dict[str, Array]:
        counts = {name: np.asarray(self.count(name), np.int64) for name in COUNTS}
        waiting = {name: value for name, value in self._others.items() if not name.startswith(_loss_name(None, ""))}
        return self._scale_dict() | waiting | counts

    def load_state_dict(self, state: dict[str, Array]) -> None:
        for name in COUNTS:
            self.whole[name].assign(int(state[name]))
        if self.scaling is not None:  # else it was saved under a policy that scales the loss
            self._begin(ScaleState(float(state["scale"]), *(int(state[name]) for name in SCALE_KEYS[1:])))
        self._others = {name: np.asarray(value) for name, value in state.items() if name.startswith(LOSS_PREFIX)}
        self.whole["ran"].assign(-1)


def _loss_name(scaling: LossScaling | None, key: str) -> str:
    numbers = () if scaling is None else scaling.to_dict().values()
    return f"{LOSS_PREFIX}{','.join(map(str, numbers))}.{key}"
