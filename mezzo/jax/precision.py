"""`Precision`: a policy applied to any JAX function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
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
from mezzo.policy.site import SiteRow
from mezzo.policy.support import refuse

Tree = Any


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

    def __call__(self, function: Callable[..., Any], *, argnums: int = 0, keyword: str = "state") -> Callable[..., Any]:
        """`function` under the policy: wrap what you differentiate, before grad, jit, vmap, scan or checkpoint.

        function   of any pytrees; the products in it get the paths of the parameters that they multiply with
        argnums    which argument holds the parameters
        keyword    name of the keyword argument that takes the state; not one of the function's own
        returns    the same function, with that keyword added
        raises     ConfigError when it is called: a rule that matches nothing, a state that is needed and not given
        """
        if keyword in inspect.signature(function).parameters:
            raise ConfigError(
                f"{getattr(function, '__name__', 'the function')} has an argument {keyword!r} itself; give mezzo's "
                f"another name: precision(loss_fn, keyword='opt_state')"
            )

        @functools.wraps(function)
        def under_policy(*args: Any, **kwargs: Any) -> Any:
            state = kwargs.pop(keyword, None)
            if state is None and self.needs_state:
                what = "draws random words for stochastic rounding" if self.draws else "scales the loss dynamically"
                raise ConfigError(
                    f"{self.policy} {what}, which needs the state of the step: call the function with "
                    f"{keyword}=opt_state, the state of precision.optimizer(…)"
                )
            given = self.init() if state is None else scaling.state_of(state)
            return self.run(function, argnums, args, kwargs, given)[0]

        return under_policy

    def run(
        self,
        function: Callable[..., Any],
        argnums: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: State,
        listener: Listener | None = None,
    ) -> tuple[Any, list[Seen], list[str]]:
        """What the function gives, the products that were met, and all paths of the model.

        listener   told of every rounding; the rest as of `__call__`
        """
        if not -len(args) <= argnums < len(args):
            raise ConfigError(f"argument {argnums} is to hold the parameters, but {len(args)} positional ones came")
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
            outs, made["tree"] = jax.tree_util.tree_flatten((result, states_of((again, more))))
            made["outs"] = outs
            made["moving"] = [i for i, out in enumerate(outs) if _is_array(out)]
            return [outs[i] for i in made["moving"]]

        closed = jax.make_jaxpr(flat)(*(leaves[i] for i in moving))
        static = [None if _is_array(out) else out for out in made["outs"]]  # tracers must not leave this trace
        names = {i: path for i in moving if (path := _parameter(paths[i][0], argnums % len(args))) is not None}
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


def _parameter(keys: tuple[Any, ...], argnum: int) -> str | None:
    """The name of a leaf of the argument that holds the parameters; None for other arguments' leaves, and for an
    argument that is one bare array."""
    if getattr(keys[0], "idx", None) != 0 or getattr(keys[1], "idx", None) != argnum:
        return None
    return leaf_path(keys[2:]) or None


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
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
