"""The scale controller: the loss scale, delayed tensor scales, and the counter behind stochastic rounding.

    products ──► note(row, amax) ──► seen          largest magnitude since the last step
    step()   ──► history (rows, steps)  ──► wanted  the scale of each site for the next step

Nothing here waits for the device. The transitions are those of `mezzo/policy/scale.py` and `mezzo/policy/amax.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzo.formats import AnyFormat
from mezzo.policy import LossScaling, Site, Spec, amax
from mezzo.torch.scaler import LossScaler


@dataclass
class Row:
    """One site whose scale is delayed: its place in the tables, its format, and how many steps decide."""

    index: int
    fmt: AnyFormat
    steps: int


class Scales:
    """State of loss scaling, of delayed scaling and of stochastic rounding, for all sites of one model.

    loss     the loss scale
    seed     of the random words
    draws    0-d int64: how often gradients were computed so far; the step in the words' key, so that each backward pass
             draws anew and a recomputed forward pass draws the same
    training whether the model runs forward with gradients: only then does the amax of forward operands count
    """

    def __init__(self, seed: int, device: torch.device, loss_scaling: LossScaling | None = None) -> None:
        self.seed, self.device = seed, device
        self.loss = LossScaler(loss_scaling, device)
        self.draws = torch.zeros((), dtype=torch.int64, device=device)
        self.training = True
        self.rows: dict[str, Row] = {}
        self.history = torch.zeros(0, 1, device=device)
        self.seen = torch.zeros(0, device=device)
        self.wanted = torch.zeros(0, device=device)

    def add(self, sites: Iterable[tuple[Site, Spec]]) -> None:
        """Make room for sites with delayed scales; those that are there already keep what they remember."""
        for site, spec in sites:
            row = self.rows.get(str(site))
            if row is None:
                self.rows[str(site)] = Row(len(self.rows), spec.fmt, spec.delayed)
            elif (row.fmt, row.steps) != (spec.fmt, spec.delayed):
                self.rows[str(site)] = Row(row.index, spec.fmt, spec.delayed)
        count = len(self.rows)
        longest = max([1, *(row.steps for row in self.rows.values())])
        if self.history.shape != (count, longest):
            history = torch.zeros(count, longest, device=self.device)
            history[: self.history.shape[0], : self.history.shape[1]] = self.history
            self.history = history
            self.seen, self.wanted = torch.zeros(count, device=self.device), torch.zeros(count, device=self.device)
        self._decide()

    def key(self, site: Site) -> tuple[int, Tensor, str]:
        """(seed, step, site) for the random words of a rounding."""
        return self.seed, self.draws, str(site)

    def scale(self, site: Site, x: Tensor, spec: Spec, note: bool) -> Tensor:
        """The scale for `x`, 0-d float32: from the steps before; from its own amax where there were none yet."""
        row = self.rows[str(site)]
        top = spec.fmt.element.max  # type: ignore[union-attr]  # Spec lets only scaled formats be delayed
        return torch.ops.mezzo.delayed_scale(x, self.seen, self.wanted, row.index, note, top)  # type: ignore[no-any-return]

    def step(self, skipped: Tensor) -> None:
        """Move the loss scale, and remember the amax seen since the last step, unless it was skipped."""
        self.loss.update(skipped)
        if self.rows:
            history = amax.remember(self.history, self.seen, torch)
            self.history.copy_(torch.where(skipped, self.history, history))
            self.seen.zero_()
            self._decide()

    def _decide(self) -> None:
        """The scales for the next step; 0 where nothing was seen yet."""
        groups: dict[tuple[AnyFormat, int], list[int]] = {}
        for row in self.rows.values():
            groups.setdefault((row.fmt, row.steps), []).append(row.index)
        for (fmt, steps), indices in groups.items():
            at = torch.tensor(indices, device=self.device)
            history = self.history[at, :steps]
            scale = amax.scale(amax.DelayedScaling(steps), history, fmt, torch)
            self.wanted[at] = torch.where(history.amax(-1) > 0, scale, torch.zeros_like(scale))

    def state_dict(self) -> dict[str, Tensor]:
        found = {f"amax.{site}": self.history[row.index, : row.steps].clone() for site, row in self.rows.items()}
        return self.loss.state_dict() | found | {"draws": self.draws.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; a site that it does not name begins anew."""
        self.loss.load_state_dict(state)
        self.draws.copy_(state.get("draws", torch.zeros((), dtype=torch.int64)))
        self.history.zero_()
        for site, row in self.rows.items():
            found = state.get(f"amax.{site}")
            if found is not None:
                length = min(len(found), row.steps)
                self.history[row.index, :length] = found[:length].to(self.device)
        self.seen.zero_()
        self._decide()


@torch.library.custom_op("mezzo::delayed_scale", mutates_args=("seen",))
def _delayed_scale(x: Tensor, seen: Tensor, wanted: Tensor, row: int, note: bool, top: float) -> Tensor:
    from mezzo.formats.blocks import MIN_SCALE, max_scale

    largest = x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
    if note:
        # torch.maximum keeps a NaN, and the history then leaves this step out.
        seen[row] = torch.maximum(seen[row], largest)
    own = (largest / torch.full_like(largest, top)).nan_to_num(1.0, 1.0).clamp(MIN_SCALE, max_scale(top))
    return torch.where(wanted[row] > 0, wanted[row], own)


@_delayed_scale.register_fake
def _(x: Tensor, seen: Tensor, wanted: Tensor, row: int, note: bool, top: float) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=x.device)
