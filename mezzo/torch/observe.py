"""Measuring what every site loses while a model trains, every few steps, in anybody's loop.

    rounding ──► SiteEvent ──► Observer ──► Sample     the sampled step: sites, updates, logits, and other formats
    step()   ──► decides whether the next step is sampled

A sampled step runs uncompiled, since compiled code tells of no rounding. In eager mode nothing of the training changes,
not one bit; between two samples nothing is done at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mezzo.errors import ConfigError
from mezzo.policy import Policy, Site
from mezzo.policy.sample import Sample
from mezzo.policy.site import ROOT, SHORTHANDS
from mezzo.torch.measure import Taken, take
from mezzo.torch.sample import Pending
from mezzo.torch.step import Step
from mezzo.torch.suppose import Suppose
from mezzo.torch.table import SiteEvent
from mezzo.torch.updates import Updates

if TYPE_CHECKING:
    from mezzo.torch.precision import Precision

EVERY = 50  # steps between two samples
KEPT = 4  # samples that can still be asked for


class Collector:
    """A tap that measures every rounding of a training step, and what other policies would lose there.

    precision   whose sites are measured
    whatif      other policies
    """

    def __init__(self, precision: Precision, whatif: Iterable[Policy] = ()) -> None:
        self.precision = precision
        self.supposed = {str(policy): Suppose(precision, policy) for policy in whatif}
        self.pending = Pending(str(precision.policy), [*self.supposed])
        self._last: tuple[weakref.ref[Tensor], Any, Taken] | None = None

    def __call__(self, event: SiteEvent) -> None:
        site = event.site
        if not _counts(self.precision, site, event.before):
            return
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction(), torch.no_grad():
            self.pending.add(site, event.spec, self._take(event))
            for name, supposed in self.supposed.items():
                if (found := supposed(event)) is not None:
                    self.pending.add(site, *found, name)

    def logits(self, path: str, largest: Tensor) -> None:
        """The largest magnitude of an attention's logits."""
        if self.precision.scales.training and not _recomputing():
            known = self.pending.logits.get(path)
            self.pending.logits[path] = largest if known is None else torch.maximum(known, largest)

    def _take(self, event: SiteEvent) -> Taken:
        """Two products that share a rounding, one after the other, share its measure."""
        how = (event.spec.fmt, event.axis, event.scale is None, event.after.data_ptr())
        if self._last is not None and self._last[0]() is event.before and self._last[1] == how:
            return self._last[2]
        taken = take(event.before, event.after, event.spec.fmt, event.axis, event.scale)
        self._last = weakref.ref(event.before), how, taken
        return taken


def _recomputing() -> bool:
    """Whether a checkpointed block runs forward again inside of the backward pass."""
    return torch._C._current_graph_task_id() != -1


def _counts(precision: Precision, site: Site, x: Tensor) -> bool:
    if not x.numel() or (site.role in ("fprop.b", "wgrad.out") and x.dim() == 1):
        return False  # a bias, which goes with its weight
    if site.role.startswith("fprop") or site.role in (*SHORTHANDS["input"], "saved"):
        return precision.scales.training and not (site.role != "wgrad.b" and _recomputing())
    return True


class Observer:
    """Every `every` steps, and in the first one, what each site lost; `mezzo.torch.observe` makes one."""

    def __init__(
        self,
        precision: Precision,
        every: int = EVERY,
        whatif: Iterable[str | Policy] = (),
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every is a number of steps from 1 on, got {every!r}")
        if isinstance(whatif, str):
            whatif = (whatif,)
        self.precision, self.every = precision, every
        self.whatif = [Policy.of(policy) for policy in whatif]
        for policy in self.whatif:
            precision.table(policy)  # what cannot be carried out is an error now
        self._samples: dict[int, Pending | Sample] = {}
        self._collector: Collector | None = None
        self._updates: Updates | None = None
        self._eager: Any = None
        precision.attach(self)
        self._begin()

    def close(self) -> None:
        """Stop; a step that is being sampled is not finished."""
        self._end()
        self.precision.release(self)

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- steps ---

    @property
    def sampling(self) -> bool:
        """Whether the step that comes next, or is going on, is sampled."""
        return self._collector is not None

    def due(self, step: int) -> bool:
        """Whether a step (1 is the first) is sampled: a function of the step alone, the same after a resume."""
        return step % self.every == 0 or step == 1

    def updating(self, parameters: list[Tensor]) -> None:
        if self._collector is not None:
            self._updates = Updates(self.precision, parameters)

    def stepped(self, step: Step) -> None:
        collector, updates = self._collector, self._updates
        if collector is not None:
            self._end()
            if updates is not None:
                collector.pending.updates = updates.read(step.skipped)
            self._samples[step.index] = collector.pending
            for old in [*self._samples][:-KEPT]:
                del self._samples[old]
        self._begin()

    def of(self, step: int) -> Sample | None:
        """The sample of a step, if it was sampled and is one of the last; waits for the device."""
        found = self._samples.get(step)
        if isinstance(found, Pending):
            found = self._samples[step] = found.read(step)
        return found

    @property
    def last(self) -> Sample | None:
        """The last sampled step that is complete; None before the first."""
        return self.of([*self._samples][-1]) if self._samples else None

    def _begin(self) -> None:
        if self.due(self.precision.steps + 1):
            self._collector = Collector(self.precision, self.whatif)
            self.precision.hooks.taps.append(self._collector)
            self.precision.hooks.logits.append(self._collector.logits)
            self._eager = torch.compiler.set_stance("force_eager")

    def _end(self) -> None:
        collector, self._collector, self._updates = self._collector, None, None
        if collector is not None:
            self.precision.hooks.taps.remove(collector)
            self.precision.hooks.logits.remove(collector.logits)
            self._eager.__exit__(None, None, None)


def observe(
    model: nn.Module | Precision,
    every: int = EVERY,
    whatif: Iterable[str | Policy] = (),
) -> Observer:
    """Measure what every site of a model loses, in your own training loop.

        observer = mezzo.torch.observe(model, every=50)
        …                                             # precision.backward(loss); precision.step()
        print(observer.last.worst(5))

    model       under a Precision, or that Precision
    every       steps between two samples; the first step is always sampled
    whatif      further policies: what would each lose at the same tensors?
    returns     Observer; its close() ends it
    raises      ConfigError if the model is under no Precision, or a policy cannot be carried out on it
    """
    from mezzo.torch.precision import Precision

    if not isinstance(model, Precision):
        found = _precision_of(model)
        if found is None:
            raise ConfigError(
                "observe() needs a model under a Precision: make precision = mezzo.torch.Precision(model, optimizer, "
                "policy='bf16') first; under policy='fp32' nothing is rounded and whatif tells what would be lost"
            )
        model = found
    return Observer(model, every, whatif)


def _precision_of(model: nn.Module) -> Precision | None:
    inner = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    scope = inner.__dict__.get("_mezzo_scope")
    if scope is None or scope.path != ROOT or scope.mode.precision is None:
        return None
    return scope.mode.precision()  # type: ignore[no-any-return]
