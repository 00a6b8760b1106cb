"""`Precision`: a policy applied to any JAX function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from math import ceil, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mezzo.errors import ConfigError
from mezzo.jax import modules, scaling
from mezzo.jax.interpret import Interpreter, Origin, Seen
from mezzo.jax.paths import leaf_path, module_path, prefixes
from mezzo.jax.rounding import Listener
from mezzo.jax.scaling import State
from mezzo.policy import Policy
from mezzo.policy.site import ATTENTION_ROLES, PRODUCT_ROLES, SiteRow
from mezzo.policy.support import refuse

Tree = Any
_MARK = "__mezzo_wraps__"  # of a function under a policy: the function as it was


class Precision:
    """Every dot product and convolution of a function rounded as a policy says, forward and backward.

        precision = mezzo.jax.Precision("fp8")
        loss_fn = precision(loss_fn)                            # any function of (params, …)
        optimizer = precision.optimizer(optax.adam(1e-3))       # skips steps that are not finite

    The train step stays as it is. Under a policy that scales the loss (fp16) or rounds stochastically (nvfp4), hand
    the optimizer's state in: `jax.value_and_grad(loss_fn)(params, batch, state=opt_state)`.

    policy    a Policy or what `Policy.parse` reads
    seed      of the random words of stochastic rounding
    raises    ConfigError if JAX cannot carry the policy out
    """

    def __init__(self, policy: str | Policy, *, seed: int = 0) -> None:
        self.policy = Policy.of(policy)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed is a whole number from 0 to 2**64 - 1, got {seed!r}")
        self.seed = seed
        refuse(self.policy, "jax")
        specs = [rule.spec for rule in self.policy.all_rules()]
        # On a CPU, XLA's 16-bit products are no faster than its float32 ones.
        self.native = jax.default_backend() != "cpu"
        self.draws = any(spec.rounding == "stochastic" for spec in specs)
        self.needs_state = self.draws or (
            self.policy.loss_scaling is not None and not self.policy.loss_scaling.is_constant
        )
        if any(spec.fmt.name == "float64" for spec in specs) and not jax.config.read("jax_enable_x64"):
            raise ConfigError(
                f"{self.policy} has float64 sites, and JAX has no float64 yet; begin with "
                'jax.config.update("jax_enable_x64", True), and make the parameters float64'
            )

    # --- the function ---

    def __call__(
        self, function: Callable[..., Any], *, argnums: int | Sequence[int] = 0, keyword: str = "state"
    ) -> Callable[..., Any]:
        """`function` under the policy: wrap what you differentiate, before grad, jit, vmap, scan or checkpoint.

        function   of any pytrees; the products in it get the paths of the parameters that they multiply with
        argnums    which argument holds the parameters, or which several do
        keyword    name of the keyword argument that takes the state; not one of the function's own
        returns    the same function, with that keyword added
        raises     ConfigError when it is called: a rule that matches nothing, a state that is needed and not given
        """
        if not callable(function):
            raise ConfigError(f"wrap a function, precision(loss_fn); got {type(function).__name__}")
        if hasattr(function, _MARK):
            raise ConfigError("this function is under a policy already; wrap the function as it was")
        signature = inspect.signature(function)
        if keyword in signature.parameters:
            raise ConfigError(
                f"{getattr(function, '__name__', 'the function')} has an argument {keyword!r} itself; give mezzo's "
                f"another name: precision(loss_fn, keyword='opt_state')"
            )

        takes, extended = _with_keyword(signature, keyword)

        @functools.wraps(function)
        def under_policy(*args: Any, **kwargs: Any) -> Any:
            state = kwargs.pop(keyword, None)
            if takes is not None and len(args) > takes:  # NNX turns keywords into positions
                args, state = args[:takes], args[takes]
            if state is None and self.needs_state:
                what = "draws random words for stochastic rounding" if self.draws else "scales the loss dynamically"
                raise ConfigError(
                    f"{self.policy} {what}, which needs the state of the step: call the function with "
                    f"{keyword}=opt_state, the state of precision.optimizer(…)"
                )
            given = self.init() if state is None else scaling.state_of(state)
            return self.run(function, argnums, args, kwargs, given)[0]

        setattr(under_policy, _MARK, function)
        under_policy.__signature__ = extended  # type: ignore[attr-defined]
        return under_policy

    def run(
        self,
        function: Callable[..., Any],
        argnums: int | Sequence[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: State,
        listener: Listener | None = None,
    ) -> tuple[Any, list[Seen], list[str]]:
        """What the function gives, the products that were met, and all paths of the model.

        listener   told of every rounding; the rest as of `__call__`
        """
        function = getattr(function, _MARK, function)
        numbers = [argnums] if isinstance(argnums, int) else list(argnums)
        for number in numbers:
            if not -len(args) <= number < len(args):
                raise ConfigError(f"argument {number} is to hold the parameters, but {len(args)} positional ones came")
        given, merged, states_of, write = modules.apart((args, kwargs))
        paths, tree = jax.tree_util.tree_flatten_with_path(given)
        leaves = [leaf for _, leaf in paths]
        moving = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        made: dict[str, Any] = {}

        def flat(*values: Any) -> list[Any]:
            full = list(leaves)
            for i, value in zip(moving, values, strict=True):
                full[i] = value
            again, more = merged(jax.tree_util.tree_unflatten(tree, full))
            result = function(*again, **more)
            _refuse_gradients(result, [again[n] for n in numbers])
            outs, made["tree"] = jax.tree_util.tree_flatten((result, states_of((again, more))))
            made["outs"] = outs
            made["moving"] = [i for i, out in enumerate(outs) if _is_array(out)]
            return [outs[i] for i in made["moving"]]

        closed = jax.make_jaxpr(flat)(*(leaves[i] for i in moving))
        static = [None if _is_array(out) else out for out in made["outs"]]  # tracers must not leave this trace
        names = {
            i: path for i in moving if (path := _parameter(paths[i][0], {n % len(args) for n in numbers})) is not None
        }
        known = prefixes(module_path(name) for name in names.values())
        run = Interpreter(self.policy, known, self.seed, state.draws, listener, self.native)
        origins = [Origin()] * len(closed.consts)
        origins += [Origin(module_path(names[i]) if i in names else None) for i in moving]

        def under_table(values: list[Any]) -> list[Any]:
            consts = values[: len(closed.consts)]
            return run.run(closed.jaxpr, consts, values[len(consts) :], origins)[0]

        values = [*closed.consts, *(jnp.asarray(leaves[i]) for i in moving)]
        scaled = self.policy.loss_scaling is not None
        results = scaling.scaled(under_table, state.scale, values) if scaled else under_table(values)
        known |= prefixes(seen.path for seen in run.seen.values())
        self.policy.check_paths(known)
        _check_met(self.policy, run.seen.values())
        for i, out in zip(made["moving"], results, strict=True):
            static[i] = out
        result, states = jax.tree_util.tree_unflatten(made["tree"], static)
        write(states)
        return result, list(run.seen.values()), sorted(known)

    # --- the step ---

    def init(self) -> State:
        """The state before the first step, for those who carry it without `optimizer`."""
        return scaling.initial(self.policy)

    def optimizer(self, inner: Any, *, max_norm: float | None = None) -> Any:
        """An optax transformation that leaves steps with nonfinite gradients out, clips and moves the loss scale.

        inner      optax transformation, over float32 (or float64) parameters
        max_norm   clip gradients to this total norm
        """
        return scaling.guard(self.policy, inner, max_norm)

    def check(self, state: Tree) -> None:
        """Stop when steps keep being skipped: call it on the host, for instance where the loss is printed.

        raises    NonfiniteError
        """
        scaling.check(self.policy, state)

    # --- looking ---

    def sites(self, function: Callable[..., Any], *args: Any, argnums: int = 0, **kwargs: Any) -> list[SiteRow]:
        """The site table of a function at these arguments, which may be `jax.ShapeDtypeStruct`s: one row a site."""
        seen: list[Seen] = []

        arrays, rebuilt = apart((args, kwargs))

        def look(arrays: list[Any]) -> None:
            again, more = rebuilt(arrays)
            seen[:] = self.run(function, argnums, again, more, self.init())[1]

        jax.eval_shape(look, arrays)
        return [row for one in seen for row in _rows(one)]


def _rows(seen: Seen) -> Iterable[SiteRow]:
    if seen.site is None:
        yield SiteRow(f"{seen.path}:op {seen.kind}", seen.shapes[0] if seen.shapes else (), "", "not covered", 0)
        return
    names = seen.site.names
    a, b, y = seen.shapes
    shapes = {"fprop.a": a, "fprop.b": b, "fprop.out": y, "dgrad.a": y, "dgrad.b": b, "dgrad.out": a,
              "wgrad.a": y, "wgrad.b": a, "wgrad.out": b}  # fmt: skip
    for role, spec in seen.site.specs.items():
        if names is not None and role not in names:
            continue
        shown = role if names is None else names[role]
        own = role.endswith("out") or seen.site.native_dtype(role.partition(".")[0]) is not None
        route = "native" if spec.fmt.name in ("float32", "float64") or (own and seen.site.native) else "emulated"
        call = f"#{seen.call}" if seen.call else ""
        size = ceil(prod(shapes[role]) * spec.fmt.bits / 8)
        yield SiteRow(f"{seen.path}{call}:{shown}", shapes[role], str(spec), route, size)


def _parameter(keys: tuple[Any, ...], argnums: set[int]) -> str | None:
    """The name of a leaf of the arguments that hold the parameters; None for other arguments' leaves, and for an
    argument that is one bare array."""
    if getattr(keys[0], "idx", None) != 0 or getattr(keys[1], "idx", None) not in argnums:
        return None
    return leaf_path(keys[2:]) or None


def _with_keyword(signature: inspect.Signature, keyword: str) -> tuple[int | None, inspect.Signature]:
    """(how many positional arguments a function takes, None if any; its signature with a keyword after them)"""
    kinds, old = inspect.Parameter, list(signature.parameters.values())
    positional = [one for one in old if one.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    others = [one for one in old if one not in positional]
    if any(one.kind is kinds.VAR_POSITIONAL for one in others):
        at = len(others) - (others[-1].kind is kinds.VAR_KEYWORD)
        extra = kinds(keyword, kinds.KEYWORD_ONLY, default=None)
        return None, signature.replace(parameters=[*positional, *others[:at], extra, *others[at:]])
    extra = kinds(keyword, kinds.POSITIONAL_OR_KEYWORD, default=None)
    return len(positional), signature.replace(parameters=[*positional, extra, *others])


def _refuse_gradients(result: Any, parameters: list[Any]) -> None:
    """Refuse a function that gives back a tree like its parameters: it is a gradient, or a whole train step."""
    candidates = [result, *result] if isinstance(result, tuple) else [result]
    for one in candidates:
        for tree in parameters:
            if _shapes(one) == _shapes(tree) and not _is_array(tree) and jax.tree.leaves(tree):
                raise ConfigError(
                    "this function gives back a tree like its parameters: gradients, or what a train step updated. "
                    "Wrap the loss, and differentiate that: jax.grad(precision(loss_fn))(…)"
                )


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten(tree)
    return structure, [getattr(leaf, "shape", None) for leaf in leaves]


def _check_met(policy: Policy, seen: Iterable[Seen]) -> None:
    """Refuse a rule of the policy's own for single layers that speaks of products where none was met."""
    names = [(one.path, one.site.names or {role: role for role in one.site.specs}) for one in seen if one.site]
    met = {(path, name) for path, roles in names for name in roles.values()}
    met |= {(path, "fprop.probs") for path, roles in names if "fprop.query" in roles.values()}
    for rule in policy.rules:
        roles = [role for role in rule.roles() if role in PRODUCT_ROLES or role in ATTENTION_ROLES]
        if roles and not any(char in rule.path for char in "*?[%"):
            path = rule.path.partition("#")[0]
            near = any(one == path or one.startswith(f"{path}.") for one, _ in met)
            if near and not any((path, role) in met for role in roles):
                there = sorted({role for one, role in met if one == path})
                raise ConfigError(
                    f"the rule {str(rule)!r} speaks of {rule.role}, which no product of {path} has"
                    + (f"; it has {', '.join(there)}" if there else f"; products lie below it: {path}.*")
                )


def apart(tree: Tree) -> tuple[list[Any], Callable[[list[Any]], Tree]]:
    """The arrays of a tree, and what puts others in their place; a model's functions and numbers stay."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    moving = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def rebuilt(arrays: list[Any]) -> Tree:
        full = list(leaves)
        for i, array in zip(moving, arrays, strict=True):
            full[i] = array
        return jax.tree_util.tree_unflatten(structure, full)

    return [leaves[i] for i in moving], rebuilt


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))  # NumPy's scalars stay what they are: settings
