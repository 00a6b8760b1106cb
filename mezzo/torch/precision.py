"""`Precision`: one object that trains a model under a policy, in mezzo's loop or in anybody's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mezzo import hardware
from mezzo.errors import ConfigError, NonfiniteError
from mezzo.policy import LossScaling, Policy, Site
from mezzo.policy.site import ROOT, SiteRow
from mezzo.torch.advice import advise, operands
from mezzo.torch.clip import Clipping, norms
from mezzo.torch.compact import Compact
from mezzo.torch.intercept import Seen, attach, detach, refuse_attached
from mezzo.torch.masters import device_of, make_masters
from mezzo.torch.products import float32_kernels
from mezzo.torch.prune import Pruner
from mezzo.torch.scales import Scales
from mezzo.torch.sites import rows
from mezzo.torch.step import Step
from mezzo.torch.switch import same_storage
from mezzo.torch.table import Hooks, SiteEvent, StepObserver, Table


class Precision:
    """Train `model` under `policy`; the model's own parameters are the float32 (or float64) masters.

        precision = mezzo.torch.Precision(model, optimizer, policy="bf16")
        for x, y in batches:
            loss = loss_fn(model(x), y)
            precision.backward(loss)       # may be called several times: gradients accumulate
            step = precision.step()        # unscale, clip, skip if nonfinite, update, zero gradients

    model       its parameters become masters of the policy's dtype, in place; its modules' forward is wrapped. What
                `master` and `state` rules keep beside them, moments below float32 too, is state of the Precision
    optimizer   one, several, or None (evaluation). A fused optimizer skips on the device; another one costs one
                wait for the device each step
    policy      a recipe's name, a policy string, or a Policy
    scheduler   one or several learning-rate schedulers, moved after each step that was not skipped
    max_norm    gradients are clipped to this total norm
    max_value   each element of a gradient is clipped to [-max_value, max_value]
    adaptive    the gradient of each unit (row, output channel) is clipped to this share of its weights' norm
    pruner      a Pruner of this model, moved after each step that was not skipped
    seed        of stochastic rounding
    raises      ConfigError if the policy cannot be carried out on this model

    Several ways of clipping apply in the order adaptive, value, norm, each to what the one before it left.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        policy: str | Policy = "bf16",
        *,
        scheduler: Any = None,
        max_norm: float | None = None,
        max_value: float | None = None,
        adaptive: float | None = None,
        pruner: Pruner | None = None,
        seed: int = 0,
    ) -> None:
        self.policy = Policy.of(policy)
        self.model = model
        self.optimizers = _listed(optimizer)
        for one in self.optimizers:
            if isinstance(one, torch.optim.LBFGS):
                raise ConfigError("LBFGS evaluates the loss several times a step, which step() cannot do; use another")
        self.schedulers = _listed(scheduler)
        for one in self.schedulers:
            if isinstance(one, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise ConfigError("ReduceLROnPlateau needs a metric at each step; call its step(metric) yourself")
        self.clipping = Clipping(max_norm, max_value, adaptive)
        if pruner is not None and pruner.model is not model:
            raise ConfigError("the pruner is of another model; make it with Pruner(model, ...) of this one")
        self.pruner = pruner
        self.device = device_of(model)
        self.hooks = Hooks()
        self.hardware = hardware.measure(self.device.type)
        self._tables: dict[str, Table] = {}
        self.scales = Scales(seed, self.device, self.policy.loss_scaling)
        refuse_attached(model)
        table = self.table(self.policy)
        self.compact = Compact(model, table, self.optimizers, seed)
        make_masters(model, table, self.optimizers, self.compact)
        self.mode = attach(model, table)
        self.mode.precision = weakref.ref(self)
        self.mode.recording = {}
        self._seen: dict[tuple[str, str], Seen] = self.mode.recording
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.last: Step | None = None
        self.scaled = False  # whether there are gradients of a loss that was scaled
        self.steps = self.skipped = self.bad_run = 0
        kept = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._buffer_names = sorted(name for name, _ in model.named_buffers() if name in kept)
        self._keep_buffers()
        self.hooks.watching = self._always_watches
        # A first step that is skipped must not undo a checkpoint loaded in between.
        self._on_load = model.register_load_state_dict_post_hook(lambda *_: self._loaded())

    # --- training ---

    def backward(self, loss: Tensor) -> None:
        """Scale the loss and add its gradients to those already there.

        loss      0-d tensor; divide it by the number of calls yourself when accumulating a mean
        """
        if not isinstance(loss, Tensor):
            raise ConfigError(f"backward takes the loss as a tensor of one number, got {type(loss).__name__}")
        if loss.dim() != 0:
            raise ConfigError(f"backward takes a loss of one number, got shape {tuple(loss.shape)}; take its mean")
        loss = loss.float() if loss.dtype in (torch.bfloat16, torch.float16) else loss
        # Convolutions and einsum are differentiated by torch, whose kernels read this switch now, not in forward.
        tf32 = any(rule.fmt.name == "tf32" for rule in self.policy.all_rules())
        with float32_kernels("tf32" if tf32 else "float32", self.device):
            loss.mul(self.scales.loss.scale).backward()
        self.scales.draws += 1
        self.scaled = True

    def step(self) -> Step:
        """Unscale, clip, skip if a gradient is not finite, update, zero the gradients.

        returns   what happened, as device tensors: reading it waits for the device, `step()` itself does not
        raises    NonfiniteError when steps keep being skipped (at the loss scale's floor, if it has one)
        """
        if not self.optimizers:
            raise ConfigError("step() needs an optimizer; this Precision was made without one")
        self._finish_last()
        self.mode.recording = None
        owned = [p for o in self.optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
        if not owned:
            raise ConfigError("step() found no gradient; call precision.backward(loss) first")
        if self.policy.loss_scaling is not None and not self.scaled:
            raise ConfigError(
                "step() divides gradients by the loss scale, and these do not come from precision.backward(loss); call "
                "that instead of loss.backward()"
            )
        self.scaled = False
        grads = [p.grad for p in owned if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise ConfigError("step() cannot unscale sparse gradients; make the embeddings with sparse=False")
        if self.pruner is not None:
            self.pruner.mask_gradients()
        each, total = norms(grads)
        scale = self.scales.loss.scale
        overflow = ~torch.isfinite(total)
        grad_norm = total.float() / scale
        for observer in self.hooks.observers:
            observer.updating(owned)
        self._update(self.clipping.divisor(grads, owned, scale, grad_norm), overflow)
        if self.pruner is not None:
            self.pruner.move(overflow, {p: s.remainder for p, s in self.compact.slots.items()})
        self._roll_back_buffers(overflow)
        self.scales.step(overflow)
        self.steps += 1
        names = [self.names.get(id(p), "a parameter outside of the model") for p in owned]
        self.last = Step(self.steps, overflow, grad_norm, scale, self.scales.loss.state.at_floor,
                         tuple(self.hooks.nonfinite), tuple(zip(names, each, strict=True)),
                         sparsity=None if self.pruner is None else self.pruner.sparsity)  # fmt: skip
        self.hooks.nonfinite = []
        try:
            if self.device.type == "cpu":
                self._finish_last()  # nothing to wait for
        finally:
            for observer in self.hooks.observers:
                observer.stepped(self.last)
        return self.last

    def _update(self, divisor: Tensor, overflow: Tensor) -> None:
        fused = [o for o in self.optimizers if getattr(o, "_step_supports_amp_scaling", False)]
        others = [o for o in self.optimizers if o not in fused]
        if others and not bool(overflow):  # this waits for the device
            for optimizer in others:
                self.compact.step(optimizer, self.steps, factor=1.0 / divisor)
        for optimizer in fused:
            optimizer.grad_scale, optimizer.found_inf = divisor, overflow.float()
            self.compact.step(optimizer, self.steps, skipped=overflow)
            del optimizer.grad_scale, optimizer.found_inf
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _roll_back_buffers(self, overflow: Tensor) -> None:
        """A skipped step leaves no trace in running statistics either."""
        with torch.no_grad():
            for name, buffer in self.buffers():
                buffer.copy_(torch.where(overflow, self._kept[name], buffer))
                self._kept[name].copy_(buffer)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The persistent buffers as they are now: modules may put a new tensor in a buffer's place."""
        for name in self._buffer_names:
            buffer = self.model.get_buffer(name)
            yield name, buffer

    def _loaded(self) -> None:
        self._keep_buffers()
        self.compact.forget()

    def _keep_buffers(self) -> None:
        self._kept = {name: buffer.clone() for name, buffer in self.buffers()}

    def _finish_last(self) -> None:
        """Act on the outcome of the step before: schedulers, the search for the site, the end of patience."""
        last = self.last
        if last is None or last.finished:
            return
        last.finished = True
        if not last.skipped_now():
            self.bad_run = 0
            self.hooks.watching = self._always_watches
            if self.pruner is not None:
                self.pruner.taken()
            for scheduler in self.schedulers:
                scheduler.step()
            return
        self.skipped += 1
        self.bad_run += 1
        self.hooks.watching = True
        scaling = self.policy.loss_scaling
        run = int(last.at_floor) if scaling else self.bad_run
        patience = (scaling or LossScaling()).patience
        if run >= patience:
            where = f"at the loss scale's floor of {scaling.floor:g}" if scaling else f"under {self.policy}"
            less = ""
            if scaling and scaling.is_constant:
                where, less = f"at the constant loss scale of {scaling.init:g}", "take a smaller loss_scale, "
            raise NonfiniteError(
                f"{run} steps in a row had nonfinite gradients {where}; first nonfinite at {last.site}. The weights "
                f"are those of the last good step. Look for NaN in the data, {less}lower the learning rate, or give "
                f"that site a wider format, for instance with the rule {last.rule}"
            )

    @property
    def _always_watches(self) -> bool:
        """Where overflow is expected or somebody asks for it, every step is watched; else the one after a skipped one.

        Where nothing is rounded, watching would take torch's own operations away, and costs too much.
        """
        asked = any(observer.watches for observer in self.hooks.observers)
        rounds = any(rule.fmt.name not in ("float32", "float64") for rule in self.policy.all_rules())
        return bool(self.optimizers) and (self.policy.loss_scaling is not None or (asked and rounds))

    def attach(self, observer: StepObserver) -> None:
        """Tell `observer` of every step."""
        self.hooks.observers.append(observer)
        self.hooks.watching = self._always_watches

    def release(self, observer: StepObserver) -> None:
        """Undo `attach`."""
        if observer in self.hooks.observers:
            self.hooks.observers.remove(observer)
            self.hooks.watching = self._always_watches

    # --- other tables ---

    @contextmanager
    def using(self, policy: str | Policy) -> Iterator[None]:
        """Run the model under another policy's formats for a while; masters and loss scale stay."""
        outer = self.mode.table
        self.mode.table = self.table(Policy.of(policy))
        try:
            yield
        finally:
            self.mode.table = outer

    def switch(self, policy: str | Policy, loss_scale: float | None = None) -> None:
        """Go on training under another policy, between two steps. Weights, moments and every scale are handed over.

        A loss scale and delayed scales that this policy had before go on where they stopped; delayed scales of formats
        that it shares with the policy before go on too.

        policy        stores weights and moments as the one before did
        loss_scale    begin with this one, if the policy has dynamic loss scaling
        raises        ConfigError if it does not, cannot be carried out, or there are gradients of a scaled loss
        """
        policy = Policy.of(policy)
        if self.mode.table is not self.table(self.policy):
            raise ConfigError("switch() inside of using(): leave that first")
        if self.scaled:
            raise ConfigError("switch() with gradients of a scaled loss: call it after step(), not after backward()")
        table = self.table(policy)
        same_storage(self, policy, table)
        self._finish_last()
        self.scales.switch(policy.loss_scaling, loss_scale)
        self.policy, self.mode.table, self.bad_run = policy, table, 0
        self.hooks.watching = self._always_watches
        for observer in self.hooks.observers:
            observer.restarted()

    def prepare(self, policy: str | Policy) -> None:
        """Make the table of a policy that `switch` will ask for.

        raises    ConfigError as `switch`
        """
        policy = Policy.of(policy)
        same_storage(self, policy, self.table(policy))

    def table(self, policy: Policy) -> Table:
        """The policy resolved against this model; made once.

        raises    ConfigError if it cannot be carried out
        """
        key = str(policy)
        if key not in self._tables:
            paths = [path or ROOT for path, _ in self.model.named_modules()]
            policy.check_paths(paths)
            table = self._tables[key] = Table(policy, self.hardware.native, self.hooks, self.scales, paths)
            # First those that may hold a product: an error should name one of them.
            large = {path or ROOT for path, m in self.model.named_modules() for p in m.parameters(False) if p.dim() > 1}
            table.resolve(sorted(paths, key=lambda path: path not in large))
        return self._tables[key]

    # --- looking ---

    def sites(self, *example: Any, **kwargs: Any) -> list[SiteRow]:
        """The site table: what each tensor is rounded to and how, and what was seen and is not covered.

        example   inputs for one forward pass without gradients; needed only if the model has not run yet
        raises    ConfigError if there is nothing to show
        """
        if example or kwargs:
            outer, self.mode.recording = self.mode.recording, {}
            try:
                with torch.no_grad():
                    self.model(*example, **kwargs)
                self._seen = self.mode.recording
            finally:
                self.mode.recording = outer
        if not self._seen:
            raise ConfigError("no forward pass seen yet: run the model once, or give example inputs to sites()")
        return [*rows(self.model, self.mode, self._seen.values()), *self.compact.rows()]

    def advice(self, *example: Any, **kwargs: Any) -> list[str]:
        """What to know before training: formats and shapes that train badly or slowly, each with a remedy.

        example   as for `sites`
        raises    ConfigError as `sites`
        """
        self.sites(*example, **kwargs)
        found = operands(self._seen.values(), self.mode.table)
        texts = advise(found, device=self.device.type, loss_scaling=self.policy.loss_scaling is not None)
        if self.policy.spares_no_head(path for path, _ in self.model.named_modules()):
            texts.insert(
                0,
                f"{self.policy.recipe} keeps the output head in bfloat16, and no module here has a name that ends in "
                "head: the last layer is rounded like the others; the rule LAST:*.[ab]=bfloat16 with its path would "
                "spare it",
            )
        return texts

    @contextmanager
    def tap(self, listener: Callable[[Site, Tensor, Tensor], None]) -> Iterator[None]:
        """Call `listener(site, before, after)` at every rounding, forward and backward, while the context is open."""

        def told(event: SiteEvent) -> None:
            listener(event.site, event.before, event.after)

        self.hooks.taps.append(told)
        try:
            yield
        finally:
            self.hooks.taps.remove(told)

    @property
    def routes(self) -> dict[str, str]:
        """Format → "native" or "emulated" on this machine, for the formats the policy names; goes into manifests."""
        return self.routes_of(self.policy)

    def routes_of(self, policy: Policy) -> dict[str, str]:
        """As `routes`, of another policy."""
        formats = {rule.fmt.name: rule.fmt for rule in policy.all_rules()}
        return {name: self.hardware.route(formats[name])[0] for name in sorted(formats)}

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that must survive a restart besides weights, optimizer and scheduler: tensors, by name.

        Some are those that the next step changes: copy them to keep them in memory.
        Waits for the last step's outcome and moves the scheduler by it: take the scheduler's state after this.
        """
        self._finish_last()
        counts = {"steps": self.steps, "skipped": self.skipped, "bad_run": self.bad_run}
        own = {name: torch.tensor(n) for name, n in counts.items()}
        pruned = {} if self.pruner is None else self.pruner.state_dict()
        return self.scales.state_dict() | self.compact.state_dict() | pruned | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, after the model's own state was loaded."""
        self.load_lasting(state)
        self.scales.load_state_dict(state)
        self.bad_run = int(state["bad_run"])

    def load_lasting(self, state: dict[str, Tensor]) -> None:
        """Restore only what another policy can go on with: all but the loss scale and the run of skipped steps."""
        self.steps, self.skipped, self.bad_run = int(state["steps"]), int(state["skipped"]), 0
        self.last = None
        self.scales.load_lasting(state)
        self.compact.load_state_dict(state, self.steps)
        if self.pruner is not None:
            self.pruner.load_state_dict(state, int(state["steps"] - state["skipped"]))
        self._keep_buffers()
        for observer in self.hooks.observers:
            observer.restarted()

    def remove(self) -> None:
        """Give the model its own forward back, and the optimizers their moments; weights stay as they are."""
        for observer in [*self.hooks.observers]:
            observer.close()
        detach(self.model)
        self.compact.release()
        self._on_load.remove()


def _listed(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, Sequence) else [given]
