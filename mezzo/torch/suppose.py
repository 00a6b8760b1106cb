"""What if: what a site would lose under another policy, at the tensors that training has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mezzo.formats import FLOAT32
from mezzo.policy import Policy, Site, Spec
from mezzo.policy.policy import find
from mezzo.policy.scale import initial
from mezzo.policy.site import SHORTHANDS
from mezzo.torch.measure import Taken, take
from mezzo.torch.table import OUTPUTS, SiteEvent, round_to, turned

if TYPE_CHECKING:
    from mezzo.torch.precision import Precision

# The roles whose tensors carry the loss scale.
SCALED = (*SHORTHANDS["grad_output"], *(role for role in OUTPUTS if not role.startswith("fprop")))


class Suppose:
    """Rounds what a tap is told of as `policy` would; training sees nothing of it.

    A delayed scale is taken from the tensor itself, as it would be where the history is like the present. A policy that
    scales the loss begins with its first scale, or goes on with the present one if it is the run's own.
    """

    def __init__(self, precision: Precision, policy: Policy) -> None:
        self.scales, self.policy = precision.scales, policy
        self.table = precision.table(policy)
        same = policy.loss_scaling == precision.policy.loss_scaling
        self.scale = None if same else initial(policy.loss_scaling).scale if policy.loss_scaling else 1.0

    def __call__(self, event: SiteEvent) -> tuple[Spec, Taken] | None:
        """The spec that the site would have, and the measures; None if it would keep nothing."""
        site = event.site
        spec = self.table.saved(site.path) if site.role == "saved" else self._spec(site)
        if spec is None:
            return None
        x = event.raw
        if self.scale is not None and site.role in SCALED:
            x = x.float() * (self.scale / self.scales.loss.scale)
        now = replace(spec, delayed=0)
        key = self.scales.key(site) if now.rounding == "stochastic" else None
        source = turned(now, x, event.axis)
        y = round_to(now, source, event.axis, key, None)
        return spec, take(source, y, now.fmt, event.axis)

    def _spec(self, site: Site) -> Spec:
        return find(self.table.rules, site) or Spec(FLOAT32)
