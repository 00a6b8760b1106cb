"""Measuring in high precision what a low phase begins with, and what it will cost: scales, held-out loss, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezzo.formats import FLOAT16
from mezzo.policy import Policy, Site
from mezzo.policy.site import ROOT, SHORTHANDS
from mezzo.torch.switch import undisturbed
from mezzo.torch.table import SiteEvent

if TYPE_CHECKING:
    from mezzo.torch.precision import Precision

HEADROOM = 16.0  # how far below the format's largest value a measured loss scale keeps the largest gradient
# A convolution rounds a tensor once for two products and tells of it once; its amax is both roles'.
_TOGETHER = {
    "fprop.a": ("fprop.a", "wgrad.b"),
    "fprop.b": ("fprop.b", "dgrad.b"),
    "dgrad.a": ("dgrad.a", "wgrad.a"),
}


class Calibration:
    """A tap that notes the amax of every tensor that `following` gives a delayed scale, and the largest gradient.

    With `Precision.tap`, while training goes on under another policy. What it notes enters the histories of the
    following policy's scales, as if that policy had trained these steps.
    """

    def __init__(self, precision: Precision, following: Policy) -> None:
        self.precision = precision
        self.following = following
        table = precision.table(following)
        self.rows = table.delayed_rows()
        self.scaling = following.loss_scaling
        paths = [path or ROOT for path, _ in precision.model.named_modules()]
        self.half = {path for path in paths if table.product(path, 0).formats["dgrad.a"] is FLOAT16}
        self.largest = torch.zeros((), device=precision.device)  # of unscaled gradients that float16 will hold
        self.told = False

    def __call__(self, event: SiteEvent) -> None:
        site, before = event.site, event.before
        scales = self.precision.scales
        gradient = site.role in SHORTHANDS["grad_output"]
        self.told = True
        if not (scales.training or gradient) or site.role == "saved" or not before.numel():
            return
        if site.role == "fprop.b" and before.dim() == 1:
            return  # a bias, which 16 bits round like the weight and fewer leave as it is
        rows = [
            row
            for role in _TOGETHER.get(site.role, (site.role,))
            if (row := self.rows.get(Site(site.path, role, site.call))) is not None
        ]
        scaled = gradient and self.scaling is not None and site.path in self.half
        if rows or scaled:
            amax = before.detach().abs().amax().float()
            for row in rows:
                scales.seen[row] = torch.maximum(scales.seen[row], amax)
            if scaled:
                unscaled = amax / scales.loss.scale
                self.largest = torch.where(torch.isfinite(unscaled), self.largest.maximum(unscaled), self.largest)

    def loss_scale(self) -> float | None:
        """The largest power of two that keeps the largest gradient seen below float16's maximum / 16."""
        largest = float(self.largest)
        if self.scaling is None or self.scaling.is_constant or not largest:
            return None
        return float(2.0 ** math.floor(math.log2(FLOAT16.max / HEADROOM / largest)))


def _gradient(precision: Precision, policy: Policy, loss: Callable[[], Tensor]) -> Tensor:
    """All gradients of a loss as one float64 vector, unscaled; drawn with the random state as it is, which stays."""
    with undisturbed(precision), precision.using(policy):
        precision.backward(loss())
        scale = precision.scales.loss.scale.double()
        found = [p.grad.flatten().double() / scale for p in precision.model.parameters() if p.grad is not None]
    return torch.cat(found)


def compare(
    precision: Precision,
    low: Policy,
    high: Policy,
    loss: Callable[[], Tensor] | None,
    evaluate: Callable[[], float] | None,
) -> dict[str, float]:
    """What `low` loses against `high` at the weights as they are; nothing of the training changes.

    loss       runs the model on a batch and returns the loss, 0-d, with its graph
    evaluate   returns the held-out loss
    returns    gradient_cosine, gradient_ratio (norm under low / under high), val_loss_low, val_loss_high, as asked for
    """
    found: dict[str, float] = {}
    if loss is not None:
        of_low, of_high = (_gradient(precision, policy, loss) for policy in (low, high))
        norms = of_low.norm(), of_high.norm()
        found["gradient_cosine"] = float(of_low @ of_high / (norms[0] * norms[1]))
        found["gradient_ratio"] = float(norms[0] / norms[1])
    if evaluate is not None:
        for name, policy in (("val_loss_low", low), ("val_loss_high", high)):
            with undisturbed(precision), precision.using(policy):
                found[name] = evaluate()
    return found
