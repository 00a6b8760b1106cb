"""What if: what a site would lose under another policy, at the tensors that training has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mezzo.errors import ConfigError
from mezzo.formats import BFLOAT16, FLOAT16, FLOAT32, AnyFormat, ScaledFormat
from mezzo.policy import Policy, Spec
from mezzo.policy.policy import find
from mezzo.policy.roles import SCALED
from mezzo.policy.scale import initial
from mezzo.policy.site import ROOT
from mezzo.torch.measure import Taken, take
from mezzo.torch.table import SiteEvent, round_to, turned

if TYPE_CHECKING:
    from mezzo.torch.precision import Precision

# Bits of the fraction of what a tensor may arrive in.
NARROW = {torch.bfloat16: BFLOAT16.mantissa_bits, torch.float16: FLOAT16.mantissa_bits}


class Suppose:
    """Rounds what a tap is told of as `policy` would; training sees nothing of it.

    A delayed scale is taken from the tensor itself, as it would be where the history is like the present.

    loss_scale   of a policy that scales the loss; None: the first it has, or the present one if it is the run's own
    """

    def __init__(self, precision: Precision, policy: Policy, loss_scale: float | None = None) -> None:
        self.scales = precision.scales
        paths = [path or ROOT for path, _ in precision.model.named_modules()]
        policy.check_paths(paths)
        self.rules = policy.rules_for(paths)
        if any(rule.by_call for rule in self.rules) and not precision.mode.table.by_call:
            raise ConfigError(
                f"{policy}: the model runs under {precision.policy}, which tells no calls apart (path#1), so what a "
                "rule for one call would lose is not known; drop that rule, or run under a policy with such rules"
            )
        same = policy.loss_scaling == precision.policy.loss_scaling
        self.scale: float | None = 1.0  # None: as it is
        if policy.loss_scaling is not None:
            first = None if same else float(initial(policy.loss_scaling).scale)
            self.scale = first if loss_scale is None else loss_scale
        elif same:
            self.scale = None

    def __call__(self, event: SiteEvent) -> tuple[Spec, Taken] | None:
        """The spec that the site would have, and the measures; None if it would keep nothing."""
        site = event.site
        spec = find(self.rules, site)
        if spec is None and site.role == "saved":
            return None  # kept as it is
        spec = spec or Spec(FLOAT32)
        x = event.raw
        if self.scale is not None and site.role in SCALED:
            x = x.float() * (self.scale / self.scales.loss.scale)
        now = replace(spec, delayed=0)
        key = self.scales.key(site) if now.rounding == "stochastic" else None
        source = turned(now, x, event.axis)
        y = round_to(now, source, event.axis, key, None)
        taken = take(source, y, now.fmt, event.axis)
        # A tensor that arrives in 16 bits does not tell what as many bits of another kind would lose of it.
        hidden = event.raw.dtype in NARROW and _fraction_bits(now.fmt) >= NARROW[event.raw.dtype]
        return spec, taken.unknown() if hidden else taken


def _fraction_bits(fmt: AnyFormat) -> int:
    return fmt.element.mantissa_bits if isinstance(fmt, ScaledFormat) else fmt.mantissa_bits
