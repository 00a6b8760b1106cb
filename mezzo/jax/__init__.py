"""L2: sites on a JAX function, quantised products, loss scaling inside `jit`."""

from mezzo.errors import require

require("jax", extra="jax", option="mezzo.jax")

from mezzo.jax.measure import first_nonfinite, measure  # noqa: E402
from mezzo.jax.phases import Phases  # noqa: E402
from mezzo.jax.precision import Precision  # noqa: E402
from mezzo.jax.quantize import bits, hadamard, quantize  # noqa: E402
from mezzo.jax.scaling import State, advance, all_finite, grad_norm, select  # noqa: E402

CONTRACT = 1  # version of the numerics contract, docs/numerics.md

__all__ = [
    "CONTRACT",
    "Phases",
    "Precision",
    "State",
    "advance",
    "all_finite",
    "bits",
    "first_nonfinite",
    "grad_norm",
    "hadamard",
    "measure",
    "quantize",
    "select",
]
