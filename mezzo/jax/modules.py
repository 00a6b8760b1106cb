"""Flax NNX modules among a function's arguments: what the function writes into them (running statistics, random
counters) must reach the caller's module, though the function ran on a copy while it was traced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax

Tree = Any


@jax.tree_util.register_pytree_with_keys_class
class Split:
    """A module as its variables (a tree) and its graph (static)."""

    def __init__(self, state: Tree, graph: Any) -> None:
        self.state, self.graph = state, graph

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Tree], ...], Any]:
        return ((jax.tree_util.GetAttrKey(""), self.state),), self.graph  # paths leave the empty name out

    @classmethod
    def tree_unflatten(cls, graph: Any, children: tuple[Tree, ...]) -> Split:
        return cls(children[0], graph)


def apart(
    args: Tree,
) -> tuple[Tree, Callable[[Tree], Tree], Callable[[Tree], list[Tree]], Callable[[list[Tree]], None]]:
    """The arguments with each module split.

    returns   (arguments to trace with; puts modules back; reads their variables after the call; writes variables into
              the caller's modules)
    """
    nnx = sys.modules.get("flax.nnx")  # nobody has a module without having imported it
    if nnx is None:
        return args, lambda tree: tree, lambda tree: [], lambda states: None
    owned: list[Any] = []

    def is_module(x: Any) -> bool:
        return isinstance(x, nnx.Module)

    def split(x: Any) -> Any:
        if not is_module(x):
            return x
        owned.append(x)
        graph, state = nnx.split(x)
        return Split(state, graph)

    traced = jax.tree.map(split, args, is_leaf=is_module)

    def merged(tree: Tree) -> Tree:
        def merge(x: Any) -> Any:
            return nnx.merge(x.graph, x.state) if isinstance(x, Split) else x

        return jax.tree.map(merge, tree, is_leaf=lambda x: isinstance(x, Split))

    def states(tree: Tree) -> list[Tree]:
        return [nnx.state(x) for x in jax.tree.leaves(tree, is_leaf=is_module) if is_module(x)]

    def write(found: list[Tree]) -> None:
        for module, state in zip(owned, found, strict=True):
            nnx.update(module, state)

    return traced, merged, states, write
