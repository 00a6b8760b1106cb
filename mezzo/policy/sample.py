"""What one sampled step showed: the measures of every site, of the update, and of formats that were not used."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mezzo.errors import ConfigError
from mezzo.formats import Format
from mezzo.formats.measure import Measure
from mezzo.policy.site import Site
from mezzo.policy.spec import Spec

# Logits beyond it leave nothing but the largest; trainings that diverged had passed it. Kimi K2 (arXiv 2507.20534,
# section 2.1) clips there; "Scaling Vision Transformers to 22B" (arXiv 2302.05442) saw divergence above.
LARGE_LOGIT = 100.0
DOWNSTREAM = 3  # nonfinite sites that are told of
LOST = 0.5  # share of the weights that a step should have moved and did not


@dataclass(frozen=True)
class Measured:
    """A site's spec, and what it lost."""

    spec: Spec
    measure: Measure

    @property
    def overflows(self) -> bool:
        """Whether finite values became infinite, which no SQNR shows."""
        return self.measure.overflowed > 0 and isinstance(self.spec.fmt, Format) and self.spec.fmt.infinity

    def __str__(self) -> str:
        m = self.measure
        lost = f"{m.sqnr:.1f} dB, {m.underflow:.1%} underflow, {m.overflow:.1%} overflow" if m.known else "not known"
        return f"{self.spec}: {lost}"

    def to_dict(self) -> dict[str, Any]:
        return {"format": str(self.spec)} | self.measure.to_dict()


@dataclass(frozen=True)
class Update:
    """What an optimizer step did to one parameter.

    ratio    norm of the update / norm of the weight
    lost     share of the weights that have a gradient and did not change at all
    unseen   share of the changed weights whose value in the products' format stayed the same; None if not rounded
    """

    ratio: float
    lost: float
    unseen: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "lost": self.lost, "unseen": self.unseen}


@dataclass(frozen=True)
class Finding:
    """Something that a person should look at.

    kind    nonfinite, overflow, all_zero, logits, lost_updates
    site    PATH:ROLE, a module's path, or a parameter's name
    """

    kind: str
    site: str
    text: str

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "site": self.site, "text": self.text}


@dataclass(frozen=True)
class Sample:
    """Everything measured in one step.

    step      1 is the first
    policy    the step ran under
    sites     in the order of computation
    updates   by parameter; empty if the step was skipped
    logits    largest magnitude of each attention's logits, by path
    whatif    policy → sites as they would be under it, at the same tensors
    """

    step: int
    policy: str
    sites: dict[Site, Measured]
    updates: dict[str, Update] = field(default_factory=dict)
    logits: dict[str, float] = field(default_factory=dict)
    whatif: dict[str, dict[Site, Measured]] = field(default_factory=dict)

    def worst(self, count: int = 10, policy: str | None = None) -> list[tuple[Site, Measured]]:
        """The sites that lose most, by SQNR; of another policy that was asked for.

        raises    ConfigError if it was not
        """
        if policy is not None and policy not in self.whatif:
            raise ConfigError(f"{policy!r} was not asked for; asked for: {', '.join(self.whatif) or 'none'}")
        sites = self.sites if policy is None else self.whatif[policy]
        return ranked(sites)[:count]

    @property
    def findings(self) -> list[Finding]:
        """What is wrong, first things first: the first nonfinite site is where it began."""
        found = [finding for site, one in self.sites.items() for finding in _of_site(site, one)]
        bad = [one for one in found if one.kind in ("nonfinite", "overflow")]
        found = [*bad[:DOWNSTREAM], *(one for one in found if one not in bad)]  # what is not finite spreads
        for path, logit in self.logits.items():
            if not logit <= LARGE_LOGIT:
                text = f"an attention logit of {logit:.4g}: beyond {LARGE_LOGIT:g} the softmax gives all to one key"
                found.append(Finding("logits", path, text))
        for name, update in self.updates.items():
            if update.lost > LOST:
                text = f"{update.lost:.0%} of the weights that have a gradient did not change: too small an update"
                found.append(Finding("lost_updates", name, text))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one line of a run's sites.jsonl."""
        return {
            "step": self.step,
            "policy": self.policy,
            "sites": _plain(self.sites),
            "updates": {name: update.to_dict() for name, update in self.updates.items()},
            "logits": self.logits,
            "whatif": {policy: _plain(sites) for policy, sites in self.whatif.items()},
            "findings": [finding.to_dict() for finding in self.findings],
        }


def ranked(sites: dict[Site, Measured]) -> list[tuple[Site, Measured]]:
    """Worst first: nonfinite or overflowing into infinity, in the order of computation; then by SQNR; what cannot be
    compared comes last."""

    def loss(entry: tuple[Site, Measured]) -> tuple[bool, float]:
        one = entry[1]
        sqnr = -math.inf if one.measure.nonfinite or one.overflows else one.measure.sqnr
        return math.isnan(sqnr), sqnr

    return sorted(sites.items(), key=loss)


def _plain(sites: dict[Site, Measured]) -> dict[str, Any]:
    return {str(site): one.to_dict() for site, one in sites.items()}


def _of_site(site: Site, one: Measured) -> list[Finding]:
    m = one.measure
    if m.nonfinite:
        text = f"{m.nonfinite:,} of {m.count:,} values are infinite or NaN before they are rounded to {one.spec}"
        return [Finding("nonfinite", str(site), text)]
    if one.overflows:
        text = f"{m.overflowed:,} of {m.count:,} values overflow {one.spec}, the largest is {m.amax:.6g}"
        return [Finding("overflow", str(site), text)]
    if m.zeros == m.count:
        return [Finding("all_zero", str(site), f"all {m.count:,} values are zero")]
    return []
