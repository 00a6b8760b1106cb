"""Rounding at the sites: what a product does to its operands and to its result.

Values stay in float32 (float64 in a float64 product), whatever format they are rounded to: XLA may keep a pair of
conversions to 16 bits and back, or delete it; it cannot delete integer arithmetic on the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mezzo.formats.rounding import Overflow
from mezzo.jax.quantize import hadamard, quantize
from mezzo.policy import Site, Spec
from mezzo.policy.roles import WIDE, shared

Array = Any
HALVES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Rounding(NamedTuple):
    """One rounding, as listeners are told of it.

    spec   what the site is given
    axis   the one that the product sums over
    """

    site: Site
    spec: Spec
    axis: int


Listener = Callable[[Rounding, Array, Array, Array], None]  # (…, as it came, before, after the rounding)


@dataclass(frozen=True)
class SiteSpec:
    """What one product's roles are given. Hashable: it is static where JAX traces.

    roles      (role, Spec) of the nine roles
    shown      role → the role that random words and listeners know, where the product is part of an attention
    weight     whether b is a weight, whose random words are numbered in the order (out, in)
    listener   told of every rounding on the host
    native     whether the device multiplies 16-bit operands itself
    """

    path: str
    call: int
    roles: tuple[tuple[str, Spec], ...]
    seed: int = 0
    weight: bool = True
    shown: tuple[tuple[str, str], ...] | None = None
    part: str = ""
    listener: Listener | None = None
    native: bool = False

    @cached_property
    def specs(self) -> dict[str, Spec]:
        return dict(self.roles)

    @cached_property
    def names(self) -> dict[str, str] | None:
        return None if self.shown is None else dict(self.shown)

    @property
    def acc(self) -> Any:
        """The dtype that the product is computed in."""
        return jnp.float64 if any(spec.fmt.name == "float64" for _, spec in self.roles) else jnp.float32

    @property
    def plain(self) -> bool:
        """Whether the unmodified operation is already what the table asks for."""
        return self.listener is None and len({s.fmt.name for _, s in self.roles} - {"float32", "float64"}) == 0

    def shared(self, one: str, other: str) -> bool:
        """Whether a tensor rounded for one role serves the other, which sums over another axis."""
        return shared(self.specs, one, other)

    def native_dtype(self, product: str) -> Any:
        """The 16-bit dtype that a product's operands go to the device in; None: they are multiplied as float32."""
        names = {self.specs[f"{product}.{operand}"].fmt.name for operand in "ab"}
        return HALVES.get(names.pop()) if self.native and len(names) == 1 and self.acc == jnp.float32 else None

    def rounds_to_16_bits(self, role: str) -> bool:
        return self.specs[role].fmt.name in HALVES

    def round(self, role: str, x: Array, axis: int, draws: Array) -> Array:
        """`x` rounded for `role` along the summed axis, in `acc`; tells the listener."""
        spec = self.specs[role]
        source = turned(spec, x, axis)
        site = Site(f"{self.path}.{self.part}" if self.part else self.path, role, self.call)
        key = (self.seed, draws, str(site)) if spec.rounding == "stochastic" else None
        y = round_to(spec, source, axis, key).astype(self.acc)
        self.tell(role, x, source, y, axis)
        return y

    def tell(self, role: str, raw: Array, before: Array, after: Array, axis: int) -> None:
        if self.listener is None or (self.names is not None and role not in self.names):
            return
        shown = role if self.names is None else self.names[role]
        told = Rounding(Site(self.path, shown, self.call), self.specs[role], axis)
        listener = self.listener
        jax.debug.callback(lambda *arrays: listener(told, *arrays), raw, before, after, ordered=False)


def turned(spec: Spec, x: Array, axis: int) -> Array:
    """`x`, or its Hadamard transform where `spec` asks for one; zeros fill the last block."""
    if not spec.hadamard:
        return x
    missing = -x.shape[axis] % spec.hadamard
    if missing:
        widths: list[Sequence[int]] = [(0, 0)] * x.ndim
        widths[axis] = (0, missing)
        x = jnp.pad(x, widths)
    return hadamard(x, axis=axis, block=spec.hadamard)


def round_to(spec: Spec, x: Array, axis: int, key: tuple[int, Array, str] | None = None) -> Array:
    """`x`, transformed already, rounded as `spec` says; formats that tensors live in overflow, the others saturate."""
    name = spec.fmt.name
    if name == "float64" or (name == "float32" and x.dtype == jnp.float32):
        return x
    overflow: Overflow = "cast" if name in WIDE else "saturate"
    return quantize(x, spec.fmt, axis=axis, rounding=spec.rounding, overflow=overflow, key=key)
