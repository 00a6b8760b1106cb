"""Which layer is running, in this thread: what the wrapped operations ask before they do anything."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzo.keras.layers import Layers
    from mezzo.keras.table import SiteSpec


@dataclass
class Seen:
    """One operation met in a forward pass: the shapes it had the first time, and how often it ran.

    kind    "product", "attention" or "compute"
    shapes  of its operands, then of its result
    """

    path: str
    kind: str
    shapes: list[tuple[int, ...]]
    calls: int = 1


@dataclass
class Forward:
    """One forward pass of a model.

    calls    (path, kind) → how often it ran: the call index
    tags     id of a tensor → the tensor, and what it is: "weight", or "key" in attention. It holds the tensor, so that
             the id stays its own
    """

    layers: Layers
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    tags: dict[int, tuple[Any, str]] = field(default_factory=dict)

    def call_index(self, path: str, kind: str) -> int:
        index = self.calls.get((path, kind), 0)
        self.calls[(path, kind)] = index + 1
        return index

    def tag(self, tensor: Any, kind: str) -> None:
        self.tags[id(tensor)] = (tensor, kind)

    def kind(self, tensor: Any) -> str:
        """What the tensor is, "" if nothing is known of it."""
        found = self.tags.get(id(tensor))
        return found[1] if found is not None else ""


@dataclass
class Scope:
    """A layer that is running.

    parts    specs of the products that come next, inside of attention
    """

    forward: Forward
    path: str
    parts: list[SiteSpec] = field(default_factory=list)


class _Thread(threading.local):
    scope: Scope | None = None
    off: bool = False


_thread = _Thread()


def current() -> Scope | None:
    """The running layer, or None where operations are TensorFlow's own."""
    return None if _thread.off else _thread.scope


def outer() -> Scope | None:
    """As `current`, also where it is suspended."""
    return _thread.scope


def is_suspended() -> bool:
    return _thread.off


@contextmanager
def entered(scope: Scope) -> Iterator[None]:
    before, _thread.scope = _thread.scope, scope
    try:
        yield
    finally:
        _thread.scope = before


@contextmanager
def suspended() -> Iterator[None]:
    """Operations inside are TensorFlow's own."""
    before, _thread.off = _thread.off, True
    try:
        yield
    finally:
        _thread.off = before
