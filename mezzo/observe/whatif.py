"""What if: the sites of a trained model under another policy than its own, and the rules that spare the worst."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mezzo.policy import Policy, Site
from mezzo.policy.sample import Measured, Sample, ranked
from mezzo.policy.site import ATTENTION_ROLES, PRODUCT_ROLES

SPARE = "bfloat16"  # the format that a spared site gets
_ATTENTION = tuple(role for role in ATTENTION_ROLES if role not in PRODUCT_ROLES)


@dataclass(frozen=True)
class Answer:
    """What one policy would do to every site.

    policy   asked for
    sites    worst first
    rules    SITE=FORMAT: would spare the worst ones
    """

    policy: Policy
    sites: list[tuple[Site, Measured]]
    rules: tuple[str, ...]

    @property
    def spared(self) -> str:
        """The policy with the rules on top, to paste behind --policy."""
        return "; ".join([str(self.policy), *self.rules])


def answer(sample: Sample, policy: Policy, spare: int = 5) -> Answer:
    """Rank the sites of `sample.whatif[str(policy)]`.

    spare   how many of the worst get a rule: products, since one operand's noise is the product's
    """
    sites = ranked(sample.whatif[str(policy)])
    return Answer(policy, sites, rules(sites, spare))


def rules(sites: Iterable[tuple[Site, Measured]], count: int) -> tuple[str, ...]:
    """Rules that spare the first `count` products, or other tensors, among sites that are sorted worst first."""
    found: dict[str, None] = {}
    for site, one in sites:
        if len(found) == count:
            break
        if lossy(one):
            found[_rule(site)] = None
    return tuple(found)


def lossy(one: Measured) -> bool:
    """Whether the format loses what a rule could spare: below 16 bits, or by overflow."""
    return one.overflows or (math.isfinite(one.measure.sqnr) and one.spec.fmt.bits < 16)


def _rule(site: Site) -> str:
    where = f"{site.path}#{site.call}" if site.call else site.path
    product, _, operand = site.role.partition(".")
    if site.role in _ATTENTION:
        # Attention has one format for what it multiplies, and one for the gradient that comes.
        return f"{where}:{'grad_output' if product == 'dgrad' else 'input'}={SPARE}"
    if operand in ("a", "b"):
        return f"{where}:{product}.[ab]={SPARE}"
    return f"{where}:{site.role}={SPARE}"
