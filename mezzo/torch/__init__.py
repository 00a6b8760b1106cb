"""L2: sites on a torch module, quantised products, and the `Precision` that trains with them."""

from mezzo.policy.site import SiteRow
from mezzo.torch.cpu16 import FastCpu, fast_cpu
from mezzo.torch.hadamard import hadamard
from mezzo.torch.observer import Observer, observe, what_if
from mezzo.torch.phases import Phases
from mezzo.torch.precision import Precision
from mezzo.torch.prune import Pruner
from mezzo.torch.quantize import quantize
from mezzo.torch.step import Step

CONTRACT = 1  # version of the numerics contract, docs/numerics.md

__all__ = [
    "CONTRACT",
    "FastCpu",
    "Observer",
    "Phases",
    "Precision",
    "Pruner",
    "SiteRow",
    "Step",
    "fast_cpu",
    "hadamard",
    "observe",
    "quantize",
    "what_if",
]
