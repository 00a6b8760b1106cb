"""What each site of a function loses in one step: measured on the host, at the tensors that the step has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mezzo.errors import ConfigError
from mezzo.jax import scaling
from mezzo.jax.interpret import Seen
from mezzo.jax.precision import Precision, apart
from mezzo.jax.rounding import Rounding
from mezzo.policy import Policy, Site
from mezzo.policy.collect import HostCollector
from mezzo.policy.sample import Sample


def measure(
    precision: Precision,
    function: Callable[..., Any],
    *args: Any,
    whatif: Iterable[str | Policy] = (),
    state: Any = None,
    argnums: int = 0,
    has_aux: bool = False,
    **kwargs: Any,
) -> Sample:
    """Run a loss and its gradient once and measure every rounding, forward and backward; nothing is trained.

        sample = mezzo.jax.measure(precision, loss_fn, params, x, y, whatif=["nvfp4"], state=opt_state)
        for site, one in sample.worst(5): print(site, one)

    precision  what it runs under; under "fp32" every tensor is met unrounded
    function   the loss, as it was before `precision(loss_fn)`; its arguments follow
    whatif     policies: what would each lose at the same tensors?
    state      the optimizer's, of a policy that needs it; by default that before the first step
    returns    Sample; its step is how many the state was stepped so far
    raises     ConfigError if no product was met, or a rule of `whatif` matches nothing
    """
    given = precision.init() if state is None else scaling.state_of(state)
    told: list[tuple[Rounding, np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    seen: list[Seen] = []

    def listener(rounding: Rounding, raw: Any, before: Any, after: Any) -> None:
        told.append((rounding, np.asarray(raw), np.asarray(before), np.asarray(after)))

    paths: list[str] = []
    arrays, rebuilt = apart(args[argnums])

    def loss(parameters: list[Any], others: list[Any]) -> Any:
        again = list(rest(others))
        again[argnums] = rebuilt(parameters)
        out, seen[:], paths[:] = precision.run(function, argnums, tuple(again), kwargs, given, listener)
        return out[0] if has_aux else out

    others, rest = apart(args)
    jax.block_until_ready(jax.jit(jax.value_and_grad(loss, allow_int=True))([jnp.asarray(x) for x in arrays], others))
    jax.effects_barrier()
    if not told:
        raise ConfigError("the function has no dot product or convolution, so there is nothing to measure")
    asked = [Policy.of(policy) for policy in whatif]
    collector = HostCollector(precision.policy, paths, asked, float(given.scale), precision.seed, int(given.draws))
    order = _order(seen)
    for rounding, raw, before, after in sorted(told, key=lambda one: order.get(one[0].site, len(order))):
        collector.add(rounding.site, rounding.spec, rounding.axis, raw, before, after)
    told.clear()  # jit's caches keep the listener
    return collector.sample(int(given.steps))


def _order(seen: list[Seen]) -> dict[Site, int]:
    """Sites in the order of computation, which callbacks do not keep: forward in order, then backward."""
    forward: list[Site] = []
    backward: list[Site] = []
    for one in seen:
        if one.site is not None:
            shown = one.site.names or {role: role for role in one.site.specs}
            sites = {role: Site(one.path, name, one.site.call) for role, name in shown.items()}
            forward += [site for role, site in sites.items() if role.startswith("fprop")]
            backward = [site for role, site in sites.items() if not role.startswith("fprop")] + backward
    return {site: i for i, site in enumerate(dict.fromkeys(forward + backward))}


def first_nonfinite(precision: Precision, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Site | None:
    """The first site whose rounded tensor is not finite where the loss and its gradient are computed; None if all are.

    Arguments as of `measure`.
    """
    sample = measure(precision, function, *args, **kwargs)
    return next((site for site, one in sample.sites.items() if one.measure.nonfinite or one.overflows), None)
