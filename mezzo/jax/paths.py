"""Site paths of a JAX function: from the names of its parameters, and from named scopes.

A weight's path is its place in the tree of parameters without its own name: `params["blocks"][0]["qkv"]["kernel"]`,
`model.blocks[0].qkv.weight` and `params["blocks.0.qkv.weight"]` all mean `blocks.0.qkv`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mezzo.policy.site import ROOT

# What libraries call a layer's own arrays: Flax kernel, embedding, scale; Equinox and torch weight, bias; Haiku w, b.
_OWN = {"kernel", "weight", "w", "b", "W", "bias", "embedding", "scale"}
_BOXES = {"value", "raw_value", "get_value"}  # of Flax NNX
_COLLECTIONS = {"params"}  # of Flax Linen


def leaf_path(keys: Iterable[Any]) -> str:
    """The dotted name of a leaf from its key path."""
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys]
    parts = [part for part in parts if part]
    while parts and parts[-1] in _BOXES:
        parts.pop()
    while len(parts) > 1 and parts[0] in _COLLECTIONS:
        parts.pop(0)
    return ".".join(parts)


def module_path(leaf: str) -> str:
    """The path of the layer that a leaf belongs to."""
    head, _, last = leaf.rpartition(".")
    if last in _OWN or (head and last.isdecimal()):  # (w, b) pairs: the number tells weight from bias
        return head or ROOT
    return leaf or ROOT


def prefixes(paths: Iterable[str]) -> set[str]:
    """Each path with all that it lies in."""
    found = {ROOT}
    for path in paths:
        parts = path.split(".")
        found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return found


def common_path(layers: Iterable[str | None]) -> str | None:
    """What the paths of several layers lie in, such as the attention of query and key; of one layer, its parent."""
    known = [layer.split(".") for layer in layers if layer is not None and layer != ROOT]
    if not known:
        return None
    common = []
    for parts in zip(*(one[:-1] for one in known), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or None


def scope_path(stack: str, known: set[str]) -> str:
    """A path from a name stack such as `vmap(M/blocks_0/attn)/...qhd,...khd->...hqk`.

    known   paths of modules; the longest end of the stack that is one of them wins, so that a model's own name in front
            does not matter
    """
    plain = re.sub(r"\b[a-z_]+\(", "", stack).replace(")", "")  # vmap(…), jvp(…), transpose(…)
    parts = [one for part in plain.split("/") if "->" not in part for one in part.split(".") if one]
    for start in range(len(parts)):
        for end in range(len(parts), start, -1):
            path = ".".join(parts[start:end])
            if path in known:
                return path
    return ".".join(parts) or ROOT
