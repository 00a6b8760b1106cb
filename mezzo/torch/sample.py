"""A sample that is still on the device, and its way to the host: one copy when somebody reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mezzo.formats.measure import Measure
from mezzo.policy import Site, Spec
from mezzo.policy.sample import Measured, Sample, Update
from mezzo.torch.measure import Taken, read

OWN = ""  # stands for the policy that the step runs under


class Pending:
    """What a step's taps gave so far: tensors on the device, which nobody waits for.

    whatif   names of further policies
    """

    def __init__(self, policy: str, whatif: Sequence[str] = ()) -> None:
        self.policy = policy
        self.taken: dict[str, dict[Site, tuple[Spec, list[Taken]]]] = {name: {} for name in (OWN, *whatif)}
        self.logits: dict[str, Tensor] = {}
        self.updates: dict[str, tuple[Tensor, bool]] = {}

    def add(self, site: Site, spec: Spec, taken: Taken, policy: str = OWN) -> None:
        self.taken[policy].setdefault(site, (spec, []))[1].append(taken)

    def read(self, step: int) -> Sample:
        """The sample of a step; waits for the device."""
        flat = [one for sites in self.taken.values() for _, several in sites.values() for one in several]
        measures = iter(read(flat))
        found: dict[str, dict[Site, Measured]] = {}
        for policy, sites in self.taken.items():
            found[policy] = {site: Measured(spec, _sum(measures, several)) for site, (spec, several) in sites.items()}
        logits = _numbers(self.logits)
        own = found.pop(OWN)
        return Sample(step, self.policy, own, _updates(self.updates), logits, found)


def _sum(measures: Any, several: list[Taken]) -> Measure:
    first: Measure = next(measures)
    for _ in several[1:]:
        first = first + next(measures)
    return first


def _numbers(tensors: dict[str, Tensor]) -> dict[str, float]:
    if not tensors:
        return {}
    values = torch.stack([t.double() for t in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def _updates(tensors: dict[str, tuple[Tensor, bool]]) -> dict[str, Update]:
    """(4,) of each parameter: ratio, lost, unseen, whether the step was taken."""
    if not tensors:
        return {}
    rows = torch.stack([figures for figures, _ in tensors.values()]).tolist()
    return {
        name: Update(ratio, lost, unseen if rounded else None)
        for (name, (_, rounded)), (ratio, lost, unseen, taken) in zip(tensors.items(), rows, strict=True)
        if taken
    }
