"""L2: sites on a Keras model under TensorFlow, quantised products, and the `Precision` that trains with them."""

import mezzo.keras.backend  # noqa: F401 - first: it says what is missing
from mezzo.keras.measure import measure
from mezzo.keras.optimizer import Optimizer
from mezzo.keras.precision import Precision
from mezzo.keras.quantize import bits, hadamard, quantize
from mezzo.policy.site import SiteRow

CONTRACT = 1  # version of the numerics contract, docs/numerics.md

__all__ = ["CONTRACT", "Optimizer", "Precision", "SiteRow", "bits", "hadamard", "measure", "quantize"]
