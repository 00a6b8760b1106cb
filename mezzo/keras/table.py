"""The site table under TensorFlow: a policy resolved, site by site, and how a tensor is rounded at a site."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.eager import record

from mezzo.errors import ConfigError
from mezzo.formats import FLOAT32, FLOAT64, AnyFormat, ScaledFormat
from mezzo.formats.rounding import Overflow
from mezzo.keras.backend import as_is
from mezzo.keras.quantize import hadamard, quantize
from mezzo.policy import Policy, Rule, Site, Spec
from mezzo.policy.policy import find
from mezzo.policy.roles import WIDE, role_specs, shared
from mezzo.policy.site import ATTENTION_ROLES, PRODUCT_ROLES

HALVES = ("bfloat16", "float16")
Tensor = Any  # tensorflow has no types that mypy could read


class Event(NamedTuple):
    """One rounding, as taps are told of it: NumPy's `before` (or its Hadamard transform) and `after`, of one shape.

    axis    the one that the product sums over
    """

    site: Site
    before: Any
    after: Any
    spec: Spec
    axis: int


@dataclass
class Hooks:
    """What listens to the sites while they run.

    taps         are told of roundings, eagerly
    unguarded    gives the policy that scales the loss, if there is one and no optimizer would divide by the scale
    """

    taps: list[Callable[[Event], None]] = field(default_factory=list)
    unguarded: Callable[[], Policy | None] = lambda: None


class Rounder:
    """Rounds tensors, with random words where a site asks for them.

    seed    of the Precision
    count   int64 variable: how many steps there were so far

    In a graph each way of rounding is one function that all sites call: written out at every site, a deep model would
    be traced for minutes.
    """

    def __init__(self, seed: int, count: Tensor) -> None:
        self.seed, self.count = seed, count
        self._functions: dict[tuple[str, str, int, str], Any] = {}

    def __call__(self, x: Tensor, spec: Spec, axis: int, site: Site) -> Tensor:
        """`x` rounded as `spec` says, in its own dtype."""
        random = spec.rounding == "stochastic"
        step = self.count.read_value() if random else tf.constant(0, tf.int64)
        if tf.executing_eagerly():
            return self._round(spec, axis, str(site), x, step)
        name = (spec.fmt.name, spec.rounding, axis, str(site) if random else "")
        if name not in self._functions:
            self._functions[name] = tf.function(
                functools.partial(self._round, spec, axis, str(site)),
                autograph=False,
                experimental_attributes={"_noinline": True},
            )
        with record.stop_recording():  # its gradient is never asked for: products have gradients of their own
            y = self._functions[name](x, step)
        return tf.ensure_shape(y, x.shape)

    def _round(self, spec: Spec, axis: int, site: str, x: Tensor, step: Tensor) -> Tensor:
        key = (self.seed, step, site) if spec.rounding == "stochastic" else None
        overflow: Overflow = "cast" if spec.fmt.name in WIDE else "saturate"
        return tf.cast(quantize(x, spec.fmt, axis=axis, rounding=spec.rounding, overflow=overflow, key=key), x.dtype)


class SiteSpec:
    """What one layer's roles are given, and how to carry it out.

    specs   role → Spec
    acc     dtype that products are computed in
    shown   role → the role that listeners are told, where it is part of a larger operation; others are not told
    part    of that operation: tells its products' random words apart
    """

    def __init__(
        self,
        path: str,
        call: int,
        specs: dict[str, Spec],
        rounder: Rounder,
        hooks: Hooks,
        shown: dict[str, str] | None = None,
        part: str = "",
    ) -> None:
        self.path, self.call, self.specs, self.rounder, self.hooks = path, call, specs, rounder, hooks
        self.shown, self.part = shown, part
        self.out = specs["fprop.out"].fmt
        formats = {spec.fmt.name for spec in specs.values()}
        self.acc = tf.float64 if "float64" in formats else tf.float32
        self.uniform = formats.pop() if len(formats) == 1 and all(s.plain for s in specs.values()) else None

    def plain(self, *tensors: Tensor) -> bool:
        """Whether the unmodified float32 or float64 operation is already what the table asks for."""
        return (
            self.uniform in ("float32", "float64")
            and not self.hooks.taps
            and self.hooks.unguarded() is None  # its gradients are to be seen
            and all(x.dtype.name == self.uniform for x in tensors)
        )

    def cast(self, role: str, x: Tensor, axis: int = -1, order: Sequence[int] | None = None) -> Tensor:
        """Round `x` to the format of `role`; hand it to whoever listens.

        axis      the one that the product sums over
        order     the order of axes in which torch has this tensor: in it elements draw their random words and blocks of
                  several rows lie. None: as it is
        returns   like x; under a Hadamard transform the axis is filled with zeros up to a multiple of the block
        """
        spec = self.specs[role]
        turned_round = order is not None and (spec.rounding == "stochastic" or _has_rows(spec.fmt))
        if turned_round and order is not None:
            x, axis = tf.transpose(x, order), list(order).index(axis % len(order))
        source = _turned(spec, x, axis)
        y = self._round(role, spec, source, axis)
        self.tell(role, source, y, axis)
        return tf.transpose(y, _inverse(order)) if turned_round and order is not None else y

    def again(self, role: str, x: Tensor, rounded: Tensor, axis: int = -1) -> Tensor:
        """`rounded`, which another role shares with this one."""
        self.tell(role, x, rounded, axis)
        return rounded

    def arriving(self, g: Tensor) -> Tensor:
        """The gradient that comes back to the result: a tensor of 16 bits has a gradient of those 16 bits.

        raises    ConfigError if the policy scales the loss and no optimizer was guarded
        """
        policy = self.hooks.unguarded()
        if policy is not None:
            raise as_is(
                ConfigError(
                    f"{policy} scales the loss, but no optimizer was guarded: optimizer = "
                    "precision.optimizer(optimizer), and differentiate optimizer.scale_loss(loss)"
                )
            )
        if self.out.name not in HALVES:
            return g
        return self.rounder(g, Spec(self.out), -1, Site(self.path, "fprop.out"))

    @property
    def arrives_rounded(self) -> bool:
        """Whether `arriving` has done what `dgrad.a` asks for."""
        return self.out.name in HALVES and self.shared("dgrad.a", "fprop.out")

    def shared(self, one: str, other: str) -> bool:
        """Whether a tensor rounded for one role serves the other, which sums over another axis."""
        return shared(self.specs, one, other)

    def _round(self, role: str, spec: Spec, x: Tensor, axis: int) -> Tensor:
        if spec.rounding == "nearest" and (spec.fmt is FLOAT64 or (spec.fmt is FLOAT32 and x.dtype == tf.float32)):
            return x
        site = Site(f"{self.path}.{self.part}" if self.part else self.path, role, self.call)
        return self.rounder(x, spec, axis, site)

    def tell(self, role: str, before: Tensor, after: Tensor, axis: int) -> None:
        """Hand a rounding to whoever listens; in a graph there is nothing to hand out yet."""
        if not self.hooks.taps or not tf.executing_eagerly():
            return
        shown = role if self.shown is None else self.shown.get(role)
        if shown is not None:
            event = Event(Site(self.path, shown, self.call), before.numpy(), after.numpy(), self.specs[role], axis)
            for tap in self.hooks.taps:
                tap(event)


class Table:
    """A policy's specs for every path that is asked for, looked up once.

    paths    the model's layers, which rules by depth count in
    """

    def __init__(self, policy: Policy, rounder: Rounder, hooks: Hooks, paths: Iterable[str] = ()) -> None:
        self.policy, self.rounder, self.hooks = policy, rounder, hooks
        self.rules: tuple[Rule, ...] = policy.rules_for(paths)
        self.by_call = any(rule.by_call for rule in self.rules)
        self._products: dict[tuple[str, int], SiteSpec] = {}
        self._attention: dict[tuple[str, int], SiteSpec] = {}

    def resolve(self, paths: Iterable[str]) -> None:
        """Look all of `paths` up now, so that what cannot be is refused before anything runs."""
        calls = {0, *(int(rule.path.partition("#")[2]) for rule in self.rules if rule.by_call)}
        for path in paths:
            self.stored(path)
            for call in calls:
                self.product(path, call)
                self.attention(path, call)

    def product(self, path: str, call: int) -> SiteSpec:
        return self._spec(self._products, PRODUCT_ROLES, path, call)

    def attention(self, path: str, call: int) -> SiteSpec:
        """As `product`; `fprop.probs` is there only if a rule speaks of it."""
        return self._spec(self._attention, ATTENTION_ROLES, path, call)

    def _spec(self, cache: dict[tuple[str, int], SiteSpec], roles: tuple[str, ...], path: str, call: int) -> SiteSpec:
        key = (path, call if self.by_call else 0)
        if key not in cache:
            cache[key] = SiteSpec(path, key[1], role_specs(self.rules, roles, path, key[1]), self.rounder, self.hooks)
        return cache[key]

    def compute_format(self, path: str) -> AnyFormat:
        spec = find(self.rules, Site(path, "compute"))
        return FLOAT32 if spec is None else spec.fmt

    def stored(self, path: str) -> str:
        """The dtype that weights of `path` have, and that its layer computes in.

        raises    ConfigError if rules for `master` and `compute` say two things
        """
        spec = find(self.rules, Site(path, "master")) or Spec(FLOAT32)
        compute = self.compute_format(path)
        if compute.name != spec.fmt.name:
            raise ConfigError(
                f"{path}:compute={compute} and {path}:master={spec}: under TensorFlow a layer computes in the dtype of "
                "its weights; give both roles float32, or both float64"
            )
        return spec.fmt.name


def _has_rows(fmt: AnyFormat) -> bool:
    return isinstance(fmt, ScaledFormat) and isinstance(fmt.group, tuple) and fmt.group[0] > 1


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(axis) for axis in range(len(order))]


def _turned(spec: Spec, x: Tensor, axis: int) -> Tensor:
    """`x`, or its Hadamard transform where `spec` asks for one."""
    if not spec.hadamard:
        return x
    # Zeros that fill the last block add nothing to the sum, as the other operand has them too.
    axis, block, size = axis % x.shape.rank, spec.hadamard, x.shape[axis]
    missing = -(tf.shape(x)[axis] if size is None else size) % block
    if size is None or missing:
        x = tf.pad(x, [[0, missing if at == axis else 0] for at in range(x.shape.rank)])
    if size is not None:
        return hadamard(x, axis=axis, block=block)
    # All blocks are multiplied by one matrix, so a length that is not known is as many blocks as there are.
    last = [*(at for at in range(x.shape.rank) if at != axis), axis]
    moved = tf.transpose(x, last)
    blocks = tf.reshape(moved, tf.concat([tf.shape(moved)[:-1], [-1, block]], 0))
    turned = tf.reshape(hadamard(blocks, axis=-1, block=block), tf.shape(moved))
    return tf.ensure_shape(tf.transpose(turned, _inverse(last)), x.shape)
