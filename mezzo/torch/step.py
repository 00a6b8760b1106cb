"""What one optimizer step did."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mezzo.policy import Site


@dataclass
class Step:
    """The outcome of one step as device tensors; `skipped_now()`, `site` and `rule` wait for the device.

    index       1 for the first step
    skipped     0-d bool: a gradient was not finite, weights and buffers stayed
    grad_norm   0-d float32: total norm of the unscaled gradients, before clipping
    loss_scale  0-d float32: the scale this step's loss was multiplied by
    at_floor    0-d int32: overflows in a row at the scale's floor
    sparsity    0-d float32: share of the prunable weights that are masked after this step; None without a pruner
    """

    index: int
    skipped: Tensor
    grad_norm: Tensor
    loss_scale: Tensor
    at_floor: Tensor
    watched: tuple[tuple[Site, Tensor], ...]
    norms: tuple[tuple[str, Tensor], ...]
    sparsity: Tensor | None = None
    finished: bool = False

    def skipped_now(self) -> bool:
        return bool(self.skipped)

    @cached_property
    def first_site(self) -> Site | None:
        """The first site whose result was not finite, in the order of computation; None if unknown or not skipped."""
        if not self.watched or not self.skipped_now():
            return None
        flags = torch.stack([flag for _, flag in self.watched]).tolist()
        return next((site for (site, _), flag in zip(self.watched, flags, strict=True) if flag), None)

    @cached_property
    def site(self) -> str | None:
        """That site as text, or the parameters whose gradients were not finite; None if the step was not skipped."""
        if not self.skipped_now():
            return None
        if self.first_site is not None:
            return str(self.first_site)
        bad = [name for name, norm in self.norms if not bool(torch.isfinite(norm))]
        if not bad:
            return "the sum over all gradients"
        shown = ", ".join(bad[-3:])
        return f"the gradient of {shown}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")

    @property
    def rule(self) -> str:
        """A rule that would spare the site."""
        site = self.first_site
        return f"'{site.path or '*'}:*=float32'" if site else "'PATH:*=float32'"
