"""Measures on the host, in NumPy: what adapters use whose taps hand out arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mezzo.formats import FLOAT32, hadamard, quantize
from mezzo.formats.measure import Measure, measure
from mezzo.policy.policy import Policy, find
from mezzo.policy.roles import SCALED, WIDE
from mezzo.policy.rule import Rule
from mezzo.policy.sample import Measured, Sample
from mezzo.policy.site import Site
from mezzo.policy.spec import Spec

Array = np.ndarray[Any, Any]


@dataclass
class HostCollector:
    """Adds up what roundings lost, at the sites of a policy and at those of others.

    policy   that the model runs under
    paths    of the model's modules, which rules by depth count in
    whatif   further policies: what would each lose at the same tensors?
    scale    the loss scale
    seed     of random words, and `draws`, the step they belong to
    """

    policy: Policy
    paths: Iterable[str] = ()
    whatif: Iterable[Policy] = ()
    scale: float = 1.0
    seed: int = 0
    draws: int = 0
    found: dict[str, dict[Site, Measured]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own = str(self.policy)
        known = list(self.paths)
        self.others: list[tuple[str, Policy, tuple[Rule, ...]]] = []
        for policy in self.whatif:
            policy.check_paths(known)
            self.others.append((str(policy), policy, policy.rules_for(known)))

    def add(self, site: Site, spec: Spec, axis: int, raw: Array, before: Array, after: Array) -> None:
        """One rounding: `before` (raw, or its transform) became `after`."""
        if not np.asarray(raw).size:
            return
        self._add(self.own, site, spec, measure(before, after, spec.fmt, axis=axis))
        for name, policy, rules in self.others:
            other = find(rules, site) or Spec(FLOAT32)
            start = policy.loss_scaling.init if policy.loss_scaling is not None else 1.0
            x = np.asarray(raw, np.float32)
            if site.role in SCALED and policy.loss_scaling != self.policy.loss_scaling:
                x = x * np.float32(start / self.scale)
            source = transformed(other, x, axis)
            key = (self.seed, self.draws, str(site)) if other.rounding == "stochastic" else None
            overflow = "cast" if other.fmt.name in WIDE else "saturate"
            y = quantize(source, other.fmt, axis=axis, rounding=other.rounding, overflow=overflow, key=key)  # type: ignore[arg-type]
            self._add(name, site, other, measure(source, y, other.fmt, axis=axis))

    def _add(self, policy: str, site: Site, spec: Spec, one: Measure) -> None:
        sites = self.found.setdefault(policy, {})
        known = sites.get(site)
        sites[site] = Measured(spec, one if known is None else known.measure + one)

    def sample(self, step: int) -> Sample:
        own = self.found.get(self.own, {})
        return Sample(step, self.own, own, whatif={name: self.found.get(name, {}) for name, _, _ in self.others})


def transformed(spec: Spec, x: Array, axis: int) -> Array:
    """`x`, or its Hadamard transform where `spec` asks for one; zeros fill the last block."""
    if not spec.hadamard:
        return x
    missing = -x.shape[axis] % spec.hadamard
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return hadamard(np.pad(x, widths), axis=axis, block=spec.hadamard)
