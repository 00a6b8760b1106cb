"""`Precision`: one object that trains a Keras model under a policy, through `fit` or in anybody's loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

import numpy as np
import tensorflow as tf
from tensorflow.python.saved_model import save_context

from mezzo.errors import ConfigError, NonfiniteError
from mezzo.keras.checks import check_layers, check_order, check_seed, policy_of
from mezzo.keras.layers import COMPUTE, Layers
from mezzo.keras.optimizer import Optimizer, Parts
from mezzo.keras.sites import rows
from mezzo.keras.state import Array, State
from mezzo.keras.table import Event, Hooks, Rounder, Table
from mezzo.policy import LossScaling, Policy, Site
from mezzo.policy.site import ROOT, SiteRow
from mezzo.policy.support import refuse

_FUNCTIONS = ("train_function", "test_function", "predict_function")
_Given = ParamSpec("_Given")


def _in_order(
    init: Callable[Concatenate[Precision, _Given], None],
) -> Callable[Concatenate[Precision, _Given], None]:
    """Before Python refuses a wrong number of arguments: say which are mixed up."""

    def checked(self: Precision, /, *args: _Given.args, **kwargs: _Given.kwargs) -> None:
        check_order(args, kwargs)
        init(self, *args, **kwargs)

    functools.update_wrapper(checked, init)
    return checked


class Precision:
    """Train `model` under `policy`; the model's own variables are the float32 (or float64) masters.

        precision = mezzo.keras.Precision(model, policy="fp8")
        model.compile(optimizer="adam", loss=…)
        model.fit(x, y)

    In a loop of your own, `optimizer = precision.optimizer(optimizer)`, then `optimizer.scale_loss(loss)` before the
    gradients and `optimizer.apply_gradients` after, and `precision.check()` now and then.

    model       built under the dtype policy float32 (float64 for fp64). Its layers' `call` is wrapped on the instances;
                what it saves is its own. Where it is compiled already its optimizer is wrapped in place
    policy      a recipe's name, a policy string, or a Policy
    seed        of stochastic rounding
    max_norm    gradients are clipped to this total norm
    raises      ConfigError if the policy cannot be carried out on this model
    """

    @_in_order
    def __init__(
        self, model: Any, policy: str | Policy = "bf16", *, seed: int = 0, max_norm: float | None = None
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"max_norm is a positive number, got {max_norm!r}")
        check_seed(seed)
        self.policy = policy_of(policy)
        self.model, self.max_norm = model, max_norm
        refuse(self.policy, "tensorflow")
        self.hooks = Hooks(unguarded=self._unguarded)
        self._guarded = False  # whether an optimizer is behind the loss scale
        self.state = State(self.policy.loss_scaling)
        self._rounder = Rounder(seed, self.state.whole["draws"])
        self._tables: dict[str, Table] = {}
        self._paths: list[str] = []
        self._checked: set[str] = set()
        self._generation = 0
        self._stashed: dict[tuple[str, str], list[Any]] = {}
        self._stale = True  # whether what is kept of moving averages may be older than the last load
        self._own = {name: getattr(model, name) for name in ("compile", "make_train_function") if hasattr(model, name)}
        self.layers: Layers | None = None
        layers = Layers(model, Table(self.policy, self._rounder, self.hooks), self._found)
        self.layers = layers
        try:
            self._found(list(layers.paths.values()))
            self._compiled()
        except ConfigError:
            layers.detach()
            raise
        self._wrap_trainer()

    # --- training ---

    def optimizer(self, optimizer: Any) -> Optimizer:
        """`optimizer` behind this policy's loss scale, skipped steps and clipping.

        raises    ConfigError if it scales the loss itself
        """
        if isinstance(optimizer, Optimizer):
            if optimizer._parts.state is not self.state:
                raise ConfigError("this optimizer is guarded by another Precision; give its inner_optimizer")
            return optimizer
        guarded = Optimizer(Parts(optimizer, self.state, self.max_norm, lambda: self._generation, self._prepare))
        self._guarded = True
        return guarded

    def _unguarded(self) -> Policy | None:
        """The policy, if its loss scale would go unnoticed where gradients are taken now."""
        scaling = self.policy.loss_scaling
        if self._guarded or scaling is None or (scaling.is_constant and scaling.init == 1):
            return None
        if self.hooks.taps or self.layers is None or self.layers.table.policy != self.policy:
            return None  # somebody only looks
        return None if save_context.in_save_context() else self.policy  # what is exported has its gradients traced

    def _prepare(self, variables: Sequence[Any]) -> None:
        self.state.watch([_name(v) for v in variables])
        self.state.remember(self._layers.running())

    def check(self) -> None:
        """Act on what the steps so far came to; waits for the device. `fit` calls it after each step.

        raises    NonfiniteError when steps keep being skipped (at the loss scale's floor, if it has one); ConfigError
                  if a tf.function that was traced before `switch` still runs
        """
        ran = self.state.count("ran")
        if ran not in (-1, self._generation):
            raise ConfigError(
                "a tf.function that was traced under the policy before switch() still runs, with its roundings; make "
                "the tf.function anew after switch()"
            )
        scaling = self.policy.loss_scaling
        run = self.state.count("at_floor" if scaling else "bad_run")
        if run >= (scaling or LossScaling()).patience:
            where = f"at the loss scale's floor of {scaling.floor:g}" if scaling else f"under {self.policy}"
            less = ""
            if scaling and scaling.is_constant:
                where, less = f"at the constant loss scale of {scaling.init:g}", "take a smaller loss_scale, "
            found, rule = self._culprits()
            wider = f", or give that layer a wider format with the rule {rule!r}" if rule else ""
            raise NonfiniteError(
                f"{run} steps in a row had nonfinite gradients {where}; not finite is {found}. The weights are those "
                f"of the last good step. Look for NaN in the data, {less}lower the learning rate{wider}"
            )

    def _culprits(self) -> tuple[str, str]:
        """What was not finite, and a rule that helps one layer of it: "" if none has a format to widen."""
        bad = self.state.nonfinite()
        if not bad:
            return "the sum over all gradients", ""
        table, wide = self._layers.table, {}
        computing = {path for path, layer in self._layers.named() if isinstance(layer, COMPUTE)}
        for path, variable in self._layers.variables():
            if path not in computing and table.product(path, 0).uniform not in ("float32", "float64"):
                wide[_name(variable)] = f"{path}:*={table.stored(path)}"
        low = [name for name in bad if name in wide][-1:]
        listed = bad[-3:] if not low or low[0] in bad[-3:] else [*low, *bad[-2:]]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"the gradient of {', '.join(listed)}{more}", wide[low[0]] if low else ""

    # --- the model ---

    @property
    def _layers(self) -> Layers:
        if self.layers is None:
            raise ConfigError("this Precision was removed from its model; make another")
        return self.layers

    def _found(self, paths: list[str]) -> None:
        """Layers were built: rules may speak of them."""
        self._paths = paths
        if self.layers is None:
            return
        current = self.layers.table.policy
        self._tables = {}
        self.layers.table = self.table(current)
        for layer_path, dtype in _dtypes(self.layers):
            self._check_dtype(layer_path, dtype)

    def _check_dtype(self, path: str, dtype: str) -> None:
        wanted = self._layers.table.stored(path)
        if dtype == wanted:
            return
        if dtype in ("bfloat16", "float16"):
            raise ConfigError(
                f"{path} computes in {dtype} by Keras' own dtype policy, where mezzo rounds by its table; build the "
                "model under keras.config.set_dtype_policy('float32')"
            )
        raise ConfigError(
            f"{path} computes in {dtype}, and the policy {self._layers.table.policy} stores its weights in {wanted}; "
            f"build the model under keras.config.set_floatx({wanted!r}), or take a policy for {dtype}"
        )

    def table(self, policy: Policy) -> Table:
        """The policy resolved against this model.

        raises    ConfigError if it cannot be carried out
        """
        key = str(policy)
        if key not in self._tables:
            refuse(policy, "tensorflow")
            if self._layers.ran or all(layer.built for layer in self.model._flatten_layers()):
                policy.check_paths(self._paths)
            table = Table(policy, self._rounder, self.hooks, self._paths)
            table.resolve(self._paths)
            check_layers(table, self._layers.named())
            self._tables[key] = table
        return self._tables[key]

    def _wrap_trainer(self) -> None:
        model, own = self.model, self._own
        if len(own) < 2:  # a layer, or a network that does not train itself
            return

        @functools.wraps(own["compile"])
        def compile(*args: Any, **kwargs: Any) -> Any:
            result = own["compile"](*args, **kwargs)
            self._compiled()
            return result

        @functools.wraps(own["make_train_function"])
        def make_train_function(force: bool = False) -> Any:
            own["make_train_function"](force)
            self._stale = True
            if not hasattr(model.train_function, "_mezzo"):
                model.train_function = self._checking(model.train_function)

        object.__setattr__(model, "compile", compile)
        object.__setattr__(model, "make_train_function", make_train_function)

    def _compiled(self) -> None:
        """Put the model's optimizer behind the policy."""
        self._stashed = {}
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is not None:
            self.model.optimizer = self.optimizer(optimizer)
            for name in _FUNCTIONS:
                setattr(self.model, name, None)

    def _checking(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Keras' train function with `check` behind it."""

        def step(iterator: Any) -> Any:
            if self.hooks.taps and not self.model.run_eagerly:
                raise ConfigError("a tap sees tensors only where the model runs eagerly; compile with run_eagerly=True")
            if self._stale and self.model.optimizer.built:
                self.state.remember(self._layers.running())
                self._stale = False
            logs = function(iterator)
            self.check()
            return logs

        step._mezzo = True  # type: ignore[attr-defined]
        return step

    # --- other tables ---

    @contextmanager
    def using(self, policy: str | Policy) -> Iterator[None]:
        """Run the model under another policy's formats for a while; masters and loss scale stay.

        A tf.function of your own keeps the table that it was traced under; `model.evaluate` and the like follow.
        """
        outer = self._layers.table.policy
        self._take(policy_of(policy))
        try:
            yield
        finally:
            self._take(outer)

    def switch(self, policy: str | Policy, loss_scale: float | None = None) -> None:
        """Go on training under another policy, between two steps. Weights, moments and the loss scale are handed over.

        A loss scale that was used before goes on where it stopped. `fit` follows; make a tf.function of your own anew.

        policy        stores weights as the one before did
        loss_scale    begin with this one, if the policy has dynamic loss scaling
        raises        ConfigError if it does not, or cannot be carried out
        """
        policy = policy_of(policy)
        if str(self._layers.table.policy) != str(self.policy):
            raise ConfigError("switch() inside of using(): leave that first")
        if loss_scale is not None and (policy.loss_scaling is None or policy.loss_scaling.is_constant):
            raise ConfigError(f"loss_scale={loss_scale:g} is for a policy with dynamic loss scaling, not for {policy}")
        before = self.policy
        self.policy = policy
        try:
            self._take(policy, before)
        except ConfigError:
            self.policy = before
            raise
        self._generation += 1
        self.state.switch(policy.loss_scaling, loss_scale)

    def _take(self, policy: Policy, main: Policy | None = None) -> None:
        """Make `policy` the table in force; Keras' compiled functions go and come with it.

        main    the policy that trained until now, if that changes too
        """
        layers = self._layers
        before = (str(layers.table.policy), str(main or self.policy))
        layers.table = self.table(policy)
        for path, dtype in _dtypes(layers):
            self._check_dtype(path, dtype)
        if not hasattr(self.model, "train_function"):
            return
        self._stashed[before] = [getattr(self.model, name) for name in _FUNCTIONS]
        found = self._stashed.get((str(policy), str(self.policy)), [None] * len(_FUNCTIONS))
        if main is not None:
            found = [None] * len(_FUNCTIONS)  # traced with another generation
        training = self.model.train_function is not None
        for name, function in zip(_FUNCTIONS, found, strict=True):
            setattr(self.model, name, function)
        if training and self.model.train_function is None:
            self.model.make_train_function()  # fit, if it is running, has none of its own

    # --- looking ---

    def sites(self, *example: Any, **kwargs: Any) -> list[SiteRow]:
        """The site table: what each tensor is rounded to and how.

        example   inputs for one forward pass
        raises    ConfigError if there are none
        """
        if not example and not kwargs:
            raise ConfigError("sites() needs inputs for one forward pass: sites(x)")
        layers = self._layers
        layers.recording = {}
        try:
            self.model(*example, **kwargs)
            seen = layers.recording
        finally:
            layers.recording = None
        return rows(layers, seen.values())

    @contextmanager
    def tap(self, listener: Callable[[Site, Array, Array], None]) -> Iterator[None]:
        """Call `listener(site, before, after)` at every rounding, forward and backward, with NumPy arrays.

        Only where the model runs eagerly.
        """
        with self.events(lambda event: listener(event.site, event.before, event.after)):
            yield

    @contextmanager
    def events(self, listener: Callable[[Event], None]) -> Iterator[None]:
        """As `tap`, with all that is known of a rounding."""
        self.hooks.taps.append(listener)
        try:
            yield
        finally:
            self.hooks.taps.remove(listener)

    # --- state ---

    def state_dict(self) -> dict[str, Array]:
        """Everything that must survive a restart besides the model with its optimizer: arrays, by name."""
        return self.state.state_dict()

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Restore what `state_dict` gave, after the model's own state was loaded.

        raises    ConfigError if something is missing
        """
        missing = [name for name in self.state.state_dict() if name not in state and not name.startswith("loss_scale.")]
        if missing:
            raise ConfigError(f"the state lacks {', '.join(missing)}; give what state_dict() gave")
        self.state.load_state_dict({name: np.asarray(value) for name, value in state.items()})
        if self.state.kept:
            self.state.remember(self._layers.running())

    def remove(self) -> None:
        """Give the model its own calls, compile and optimizer back; weights stay as they are."""
        self._layers.detach()
        self.layers = None
        for name in self._own:
            self.model.__dict__.pop(name, None)
        optimizer = getattr(self.model, "optimizer", None)
        if isinstance(optimizer, Optimizer):
            self.model.optimizer = optimizer.inner_optimizer
            for name in _FUNCTIONS:
                setattr(self.model, name, None)


def _name(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))


def _dtypes(layers: Layers) -> Iterator[tuple[str, str]]:
    """(path, dtype) of what layers compute in and of their weights, where that is floating."""
    for layer, _ in layers._own:
        if tf.as_dtype(layer.compute_dtype or "float32").is_floating:
            yield layers.paths[id(layer)], layer.compute_dtype
    for path, variable in layers.variables():
        if tf.as_dtype(variable.dtype).is_floating:
            yield path or ROOT, variable.dtype
