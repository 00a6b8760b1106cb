"""Where the table meets the model: module scopes give the path, a TorchFunctionMode catches the operations.

Every module's `forward` is wrapped so that the mode knows the path; the mode then replaces products, attention, norms,
softmaxes and losses. Functional calls and parameters used by hand (`MultiheadAttention.out_proj`) are caught too. What
was seen and has no rule is listed by `Precision.sites()`.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from mezzo.errors import ConfigError
from mezzo.policy.site import ROOT
from mezzo.torch.handlers import HANDLERS, PRODUCTS
from mezzo.torch.saved import saving
from mezzo.torch.table import Table

if TYPE_CHECKING:
    from mezzo.torch.precision import Precision

# Modules whose operation is not covered, and which want operands of their parameters' dtype.
_UNCOVERED = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
# Operations that only move elements: nothing is rounded, nothing to list.
_MOVES = {Tensor.view, Tensor.reshape, Tensor.transpose, Tensor.permute, Tensor.contiguous, Tensor.expand, Tensor.chunk,
          Tensor.split, Tensor.unbind, Tensor.unsqueeze, Tensor.squeeze, Tensor.flatten, Tensor.clone, Tensor.detach,
          Tensor.__getitem__, Tensor.to, Tensor.float, Tensor.unflatten, Tensor.type_as, Tensor.t,
          Tensor.repeat_interleave,
          torch.transpose, torch.permute, torch.flatten, torch.reshape, torch.stack, torch.cat, torch.squeeze,
          torch.unsqueeze, torch.repeat_interleave}  # fmt: skip


@dataclass
class Seen:
    """One operation met in a forward pass: what it is, the shapes it had the first time, and how often it ran.

    kind    "linear" (a product with a weight), "product", "attention", "compute", or the name of an operation that no
            rule speaks of
    shapes  of its tensor operands, in order
    """

    path: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    out: tuple[int, ...] = ()
    calls: int = 1


class SiteMode(TorchFunctionMode):
    """Carries the table out while a model's forward runs.

    path       of the module that is running
    kept       None, or where the bytes of each storage kept for the backward pass are noted
    in_product whether a product or attention is running, which keeps its operands by its own roles
    calls      how often each (path, kind) ran in this forward pass: the call index
    recording  None, or where operations are noted
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.path = ROOT
        self.depth = 0
        self.in_product = False
        self.samplers = 0
        self.sampling = False  # for compiled code, which then lets the model run uncompiled
        self.kept: dict[int, int] | None = None
        self.calls: dict[tuple[str, str], int] = {}
        self.recording: dict[tuple[str, str], Seen] | None = None
        self._noted: Seen | None = None
        self._met: dict[tuple[str, str], int] = {}  # how often each was noted in this forward pass
        self.precision: weakref.ref[Precision] | None = None  # whose mode this is
        self.owners: dict[int, str] = {}  # id of a parameter → path, for layers used without being called

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func)
        if handler is None:
            out = func(*args, **(kwargs or {}))
            if self.recording is not None:
                self._note_uncovered(func, args, out)
            return out
        before = self._noted
        self.in_product = func in PRODUCTS
        try:
            out = handler(self, func, args, kwargs or {})
        finally:
            self.in_product = False
        if self._noted is not None and self._noted is not before and isinstance(out, Tensor):
            self._noted.out = tuple(out.shape)
        return out

    def sample(self, change: int) -> None:
        """One more (+1) or less who needs the model to run uncompiled, since compiled code tells of no rounding."""
        self.samplers += change
        self.sampling = self.samplers > 0

    def call_index(self, path: str, kind: str) -> int:
        if not self.table.by_call:
            return 0
        index = self.calls.get((path, kind), 0)
        self.calls[(path, kind)] = index + 1
        return index

    def weight_path(self, weight: Tensor) -> str:
        """The running path, or that of the child that owns the weight but was not itself called."""
        owner = self.owners.get(id(weight), "") if self.owners else ""
        below = owner and (self.path == ROOT or owner.startswith(self.path + "."))
        return owner if below else self.path

    def note(self, path: str, kind: str, *tensors: Any) -> None:
        if self.recording is None:
            return
        self._met[(path, kind)] = met = self._met.get((path, kind), 0) + 1
        seen = self.recording.get((path, kind))
        if seen is not None:
            seen.calls = max(seen.calls, met)
            return
        operands = [t for t in tensors if isinstance(t, Tensor)]
        floats = [t for t in operands if t.is_floating_point()]
        if floats:
            shapes = tuple(tuple(t.shape) for t in operands)
            self._noted = Seen(path, kind, shapes, floats[0].dtype, floats[0].device)
            self.recording[(path, kind)] = self._noted

    def _note_uncovered(self, func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
        first = out[0] if isinstance(out, tuple) and out else out  # an LSTM gives several
        if not isinstance(first, Tensor) or not first.is_floating_point() or func in _MOVES:
            return
        leaves = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        operands = [a for a in leaves if isinstance(a, Tensor) and a.is_floating_point()]
        if operands and getattr(func, "__name__", "") not in ("__get__", "__set__"):
            self.note(self.path, getattr(func, "__name__", str(func)), *operands)


@dataclass(eq=False)
class Scope:
    """What a wrapped module remembers. Copies of the model share it.

    before  the forward that the instance had of its own
    widen   the module's operation is not covered and wants operands of its parameters' dtype
    owner   the module uses the parameters of its children without calling them
    """

    path: str
    mode: SiteMode
    before: Any = None
    widen: bool = False
    owner: bool = False

    def __deepcopy__(self, memo: Any) -> Scope:
        return self

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = type(module).forward.__get__(module) if self.before is None else self.before
        if self.widen:
            dtype = next(module.parameters()).dtype
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
            )
        mode, outer = self.mode, self.mode.path
        if torch.compiler.is_compiling():
            if mode.table.saves:
                _refuse_compiled()
            if mode.sampling:
                return _uncompiled(self, module, args, kwargs)
        mode.path = self.path
        if self.owner:  # looked up anew: a copy of the model has parameters of its own
            mode.owners = {id(p): _join(self.path, n.rpartition(".")[0]) for n, p in module.named_parameters()}
        try:
            if mode.depth:
                return forward(*args, **kwargs)
            return self._outermost(module, forward, args, kwargs)
        finally:
            mode.path = outer

    def _outermost(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        mode = self.mode
        recomputing = False
        compiling = torch.compiler.is_compiling()
        if not compiling:
            recomputing = torch._C._current_graph_task_id() != -1
            _check_surroundings(mode, recomputing)
        mode.depth = 1
        mode.calls = {}
        mode._met = {}
        recording, mode.recording = mode.recording, None if recomputing or compiling else mode.recording
        hooks = mode.table.hooks
        watching = hooks.watching
        if not compiling:  # compiled code does not watch, and must not be compiled anew when this changes
            hooks.watching = watching and torch.is_grad_enabled()
        mode.table.scales.training = torch.is_grad_enabled()
        keeps = mode.table.saves or mode.kept is not None
        try:
            with mode, saving(mode, module) if keeps and not recomputing else nullcontext():
                out = forward(*args, **kwargs)
        finally:
            mode.depth = 0
            mode.recording = recording
            if not compiling:
                hooks.watching = watching
        return out if recomputing else pytree.tree_map_only(Tensor, _to_float32, out)


@torch._dynamo.disable  # type: ignore[untyped-decorator]  # raised while tracing, it would only make Dynamo run the model as it is
def _refuse_compiled() -> None:
    raise ConfigError(
        "a compiler decides itself what it keeps for the backward pass, so saved rules cannot be followed in compiled "
        "code; drop those rules or torch.compile"
    )


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="mezzo measures this step, in which the model runs uncompiled: compile it without fullgraph=True, or close "
    "the observer"
)
def _uncompiled(scope: Scope, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return scope.run(module, args, kwargs)


def _check_surroundings(mode: SiteMode, recomputing: bool) -> None:
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise ConfigError("torch.autocast is on around a model that mezzo already rounds; remove one of the two")
    if any(isinstance(other, SiteMode) for other in _get_current_function_mode_stack()):
        raise ConfigError("a model under one Precision calls a model under another; give both to one Precision")
    if recomputing and mode.table.by_call:
        raise ConfigError(
            "activation checkpointing recomputes layers out of order, so rules for single calls (path#1) cannot be "
            "followed; drop those rules or the checkpointing"
        )


def _to_float32(x: Tensor) -> Tensor:
    """What leaves the model is float32, so that a loss outside of it is computed in float32 too."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _scoped_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._mezzo_scope.run(self, args, kwargs)  # type: ignore[union-attr, operator]


def refuse_attached(model: nn.Module) -> None:
    if any("_mezzo_scope" in module.__dict__ for module in model.modules()):
        raise ConfigError("this model is already under a Precision; call its remove() first")


def attach(model: nn.Module, table: Table) -> SiteMode:
    """Wrap the forward of every module of the model.

    raises    ConfigError if the model is already under a Precision
    """
    refuse_attached(model)
    mode = SiteMode(table)
    for path, module in model.named_modules():
        # A bound method, not a closure: a deep copy of the model binds it to the copy.
        own = module.__dict__.get("forward")
        scope = Scope(
            path or ROOT, mode, own, isinstance(module, _UNCOVERED), isinstance(module, nn.MultiheadAttention)
        )
        module._mezzo_scope = scope
        module.forward = types.MethodType(_scoped_forward, module)
    return mode


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in model.modules():
        scope = module.__dict__.pop("_mezzo_scope", None)
        if scope is not None:
            del module.forward
            if scope.before is not None:
                module.forward = scope.before


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path != ROOT and name else name or path
