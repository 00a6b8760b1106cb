"""What an optimizer step does to the weights: how far they move, and what of that is lost to rounding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzo.policy.site import ROOT
from mezzo.torch.measure import elements
from mezzo.torch.quantize import quantize
from mezzo.torch.rounding import CARRIERS

if TYPE_CHECKING:
    from mezzo.torch.precision import Precision


class Updates:
    """The weights before a step; `read` compares them with those after it.

    parameters   those with a gradient
    """

    @torch.no_grad()
    def __init__(self, precision: Precision, parameters: list[Tensor]) -> None:
        self.precision = precision
        groups = [group for optimizer in precision.optimizers for group in optimizer.param_groups]
        still = {id(p) for group in groups if _is_zero(group.get("lr")) for p in group["params"]}
        moving = [p for p in parameters if id(p) not in still]  # a warmup may begin at zero
        self.before = [(p, p.detach().clone(), p.grad, self._remainder(p)) for p in moving]

    def _remainder(self, p: Tensor) -> Tensor | None:
        """What a low weight cannot hold and is kept beside it."""
        slot = self.precision.compact.slots.get(p)
        return None if slot is None or slot.remainder is None else slot.remainder.clone()

    @torch.no_grad()
    def read(self, skipped: Tensor) -> dict[str, tuple[Tensor, bool]]:
        """Name → ((4,) float64: ratio, lost, unseen, whether the step was taken; whether products round the weight)."""
        found: dict[str, tuple[Tensor, bool]] = {}
        for p, before, gradient, remainder in self.before:
            name = self.precision.names.get(id(p))
            if name is None or gradient is None:
                continue
            sums, _ = elements(before, p.detach(), math.inf)
            size, moved = sums[6].sqrt(), sums[7].sqrt()
            changed = p != before
            now = self._remainder(p)
            kept = changed if now is None or remainder is None else changed | (now != remainder)
            asked = gradient != 0
            lost = _share((asked > kept).count_nonzero(), asked.count_nonzero())  # asked and not kept
            unseen, rounded = self._unseen(name, p, before, changed)
            ratio = torch.where(moved > 0, moved / size, 0.0)  # infinite where the weight was zero
            found[name] = torch.stack([ratio, lost, unseen, (~skipped).double()]), rounded
        self.before = []
        return found

    def _unseen(self, name: str, p: Tensor, before: Tensor, changed: Tensor) -> tuple[Tensor, bool]:
        """Share of the changed weights that are the same to the forward product."""
        path = name.rpartition(".")[0] or ROOT
        spec = self.precision.mode.table.product(path, 0).specs["fprop.b"]
        narrow = spec.fmt.name not in ("float32", "float64") and p.dtype is not CARRIERS.get(spec.fmt.name)
        if p.dim() < 2 or not narrow or spec.hadamard or isinstance(self._module(path), torch.nn.Embedding):
            return torch.zeros((), dtype=torch.float64, device=p.device), False
        then, now = (quantize(w.float(), spec.fmt) for w in (before, p.detach()))
        return _share((changed & (then == now)).count_nonzero(), changed.count_nonzero()), True

    def _module(self, path: str) -> torch.nn.Module:
        model = self.precision.model
        return model if path == ROOT else model.get_submodule(path)


def _is_zero(rate: Any) -> bool:
    return not isinstance(rate, Tensor) and rate == 0  # a tensor would be waited for


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.double().clamp(min=1)
