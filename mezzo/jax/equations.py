"""Equations of a jaxpr: what they hold, how they are carried out, a dot_general's operands in canonical form."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

Array = Any
_LIBRARIES = ("jax", "flax", "equinox")  # whose dot product attention has attention's own roles


@dataclass(frozen=True)
class Operand:
    """One side of a dot_general."""

    value: Array
    batch: tuple[int, ...]
    contract: tuple[int, ...]

    @property
    def free(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.value.ndim) if i not in (*self.batch, *self.contract))

    @property
    def free_shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape[i] for i in self.free)

    def canonical(self) -> Array:
        """(rows, summed), with all batches as one axis in front if there are any."""
        x = jnp.transpose(self.value, (*self.batch, *self.free, *self.contract))
        shape = self.value.shape
        batches = [prod(shape[i] for i in self.batch)] if self.batch else []
        return x.reshape(*batches, prod(self.free_shape), prod(shape[i] for i in self.contract))


@contextmanager
def surroundings(eqn: Any) -> Iterator[None]:
    """The named scopes and settings that an equation was written under, for profiles and compilers."""
    stack = str(eqn.source_info.name_stack)
    with ExitStack() as entered:
        manager = getattr(eqn.ctx, "manager", None)
        if manager is not None:
            entered.enter_context(manager)
        if stack:
            entered.enter_context(jax.named_scope(stack))
        yield


def bind(eqn: Any, values: Sequence[Array], **other: Any) -> list[Array]:
    """Carry out an equation as it is, but for `other` parameters."""
    params = eqn.primitive.get_bind_params({**eqn.params, **other})
    functions: Sequence[Any] = ()
    if isinstance(params, tuple):  # up to JAX 0.9 the functions came beside the parameters
        functions, params = params
    with surroundings(eqn):
        outcome = eqn.primitive.bind(*functions, *values, **params)
    return list(outcome) if eqn.primitive.multiple_results else [outcome]


def in_attention(eqn: Any) -> bool:
    """Whether a dot product attention of JAX, Flax or Equinox is what makes this product."""
    traceback = eqn.source_info.traceback
    homes = [os.path.dirname(sys.modules[name].__file__ or "?") + os.sep for name in _LIBRARIES if name in sys.modules]
    return traceback is not None and any(
        "dot_product_attention" in frame.function_name and frame.file_name.startswith(tuple(homes))
        for frame in traceback.frames
    )


def closed_jaxprs(eqn: Any) -> Iterable[Any]:
    """The closed jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "jaxpr") and hasattr(one, "consts"):
                yield one


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The open jaxprs among an equation's parameters."""
    opened = [one for value in eqn.params.values() for one in (value if isinstance(value, (tuple, list)) else (value,))]
    return [one.jaxpr for one in closed_jaxprs(eqn)] + [
        one for one in opened if hasattr(one, "eqns") and not hasattr(one, "consts")
    ]


def has(jaxpr: Any, names: set[str]) -> bool:
    return any(
        eqn.primitive.name in names or any(has(inner, names) for inner in inner_jaxprs(eqn)) for eqn in jaxpr.eqns
    )
