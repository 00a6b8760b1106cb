"""Run a jaxpr with every dot product and convolution in it rounded as a policy says.

The jaxpr is that of a user's function, traced as it is. Loops, branches, checkpoints and calls that hold products are
built anew around the rounded ones; everything else is bound as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from mezzo.errors import ConfigError
from mezzo.formats import FLOAT32, FLOAT64
from mezzo.jax.equations import Operand, bind, closed_jaxprs, has, in_attention, inner_jaxprs, surroundings
from mezzo.jax.paths import common_path, prefixes, scope_path
from mezzo.jax.products import bilinear, product
from mezzo.jax.rounding import Listener, SiteSpec
from mezzo.policy import Policy, Rule, Spec
from mezzo.policy.depth import by_depth, expand
from mezzo.policy.roles import check_no_blocks, role_specs
from mezzo.policy.site import ATTENTION_ROLES, PRODUCT_ROLES, ROOT

Array = Any

# A weight that went through these is still that weight.
_CARRY_PATH = {
    "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims", "rev", "reshape",
    "slice", "squeeze", "stop_gradient", "transpose", "optimization_barrier",
}  # fmt: skip
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_UNCOVERED = {"ragged_dot", "ragged_dot_general", "scaled_dot", "scaled_matmul", "triangular_solve", "cholesky"}
# What the two products of attention are called in the table; None: not rounded, kept as the accumulator holds it.
_SCORES = {
    "fprop.a": "fprop.query", "fprop.b": "fprop.key", "fprop.out": None,
    "dgrad.a": None, "dgrad.b": "fprop.key", "dgrad.out": "dgrad.query",
    "wgrad.a": None, "wgrad.b": "fprop.query", "wgrad.out": "dgrad.key",
}  # fmt: skip
_RESULT = {
    "fprop.a": None, "fprop.b": "fprop.value", "fprop.out": "fprop.out",
    "dgrad.a": "dgrad.dout", "dgrad.b": "fprop.value", "dgrad.out": None,
    "wgrad.a": "dgrad.dout", "wgrad.b": None, "wgrad.out": "dgrad.value",
}  # fmt: skip
# The roles that listeners are told of: each tensor once.
_SHOWN = {
    "scores": ("fprop.a", "fprop.b", "dgrad.out", "wgrad.out"),
    "result": ("fprop.a", "fprop.b", "fprop.out", "dgrad.a", "wgrad.out"),
}


class Origin(NamedTuple):
    """Where a value comes from.

    path     of the weight that it is; None: it is none
    scores   the last attention whose scores it depends on
    layer    the last layer whose product it comes from
    """

    path: str | None = None
    scores: int = 0
    layer: str | None = None


@dataclass(frozen=True)
class Seen:
    """One product that was met.

    kind     "product", "attention", "convolution", or the name of a primitive that is not covered
    shapes   of its operands a and b as the table names them, and of its result
    """

    path: str
    kind: str
    call: int
    site: SiteSpec | None
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Interpreter:
    """One evaluation of one function under one policy.

    known   paths of the modules that the parameters show
    draws   0-d integer, see `product`
    native  whether the device multiplies 16-bit operands itself
    """

    policy: Policy
    known: set[str]
    seed: int
    draws: Array
    listener: Listener | None = None
    native: bool = False
    seen: dict[tuple[str, str, int, str], Seen] = field(default_factory=dict)
    _calls: dict[tuple[str, str], int] = field(default_factory=dict)
    _attention: int = 0
    _loops: int = 0  # that are being followed
    _looked_up: set[str] = field(default_factory=set)  # weights that rows were taken of: embeddings
    _open: dict[str, int] = field(default_factory=dict)  # path → the attention whose result is still to come

    def __post_init__(self) -> None:
        self.rules: tuple[Rule, ...] = self.policy.rules_for(sorted(self.known))
        self.by_call = any(rule.by_call for rule in self.rules)

    # --- walking ---

    def run(
        self, jaxpr: Any, consts: Sequence[Array], args: Sequence[Array], origins: Sequence[Origin], scope: str = ""
    ) -> tuple[list[Array], list[Origin]]:
        """Evaluate an open jaxpr; origins are those of consts and args together."""
        env: dict[Any, Array] = {}
        source: dict[Any, Origin] = {}

        def read(v: Any) -> Array:
            return v.val if isinstance(v, Literal) else env[v]

        for v, value, origin in zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), origins, strict=True):
            env[v], source[v] = value, origin
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            froms = [Origin() if isinstance(v, Literal) else source[v] for v in eqn.invars]
            inner = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
            results, found = self._equation(eqn, values, froms, inner)
            for v, value, origin in zip(eqn.outvars, results, found, strict=True):
                env[v], source[v] = value, origin
        outs = [read(v) for v in jaxpr.outvars]
        return outs, [Origin() if isinstance(v, Literal) else source[v] for v in jaxpr.outvars]

    def _equation(
        self, eqn: Any, values: list[Array], froms: list[Origin], scope: str
    ) -> tuple[list[Array], list[Origin]]:
        name = eqn.primitive.name
        if name == "dot_general":
            return self._dot(eqn, values, froms, scope)
        if name == "conv_general_dilated":
            return self._convolution(eqn, values, froms, scope)
        if any(has(inner, _PRODUCTS) for inner in inner_jaxprs(eqn)):
            handler = _HANDLERS.get(name)
            if handler is not None:
                return handler(self, eqn, values, froms, scope)
            self._note(Seen(scope_path(scope, self.known), name, 0, None, ()))
        elif name in _UNCOVERED:
            shapes = tuple(v.aval.shape for v in eqn.invars)
            self._note(Seen(scope_path(scope, self.known), name, 0, None, shapes))
        if (
            froms
            and froms[0].path is not None
            and (name == "gather" or any(has(i, {"gather"}) for i in inner_jaxprs(eqn)))
        ):
            self._looked_up.add(froms[0].path)
        if name == "dynamic_slice" and self._loops and froms[0].path is not None:
            self._refuse_layers_apart(froms[0].path, eqn.invars[0].aval.shape[0])
        results = bind(eqn, values)
        last = max((origin.scores for origin in froms), default=0)
        layer = next((origin.layer for origin in froms if origin.layer is not None), None)
        path = froms[0].path if froms and name in _CARRY_PATH else None
        if name in ("jit", "pjit") and len({o.path for o in froms}) == 1:
            path = froms[0].path if all(e.primitive.name in _CARRY_PATH for e in inner_jaxprs(eqn)[0].eqns) else None
        return results, [Origin(path, last, layer)] * len(results)

    # --- products ---

    def _dot(self, eqn: Any, values: list[Array], froms: list[Origin], scope: str) -> tuple[list[Array], list[Origin]]:
        (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
        aval = eqn.outvars[0].aval
        lhs = Operand(values[0], tuple(batch_l), tuple(contract_l))
        rhs = Operand(values[1], tuple(batch_r), tuple(contract_r))
        last = max(origin.scores for origin in froms)
        if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in values):
            return bind(eqn, values), [Origin(None, last)]
        part, weight = "", None
        if in_attention(eqn):  # learned queries, keys or values are operands of attention, no layer's weight
            path, part, swap, last = self._attention_part(scope, froms, last)
            layer = None
        else:
            path, weight = self._layer(scope, froms)
            swap, layer = froms[0].path is not None and froms[1].path is None, path
        kind = "attention" if part else "product"
        call = self._calls[path, kind] - 1 if part == "result" else self._count(path, kind)
        a, b = (rhs, lhs) if swap else (lhs, rhs)
        site = self._site(path, call, part, weight is not None)
        _check_wide_enough(site, values)
        self._note(Seen(path, kind, call, site, (a.value.shape, b.value.shape, aval.shape)), part)
        if site.plain:
            # An accelerator's default for float32 may be a product of fewer bits.
            exact = {"precision": (lax.Precision.HIGHEST, lax.Precision.HIGHEST)} if self.native else {}
            return bind(eqn, values, **exact), [Origin(None, last, layer)]
        with surroundings(eqn):
            y = product(site, a.canonical(), b.canonical(), self.draws)
            batch = [lhs.value.shape[i] for i in lhs.batch]
            y = y.reshape(*batch, *a.free_shape, *b.free_shape)
            if swap:
                n, m = len(batch), len(batch) + len(a.free_shape)
                y = jnp.transpose(y, (*range(n), *range(m, y.ndim), *range(n, m)))
        return [y.astype(aval.dtype)], [Origin(None, last, layer)]

    def _layer(self, scope: str, froms: list[Origin]) -> tuple[str, str | None]:
        """(path of a product, the weight that it multiplies with): the second operand where both are weights."""
        weight = froms[1].path or froms[0].path
        path = scope_path(scope, self.known) if weight is None or weight in self._looked_up else weight
        # A head that shares the embedding's weight has a path of its own where a scope names it.
        return (weight if weight is not None and path == ROOT else path), weight

    def _attention_part(self, scope: str, froms: list[Origin], last: int) -> tuple[str, str, bool, int]:
        """Which of attention's two products this is: (path, part, whether operands come in the other order, scores)."""
        for path, current in self._open.items():
            with_probs = [origin.scores == current for origin in froms]
            if any(with_probs):
                del self._open[path]
                return path, "result", with_probs[1] and not with_probs[0], last
        self._attention += 1
        path = scope_path(scope, self.known)
        if path not in self.known or path == ROOT:  # no module's: that of the layers which query and key come from
            path = common_path([origin.layer for origin in froms]) or path
        self._open[path] = self._attention
        return path, "scores", False, self._attention

    def _note(self, seen: Seen, part: str = "") -> None:
        self.seen[seen.path, seen.kind, seen.call, part] = seen

    def _count(self, path: str, kind: str) -> int:
        call = self._calls.get((path, kind), 0)
        self._calls[path, kind] = call + 1
        return call

    def _convolution(
        self, eqn: Any, values: list[Array], froms: list[Origin], scope: str
    ) -> tuple[list[Array], list[Origin]]:
        a, b = values
        last = max(origin.scores for origin in froms)
        path = froms[1].path or scope_path(scope, self.known)
        if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in values):
            return bind(eqn, values), [Origin(None, last)]
        site = self._site(path, self._count(path, "product"), "", True)
        _check_wide_enough(site, values)
        self._note(Seen(path, "convolution", site.call, site, (a.shape, b.shape, eqn.outvars[0].aval.shape)))
        if site.plain:
            return bind(eqn, values), [Origin(None, last)]
        check_no_blocks(path, site.specs, "a convolution", PRODUCT_ROLES)
        params = {**eqn.params, "precision": (lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
        params["preferred_element_type"] = None

        def op(x: Array, w: Array) -> Array:
            return eqn.primitive.bind(x, w, **params)

        y = bilinear(site, op, a, b, self.draws)
        return [y.astype(eqn.outvars[0].aval.dtype)], [Origin(None, last, path)]

    def _site(self, path: str, call: int, part: str, weight: bool) -> SiteSpec:
        call = call if self.by_call else 0
        if not part:
            specs = role_specs(self.rules, PRODUCT_ROLES, path, call)
            return SiteSpec(path, call, tuple(specs.items()), self.seed, weight, None, "", self.listener, self.native)
        found = role_specs(self.rules, ATTENTION_ROLES, path, call)
        wide = Spec(FLOAT64 if any(spec.fmt.name == "float64" for spec in found.values()) else FLOAT32)
        names: dict[str, str | None] = dict(_SCORES if part == "scores" else _RESULT)
        if probs := found.get("fprop.probs"):
            # Probabilities with a format of their own: gradients of scores and probabilities are rounded like dout.
            if part == "scores":
                names["dgrad.a"] = names["wgrad.a"] = "dgrad.dout"
            else:
                names["fprop.a"] = names["wgrad.b"] = "fprop.probs"
        specs = {role: wide if name is None else found[name] for role, name in names.items()}
        shown = tuple((role, name) for role in _SHOWN[part] if (name := names[role]) is not None)
        part = part if probs else ""  # the random words of the two products are told apart where both draw some
        return SiteSpec(path, call, tuple(specs.items()), self.seed, False, shown, part, self.listener, self.native)

    # --- what holds products ---

    def _inline(
        self, eqn: Any, values: list[Array], froms: list[Origin], scope: str
    ) -> tuple[list[Array], list[Origin]]:
        closed = next(iter(closed_jaxprs(eqn)))
        return self.run(closed.jaxpr, closed.consts, values, [Origin()] * len(closed.consts) + froms, scope)

    def _checkpoint(
        self, eqn: Any, values: list[Array], froms: list[Origin], scope: str
    ) -> tuple[list[Array], list[Origin]]:
        jaxpr = eqn.params["jaxpr"]
        if self.listener is not None:  # what is computed again is measured once
            return self.run(jaxpr, (), values, froms, scope)
        found: list[Origin] = []
        body = self._repeatable(lambda *args: self._keep(found, self.run(jaxpr, (), args, froms, scope)))
        again = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        return list(again(*values)), found

    def _scan(self, eqn: Any, values: list[Array], froms: list[Origin], scope: str) -> tuple[list[Array], list[Origin]]:
        p, closed = eqn.params, eqn.params["jaxpr"]
        consts, carries = p["num_consts"], p["num_carry"]
        for origin in froms[consts + carries :]:
            if origin.path is not None:
                self._refuse_layers_apart(origin.path, p["length"])
        fixed, start, rows = values[:consts], values[consts : consts + carries], values[consts + carries :]
        found: list[Origin] = []
        froms = _through(froms, closed.jaxpr, consts, carries)

        def body(carry: Any, row: Any) -> Any:
            args = (*fixed, *carry, *row)
            origins = [Origin()] * len(closed.consts) + froms
            out = self._keep(found, self.run(closed.jaxpr, closed.consts, args, origins, scope))
            return tuple(out[:carries]), tuple(out[carries:])

        carry, ys = lax.scan(
            self._repeatable(body, loop=True),
            tuple(start),
            tuple(rows),
            p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*carry, *ys], found

    def _while(
        self, eqn: Any, values: list[Array], froms: list[Origin], scope: str
    ) -> tuple[list[Array], list[Origin]]:
        p = eqn.params
        n, m = p["cond_nconsts"], p["body_nconsts"]
        ask, go = p["cond_jaxpr"], p["body_jaxpr"]
        start = values[n + m :]
        found: list[Origin] = []
        froms = froms[:n] + _through(froms[n:], go.jaxpr, m, len(start))

        def goes_on(carry: Any) -> Array:
            origins = [Origin()] * len(ask.consts) + froms[:n] + froms[n + m :]
            return self.run(ask.jaxpr, ask.consts, (*values[:n], *carry), origins, scope)[0][0]

        def body(carry: Any) -> Any:
            origins = [Origin()] * len(go.consts) + froms[n:]
            return tuple(self._keep(found, self.run(go.jaxpr, go.consts, (*values[n : n + m], *carry), origins, scope)))

        return list(lax.while_loop(self._repeatable(goes_on), self._repeatable(body, loop=True), tuple(start))), found

    def _cond(self, eqn: Any, values: list[Array], froms: list[Origin], scope: str) -> tuple[list[Array], list[Origin]]:
        found: list[Origin] = []

        def of(branch: Any) -> Callable[..., Any]:
            origins = [Origin()] * len(branch.consts) + froms[1:]
            return self._repeatable(
                lambda *args: tuple(self._keep(found, self.run(branch.jaxpr, branch.consts, args, origins, scope)))
            )

        results = lax.switch(values[0], [of(branch) for branch in eqn.params["branches"]], *values[1:])
        return list(results), found

    def _repeatable(self, body: Callable[..., Any], loop: bool = False) -> Callable[..., Any]:
        """`body` counting calls from the same state however often JAX traces it."""
        calls, attention, waiting = dict(self._calls), self._attention, dict(self._open)

        def again(*args: Any) -> Any:
            self._calls, self._attention, self._open = dict(calls), attention, dict(waiting)
            self._loops += loop
            try:
                return body(*args)
            finally:
                self._loops -= loop

        return again

    @staticmethod
    def _keep(found: list[Origin], outcome: tuple[list[Array], list[Origin]]) -> list[Array]:
        found[:] = outcome[1]
        return outcome[0]

    def _refuse_layers_apart(self, path: str, length: int) -> None:
        """A loop has one set of rules for all its layers, wherever in the path their number would stand."""
        parts = path.split(".")
        layers = [".".join([*parts[:at], str(i), *parts[at:]]) for at in range(len(parts) + 1) for i in range(length)]
        for rule in self.policy.all_rules():
            meant = expand([rule], prefixes(layers)) if by_depth(rule) else [rule]
            meant = [one for one in meant if any(map(one.matches_path, layers))]
            if meant and not rule.matches_path(path):  # a rule that matches the path itself means all of them
                raise ConfigError(
                    f"the rule {str(rule)!r} speaks of single layers, but {path} runs through all {length} in one "
                    "lax.scan, whose layers cannot be told apart; unroll the loop, or take a policy without the rule"
                )


def _check_wide_enough(site: SiteSpec, values: Sequence[Array]) -> None:
    """A float64 site of float32 operands would be float32 in all but name."""
    if site.acc == jnp.float64 and any(x.dtype != jnp.float64 for x in values):
        raise ConfigError(
            f"{site.path} has float64 sites, but its operands are {' and '.join(str(x.dtype) for x in values)}; make "
            "parameters and inputs float64, under jax.config.update('jax_enable_x64', True)"
        )


def _through(froms: list[Origin], body: Any, consts: int, carries: int) -> list[Origin]:
    """Origins of a loop body's arguments: a carry is a weight only if the body hands it on untouched."""
    kept = list(froms)
    for i in range(consts, consts + carries):
        if body.outvars[i - consts] is not body.invars[i]:
            kept[i] = Origin(None, kept[i].scores, kept[i].layer)
    return kept


_HANDLERS: dict[str, Callable[..., tuple[list[Array], list[Origin]]]] = {
    "jit": Interpreter._inline,
    "pjit": Interpreter._inline,
    "closed_call": Interpreter._inline,
    "core_call": Interpreter._inline,
    "checkpoint": Interpreter._checkpoint,
    "remat": Interpreter._checkpoint,
    "remat2": Interpreter._checkpoint,
    "scan": Interpreter._scan,
    "while": Interpreter._while,
    "cond": Interpreter._cond,
}
