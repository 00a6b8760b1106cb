"""Measuring what every site loses while a model trains, every few steps, in anybody's loop.

    rounding ──► SiteEvent ──► Observer ──► Sample     the sampled step: sites, updates, logits, and other formats
    step()   ──► decides whether the next step is sampled

A sampled step runs uncompiled, since compiled code tells of no rounding. In eager mode nothing of the training changes,
not one bit. Between two samples nothing is measured; with `watches`, results of products are still checked.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mezzo.errors import ConfigError
from mezzo.formats.measure import has_blocks
from mezzo.policy import Policy, Site
from mezzo.policy.roles import OUTPUTS
from mezzo.policy.sample import Sample
from mezzo.policy.site import ROOT
from mezzo.torch.measure import Taken, take
from mezzo.torch.sample import OWN, Pending
from mezzo.torch.step import Step
from mezzo.torch.suppose import NARROW, Suppose
from mezzo.torch.switch import undisturbed
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
    loss_scale  theirs, if they scale the loss
    """

    def __init__(self, precision: Precision, whatif: Iterable[Policy] = (), loss_scale: float | None = None) -> None:
        self.precision = precision
        self.supposed = {str(policy): Suppose(precision, policy, loss_scale) for policy in whatif}
        self.pending = Pending(str(precision.policy), [*self.supposed])
        self._recent: deque[tuple[weakref.ref[Tensor], Any, Taken]] = deque(maxlen=2)

    def open(self) -> None:
        """Listen; a model that was compiled runs uncompiled meanwhile."""
        self.precision.hooks.taps.append(self)
        self.precision.hooks.logits.append(self.logits)
        self.precision.mode.sample(+1)

    def close(self) -> None:
        """Undo `open`."""
        self.precision.hooks.taps.remove(self)
        self.precision.hooks.logits.remove(self.logits)
        self.precision.mode.sample(-1)

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
        if not _recomputing(self.precision):
            known = self.pending.logits.get(path)
            self.pending.logits[path] = largest if known is None else torch.maximum(known, largest)

    def _take(self, event: SiteEvent) -> Taken:
        """Two products that round one tensor in one way, one soon after the other, share its measure."""
        axis = event.axis if has_blocks(event.spec.fmt) else None
        how = (event.spec, event.site.role in OUTPUTS, axis) if event.scale is None else object()
        if event.spec.rounding != "stochastic":
            for before, same, taken in self._recent:
                if before() is event.before and same == how:
                    return taken
        taken = take(event.before, event.after, event.spec.fmt, event.axis, event.scale)
        if event.before.dtype in NARROW and event.before.dtype is event.after.dtype:
            taken = taken.unknown()  # rounded before it came: by a kernel, or an operation that no rule speaks of
        self._recent.append((weakref.ref(event.before), how, taken))
        return taken


def _recomputing(precision: Precision) -> bool:
    """Whether a checkpointed block runs forward again inside of the backward pass."""
    return precision.mode.depth > 0 and torch._C._current_graph_task_id() != -1


def _counts(precision: Precision, site: Site, x: Tensor) -> bool:
    """Whether a rounding belongs to a training step, for the first time."""
    if not x.numel() or (site.role in ("fprop.b", "wgrad.out") and x.dim() == 1):
        return False  # a bias, which goes with its weight
    if precision.mode.depth == 0:
        return True  # in a backward pass; whatever ran forward since the loss was made
    return precision.scales.training and not _recomputing(precision)


class Observer:
    """Every `every` steps, and in the first one, what each site lost; `mezzo.torch.observe` makes one.

    watches   whether every step is checked for nonfinite results, so that a skipped one names its site
    """

    def __init__(
        self,
        precision: Precision,
        every: int = EVERY,
        whatif: Iterable[str | Policy] = (),
        watches: bool = True,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every is a number of steps from 1 on, got {every!r}")
        if isinstance(whatif, str):
            whatif = (whatif,)
        self.precision, self.every, self.watches = precision, every, watches
        self.whatif = [Policy.of(policy) for policy in whatif]
        Collector(precision, self.whatif)  # a rule that matches nothing is an error now
        self._samples: dict[int, Pending | Sample] = {}
        self._collector: Collector | None = None
        self._updates: Updates | None = None
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

    def restarted(self) -> None:
        self._end()
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
            self._collector.open()

    def _end(self) -> None:
        collector, self._collector, self._updates = self._collector, None, None
        if collector is not None:
            collector.close()


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
    returns     Observer; its close() ends it. Until then a model that was compiled runs uncompiled from the step before
                one that is due on; with fullgraph=True that is torch's error, which says so
    raises      ConfigError if the model is under no Precision, or a rule of `whatif` matches nothing in it
    """
    return Observer(_found(model), every, whatif)


def what_if(
    model: nn.Module | Precision,
    policies: Iterable[str | Policy],
    losses: Callable[[], Tensor] | Iterable[Callable[[], Tensor]],
    loss_scale: float | None = None,
) -> Sample:
    """Measure what every site loses, and what it would lose under other policies; nothing of a training changes.

        sample = mezzo.torch.what_if(model, ["nvfp4"], [lambda: loss_fn(model(x), y)])
        for site, one in sample.worst(10, "nvfp4"): print(site, one.spec, one.measure.sqnr)

    model        under a Precision, or that Precision. Under policy "fp32" every tensor is met unrounded; under a
                 16-bit policy, what another format of 16 bits or more would lose cannot be known (SQNR is NaN)
    policies     any, whether this machine has their formats or not
    losses       each (or the one) runs the model on a batch and returns the loss, 0-d; what they measure is added up
    loss_scale   of policies that scale the loss; None: the one they begin with
    returns      Sample; its step is how many the model was trained so far
    raises       ConfigError as `observe`, and if no site was met
    """
    precision = _found(model)
    asked = [Policy.of(policy) for policy in ([policies] if isinstance(policies, str) else policies)]
    with undisturbed(precision), torch.enable_grad():
        collector = Collector(precision, asked, loss_scale)
        collector.open()
        try:
            for loss in [losses] if callable(losses) else losses:
                precision.backward(loss())
        finally:
            collector.close()
        if not collector.pending.taken[OWN]:
            raise ConfigError("the losses met no site of the model: they must run it, with gradients")
        return collector.pending.read(precision.steps)


def _found(model: nn.Module | Precision) -> Precision:
    from mezzo.torch.precision import Precision

    found = model if isinstance(model, Precision) else _precision_of(model)
    if found is None:
        raise ConfigError(
            "this model is under no Precision: make precision = mezzo.torch.Precision(model, optimizer, policy='bf16') "
            "first; under policy='fp32' nothing is rounded, and other policies can be asked for still"
        )
    return found


def _precision_of(model: nn.Module) -> Precision | None:
    inner = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    if not isinstance(inner, nn.Module):
        raise ConfigError(f"a model or its Precision is needed, got {type(model).__name__}")
    scope = inner.__dict__.get("_mezzo_scope")
    if scope is None or scope.path != ROOT or scope.mode.precision is None:
        return None
    return scope.mode.precision()  # type: ignore[no-any-return]
