"""Pruning on a schedule: masked weights are zero after every step, in the forward pass too, and stay so for good.

    optimizer's step ──► is the schedule's sparsity above that of the masks? ──► new masks, from the weights' magnitudes
                     └─► masked weights = 0 (weight decay and momentum moved them)

Nothing here waits for the device: when the masks move is decided by a count on the host, whether they do (a step may
have been skipped) by a select on the device. Products stay dense: zeros cost as much time as other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from mezzo.errors import ConfigError

Kind = Literal["magnitude", "2:4"]
Scope = Literal["layer", "global"]

EXCLUDE = ("*head.*", "*classifier.*")  # what output layers are called
PREFIX = "prune."  # of the names in a state_dict
_LEFT_ALONE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


class Pruner:
    """Masks over the weights of `model`, moved by a schedule. Give it to `Precision`, or use it by hand:

        pruner = Pruner(model, sparsity=0.8, begin=100, end=1000, every=20)
        for x, y in batches:
            loss_fn(model(x), y).backward()
            pruner.mask_gradients()       # before clipping; masked gradients then do not count
            optimizer.step()
            pruner.step()                 # after each step of the optimizer that was not skipped
            optimizer.zero_grad()

    After t steps the sparsity is 0 for t < begin, `sparsity` for t ≥ end, and in between
    sparsity · (1 - (1 - (t - begin) / (end - begin))³), renewed at each `every`-th step from `begin` on. What is masked
    once stays masked.

    kind        "magnitude": the smallest magnitudes go; "2:4": of every 4 weights along the input axis (the second; in
                transposed convolutions the first) the 2 of largest magnitude stay, all at once at `begin`
    sparsity    share of the weights that is zero in the end, between 0 and 1; of 2:4 it is 0.5
    begin       steps after which pruning begins; 0 means the first
    end         steps after which the sparsity is reached; None means `begin`; 2:4 does not look at it, nor at `every`
    every       steps from one change of the masks to the next
    include     glob over names of parameters. Those of less than two axes, embeddings and norms are never pruned
    exclude     globs over names; by default those of an output layer
    scope       "layer": each weight is pruned to the sparsity; "global": all of them together
    raises      ConfigError for a schedule or a shape that cannot be, or if nothing is left to prune
    source      Zhu & Gupta 2017 (arXiv 1710.01878), equation 1; Mishra et al. 2021 (arXiv 2104.08378) for 2:4
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind = "magnitude",
        sparsity: float = 0.5,
        begin: int = 0,
        end: int | None = None,
        every: int = 1,
        include: str = "*weight*",
        exclude: str | Sequence[str] = EXCLUDE,
        *,
        scope: Scope = "layer",
    ) -> None:
        for what, value, known in (("kind", kind, get_args(Kind)), ("scope", scope, get_args(Scope))):
            if value not in known:
                raise ConfigError(f"{what} is one of {', '.join(map(repr, known))}, got {value!r}")
        if not 0 < sparsity < 1:
            raise ConfigError(f"sparsity is a share between 0 and 1, both left out; got {sparsity!r}")
        if kind == "2:4" and sparsity != 0.5:
            raise ConfigError(f"2:4 keeps two of every four weights: its sparsity is 0.5, not {sparsity!r}")
        if begin < 0 or every < 1:
            raise ConfigError(f"begin is a step from 0 on and every at least 1, got begin={begin!r}, every={every!r}")
        if end is not None and begin > end:
            raise ConfigError(f"pruning begins at step {begin} and ends before it, at step {end}; give begin ≤ end")
        self.model, self.kind, self.scope, self.final = model, kind, scope, float(sparsity)
        self.begin, self.end, self.every = begin, begin if end is None else end, every
        self.names = _chosen(model, include, exclude)
        if kind == "2:4":
            for name in self.names:
                _check_four(model, name)
        self.count, self.level = 0, 0.0  # steps taken, and the schedule's sparsity that the masks have
        self.masks = {name: torch.zeros_like(self._weight(name), dtype=torch.bool) for name in self.names}
        self.sparsity = self._share()

    def target(self, step: int) -> float:
        """The schedule's sparsity after `step` steps."""
        if step < max(1, self.begin):
            return 0.0
        if self.kind == "2:4" or step >= self.end:
            return self.final
        at = (step - self.begin) // self.every * self.every
        return self.final * (1 - (1 - at / (self.end - self.begin)) ** 3)

    # --- a step ---

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Make the gradients of masked weights zero, also those that are not finite: they move nothing."""
        for name, mask in self.masks.items():
            grad = self._weight(name).grad
            if grad is not None:
                grad.masked_fill_(mask.to(grad.device), 0)

    def step(self) -> None:
        """After the optimizer's step: move the masks if that is due, and zero the masked weights."""
        self.move()
        self.taken()

    @torch.no_grad()
    def move(self, skipped: Tensor | None = None, beside: Mapping[Tensor, Tensor | None] | None = None) -> None:
        """`step()` where the host does not know yet whether the step was skipped; if not, `taken()` must follow.

        skipped   0-d bool: if true, the masks stay as they are
        beside    parameter → what is kept of it besides its own value, zeroed with it
        """
        goal = self.target(self.count + 1)
        if goal > self.level:
            for name, new in self._decide(goal).items():
                old = self.masks[name]
                self.masks[name] = old | new if skipped is None else old | new & ~skipped
            self.sparsity = self._share()
        self._zero(beside or {})

    def taken(self) -> None:
        """Count the step that `move` was called for."""
        self.count += 1
        self.level = max(self.level, self.target(self.count))

    def _weight(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    def _zero(self, beside: Mapping[Tensor, Tensor | None]) -> None:
        for name in self.names:
            weight = self._weight(name)
            mask = self.masks[name] = self.masks[name].to(weight.device)
            weight.masked_fill_(mask, 0)
            rest = beside.get(weight)
            if rest is not None:
                rest.masked_fill_(mask, 0)

    def _share(self) -> Tensor:
        """0-d float32: masked weights over all that could be."""
        masked = torch.stack([mask.sum() for mask in self.masks.values()]).sum()
        return masked.float() / sum(mask.numel() for mask in self.masks.values())

    def _decide(self, goal: float) -> dict[str, Tensor]:
        """What is to be masked; what is masked already comes first."""
        sizes: dict[str, Tensor] = {}
        for name in self.names:
            weight = self._weight(name).detach()
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            sizes[name] = wide.abs().masked_fill_(self.masks[name].to(weight.device), -1.0)
        if self.kind == "2:4":
            return {name: two_of_four(size, _input_axis(self.model, name)) for name, size in sizes.items()}
        if self.scope == "layer":
            return {name: smallest(size, round(goal * size.numel())) for name, size in sizes.items()}
        together = torch.cat([size.flatten() for size in sizes.values()])
        parts = smallest(together, round(goal * together.numel())).split([size.numel() for size in sizes.values()])
        return {name: part.view(size.shape) for (name, size), part in zip(sizes.items(), parts, strict=True)}

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Steps, sparsity and masks (bool, true where the weight is zero), under names that begin with `prune.`."""
        own = {f"{PREFIX}steps": torch.tensor(self.count), f"{PREFIX}level": torch.tensor(self.level).double()}
        return own | {f"{PREFIX}mask.{name}": mask for name, mask in self.masks.items()}

    @staticmethod
    def saved_in(state: Mapping[str, Tensor]) -> bool:
        """Whether a state is of training that pruned."""
        return f"{PREFIX}steps" in state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], steps: int = 0) -> None:
        """Restore what `state_dict` gave, and zero the masked weights; other names in `state` are passed over.

        steps     where to begin if `state` is of training that did not prune
        raises    ConfigError if the masks are of other weights; nothing was changed then
        """
        start = f"{PREFIX}mask."
        saved = {key.removeprefix(start): mask for key, mask in state.items() if key.startswith(start)}
        if not self.saved_in(state):
            self.count, self.level = steps, 0.0
            saved = {name: torch.zeros_like(mask) for name, mask in self.masks.items()}
        else:
            differ = sorted(saved.keys() ^ self.masks.keys()) or [
                name for name, mask in self.masks.items() if mask.shape != saved[name].shape
            ]
            if differ:
                raise ConfigError(
                    f"the saved masks are of other weights than this pruner's, first {differ[0]}; make it with the "
                    "same include and exclude, for the same model"
                )
            self.count, self.level = int(state[f"{PREFIX}steps"]), float(state[f"{PREFIX}level"])
        for name in self.names:
            self.masks[name] = torch.zeros_like(self._weight(name), dtype=torch.bool).copy_(saved[name])
        self.sparsity = self._share()
        self._zero({})


# --- masks ---


def smallest(size: Tensor, count: int) -> Tensor:
    """Bool like `size`: true at its `count` smallest elements, of equal ones at the first."""
    mask = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
    mask[size.flatten().sort(stable=True).indices[:count]] = True
    return mask.view(size.shape)


def two_of_four(size: Tensor, axis: int) -> Tensor:
    """Bool like `size`: of each 4 neighbours along `axis` true at the 2 smallest; of equal ones the first stay.

    axis      its length is a multiple of 4
    """
    four = size.movedim(axis, -1).unflatten(-1, (-1, 4))
    order = four.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.ones_like(four, dtype=torch.bool).scatter_(-1, order[..., :2], False)
    return mask.flatten(-2).movedim(-1, axis)


# --- which weights ---


def _chosen(model: nn.Module, include: str, exclude: str | Sequence[str]) -> list[str]:
    """raises    ConfigError if a glob of the user's matches nothing, or nothing is left"""
    never = {id(p) for m in model.modules() if isinstance(m, _LEFT_ALONE) for p in m.parameters(recurse=False)}
    possible = [n for n, p in model.named_parameters() if p.dim() >= 2 and p.is_floating_point() and id(p) not in never]
    globs = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if globs != EXCLUDE:
        idle = [glob for glob in globs if glob not in EXCLUDE and not any(fnmatchcase(n, glob) for n in possible)]
        if idle:
            raise ConfigError(f"exclude: {idle[0]!r} matches nothing that could be pruned; {_shown(possible)}")
    found = [n for n in possible if fnmatchcase(n, include) and not any(fnmatchcase(n, glob) for glob in globs)]
    if not found:
        raise ConfigError(
            f"nothing to prune: include={include!r} without {', '.join(map(repr, globs)) or 'exceptions'} matches "
            f"no weight; {_shown(possible)}"
        )
    return found


def _shown(possible: Sequence[str]) -> str:
    more = f" and {len(possible) - 4} more" if len(possible) > 4 else ""
    names = ", ".join(possible[:4]) or "none"
    return f"weights of two axes or more, embeddings and norms left out: {names}{more}"


def _input_axis(model: nn.Module, name: str) -> int:
    """Where a weight's products sum: transposed convolutions keep their input channels first, all others second."""
    module = model.get_submodule(name.rpartition(".")[0])
    return 0 if isinstance(module, _ConvTransposeNd) else 1


def _check_four(model: nn.Module, name: str) -> None:
    shape = tuple(model.get_parameter(name).shape)
    inputs = shape[_input_axis(model, name)]
    if inputs % 4:
        raise ConfigError(
            f"2:4 takes weights whose input size is a multiple of 4; {name} {shape} has {inputs} inputs: change the "
            f"layer's input size, or leave it out with Pruner(exclude=(*EXCLUDE, {name!r}))"
        )
