"""Loss scaling, finite checks and clipping inside `jit`: plain functions, and an optax transformation made of them.

    loss_fn(params, batch, state=opt_state)   gradients are computed of loss · scale and come out divided by it
    optimizer.update(grads, opt_state, …)     skips what is not finite, moves the scale

Transitions are those of `mezzo/policy/scale.py`; all state is arrays and lives in the optimizer's state.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mezzo.errors import ConfigError, NonfiniteError, require
from mezzo.policy import LossScaling, Policy
from mezzo.policy import scale as machine

Array = Any
Tree = Any


class State(NamedTuple):
    """What must survive from step to step, each a 0-d array.

    scale      float32: what the loss is multiplied by
    good       int32: good steps since the scale last changed
    bad        int32: overflows in a row
    at_floor   int32: overflows in a row at the scale's floor
    bad_run    int32: skipped steps in a row
    draws      int32: how often gradients were computed; keys the words of stochastic rounding
    steps      int32: optimizer steps, skipped ones too
    skipped    int32: how many of them were skipped
    skips      bool: whether the last one was
    grad_norm  float32: total norm of the last gradients, before clipping
    """

    scale: Array
    good: Array
    bad: Array
    at_floor: Array
    bad_run: Array
    draws: Array
    steps: Array
    skipped: Array
    skips: Array
    grad_norm: Array


_COUNTERS = ("good", "bad", "at_floor", "bad_run", "draws", "steps", "skipped")


class Guarded(NamedTuple):
    """State of the guarded optimizer: `precision` beside the inner optimizer's own."""

    precision: State
    inner: Tree


def initial(policy: str | Policy) -> State:
    """The state before the first step."""
    scaling = Policy.of(policy).loss_scaling
    scale = jnp.asarray(scaling.init if scaling else 1.0, jnp.float32)
    # A buffer each: one that two fields share cannot be donated.
    counters = {name: jnp.zeros((), jnp.int32) for name in _COUNTERS}
    return State(scale=scale, **counters, skips=jnp.zeros((), bool), grad_norm=jnp.zeros((), jnp.float32))


def state_of(tree: Tree) -> State:
    """The `State` in an optimizer's state, however deep it lies.

    raises    ConfigError if there is none, or more than one
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, State))
    found = [x for x in leaves if isinstance(x, State)]
    if len(found) != 1:
        raise ConfigError(
            f"state= holds {len(found) or 'no'} mezzo.jax.State; give the state of the optimizer that "
            "Precision.optimizer made, or that of Precision.init()"
        )
    return found[0]


# --- plain functions ---


@jax.custom_vjp
def multiply_gradient(x: Array, factor: Array) -> Array:
    """x itself; its gradient is multiplied by `factor`."""
    return x


def _multiplied(factor: Array, g: Array) -> tuple[Array, None]:
    g = jnp.asarray(g)
    return g * factor.astype(g.dtype), None


multiply_gradient.defvjp(lambda x, factor: (x, factor), _multiplied)


def grad_norm(grads: Tree) -> Array:
    """Total Euclidean norm of all gradients, 0-d float32; not finite if one of them is not."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads) if g is not None]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def all_finite(grads: Tree) -> Array:
    """Whether every gradient is finite, 0-d bool; a total norm that overflows float32 counts as not finite, too."""
    return jnp.isfinite(grad_norm(grads))


def select(condition: Array, yes: Tree, no: Tree) -> Tree:
    """Leaf by leaf `yes` where `condition`, else `no`: for buffers that a skipped step must leave as they were."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b) if _is_array(a) else a, yes, no)


def advance(policy: str | Policy, state: State, overflow: Array, norm: Array | None = None) -> State:
    """The state after a step.

    overflow   0-d bool: some gradient was not finite
    norm       0-d float32, for the record
    """
    scaling = Policy.of(policy).loss_scaling
    moved = machine.ScaleState(state.scale, state.good, state.bad, state.at_floor)
    if scaling is not None:
        moved = machine.update(scaling, moved, overflow, jnp.where)
    return State(
        scale=moved.scale.astype(jnp.float32),
        good=moved.good,
        bad=moved.bad,
        at_floor=moved.at_floor,
        bad_run=jnp.where(overflow, state.bad_run + 1, 0),
        draws=state.draws + 1,
        steps=state.steps + 1,
        skipped=state.skipped + overflow,
        skips=jnp.asarray(overflow),
        grad_norm=state.grad_norm if norm is None else norm,
    )


# --- the optax transformation ---


def guard(policy: str | Policy, inner: Any, max_norm: float | None = None) -> Any:
    """`inner` with steps whose gradients are not finite left out: weights, its own state, everything stays.

    inner      optax transformation
    max_norm   clip gradients to this total norm
    returns    optax.GradientTransformationExtraArgs whose state is a `Guarded`
    raises     ConfigError if max_norm is not positive; MissingExtraError without optax
    """
    optax = require("optax", extra="jax", option="mezzo.jax.Precision.optimizer")
    if max_norm is not None and not max_norm > 0:
        raise ConfigError(f"max_norm is a positive number or None, got {max_norm!r}")
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ConfigError(f"an optax transformation is needed, such as optax.adam(1e-3); got {inner!r}")
    policy = Policy.of(policy)
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> Guarded:
        return Guarded(initial(policy), inner.init(params))

    def update(grads: Tree, state: Guarded, params: Tree = None, **more: Any) -> tuple[Tree, Guarded]:
        if not isinstance(state, Guarded):
            raise ConfigError(
                "this state is not of precision.optimizer(…); begin with opt_state = optimizer.init(params)"
            )
        norm = grad_norm(grads)
        overflow = ~jnp.isfinite(norm)
        # Zeros in their place: a NaN would go through `where` into gradients of gradients and into debuggers.
        factor = 1.0 if max_norm is None else 1.0 / jnp.maximum(1.0, norm / max_norm)
        clean = jax.tree.map(lambda g: jnp.where(overflow, jnp.zeros_like(g), g * jnp.asarray(factor, g.dtype)), grads)
        updates, after = inner.update(clean, state.inner, params, **more)
        updates = jax.tree.map(lambda u: jnp.where(overflow, jnp.zeros_like(u), u), updates)
        return updates, Guarded(advance(policy, state.precision, overflow, norm), select(overflow, state.inner, after))

    return optax.GradientTransformationExtraArgs(init, update)


def check(policy: str | Policy, tree: Tree, first: str = "") -> None:
    """Stop a training whose steps keep being skipped; call it on the host now and then.

    tree      an optimizer's state, or a `State`
    first     what was nonfinite first, if that is known
    raises    NonfiniteError
    """
    policy, state = Policy.of(policy), state_of(tree)
    scaling = policy.loss_scaling
    run = int(state.at_floor if scaling else state.bad_run)
    if run < (scaling or LossScaling()).patience:
        return
    where, less = f"under {policy}", ""
    if scaling:
        where = f"at the loss scale's floor of {scaling.floor:g}"
        if scaling.is_constant:
            where, less = f"at the constant loss scale of {scaling.init:g}", "take a smaller loss_scale, "
    found = f"; first nonfinite at {first}" if first else ""
    raise NonfiniteError(
        f"{run} steps in a row had nonfinite gradients {where}{found}. The weights are those of the last good step. "
        f"Look for NaN in the data, {less}lower the learning rate, or give the site a wider format "
        "(mezzo.jax.first_nonfinite(precision, loss_fn, …) finds it)"
    )


def scaled(function: Any, scale: Array, values: list[Array]) -> list[Array]:
    """Outputs of `function(values)`, whose gradients with respect to `values` are computed of outputs · scale."""
    _refuse_float16(values, "a parameter or input")
    back = partial(multiply_gradient, factor=1.0 / scale)
    outs = function([back(v) if _is_float(v) else v for v in values])
    _refuse_float16(outs, "what the function gives")
    return [multiply_gradient(y, scale) if _is_float(y) else y for y in outs]


def _refuse_float16(values: list[Any], what: str) -> None:
    if any(_is_float(v) and v.dtype == jnp.float16 for v in values):
        raise ConfigError(
            f"{what} is float16, which holds neither the loss scale nor what it keeps from vanishing; keep parameters "
            "and loss in float32: the policy rounds what enters products"
        )


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def _is_float(x: Any) -> bool:
    return _is_array(x) and bool(jnp.issubdtype(x.dtype, jnp.floating))
