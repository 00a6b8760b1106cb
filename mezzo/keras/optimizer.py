"""`Optimizer`: any Keras optimizer behind loss scaling, skipped steps and clipping, by Keras' own protocol.

Keras' trainer and everybody's loops call `scale_loss` before the gradients are taken and `apply` after. What is saved
is the optimizer inside: a model that was trained here loads without mezzo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from mezzo.errors import ConfigError
from mezzo.keras.backend import as_is
from mezzo.keras.state import State
from mezzo.keras.table import Tensor


@dataclass
class Parts:
    """What the wrapper holds, out of sight of Keras' and TensorFlow's tracking.

    generation   gives the number of the table in force
    prepared     called once the inner optimizer has its variables
    scaled       whether the loss was ever scaled
    """

    inner: Any
    state: State
    max_norm: float | None
    generation: Callable[[], int]
    prepared: Callable[[Sequence[Any]], None]
    scaled: bool = False


class Optimizer(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Scale the loss, unscale and clip the gradients, leave a step out whose gradients are not finite.

    Made by `Precision.optimizer`, or by it for `model.compile`. Attributes that are not its own are those of the
    optimizer inside, `learning_rate` among them.
    """

    def __init__(self, parts: Parts) -> None:
        check_inner(parts.inner)
        super().__init__(learning_rate=0.0, name=parts.inner.name)
        self._parts = parts
        self._variables: list[Any] = []
        self.built = parts.inner.built
        if self.built:
            parts.prepared(parts.inner._trainable_variables)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_parts" not in self.__dict__:
            raise AttributeError(name)
        parts = self.__dict__["_parts"]
        return parts.inner if name == "inner_optimizer" else getattr(parts.inner, name)

    def __repr__(self) -> str:
        inner = self.__dict__["_parts"].inner if "_parts" in self.__dict__ else None
        return f"<mezzo.keras.Optimizer around {inner!r}>"

    @property  # type: ignore[misc]  # nobody sets it
    def __class__(self) -> Any:
        """That of the optimizer inside: Keras writes its name into files. `type` and isinstance know this one too."""
        return type(self.__dict__["_parts"].inner) if "_parts" in self.__dict__ else Optimizer

    def build(self, variables: Sequence[Any]) -> None:
        with tf.init_scope():
            if not self._parts.inner.built:
                self._parts.inner.build(variables)
            self._parts.prepared(variables)
        self.built = True

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss as gradients are to be taken of it."""
        parts = self._parts
        parts.scaled = True
        if parts.state.scaling is None:
            return loss
        loss = tf.convert_to_tensor(loss)
        wide = loss if loss.dtype == tf.float64 else tf.cast(loss, tf.float32)
        return wide * tf.cast(parts.state.scale, wide.dtype)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Unscale, clip, and update unless a gradient is not finite.

        raises    ConfigError if the policy scales the loss and `scale_loss` was never called
        """
        parts, grads = self._parts, list(grads)
        given = trainable_variables
        variables = list(parts.inner._trainable_variables if given is None else given)
        there = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
        if not there:
            parts.inner.apply(grads, given)  # it says what is wrong
            return
        if not self.built:
            self.build(variables)
        state = parts.state
        if state.scaling is not None and not parts.scaled:
            raise as_is(
                ConfigError(
                    "the gradients are divided by the loss scale, and the loss was never multiplied by it; write "
                    "loss = optimizer.scale_loss(loss) before tape.gradient(loss, …)"
                )
            )
        each = [tf.norm(_dense(g, v)) for g, v in there]
        total = tf.norm(tf.stack([tf.cast(norm, each[0].dtype) for norm in each]))
        finite = tf.math.is_finite(total)
        flags = {id(v): ~tf.math.is_finite(norm) for norm, (_, v) in zip(each, there, strict=True)}
        factor = self._factor(total)
        if factor is not None:
            grads = [None if g is None else _times(g, factor) for g in grads]

        def update() -> Tensor:
            parts.inner.apply(grads, None if given is None else variables)
            return tf.constant(0)

        tf.cond(finite, update, lambda: tf.constant(0))
        fine = tf.constant(False)
        state.step(~finite, tf.stack([flags.get(id(v), fine) for v in self._watched(variables)]), parts.generation())

    def _watched(self, variables: Sequence[Any]) -> Sequence[Any]:
        known = self._parts.inner._trainable_variables
        return known if any(v is variables[0] for v in known) else variables

    def _factor(self, total: Tensor) -> Tensor | None:
        """What gradients of this total norm are multiplied by; None: nothing is to be done to them."""
        scaling, max_norm = self._parts.state.scaling, self._parts.max_norm
        if scaling is None and max_norm is None:
            return None
        divisor = tf.cast(tf.convert_to_tensor(self._parts.state.scale), total.dtype)
        if max_norm is not None:
            divisor = divisor * tf.maximum(tf.cast(1.0, total.dtype), total / divisor / max_norm)
        return 1.0 / divisor

    @property
    def variables(self) -> list[Any]:
        return self._parts.inner.variables  # type: ignore[no-any-return]

    @property
    def iterations(self) -> Any:
        return self._parts.inner.iterations

    @property
    def learning_rate(self) -> Any:
        return self._parts.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self._parts.inner.learning_rate = value

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        self._parts.inner.finalize_variable_values(var_list)

    def save_own_variables(self, store: Any) -> None:
        self._parts.inner.save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        self._parts.inner.load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """That of the optimizer inside."""
        return self._parts.inner.get_config()  # type: ignore[no-any-return]

    # To tf.train.Checkpoint this is the optimizer inside.

    def _trackable_children(self, *args: Any, **kwargs: Any) -> Any:
        return self._parts.inner._trackable_children(*args, **kwargs)

    def _lookup_dependency(self, *args: Any, **kwargs: Any) -> Any:
        if "_parts" not in self.__dict__:  # Keras' own __init__ is running
            return super()._lookup_dependency(*args, **kwargs)
        return self._parts.inner._lookup_dependency(*args, **kwargs)


def check_inner(optimizer: Any) -> None:
    """Refuse what cannot go inside.

    raises    ConfigError that says why
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(
            f"optimizer is a keras.optimizers.Optimizer, got {type(optimizer).__name__}; a name is looked up by "
            "keras.optimizers.get"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor is not None:
        raise ConfigError(
            f"{type(optimizer).__name__} scales the loss itself, and the policy does so too; give the optimizer "
            "without LossScaleOptimizer and loss_scale_factor"
        )
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        raise ConfigError("mezzo.keras trains on one device; leave the scope of the distribution strategy")


def _dense(gradient: Any, variable: Any) -> Tensor:
    """A gradient whose rows may come several times (an embedding's), added up; float32 or float64."""
    if isinstance(gradient, tf.IndexedSlices):
        gradient = tf.math.unsorted_segment_sum(gradient.values, gradient.indices, variable.shape[0])
    return gradient if gradient.dtype == tf.float64 else tf.cast(gradient, tf.float32)


def _times(gradient: Any, factor: Tensor) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(_times(gradient.values, factor), gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(factor, gradient.dtype)
