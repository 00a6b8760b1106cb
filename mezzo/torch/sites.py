"""The site table as people read it: one row a site, from what a forward pass showed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil, prod

from torch import nn

from mezzo.policy import Spec
from mezzo.policy.site import ROOT, SiteRow
from mezzo.torch import float8
from mezzo.torch.attention import algorithm
from mezzo.torch.intercept import Seen, SiteMode
from mezzo.torch.saved import STATISTICS
from mezzo.torch.table import SiteSpec, Table


def rows(model: nn.Module, mode: SiteMode, seen: Iterable[Seen]) -> list[SiteRow]:
    """Every site of the model, in the order met; masters last."""
    found = [row for one in seen for row in _rows_of(one, mode.table)]
    for name, parameter in model.named_parameters():
        fmt = str(parameter.dtype).removeprefix("torch.")
        spec = mode.table.master(name.rpartition(".")[0] or ROOT)
        if spec.fmt.name == fmt:
            fmt = str(spec)
        size = parameter.numel() * parameter.element_size()
        found.append(SiteRow(f"{name}:master", tuple(parameter.shape), fmt, "native", size))
    return found


def _rows_of(seen: Seen, table: Table) -> Iterator[SiteRow]:
    def row(role: str, shape: tuple[int, ...], fmt: str, route: str) -> SiteRow:
        return SiteRow(
            f"{seen.path}:{role}", shape, fmt, route, ceil(prod(shape) * Spec.parse(fmt).fmt.bits / 8), seen.calls
        )

    if seen.kind in ("linear", "product"):
        spec = table.product(seen.path, 0)
        for role, shape in _product_shapes(seen.shapes[0], seen.shapes[1], seen.out).items():
            yield row(role, shape, str(spec.specs[role]), _product_route(spec, role, seen))
    elif seen.kind == "attention":
        spec = table.attention(seen.path, 0)
        how = algorithm(spec, seen.device)
        for role, shape in _attention_shapes(seen.shapes[0], seen.shapes[1], seen.shapes[2], seen.out).items():
            known = spec.specs.get(role)
            if known is not None:
                yield row(role, shape, str(known), how)
            else:  # the kernel's own: float32 in emulation, the operands' format on tensor cores
                kept = spec.formats["fprop.query"].name if how == "native" else "float32"
                yield row(role, shape, kept, "kernel")
    elif seen.kind == "compute":
        yield row("compute", seen.out, table.compute_format(seen.path).name, "native")
        yield from _saved(seen, table)
    else:
        name = str(seen.dtype).removeprefix("torch.")
        yield SiteRow(f"{seen.path}:op {seen.kind}", seen.shapes[0], name, "not covered", 0, seen.calls)
        yield from _saved(seen, table)


def _saved(seen: Seen, table: Table) -> Iterator[SiteRow]:
    """How what an operation keeps for the backward pass is kept; the shape is that of its first operand."""
    spec = table.saved(seen.path)
    if spec is not None and len(seen.shapes[0]) > 1 and seen.shapes[0][-1] >= STATISTICS:
        shape = seen.shapes[0]
        yield SiteRow(
            f"{seen.path}:saved", shape, str(spec), "stored", ceil(prod(shape) * spec.fmt.bits / 8), seen.calls
        )


def _product_route(spec: SiteSpec, role: str, seen: Seen) -> str:
    if seen.kind == "linear" and float8.fits(spec):
        return "native"
    product = role.partition(".")[0]
    operands = f"{product}.a", f"{product}.b"
    if seen.device.type == "cuda":  # tensor cores deliver their float32 sums too
        return spec.route(*operands)
    return spec.result_route(f"{product}.out", *operands)


def _product_shapes(a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        "fprop.a": a, "fprop.b": b, "fprop.out": out,
        "dgrad.a": out, "dgrad.b": b, "dgrad.out": a,
        "wgrad.a": out, "wgrad.b": a, "wgrad.out": b,
    }  # fmt: skip


def _attention_shapes(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], out: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    probs = (*query[:-1], key[-2])
    return {
        "fprop.query": query, "fprop.key": key, "fprop.value": value, "fprop.probs": probs, "fprop.out": out,
        "dgrad.dout": out, "dgrad.query": query, "dgrad.key": key, "dgrad.value": value,
    }  # fmt: skip
