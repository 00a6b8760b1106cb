"""The site table: a policy resolved, site by site, against one model on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats import FLOAT32, AnyFormat
from mezzo.formats.spec import E8M0
from mezzo.policy import Policy, Site
from mezzo.policy.site import ATTENTION_ROLES, PRODUCT_ROLES
from mezzo.torch.rounding import CARRIERS, carrier, cast, depends_on_axis, widen

Tap = Callable[[Site, Tensor, Tensor], None]
OUTPUTS = ("fprop.out", "dgrad.out", "wgrad.out", "dgrad.query", "dgrad.key", "dgrad.value")


@dataclass
class Hooks:
    """What listens to the sites while they run. Empty, it costs one comparison a site.

    taps       called with (site, tensor before rounding, tensor after)
    watching   whether each product's result is checked for nonfinite values
    nonfinite  (site, 0-d boolean tensor) in the order in which the results appeared
    """

    taps: list[Tap] = field(default_factory=list)
    watching: bool = False
    nonfinite: list[tuple[Site, Tensor]] = field(default_factory=list)

    @property
    def active(self) -> bool:
        return self.watching or bool(self.taps)


class SiteSpec:
    """The formats of one layer's roles, and how to carry them out.

    formats   role → Format
    native    names of the formats that this machine multiplies itself
    acc       dtype that emulated products are computed in
    shown     role → the role that listeners are told, where it is part of a larger operation; others are not told
    """

    def __init__(
        self,
        path: str,
        call: int,
        formats: dict[str, AnyFormat],
        native: frozenset[str],
        hooks: Hooks,
        shown: dict[str, str] | None = None,
    ) -> None:
        self.path, self.call, self.formats, self.hooks, self.shown = path, call, formats, hooks, shown
        self.acc = torch.float64 if any(f.name == "float64" for f in formats.values()) else torch.float32
        self.native = native
        names = {f.name for f in formats.values()}
        self.uniform = names.pop() if len(names) == 1 else None

    def cast(self, role: str, x: Tensor, axis: int = -1) -> Tensor:
        """Round `x` to the format of `role`; hand it to whoever listens.

        axis    the one that the product sums over
        """
        y = cast(x, self.formats[role], axis)
        if self.hooks.active and not torch.compiler.is_compiling():
            if self.shown is not None:
                if role not in self.shown:
                    return y
                role = self.shown[role]
            site = Site(self.path, role, self.call)
            for tap in self.hooks.taps:
                tap(site, x, y)
            if self.hooks.watching and role in OUTPUTS:
                self.hooks.nonfinite.append((site, ~torch.isfinite(y.sum(dtype=torch.float32))))
        return y

    def wide(self, x: Tensor) -> Tensor:
        """`x` in the dtype of the emulated product (exact)."""
        return widen(x, self.acc)

    def route(self, *operands: str) -> str:
        """How a product of these operands runs: natively if the machine has their one format, else emulated."""
        names = {self.formats[role].name for role in operands}
        return "native" if len(names) == 1 and names <= self.native else "emulated"

    def result_route(self, result: str, *operands: str) -> str:
        """As `route`, but native only if the kernel can also deliver the result in its format."""
        route = self.route(*operands)
        return route if self.formats[result].name == self.formats[operands[0]].name else "emulated"

    def shared(self, one: str, other: str) -> bool:
        """Whether a tensor rounded for one role serves the other, which sums over another axis."""
        return self.formats[one] == self.formats[other] and not depends_on_axis(self.formats[one])

    def require_same(self, what: str, *roles: str) -> None:
        """Refuse formats that this operation cannot tell apart."""
        names = {role: self.formats[role].name for role in roles if role in self.formats}
        if len(set(names.values())) > 1:
            listed = ", ".join(f"{role}={name}" for role, name in names.items())
            raise ConfigError(f"{self.path}: {what} keeps one rounded copy for {listed}; give these roles one format")
        blocks = [role for role in names if depends_on_axis(self.formats[role])]
        if blocks:
            raise ConfigError(
                f"{self.path}:{blocks[0]}={names[blocks[0]]}: {what} sums over several axes in its three products, so "
                "its blocks would lie across them; take a format without blocks, such as bfloat16 or e4m3@tensor"
            )

    def plain(self, *tensors: Tensor | None) -> bool:
        """Whether the unmodified float32 or float64 operation is already what the table asks for."""
        return (
            self.uniform in ("float32", "float64")
            and not self.hooks.active
            and all(t is None or (t.dtype is self.acc and t.device.type == "cpu") for t in tensors)
        )


class Table:
    """A policy's formats for every path that is asked for, looked up once."""

    def __init__(self, policy: Policy, native: frozenset[str], hooks: Hooks) -> None:
        self.policy, self.native, self.hooks = policy, native, hooks
        self.by_call = any(rule.by_call for rule in policy.all_rules())
        self._products: dict[tuple[str, int], SiteSpec] = {}
        self._attention: dict[tuple[str, int], SiteSpec] = {}
        self._compute: dict[str, torch.dtype] = {}

    def resolve(self, paths: Iterable[str]) -> None:
        """Look all of `paths` up now: a compiler that met the look-up inside of a model would trace it."""
        calls = {0, *(int(rule.path.partition("#")[2]) for rule in self.policy.all_rules() if rule.by_call)}
        for path in paths:
            self.compute(path)
            for call in calls:
                self.product(path, call)
                self.attention(path, call)

    def product(self, path: str, call: int) -> SiteSpec:
        return self._spec(self._products, PRODUCT_ROLES, path, call)

    def attention(self, path: str, call: int) -> SiteSpec:
        """As `product`; `fprop.probs` is there only if a rule speaks of it, else the kernel decides."""
        return self._spec(self._attention, ATTENTION_ROLES, path, call)

    def _spec(self, cache: dict[tuple[str, int], SiteSpec], roles: tuple[str, ...], path: str, call: int) -> SiteSpec:
        key = (path, call if self.by_call else 0)
        if key not in cache:
            formats = {}
            for role in roles:
                fmt = self.policy.format(Site(path, role, key[1]))
                if fmt is not None or role != "fprop.probs":
                    formats[role] = fmt or FLOAT32
            _check(path, formats)
            cache[key] = SiteSpec(path, key[1], formats, self.native, self.hooks)
        return cache[key]

    def compute_format(self, path: str) -> AnyFormat:
        return self.policy.format(Site(path, "compute")) or FLOAT32

    def compute(self, path: str) -> torch.dtype:
        """The dtype that a norm, softmax, embedding or loss at `path` computes in."""
        if path not in self._compute:
            fmt = self.compute_format(path)
            if fmt.name == "tf32" or fmt.name not in CARRIERS:
                raise ConfigError(f"{path}:compute={fmt}: {fmt} is a format for operands of products; use float32")
            self._compute[path] = carrier(fmt)
        return self._compute[path]

    def master(self, path: str) -> torch.dtype:
        fmt = self.policy.format(Site(path, "master")) or FLOAT32
        if fmt.name not in ("float32", "float64"):
            raise ConfigError(f"{path}:master={fmt}: masters are float32 or float64")
        return carrier(fmt)


def _check(path: str, formats: dict[str, AnyFormat]) -> None:
    """Refuse formats that a role cannot have."""
    for role, fmt in formats.items():
        if fmt is E8M0:
            raise ConfigError(f"{path}:{role}={fmt}: it is a format for scales, not for tensors")
        if role in OUTPUTS and fmt.name not in CARRIERS:
            raise ConfigError(
                f"{path}:{role}={fmt}: results of products are kept in {', '.join(CARRIERS)}; give the low format to "
                "the operands of the next product (input, weight, grad_output)"
            )
