"""What the JAX engine runs: AdamW by torch's formula, and the compiled functions of one policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

import mezzo.jax
from mezzo.jax.scaling import Guarded
from mezzo.models import gpt_jax
from mezzo.models.shapes import GPTConfig
from mezzo.policy import Policy
from mezzo.train.adamw_state import Options
from mezzo.train.config import Config

Params = dict[str, Any]


class Moments(NamedTuple):
    """AdamW's state: steps taken (int32, 0-d), and two running means for each parameter."""

    count: Any
    first: Params
    second: Params


def adamw(options: Options) -> Any:
    """AdamW by torch's formula, as an optax transformation whose `update` takes the learning rate: `rate=…`.

    Matrices and embeddings decay, vectors (norms, biases) do not.
    source    Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2
    """
    beta1, beta2 = options.betas

    def init(params: Params) -> Moments:
        return Moments(jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(grads: Params, state: Moments, params: Params, *, rate: Any, **more: Any) -> tuple[Params, Moments]:
        count = state.count + 1
        first = {name: beta1 * m + (1 - beta1) * grads[name] for name, m in state.first.items()}
        second = {name: beta2 * v + (1 - beta2) * jnp.square(grads[name]) for name, v in state.second.items()}
        one, two = 1 - beta1 ** count.astype(jnp.float32), 1 - beta2 ** count.astype(jnp.float32)

        def moved(name: str) -> Any:
            step = (first[name] / one) / (jnp.sqrt(second[name] / two) + options.eps)
            decay = options.weight_decay if params[name].ndim >= 2 else 0.0
            return -rate * (step + decay * params[name])

        return {name: moved(name) for name in params}, Moments(count, first, second)

    return optax.GradientTransformationExtraArgs(init, update)


class Compiled(NamedTuple):
    """What one policy runs: compiled when first called.

    gradient   params, state, x, y → gradients, loss
    add        gradients, more → their sum
    update     params, moments, state, gradients, rate → params, moments, state, parameter → gradient is finite
    loss       params, state, x, y → loss
    logits     params, state, idx, last → logits that follow
    plain      params, x, y → loss, before any rounding
    """

    precision: Any
    gradient: Callable[..., Any]
    add: Callable[..., Any]
    update: Callable[..., Any]
    loss: Callable[..., Any]
    logits: Callable[..., Any]
    plain: Callable[..., Any]


def compiled(policy: Policy, config: Config, shape: GPTConfig, options: Options) -> Compiled:
    """What `Compiled` says, of one policy."""
    t = config.train
    precision = mezzo.jax.Precision(policy, seed=t.seed)
    optimizer = precision.optimizer(adamw(options), max_norm=t.clip or None)  # 0 clips nothing

    def plain(params: Params, x: Any, y: Any) -> Any:
        return gpt_jax.loss(params, x, y, shape, checkpoint_activations=t.checkpoint_activations)

    def read(params: Params, idx: Any, last: Any) -> Any:
        return gpt_jax.head(params, gpt_jax.hidden_states(params, idx, shape)[0, last], shape)

    under, logits = precision(plain), precision(read)

    def gradient(params: Params, state: Any, x: Any, y: Any) -> tuple[Params, Any]:
        def share(params: Params) -> tuple[Any, Any]:
            loss = under(params, x, y, state=state)
            return loss / t.accumulate, loss

        grads, loss = jax.grad(share, has_aux=True)(params)
        return grads, loss

    def update(params: Params, moments: Moments, state: Any, grads: Params, rate: Any) -> tuple[Any, ...]:
        moved, after = optimizer.update(grads, Guarded(state, moments), params, rate=rate)
        finite = {name: jnp.isfinite(g).all() for name, g in grads.items()}
        return optax.apply_updates(params, moved), after.inner, after.precision, finite

    return Compiled(
        precision,
        jax.jit(gradient),
        jax.jit(lambda one, other: jax.tree.map(jnp.add, one, other), donate_argnums=0),
        jax.jit(update, donate_argnums=(0, 1)),
        jax.jit(lambda params, state, x, y: under(params, x, y, state=state)),
        jax.jit(lambda params, state, idx, last: logits(params, idx, last, state=state)),
        plain,
    )
