"""Weights and moments in low precision between steps, under any torch optimizer.

                 at rest                                        while the optimizer steps, a chunk at a time
    weight       bfloat16 Parameter (+ 16 bits: kahan, split)   ──► float32 copy ──┐
    gradient     bfloat16                                       ──► float32 copy ──┼──► optimizer.step()
    moments      bfloat16, or codes and scales (`pack.py`)      ──► float32 ───────┘         │
                 ◄── rounded, each with the random words of its own site ────────────────────┘

The Parameter is the user's; the rest is state of `Precision`. Between steps `optimizer.state` of such a parameter holds
only `step` and what is not floating point. Parameters whose master and moments are float32 or float64 are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mezzo.errors import ConfigError
from mezzo.formats import FLOAT32, ScaledFormat, get_format
from mezzo.formats.spec import BFLOAT16
from mezzo.policy import Site, Spec
from mezzo.policy.policy import find
from mezzo.policy.site import ROOT, STATE_ROLES, SiteRow
from mezzo.torch.moments import WIDE, Packed, at_rest, to_bfloat16
from mezzo.torch.table import Table

if TYPE_CHECKING:
    from mezzo.torch.precision import Precision

CHUNK = 1 << 24  # elements that have float32 copies at a time
PREFIX = "compact."  # of the names that it adds to Precision.state_dict


@dataclass
class Slot:
    """How one parameter is kept between steps.

    name       the parameter's
    master     Spec of its weight
    states     role → Spec of its moments
    remainder  what the bfloat16 weight cannot hold: bfloat16 for kahan, int16 for split
    moments    by the optimizer's names
    """

    name: str
    master: Spec
    states: dict[str, Spec]
    remainder: Tensor | None = None
    moments: dict[str, Packed] = field(default_factory=dict)

    @property
    def low(self) -> bool:
        return any(spec.fmt.name not in WIDE for spec in (self.master, *self.states.values()))

    @property
    def low_master(self) -> bool:
        return self.master.fmt.name not in WIDE

    def spec(self, key: str) -> Spec:
        """What the rules give to the moment that the optimizer calls `key`."""
        return self.states.get(f"state.{key}", self.states["state.other"])


class Compact:
    """The parameters of a model that are kept in low precision between steps, and the steps of their optimizers.

    raises    ConfigError if a format cannot be had; nothing was changed then
    """

    def __init__(self, model: nn.Module, table: Table, optimizers: Iterable[Optimizer], seed: int) -> None:
        self.seed, self.optimizers = seed, list(optimizers)
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.slots: dict[Tensor, Slot] = {}
        owners: dict[Tensor, tuple[str, Slot]] = {}
        for path, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point():
                    slot = _slot(table, path or ROOT, f"{path}.{own}" if path else own)
                    first = owners.setdefault(parameter, (path or ROOT, slot))
                    if slot.low or first[1].low:
                        _check_tied(first, (path or ROOT, slot))
                        self.slots[parameter] = first[1]

    def begin(self) -> None:
        """Store low masters as such; what bfloat16 cannot hold of them goes into the remainder."""
        for parameter, slot in self.slots.items():
            if slot.low_master:
                parameter.data, remainder = _store(parameter.detach(), Spec(BFLOAT16, keep=slot.master.keep), None)
                slot.remainder = remainder if self.optimizers else None

    def forget(self) -> None:
        """Weights were replaced: what was left over of the old ones means nothing."""
        for slot in self.slots.values():
            if slot.remainder is not None:
                slot.remainder.zero_()

    # --- steps ---

    @torch.no_grad()
    def step(
        self, optimizer: Optimizer, count: int, *, factor: Tensor | None = None, skipped: Tensor | None = None
    ) -> None:
        """One step of `optimizer`.

        count    steps before this one: the step in the key of random words
        factor   what gradients are multiplied by first; None if a fused optimizer does that itself
        skipped  0-d bool, for a fused optimizer: if true, everything stays as it is to the bit
        """
        groups = optimizer.param_groups
        kept = [group["params"] for group in groups]
        # An optimizer of torch treats each parameter by itself; another one may look at all of them.
        alone = type(optimizer).__module__.startswith("torch.optim.")
        compact = any(p in self.slots for params in kept for p in params)
        try:
            for chunk in _chunks(kept, CHUNK) if compact and alone else [kept]:
                self._step(optimizer, chunk, count, factor, skipped)
        finally:
            for group, params in zip(groups, kept, strict=True):
                group["params"] = params

    def _step(
        self, optimizer: Optimizer, chunk: list[list[Tensor]], count: int, factor: Tensor | None, skipped: Tensor | None
    ) -> None:
        state = optimizer.state
        opened: list[tuple[Tensor, Tensor]] = []
        kept: dict[Tensor, dict[str, Any]] = {}  # what stays in the optimizer's own state
        try:
            for group, params in zip(optimizer.param_groups, chunk, strict=True):
                group["params"] = [
                    self._open(p, state, opened, kept, count) if p in self.slots and p.grad is not None else p
                    for p in params
                ]
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if factor is not None and grads:
                torch._foreach_mul_(grads, factor)
            optimizer.step()
            for p, w in opened:
                kept[p] = self._close(p, w, state.get(w, {}), count, skipped)
        except KeyError as error:
            lost = [self.slots[p].name for p, _ in opened if kept.get(p) and not self.slots[p].moments]
            if not lost:
                raise
            raise ConfigError(
                f"the optimizer's state of {lost[0]} has no {error}: under this policy moments are part of "
                "Precision.state_dict(); load it beside the optimizer's"
            ) from error
        finally:
            for p, w in opened:
                state.pop(w, None)
                if kept[p]:
                    state[p] = kept[p]

    def _open(
        self,
        p: Tensor,
        state: dict[Tensor, dict[str, Any]],
        opened: list[tuple[Tensor, Tensor]],
        kept: dict[Tensor, dict[str, Any]],
        count: int,
    ) -> Tensor:
        """What the optimizer steps on in the place of p: p itself, or a float32 copy. Its moments go into `state`."""
        slot = self.slots[p]
        w = p
        if slot.low_master:
            w = nn.Parameter(_load(p, slot), requires_grad=p.requires_grad)
            assert p.grad is not None
            w.grad = p.grad.to(w.dtype)
        found = state.pop(p, {})
        kept[p] = {key: value for key, value in found.items() if not _floating(key, value)}
        opened.append((p, w))
        for key, value in found.items():  # floating numbers are there if they come from a time before this policy
            if key not in kept[p]:
                slot.moments[key] = self._pack(slot, key, value, w, count)
        full = kept[p] | {key: packed.values(w) for key, packed in slot.moments.items()}
        if full:
            state[w] = full
        return w

    def _close(self, p: Tensor, w: Tensor, state: dict[str, Any], count: int, skipped: Tensor | None) -> dict[str, Any]:
        """Round weight and moments to what they rest in; returns what stays in the optimizer's state."""
        slot = self.slots[p]
        for key, value in state.items():
            if not _floating(key, value):
                continue
            old = slot.moments.get(key)
            if skipped is not None and old is None:
                value = torch.where(skipped, torch.zeros_like(value), value)  # a fused SGD leaves it uninitialised
            new = self._pack(slot, key, value, w, count)
            if skipped is not None and old is not None and new.fmt is not None:
                new.tensors = tuple(map(torch.where, [skipped] * 2, old.tensors, new.tensors))
            slot.moments[key] = new
        if slot.low_master:
            data, remainder = _store(w.detach(), slot.master, (self.seed, count, f"{slot.name}:master"))
            if skipped is not None:
                data = torch.where(skipped, p, data)
                if remainder is not None and slot.remainder is not None:
                    remainder = torch.where(skipped, slot.remainder, remainder)
            p.copy_(data)
            slot.remainder = remainder
        return {key: value for key, value in state.items() if not _floating(key, value)}

    def _pack(self, slot: Slot, key: str, value: Tensor, like: Tensor, count: int) -> Packed:
        """`value` as the rules say; as it is where it is no moment of the weight's shape."""
        if value.shape != like.shape or not value.dim():
            return Packed(None, (value,))
        return at_rest(value.to(like.dtype), slot.spec(key), key, (self.seed, count, f"{slot.name}:state.{key}"))

    def rows(self) -> list[SiteRow]:
        """A row for each parameter's moments that are kept in low precision, and for what is kept beside its weight."""
        found = []
        for p, slot in self.slots.items():
            roles = self._roles()
            specs = {role: slot.states[role] for role in roles if slot.states[role].fmt.name not in WIDE}
            alike = len(specs) == len(roles) > 1 and len(set(specs.values())) == 1
            for role, spec in ({"state": specs[roles[0]]} if alike else specs).items():
                size = ceil(p.numel() * spec.fmt.bits / 8)
                found.append(SiteRow(f"{slot.name}:{role}", tuple(p.shape), str(spec), "stored", size))
        return found

    def _roles(self) -> list[str]:
        """The moments that the optimizers have; AdamW's where there is none yet."""
        names: list[str] = []
        for defaults in (optimizer.defaults for optimizer in self.optimizers):
            if "betas" in defaults:
                names += ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if defaults.get("amsgrad") else [])]
            else:
                names.append("momentum_buffer" if "momentum" in defaults and "alpha" not in defaults else "other")
        return [f"state.{name}" for name in dict.fromkeys(names or ("exp_avg", "exp_avg_sq"))]

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Remainders and moments, `compact.PARAMETER:MOMENT|FORMAT|INDEX` each; the tensors themselves."""
        found: dict[str, Tensor] = {}
        for slot in self.slots.values():
            if slot.remainder is not None:
                found[f"{PREFIX}{slot.name}:master|{slot.master.keep}|0"] = slot.remainder
            for key, packed in slot.moments.items():
                for i, tensor in enumerate(packed.tensors):
                    found[f"{PREFIX}{slot.name}:{key}|{packed.fmt or ''}|{i}"] = tensor
        return found

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], count: int = 0) -> None:
        """Restore what `state_dict` gave, to the bit; moments that had another format then are rounded to this one.

        count     steps so far
        raises    ConfigError if the state is of another model
        """
        self.forget()
        for slot in self.slots.values():
            slot.moments.clear()
        saved: dict[tuple[str, str, str], list[Tensor]] = {}
        for full in sorted(key for key in state if key.startswith(PREFIX)):
            site, fmt, _ = full.removeprefix(PREFIX).split("|")
            name, _, key = site.rpartition(":")
            saved.setdefault((name, key, fmt), []).append(state[full])
        for (name, key, fmt), tensors in saved.items():
            p = self.parameters.get(name)
            if p is None:
                raise ConfigError(f"the saved state speaks of {name}, which is no parameter of this model")
            here = tuple(_placed(tensor, p) for tensor in tensors)
            if key == "master":
                known = self.slots.get(p)
                if known is not None and known.remainder is not None and known.master.keep == fmt:
                    known.remainder = here[0]
            else:
                self._restore(p, key, Packed(get_format(fmt) if fmt else None, here), count)

    def _restore(self, p: Tensor, key: str, packed: Packed, count: int) -> None:
        slot = self.slots.get(p)
        like = torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        if slot is None:
            for optimizer in self.optimizers:
                if any(p is q for group in optimizer.param_groups for q in group["params"]):
                    optimizer.state[p][key] = packed.values(like)
            return
        fmt = slot.spec(key).fmt
        same = packed.fmt == fmt or (packed.fmt is None and fmt.name in WIDE)
        slot.moments[key] = packed if same else self._pack(slot, key, packed.values(like), like, count)

    def release(self) -> None:
        """Give the moments back to the optimizers, in the weights' dtype, as torch would have them."""
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"] if p in self.slots):
                slot = self.slots[p]
                for key, packed in slot.moments.items():
                    optimizer.state[p][key] = packed.values(p).to(p.dtype)
                slot.moments.clear()


def stored_bytes(precision: Precision) -> dict[str, int]:
    """Bytes that a Precision's model and optimizers really hold between steps, gradients left out.

    returns   "weights": the parameters; "remainders": what kahan and split keep beside them; "moments": everything else
              that the optimizers remember
    """
    slots = precision.compact.slots.values()
    own = [tensor for slot in slots for packed in slot.moments.values() for tensor in packed.tensors]
    theirs = [value for o in precision.optimizers for state in o.state.values() for value in state.values()]
    return {
        "weights": _bytes(precision.compact.parameters.values()),
        "remainders": _bytes(slot.remainder for slot in slots),
        "moments": _bytes(own) + _bytes(theirs),
    }


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _chunks(groups: list[list[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    """The parameters with gradients, in the same groups, about `size` elements at a time."""
    chunk: list[list[Tensor]] = [[] for _ in groups]
    total = 0
    for i, params in enumerate(groups):
        for p in params:
            if p.grad is None:
                continue
            if total and total + p.numel() > size:
                yield chunk
                chunk, total = [[] for _ in groups], 0
            chunk[i].append(p)
            total += p.numel()
    yield chunk


def _floating(key: str, value: Any) -> bool:
    """Whether an entry of an optimizer's state is for Precision to keep: `Optimizer.load_state_dict` would cast it."""
    return isinstance(value, Tensor) and value.is_floating_point() and key != "step"


# --- rounding ---


def _store(x: Tensor, master: Spec, words: tuple[int, int, str] | None) -> tuple[Tensor, Tensor | None]:
    """A weight as bfloat16, and what that cannot hold.

    Kahan: Zamirai et al. 2020 (arXiv 2010.06192), algorithm 1, with the sum of weight and compensation in float32.
    Split: ties of the upper half go away from zero, since with ties to even 0x3F7F8000 and 0x3F808000 would both be
    0x3F80 with 0x8000 below, which no signed 16 bits can tell apart.
    """
    if master.keep == "split":
        raw = x.float().view(torch.int32)
        high = (raw + 0x8000) >> 16
        return high.to(torch.int16).view(torch.bfloat16), (raw - (high << 16)).to(torch.int16)
    data = to_bfloat16(x, master.rounding, words)
    return data, (x - data.to(x.dtype)).to(torch.bfloat16) if master.keep == "kahan" else None


def _load(p: Tensor, slot: Slot) -> Tensor:
    """The float32 weight that the optimizer steps on."""
    if slot.remainder is None:
        return p.detach().float()
    if slot.master.keep == "split":
        high = p.detach().view(torch.int16).to(torch.int32) << 16
        return (high + slot.remainder).view(torch.float32)
    return p.detach().float() + slot.remainder.float()


def _placed(tensor: Tensor, p: Tensor) -> Tensor:
    """A copy on the device of p, and in its order of memory."""
    if tensor.shape == p.shape:
        return torch.empty_like(p, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.to(p.device, copy=True)


# --- what can be had ---


def _slot(table: Table, path: str, name: str) -> Slot:
    """raises    ConfigError that names the site and says what to write instead"""
    slot = Slot(name, table.master(path), {r: find(table.rules, Site(path, r)) or Spec(FLOAT32) for r in STATE_ROLES})
    for role, spec in slot.states.items():
        fmt = spec.fmt
        why = ""
        if isinstance(fmt, ScaledFormat):
            if fmt.scaling == "nvfp4":
                why = "a moment's scales do not hang on the whole tensor; write mxfp4, or better mxfp8"
            elif fmt.group == "row" or (fmt.group != "tensor" and fmt.group[0] > 1):
                why = f"moments are divided into blocks as they lie in memory; write {fmt.element}@1x128"
        elif fmt.name == "float64" and slot.low_master:
            why = "a bfloat16 weight is updated in float32, and so are its moments; write float32"
        elif fmt.name not in (*WIDE, "bfloat16"):
            why = "moments are float32, bfloat16 or scaled in blocks"
            why += "; write bfloat16" if fmt.bits > 8 or fmt.is_scale else f"; write {fmt}@1x128"
        if why:
            raise ConfigError(f"{path}:{role}={spec}: {why}")
    return slot


def _check_tied(one: tuple[str, Slot], other: tuple[str, Slot]) -> None:
    for what, a, b in (
        ("master", one[1].master, other[1].master),
        *((role, one[1].states[role], other[1].states[role]) for role in STATE_ROLES),
    ):
        if a != b:
            raise ConfigError(
                f"{one[0]}:{what}={a} and {other[0]}:{what}={b} are one tensor, {one[1].name}; give both one format"
            )
