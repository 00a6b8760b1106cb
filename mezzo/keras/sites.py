"""The site table as people read it: one row a site, from what a forward pass showed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil, prod
from typing import TYPE_CHECKING

import tensorflow as tf

from mezzo.keras.scope import Seen
from mezzo.keras.table import SiteSpec, Table
from mezzo.policy import Spec
from mezzo.policy.site import SiteRow

if TYPE_CHECKING:
    from mezzo.keras.layers import Layers

Shape = tuple[int, ...]


def rows(layers: Layers, seen: Iterable[Seen]) -> list[SiteRow]:
    """Every site of the model, in the order met; masters last."""
    found = [row for one in seen for row in _rows_of(one, layers.table)]
    for path, variable in layers.variables():
        dtype = tf.as_dtype(variable.dtype)
        shape = tuple(variable.shape)
        found.append(SiteRow(f"{path}.{variable.name}:master", shape, dtype.name, "native", prod(shape) * dtype.size))
    return found


def _rows_of(seen: Seen, table: Table) -> Iterator[SiteRow]:
    def row(role: str, shape: Shape, fmt: str, route: str) -> SiteRow:
        size = ceil(prod(shape) * Spec.parse(fmt).fmt.bits / 8)
        return SiteRow(f"{seen.path}:{role}", shape, fmt, route, size, seen.calls)

    if seen.kind == "product":
        spec = table.product(seen.path, 0)
        for role, shape in _product_shapes(*seen.shapes).items():
            yield row(role, shape, str(spec.specs[role]), _route(spec))
    elif seen.kind == "attention":
        spec = table.attention(seen.path, 0)
        how = "explicit" if "fprop.probs" in spec.specs else _route(spec)
        for role, shape in _attention_shapes(*seen.shapes).items():
            known = spec.specs.get(role)
            yield row(role, shape, "float32" if known is None else str(known), "kernel" if known is None else how)
    else:
        yield row("compute", seen.shapes[0], table.compute_format(seen.path).name, "native")


def _route(spec: SiteSpec) -> str:
    return "native" if spec.uniform in ("float32", "float64") else "emulated"


def _product_shapes(a: Shape, b: Shape, out: Shape) -> dict[str, Shape]:
    return {
        "fprop.a": a, "fprop.b": b, "fprop.out": out,
        "dgrad.a": out, "dgrad.b": b, "dgrad.out": a,
        "wgrad.a": out, "wgrad.b": a, "wgrad.out": b,
    }  # fmt: skip


def _attention_shapes(query: Shape, key: Shape, value: Shape, out: Shape) -> dict[str, Shape]:
    probs = (*query[:-1], key[-2])
    return {
        "fprop.query": query, "fprop.key": key, "fprop.value": value, "fprop.probs": probs, "fprop.out": out,
        "dgrad.dout": out, "dgrad.query": query, "dgrad.key": key, "dgrad.value": value,
    }  # fmt: skip
