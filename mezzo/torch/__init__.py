"""L2: sites on a torch module, quantised products, and the `Precision` that trains with them."""

from mezzo.torch.precision import Precision
from mezzo.torch.sites import SiteRow
from mezzo.torch.step import Step

__all__ = ["Precision", "SiteRow", "Step"]
