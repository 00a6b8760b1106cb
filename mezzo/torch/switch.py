"""What a change of policy in the middle of a training needs of a `Precision`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from mezzo.errors import ConfigError
from mezzo.formats import FLOAT32
from mezzo.policy import Policy, Site, Spec
from mezzo.policy.policy import find
from mezzo.policy.site import ROOT, STATE_ROLES
from mezzo.torch.scales import UNSEEN
from mezzo.torch.table import Table

if TYPE_CHECKING:
    from mezzo.torch.precision import Precision


def same_storage(precision: Precision, policy: Policy, table: Table) -> None:
    """raises    ConfigError if weights or moments would rest in another form than now"""
    now = precision.table(precision.policy)
    for path, module in precision.model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        for role in ("master", *STATE_ROLES):
            was, wanted = (find(t.rules, Site(path or ROOT, role)) or Spec(FLOAT32) for t in (now, table))
            if was != wanted:
                raise ConfigError(
                    f"a phase cannot change how weights and moments are stored: {path or ROOT}:{role} is {was} "
                    f"under {precision.policy} and {wanted} under {policy}; give the latter the rule "
                    f"*:{role.partition('.')[0]}={was}"
                )


@contextmanager
def undisturbed(precision: Precision) -> Iterator[None]:
    """Forward and backward passes in here leave no trace in scales, draws, gradients, buffers or random state."""
    hooks, scales, mode = precision.hooks, precision.scales, precision.mode
    logits, hooks.logits = hooks.logits, []
    gradients = [(p, p.grad) for p in precision.model.parameters()]
    for p, _ in gradients:
        p.grad = None
    scaled, nonfinite = precision.scaled, hooks.nonfinite
    taps, hooks.taps, hooks.nonfinite = hooks.taps, [], []
    recording, mode.recording = mode.recording, None
    seen, draws = scales.seen.clone(), scales.draws.clone()
    buffers = {name: buffer.clone() for name, buffer in precision.buffers()}
    try:
        with torch.random.fork_rng([precision.device] if precision.device.type == "cuda" else []):
            yield
    finally:
        hooks.taps, hooks.logits, hooks.nonfinite, mode.recording = taps, logits, nonfinite, recording
        precision.scaled = scaled
        scales.seen[: len(seen)] = seen
        scales.seen[len(seen) :] = UNSEEN  # rows that came meanwhile
        scales.draws.copy_(draws)
        for p, gradient in gradients:
            p.grad = gradient
        with torch.no_grad():
            for name, buffer in precision.buffers():
                buffer.copy_(buffers[name])
