"""The scale controller: the loss scale, delayed tensor scales, and the counter behind stochastic rounding.

    products ──► largest magnitude since the last step ──► seen (rows)
    step()   ──► history (rows, steps) ──► wanted (rows): the scale of each site for the next step

Nothing here waits for the device. The transitions are those of `mezzo/policy/scale.py` and `mezzo/policy/amax.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzo.formats import AnyFormat
from mezzo.formats.blocks import MIN_SCALE, max_scale
from mezzo.policy import LossScaling, Site, Spec, amax
from mezzo.policy.site import SHORTHANDS
from mezzo.torch.scaler import SCALE_KEYS, LossScaler

PREFIX = "amax."  # of the names in a state_dict
UNSEEN = -1.0  # of a row that no tensor has met since the last step
LOSS_PREFIX = "loss_scale."  # the same, of loss scales that wait for their policy to come back


@dataclass
class Group:
    """The rows that have one format and one length of history, as an index on the device."""

    fmt: AnyFormat
    steps: int
    at: Tensor


class Scales:
    """State of loss scaling, of delayed scaling and of stochastic rounding, for all sites of one model.

    A row of the tables is a site under one spec: another policy that is used for a while has rows of its own.

    loss     the loss scale
    seed     of the random words
    draws    0-d int64: how often gradients were computed so far; the step in the words' key, so that each backward pass
             draws anew and a recomputed forward pass draws the same
    training whether the model runs forward with gradients: only then does the amax of forward operands count
    """

    def __init__(self, seed: int, device: torch.device, loss_scaling: LossScaling | None = None) -> None:
        self.seed, self.device = seed, device
        self.loss = LossScaler(loss_scaling, device)
        self._losses = {loss_scaling: self.loss}  # of the policies so far: each goes on where it stopped
        self._saved_losses: dict[str, Tensor] = {}
        self.draws = torch.zeros((), dtype=torch.int64, device=device)
        self.training = True
        self.rows: dict[str, int] = {}
        self.groups: list[Group] = []
        self._specs: list[Spec] = []
        self._gradients = torch.zeros(0, dtype=torch.bool, device=device)  # rows whose tensors carry the loss scale
        self.history = torch.zeros(0, 1, device=device)
        self.seen = torch.zeros(0, device=device)  # UNSEEN, or the amax since the last step
        self.wanted = torch.zeros(0, device=device)
        self._saved: dict[str, Tensor] = {}  # of a loaded state: rows that may still be asked for

    def add(self, sites: Iterable[tuple[Site, Spec]]) -> None:
        """Make room for sites with delayed scales; those that are there keep what they remember."""
        before = len(self.rows)
        new = [(site, spec) for site, spec in sites if row_name(site, spec) not in self.rows]
        if not new:
            return
        for site, spec in new:
            self.rows.setdefault(row_name(site, spec), len(self.rows))
            self._specs += [spec] * (len(self.rows) - len(self._specs))
        count, longest = len(self.rows), max(spec.delayed for spec in self._specs)
        history = torch.zeros(count, max(longest, self.history.shape[1]), device=self.device)
        history[:before, : self.history.shape[1]] = self.history
        more = torch.zeros(count - before, device=self.device)
        self.history, self.wanted = history, torch.cat([self.wanted, more])
        self.seen = torch.cat([self.seen, torch.full_like(more, UNSEEN)])
        roles = (name.split(" ")[0].rpartition(":")[2] for name in self.rows)
        gradients = [role in SHORTHANDS["grad_output"] for role in roles]
        self._gradients = torch.tensor(gradients, device=self.device)
        alike: dict[tuple[AnyFormat, int], list[int]] = {}
        for index, spec in enumerate(self._specs):
            alike.setdefault((spec.fmt, spec.delayed), []).append(index)
        self.groups = [Group(*key, torch.tensor(at, device=self.device)) for key, at in alike.items()]
        for name in [*self.rows][before:]:
            self._recall(name)
        self._decide()

    def key(self, site: Site) -> tuple[int, Tensor, str]:
        """(seed, step, site) for the random words of a rounding."""
        return self.seed, self.draws, str(site)

    def scale(self, row: int, x: Tensor, spec: Spec, note: bool) -> Tensor:
        """The scale for `x`, 0-d float32: from the steps before; from its own amax where there were none yet.

        row     of the tables
        note    whether the amax of `x` counts for the steps to come
        """
        top = spec.fmt.element.max  # type: ignore[union-attr]  # Spec lets only scaled formats be delayed
        return torch.ops.mezzo.delayed_scale(x, self.seen, self.wanted, row, note, top)  # type: ignore[no-any-return]

    def switch(self, loss_scaling: LossScaling | None, scale: float | None = None) -> None:
        """Go on with another loss scale; one that was used before goes on where it stopped.

        scale    measured: begin with this one
        """
        before = self.loss.scale
        if loss_scaling not in self._losses:
            self._losses[loss_scaling] = LossScaler(loss_scaling, self.device)
            saved = {key: self._saved_losses.pop(_loss_name(loss_scaling, key), None) for key in SCALE_KEYS}
            if all(value is not None for value in saved.values()):
                self._losses[loss_scaling].load_state_dict(saved)
        self.loss = self._losses[loss_scaling]
        self.loss.forgive()
        if scale is not None:
            self.loss.begin(scale)
        self._rescale(self.loss.scale / before, self.history)

    def _rescale(self, factor: Tensor, history: Tensor) -> None:
        """Take `history` over; gradients of the next step carry a loss scale that changed by this factor."""
        if self.rows:
            change = torch.where(self._gradients, factor, torch.ones_like(factor))
            self.history.copy_(history * change[:, None])
            self._decide()

    def step(self, skipped: Tensor) -> None:
        """Move the loss scale, and remember the amax seen since the last step, unless it was skipped."""
        before = self.loss.scale
        self.loss.update(skipped)
        if self.rows:
            stays = skipped | (self.seen == UNSEEN)[:, None]  # of a policy that waits, too
            history = torch.where(stays, self.history, amax.remember(self.history, self.seen, torch))
            self.seen.fill_(UNSEEN)
            self._rescale(self.loss.scale / before, history)

    def _decide(self) -> None:
        """The scales for the next step; 0 where nothing was seen yet."""
        for group in self.groups:
            history = self.history[group.at, : group.steps]
            scale = amax.scale(amax.DelayedScaling(group.steps), history, group.fmt, torch)
            self.wanted[group.at] = torch.where(history.amax(-1) > 0, scale, torch.zeros_like(scale))

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        found = dict(self._saved)
        for name, row in self.rows.items():
            found[PREFIX + name] = self.history[row, : self._specs[row].delayed].clone()
        others = dict(self._saved_losses)
        for scaling, scaler in self._losses.items():
            if scaler is not self.loss and scaling is not None:
                others |= {_loss_name(scaling, key): value for key, value in scaler.state_dict().items()}
        return self.loss.state_dict() | others | found | {"draws": self.draws.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; a site under a spec that it does not name begins anew."""
        self.loss.load_state_dict(state)
        self.load_lasting(state)
        self._losses = {self.loss.scaling: self.loss}
        self._saved_losses = {name: tensor for name, tensor in state.items() if name.startswith(LOSS_PREFIX)}

    def load_lasting(self, state: dict[str, Tensor]) -> None:
        """All but the loss scale, which another policy begins anew."""
        self.draws.copy_(state.get("draws", torch.zeros((), dtype=torch.int64)))
        self._saved = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
        self.history.zero_()
        self.seen.fill_(UNSEEN)
        for name in self.rows:
            self._recall(name)
        self._decide()

    def _recall(self, name: str) -> None:
        """Put what a loaded state holds of a row into its place."""
        found = self._saved.pop(PREFIX + name, None)
        if found is not None:
            self.history[self.rows[name], : len(found)] = found.to(self.device)


def _loss_name(scaling: LossScaling | None, key: str) -> str:
    numbers = () if scaling is None else scaling.to_dict().values()
    return f"{LOSS_PREFIX}{','.join(map(str, numbers))}.{key}"


def row_name(site: Site, spec: Spec) -> str:
    """PATH:ROLE FORMAT delayed=STEPS: what a row of the tables is called."""
    return f"{site} {spec.fmt.name} delayed={spec.delayed}"


@torch.library.custom_op("mezzo::delayed_scale", mutates_args=("seen",))
def _delayed_scale(x: Tensor, seen: Tensor, wanted: Tensor, row: int, note: bool, top: float) -> Tensor:
    largest = x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
    if note:
        # torch.maximum keeps a NaN, and the history then leaves this step out.
        seen[row] = torch.maximum(seen[row], largest)
    own = (largest / torch.full_like(largest, top)).nan_to_num(1.0, 1.0).clamp(MIN_SCALE, max_scale(top))
    return torch.where(wanted[row] > 0, wanted[row], own)


@_delayed_scale.register_fake
def _(x: Tensor, seen: Tensor, wanted: Tensor, row: int, note: bool, top: float) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=x.device)
