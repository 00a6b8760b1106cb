"""The site table: a policy resolved, site by site, against one model on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats import BFLOAT16, FLOAT32, AnyFormat, ScaledFormat
from mezzo.formats.rounding import Overflow
from mezzo.policy import Policy, Rule, Site, Spec
from mezzo.policy.policy import find
from mezzo.policy.roles import OUTPUTS, check_same, role_specs, shared
from mezzo.policy.site import ATTENTION_ROLES, PRODUCT_ROLES
from mezzo.torch.hadamard import hadamard
from mezzo.torch.pack import pack, packs, unpack
from mezzo.torch.quantize import quantize
from mezzo.torch.rounding import CARRIERS, carrier, cast, widen
from mezzo.torch.scales import Scales, row_name
from mezzo.torch.step import Step


class SiteEvent(NamedTuple):
    """One rounding, as taps are told of it.

    before   what was rounded: the tensor, or its Hadamard transform
    after    the result, of the same shape
    spec     what the site is given
    axis     the one that the product sums over
    scale    0-d float32: a scale that comes from earlier steps; None if there is none
    raw      what came, before a Hadamard transform
    """

    site: Site
    before: Tensor
    after: Tensor
    spec: Spec
    axis: int
    scale: Tensor | None
    raw: Tensor


Tap = Callable[[SiteEvent], None]


class StepObserver(Protocol):
    """Who is told of every optimizer step.

    watches   whether each product's result is to be checked in every step, so that a skipped step names the site
    """

    watches: bool

    def updating(self, parameters: list[Tensor]) -> None:
        """The gradients are there, the update comes next."""

    def stepped(self, step: Step) -> None:
        """The step is done."""

    def restarted(self) -> None:
        """The next step is another than it was to be: under another policy, or from a state that was loaded."""

    def close(self) -> None:
        """The Precision goes away."""


@dataclass
class Hooks:
    """What listens to the sites while they run. Empty, it costs one comparison a site.

    taps       told of every rounding
    logits     called with (path, 0-d tensor: the largest magnitude of an attention's logits)
    observers  told of every optimizer step
    watching   whether each product's result is checked for nonfinite values
    nonfinite  (site, 0-d boolean tensor) in the order in which the results appeared
    """

    taps: list[Tap] = field(default_factory=list)
    logits: list[Callable[[str, Tensor], None]] = field(default_factory=list)
    observers: list[StepObserver] = field(default_factory=list)
    watching: bool = False
    nonfinite: list[tuple[Site, Tensor]] = field(default_factory=list)

    @property
    def active(self) -> bool:
        return self.watching or bool(self.taps)


class Kept(NamedTuple):
    """How an operand is kept for the backward pass: "whole", "rounded", "packed", or "nothing"."""

    how: str
    shape: tuple[int, ...] = ()


class SiteSpec:
    """What one layer's roles are given, and how to carry it out.

    specs     role → Spec;  formats: role → its format
    native    names of the formats that this machine multiplies itself
    scales    the state of stochastic rounding and of delayed scales
    acc       dtype that emulated products are computed in
    shown     role → the role that listeners are told, where it is part of a larger operation; others are not told
    part      of that operation: tells its products' random words apart
    """

    def __init__(
        self,
        path: str,
        call: int,
        specs: dict[str, Spec],
        native: frozenset[str],
        hooks: Hooks,
        scales: Scales,
        shown: dict[str, str] | None = None,
        part: str = "",
    ) -> None:
        self.part = part
        self.path, self.call, self.specs, self.hooks, self.scales, self.shown = path, call, specs, hooks, scales, shown
        # Looked up now: Dynamo cannot write a Site's name.
        self.rows = {role: scales.rows[row_name(self._site(role), s)] for role, s in specs.items() if s.delayed}
        self.formats = formats = {role: spec.fmt for role, spec in specs.items()}
        self.acc = torch.float64 if any(f.name == "float64" for f in formats.values()) else torch.float32
        self.native = native
        names = {f.name for f in formats.values()}
        self.uniform = names.pop() if len(names) == 1 else None

    def cast(self, role: str, x: Tensor, axis: int = -1) -> Tensor:
        """Round `x` to the format of `role`; hand it to whoever listens.

        axis    the one that the product sums over
        """
        source, y, scale = self._round(role, x, axis)
        self.tell(role, source, y, axis, scale, x)
        return y

    def keep(self, role: str, x: Tensor, axis: int, rounded: Tensor | None = None) -> tuple[tuple[Tensor, ...], Kept]:
        """What to keep of `x` until the backward pass needs it rounded for `role`, in as few bytes as there are.

        rounded   x rounded already, where another role shares it
        returns   tensors, and how `take` gets the rounded operand from them
        """
        spec = self.specs[role]
        if rounded is not None and spec.fmt.name in CARRIERS:
            if self.scales.training:
                self.tell(role, x, rounded, axis)
            return (rounded,), Kept("rounded")
        if not self.scales.training or x.dtype is torch.float64 or not packs(spec.fmt, bool(spec.delayed)):
            return (x,), Kept("whole")
        if rounded is None:
            source, rounded, scale = self._round(role, x, axis)
        else:
            source, scale = x, None
        self.tell(role, source, rounded, axis, scale, x)
        return pack(source, rounded, spec.fmt, axis, scale), Kept("packed", tuple(rounded.shape))

    def take(self, role: str, tensors: tuple[Tensor, ...], kept: Kept, axis: int) -> Tensor:
        """The operand rounded for `role` from what `keep` kept."""
        if kept.how == "packed":
            return unpack(tensors, kept.shape, self.specs[role].fmt, axis)
        return tensors[0] if kept.how == "rounded" else self.cast(role, tensors[0], axis)

    def _round(self, role: str, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(what is rounded: x, or its transform; the rounded tensor; the scale if it comes from earlier steps)"""
        spec = self.specs[role]
        x = turned(spec, x, axis)
        scale = self.delayed_scale(role, x) if spec.delayed else None
        key = self.scales.key(self._site(role)) if spec.rounding == "stochastic" else None
        return x, round_to(spec, x, axis, key, scale), scale

    def _site(self, role: str) -> Site:
        """Whose random words and delayed scale a rounding has."""
        return Site(f"{self.path}.{self.part}" if self.part else self.path, role, self.call)

    def delayed_scale(self, role: str, x: Tensor) -> Tensor:
        """The scale that the steps before give `role`; notes the amax of `x` for the steps to come."""
        noted = self.scales.training or not role.startswith("fprop")
        return self.scales.scale(self.rows[role], x, self.specs[role], noted)

    def tell(
        self,
        role: str,
        before: Tensor,
        after: Tensor,
        axis: int = -1,
        scale: Tensor | None = None,
        raw: Tensor | None = None,
    ) -> None:
        """Hand a rounding to whoever listens: the arguments are those of `SiteEvent`."""
        if torch.compiler.is_compiling() or not self.hooks.active:  # in this order: Dynamo then sees no hooks
            return
        shown = role
        if self.shown is not None:
            if role not in self.shown:
                return
            shown = self.shown[role]
        site = Site(self.path, shown, self.call)
        if self.hooks.taps:
            event = SiteEvent(site, before, after, self.specs[role], axis, scale, before if raw is None else raw)
            for tap in self.hooks.taps:
                tap(event)
        if self.hooks.watching and shown in OUTPUTS:
            self.hooks.nonfinite.append((site, ~torch.isfinite(after.sum(dtype=torch.float32))))

    def wide(self, x: Tensor) -> Tensor:
        """`x` in the dtype of the emulated product (exact)."""
        return widen(x, self.acc)

    def route(self, *operands: str) -> str:
        """How a product of these operands runs: natively if the machine has their one format, else emulated."""
        names = {self.formats[role].name for role in operands}
        return "native" if len(names) == 1 and names <= self.native else "emulated"

    def exact_in_bfloat16(self, *operands: str) -> bool:
        """Whether all values of these operands' formats are bfloat16 numbers (powers of two below 2**-126 aside)."""
        formats = [self.formats[role] for role in operands]
        return self.acc is torch.float32 and all(
            fmt.scaling in ("pow2", "floor") if isinstance(fmt, ScaledFormat) else BFLOAT16.holds(fmt)
            for fmt in formats
        )

    def result_route(self, result: str, *operands: str) -> str:
        """As `route`, but native only if the kernel can also deliver the result in its format."""
        route = self.route(*operands)
        return route if self.formats[result].name == self.formats[operands[0]].name else "emulated"

    def shared(self, one: str, other: str) -> bool:
        """Whether a tensor rounded for one role serves the other, which sums over another axis."""
        return shared(self.specs, one, other)

    def require_same(self, what: str, *roles: str) -> None:
        """Refuse formats that this operation cannot tell apart."""
        check_same(self.path, self.specs, what, roles)

    def plain(self, *tensors: Tensor | None) -> bool:
        """Whether the unmodified float32 or float64 operation is already what the table asks for."""
        return (
            self.uniform in ("float32", "float64")
            and (torch.compiler.is_compiling() or not self.hooks.active)
            and all(t is None or (t.dtype is self.acc and t.device.type == "cpu") for t in tensors)
        )


class Table:
    """A policy's specs for every path that is asked for, looked up once.

    paths    the model's module paths, which rules by depth count in
    """

    def __init__(
        self, policy: Policy, native: frozenset[str], hooks: Hooks, scales: Scales, paths: Iterable[str] = ()
    ) -> None:
        self.policy, self.native, self.hooks, self.scales = policy, native, hooks, scales
        self.rules: tuple[Rule, ...] = policy.rules_for(paths)
        self.by_call = any(rule.by_call for rule in self.rules)
        self._products: dict[tuple[str, int], SiteSpec] = {}
        self._attention: dict[tuple[str, int], SiteSpec] = {}
        self._compute: dict[str, torch.dtype] = {}
        self._saved: dict[str, Spec | None] = {}
        self.saves = any("saved" in rule.roles() for rule in self.rules)

    def resolve(self, paths: Iterable[str]) -> None:
        """Look all of `paths` up now: a compiler that met the look-up inside of a model would trace it."""
        calls = {0, *(int(rule.path.partition("#")[2]) for rule in self.rules if rule.by_call)}
        for path in paths:
            self.compute(path)
            self.saved(path)
            for call in calls:
                self.product(path, call)
                self.attention(path, call)

    def delayed_rows(self) -> dict[Site, int]:
        """Sites with delayed scales → their rows in `scales`; those behind a Hadamard transform left out."""
        found = (*self._products.values(), *self._attention.values())
        return {
            Site(spec.path, role, spec.call): row
            for spec in found
            for role, row in spec.rows.items()
            if not spec.specs[role].hadamard
        }

    def product(self, path: str, call: int) -> SiteSpec:
        return self._spec(self._products, PRODUCT_ROLES, path, call)

    def attention(self, path: str, call: int) -> SiteSpec:
        """As `product`; `fprop.probs` is there only if a rule speaks of it, else the kernel decides."""
        return self._spec(self._attention, ATTENTION_ROLES, path, call)

    def _spec(self, cache: dict[tuple[str, int], SiteSpec], roles: tuple[str, ...], path: str, call: int) -> SiteSpec:
        key = (path, call if self.by_call else 0)
        if key not in cache:
            specs = role_specs(self.rules, roles, path, key[1])
            delayed = [(Site(path, role, key[1]), spec) for role, spec in specs.items() if spec.delayed]
            self.scales.add(delayed)
            cache[key] = SiteSpec(path, key[1], specs, self.native, self.hooks, self.scales)
        return cache[key]

    def compute_format(self, path: str) -> AnyFormat:
        spec = find(self.rules, Site(path, "compute"))
        return FLOAT32 if spec is None else spec.fmt

    def compute(self, path: str) -> torch.dtype:
        """The dtype that a norm, softmax, embedding or loss at `path` computes in."""
        if path not in self._compute:
            fmt = self.compute_format(path)
            if fmt.name == "tf32" or fmt.name not in CARRIERS:
                raise ConfigError(f"{path}:compute={fmt}: {fmt} is a format for operands of products; use float32")
            self._compute[path] = carrier(fmt)
        return self._compute[path]

    def saved(self, path: str) -> Spec | None:
        """How operations at `path` that are no products keep tensors for the backward pass; None: as they are."""
        if path not in self._saved:
            spec = find(self.rules, Site(path, "saved")) if self.saves else None
            if spec is not None and (spec.fmt.name == "tf32" or not (spec.fmt.name in CARRIERS or packs(spec.fmt))):
                raise ConfigError(f"{path}:saved={spec} saves no memory; take bfloat16, or a format of 8 bits")
            self._saved[path] = None if spec is None or spec.fmt.name in ("float32", "float64") else spec
        return self._saved[path]

    def master(self, path: str) -> Spec:
        """How the weights of `path` are stored."""
        spec = find(self.rules, Site(path, "master")) or Spec(FLOAT32)
        if spec.fmt.name not in ("float32", "float64", "bfloat16"):
            raise ConfigError(f"{path}:master={spec}: masters are float32, float64 or bfloat16")
        return spec


def turned(spec: Spec, x: Tensor, axis: int) -> Tensor:
    """`x`, or its Hadamard transform where `spec` asks for one."""
    if not spec.hadamard:
        return x
    # Zeros that fill the last block add nothing to the sum, as the other operand has them too.
    return hadamard(_filled(x, axis, spec.hadamard), axis=axis, block=spec.hadamard)


def round_to(spec: Spec, x: Tensor, axis: int, key: tuple[int, Tensor, str] | None, scale: Tensor | None) -> Tensor:
    """`x`, transformed already, rounded as `spec` says, in the carrier of its format if that has one.

    key     of stochastic rounding
    scale   that comes from earlier steps
    """
    if spec.rounding == "nearest" and scale is None:
        return cast(x, spec.fmt, axis)
    in_carrier = spec.fmt.name in CARRIERS
    overflow: Overflow = "cast" if in_carrier else "saturate"
    y = quantize(x, spec.fmt, axis=axis, rounding=spec.rounding, overflow=overflow, key=key, scale=scale)
    return y.to(carrier(spec.fmt)) if in_carrier else y


def _filled(x: Tensor, axis: int, block: int) -> Tensor:
    """`x` with zeros at the end of an axis, up to a multiple of the block."""
    missing = -x.shape[axis] % block
    return torch.cat([x, x.new_zeros(*x.shape[:axis], missing, *x.shape[axis:][1:])], axis) if missing else x
