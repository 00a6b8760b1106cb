"""What to know before training: formats and shapes that train badly, or slowly, and what to do about each.

Precision.advice(x)   ──► operands(what a forward pass met, table) ──► advise(…) ──► short texts

"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

from mezzo.formats import FLOAT16, SCALED, AnyFormat, Format, ScaledFormat
from mezzo.policy import Site, Spec
from mezzo.torch import float8
from mezzo.torch.intercept import Seen
from mezzo.torch.table import SiteSpec, Table

GRADIENTS = ("dgrad.a", "wgrad.a", "dgrad.dout")
# Below it in some direction, public reports have float8 products slower than bfloat16's: pytorch/ao issues 1297, 2262.
LARGE = 4096
SHOWN = 3  # patterns named in one text
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # that stands alone between dots


@dataclass(frozen=True)
class Operand:
    """One operand of a product as the table gives it.

    along    length of the axis that the product sums over, along which blocks lie
    across   length of the axis that blocks of several rows span as well
    native   whether a product of this format runs in the machine's own units here
    float8   smallest of the three sizes of a product that takes the native float8 route; 0 for others
    """

    site: Site
    spec: Spec
    along: int
    across: int
    native: bool = True
    float8: int = 0

    @property
    def fmt(self) -> AnyFormat:
        return self.spec.fmt


def operands(seen: Iterable[Seen], table: Table) -> list[Operand]:
    """The operands of every product and attention that a forward pass met."""
    found: list[Operand] = []
    for one in seen:
        if one.kind in ("linear", "product"):
            found += _of_product(one, table.product(one.path, 0))
        elif one.kind == "attention":
            found += _of_attention(one, table.attention(one.path, 0))
    return found


def _of_product(seen: Seen, spec: SiteSpec) -> Iterator[Operand]:
    """Of a linear layer, x (n, k) · wᵀ (k, m), or of a product of matrices, x (n, k) · y (k, m)."""
    x, y = seen.shapes[0], seen.shapes[1]
    if seen.kind == "linear":
        n, k, m = prod(x[:-1]), x[-1], y[0]
    else:
        n, k, m = (x[-2] if len(x) > 1 else 1), (x[-1] if x else 1), (y[-1] if len(y) > 1 else 1)
    small = min(n, k, m) if seen.kind == "linear" and float8.fits(spec) else 0
    sizes = {
        "fprop.a": (k, n), "fprop.b": (k, m), "dgrad.a": (m, n),
        "dgrad.b": (m, k), "wgrad.a": (n, m), "wgrad.b": (n, k),
    }  # fmt: skip
    for role, (along, across) in sizes.items():
        native = bool(small) or spec.formats[role].name in spec.native
        yield Operand(Site(seen.path, role), spec.specs[role], along, across, native, small)


def _of_attention(seen: Seen, spec: SiteSpec) -> Iterator[Operand]:
    """Of softmax(q (t, e) · kᵀ (e, s)) · v (s, f)."""
    (t, e), (s, f) = seen.shapes[0][-2:], seen.shapes[2][-2:]
    sizes = {
        "fprop.query": (e, t), "fprop.key": (e, s), "fprop.value": (s, f), "fprop.probs": (s, t), "dgrad.dout": (f, t),
    }  # fmt: skip
    for role, (along, across) in sizes.items():
        if role in spec.specs:
            native = spec.formats[role].name in spec.native
            yield Operand(Site(seen.path, role), spec.specs[role], along, across, native)


def advise(found: Iterable[Operand], *, device: str, loss_scaling: bool) -> list[str]:
    """Short texts, each with the sites that it speaks of and what to do; a pure function.

    device         "cpu" or "cuda"
    loss_scaling   whether the policy scales the loss
    """
    known = list(found)
    texts: dict[tuple[object, ...], tuple[Callable[[str, str], str], list[Operand]]] = {}
    for one in known:
        for key, text in _about(one, loss_scaling):
            texts.setdefault(key, (text, []))[1].append(one)
    advice = [text(*_named([one.site for one in those])) for text, those in texts.values()]
    small = [one for one in known if device == "cuda" and 0 < one.float8 < LARGE]
    if small:
        sites, first = _named([one.site for one in small])
        least = min(one.float8 for one in small)
        advice.append(
            f"{sites}: float8 products with a side below {LARGE:,} (here {least:,}) can be slower than bfloat16's; "
            f"measure both, and leave small layers in bfloat16, as with the rule {first.rpartition(':')[0]}:*=bfloat16"
        )
    emulated = dict.fromkeys(one.fmt.name for one in known if not one.native and one.fmt.bits < 32)
    if emulated:
        where = "GPU" if device == "cuda" else "CPU"
        advice.append(
            f"emulated on this {where}: {', '.join(emulated)}. The numbers are those of the formats, the time is that "
            "of an emulation; `mezzo probe` shows what runs natively here"
        )
    return advice


def _about(one: Operand, loss_scaling: bool) -> Iterator[tuple[tuple[object, ...], Callable[[str, str], str]]]:
    """(what makes two remarks the same, the text given the sites and a pattern for a rule)"""
    fmt = one.fmt
    if isinstance(fmt, ScaledFormat) and isinstance(fmt.group, tuple):
        for block, length in zip(fmt.group, (one.across, one.along), strict=True):
            if length % block:
                yield ("block", block, length), _short_block(block, length)
    if one.site.role in GRADIENTS:
        element = fmt if isinstance(fmt, Format) else fmt.element
        if element.is_integer:
            yield ("steps", fmt), _even_steps(fmt)
        elif isinstance(fmt, Format) and fmt.bits <= 8:
            yield ("range", fmt), _no_scale(fmt)
        elif fmt.name == "float16" and not loss_scaling:
            yield ("range", fmt), _no_loss_scale


def _short_block(block: int, length: int) -> Callable[[str, str], str]:
    return lambda sites, first: (
        f"{sites}: blocks of {block} do not divide {length:,} elements, so the last one is short; mezzo emulates that, "
        f"but matrix units take whole blocks: make the size a multiple of {block}, or take a format without blocks, as "
        f"with the rule {first}=bfloat16"
    )


def _even_steps(fmt: AnyFormat) -> Callable[[str, str], str]:
    return lambda sites, first: (
        f"{sites}: the steps of {fmt} are evenly spaced, and gradients span many powers of two: the small ones become "
        f"zero; give them a floating-point format, as with the rule {first}=float8_e5m2@tensor"
    )


def _no_scale(fmt: Format) -> Callable[[str, str], str]:
    better = f"{fmt}@tensor" if fmt.bits == 8 else next(one.name for one in SCALED.values() if one.element == fmt)
    return lambda sites, first: (
        f"{sites}: {fmt} without a scale holds {fmt.min_subnormal:.3g} to {fmt.max:g}, and gradients are often "
        f"smaller: they become zero; give them a scale, as with the rule {first}={better}"
    )


def _no_loss_scale(sites: str, first: str) -> str:
    return (
        f"{sites}: float16 holds nothing between zero and {FLOAT16.min_subnormal:.3g}, and gradients are "
        "often smaller; add loss_scale=dynamic to the policy, or give them float32's range, as with the rule "
        f"{first}=bfloat16"
    )


def _named(sites: list[Site]) -> tuple[str, str]:
    """(the sites in few words, a pattern that matches the first): layers that differ in a number share a pattern."""
    groups: dict[str, list[Site]] = {}
    for site in dict.fromkeys(sites):
        path = site.path if site.path.isdecimal() else NUMBER.sub("*", site.path)  # a bare `*` would mean every path
        groups.setdefault(f"{path}:{site.role}", []).append(site)
    shown = [str(those[0]) if len(those) == 1 else f"{name} ({len(those)} sites)" for name, those in groups.items()]
    first, those = next(iter(groups.items()))
    more = f" and {len(shown) - SHOWN} more like these" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more, str(those[0]) if len(those) == 1 else first
