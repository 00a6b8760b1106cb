"""mezzo.jax, each case a program of its own that XLA compiles.

The kit has hundreds of shapes, and operation by operation each operation is compiled for each of them: two minutes.
One program a case, without LLVM's expensive passes, takes a quarter of it. `JitAdapter` has a few cases with all.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from adapter import Adapter

from mezzo.jax import Precision
from mezzo.jax.quantize import bits, hadamard, quantize
from mezzo.policy import LossScaling
from mezzo.policy.scale import ScaleState, initial, update

NO_CODES = "mezzo.jax keeps values, not codes"


@contextmanager
def few_passes():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


class JaxAdapter(Adapter):
    name = "jax"
    lacks = {"codes": NO_CODES, "block codes": NO_CODES}  # noqa: RUF012

    def run(self, function, x):
        with self.surroundings(), jax.enable_x64(np.asarray(x).dtype == np.float64):
            return np.asarray(jax.jit(function)(x))

    def surroundings(self):
        return few_passes()

    def quantize(self, x, fmt, **options):
        return self.run(partial(quantize, fmt=fmt, **options), x)

    def bits(self, seed, step, site, count):
        return np.asarray(bits(seed, step, site, count))

    def hadamard(self, x, **options):
        return self.run(partial(hadamard, **options), x)

    def product(self, a, b, g, formats, route):
        rules = "; ".join(f"lin:{role}={fmt}" for role, fmt in formats.items())
        function = Precision(f"fp32; {rules}")(lambda p, x: x @ p["lin.weight"].T)

        @jax.jit
        def both(p, x, g):
            y, back = jax.vjp(function, p, x)
            return y, *back(g)

        with self.surroundings():
            y, dp, dx = both({"lin.weight": b}, a, g)
        return {"fprop": np.asarray(y), "dgrad": np.asarray(dx), "wgrad": np.asarray(dp["lin.weight"])}

    def loss_scales(self, scaling, overflows):
        scaling, states = LossScaling(**scaling), []

        @jax.jit
        def step(fields, overflow):
            return vars(update(scaling, ScaleState(**fields), overflow, jnp.where))

        fields = {
            name: jnp.float32(v) if name == "scale" else jnp.int32(v) for name, v in vars(initial(scaling)).items()
        }
        for overflow in overflows:
            fields = step(fields, jnp.bool_(overflow))
            states.append(tuple(fields[name].item() for name in ("scale", "good", "bad", "at_floor")))
        return states


class JitAdapter(JaxAdapter):
    """As a user compiles, so it is asked for few."""

    name = "jax.jit"

    def surroundings(self):
        return nullcontext()


class EagerAdapter(JitAdapter):
    """Operation by operation."""

    name = "jax, eager"

    def run(self, function, x):
        return np.asarray(function(jnp.asarray(x)))


class VmapAdapter(JitAdapter):
    """Two of the same under vmap."""

    name = "jax.vmap"

    def run(self, function, x):
        y = np.asarray(jax.jit(jax.vmap(function))(np.stack([x, x])))
        assert np.array_equal(y[0], y[1], equal_nan=True)
        return y[1]
