"""A model's layers under a table: their paths, and their `call` wrapped so that products know whose they are.

The wrapped `call` is an attribute of the instance: what a model saves, clones or exports is its own layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from mezzo.errors import ConfigError
from mezzo.keras.backend import as_is
from mezzo.keras.intercept import install
from mezzo.keras.scope import Forward, Scope, Seen, entered, is_suspended, outer
from mezzo.keras.table import Table
from mezzo.policy.site import ROOT

# Layers whose work is a compute site: they run in the model's own dtype.
COMPUTE = (
    keras.layers.BatchNormalization,
    keras.layers.Embedding,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.Softmax,
    keras.layers.UnitNormalization,
)


class Layers:
    """Carries the table out while a model runs.

    table      the one in force
    found      called with all paths whenever there are new ones
    recording  None, or where operations are noted
    """

    def __init__(self, model: Any, table: Table, found: Callable[[list[str]], None]) -> None:
        self.model, self.table, self.found = model, table, found
        self.paths: dict[int, str] = {}  # id of a layer → path; `_own` keeps the layers alive
        self._own: list[tuple[Any, Any]] = []  # layer, the call that the instance had of its own
        self.recording: dict[tuple[str, str], Seen] | None = None
        self.ran = False  # whether a whole forward pass was seen, so that every layer in use has its parts
        install()
        for layer in [model, *model._flatten_layers(include_self=False)]:
            if hasattr(layer.__dict__.get("call"), "_mezzo"):
                raise ConfigError("this model, or a layer in it, is already under a Precision; call its remove() first")
        self.adopt()

    def adopt(self) -> None:
        """Wrap layers that are there now and were not before: many make their parts when they are built."""
        before = len(self.paths)
        for layer, path in _tree(self.model, "", set()):
            if id(layer) not in self.paths:
                self._wrap(layer, path or ROOT)
        if len(self.paths) > before:
            self.found(list(self.paths.values()))

    def _wrap(self, layer: Any, path: str) -> None:
        self._own.append((layer, layer.__dict__.get("call")))
        own = layer.call
        self.paths[id(layer)] = path

        @functools.wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return self._run(layer, path, own, args, kwargs)
            except ConfigError as error:
                as_is(error)
                raise

        call._mezzo = self  # type: ignore[attr-defined]
        object.__setattr__(layer, "call", call)  # not tracked, not saved

    def _run(self, layer: Any, path: str, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if is_suspended():
            return own(*args, **kwargs)
        scope = outer()
        if scope is None:
            self._check_run()
            forward = Forward(self)
        elif scope.forward.layers is not self:
            raise ConfigError("a model under one Precision calls a model under another; give both to one Precision")
        else:
            forward = scope.forward
        if any(id(child) not in self.paths for child in _children(layer)):
            self.adopt()
        with entered(Scope(forward, path)):
            out = own(*args, **kwargs)
        if not self.ran and layer is self.model:
            self.ran = True
            try:
                self.found(list(self.paths.values()))
            except ConfigError:  # Keras' symbolic pass hides it; the next one tells it again
                self.ran = False
                raise
        if self.recording is not None and isinstance(layer, COMPUTE) and tf.is_tensor(out):
            self.note(path, "compute", [list(out.shape)])
        return out

    def _check_run(self) -> None:
        self.adopt()
        if self.table.hooks.taps and not tf.executing_eagerly() and not in_symbolic_scope():
            raise ConfigError(
                "a tap sees tensors only where the model runs eagerly: call it outside of a tf.function, or compile it "
                "with run_eagerly=True"
            )

    def note(self, path: str, kind: str, shapes: Sequence[Sequence[int]]) -> None:
        """An operation ran."""
        if self.recording is None:
            return
        seen = self.recording.get((path, kind))
        if seen is not None:
            seen.calls += 1
        else:
            self.recording[(path, kind)] = Seen(path, kind, [tuple(shape) for shape in shapes])

    def named(self) -> list[tuple[str, Any]]:
        """(path, layer) of every layer that is wrapped."""
        return [(self.paths[id(layer)], layer) for layer, _ in self._own]

    def variables(self) -> Iterator[tuple[str, Any]]:
        """(path, variable) of every weight, each once."""
        done: set[int] = set()
        for layer, path in _tree(self.model, "", set()):
            for variable in [*layer._trainable_variables, *layer._non_trainable_variables]:
                if id(variable) not in done:
                    done.add(id(variable))
                    yield path or ROOT, variable

    def running(self) -> list[Any]:
        """Floating variables that a forward pass writes, such as moving averages; frozen weights are none of them."""
        return [
            variable
            for layer, _ in _tree(self.model, "", set())
            for variable in layer._non_trainable_variables
            if tf.as_dtype(variable.dtype).is_floating
        ]

    def detach(self) -> None:
        """Give every layer its own call back."""
        for layer, own in self._own:
            object.__delattr__(layer, "call")
            if own is not None:
                object.__setattr__(layer, "call", own)
        self._own, self.paths = [], {}


def _children(layer: Any) -> list[Any]:
    return [
        child
        for child in layer._flatten_layers(recursive=False, include_self=False)
        if not isinstance(child, keras.layers.InputLayer)
    ]


def _tree(layer: Any, path: str, done: set[int]) -> Iterator[tuple[Any, str]]:
    """Every layer once with its path: names joined by dots, the model's own left out."""
    if id(layer) in done:
        return
    done.add(id(layer))
    yield layer, path
    for child in _children(layer):
        yield from _tree(child, f"{path}.{child.name}" if path else child.name, done)
