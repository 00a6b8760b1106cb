"""`mezzo formats`: every number format, what it can hold, and what this machine does with it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from mezzo.formats import AnyFormat, Format, ScaledFormat
    from mezzo.hardware import Hardware

COUNT = 1_000_000_000
MEANING = {
    "native": "PyTorch's own product",
    "emulated": "operands rounded, float32 product",
    "scale": "no operand of a product",
}


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def formats(names: tuple[str, ...], as_json: bool) -> None:
    """Every number format: range, precision, scales, its standard, and whether this machine multiplies it natively.

    With a NAME, such as bf16, nvfp4 or e4m3@1x128+pow2: how its scale comes about and what becomes of zeros, NaN,
    infinities and numbers out of range.

    \b
    Examples:
      mezzo formats
      mezzo formats nvfp4 e4m3@1x128+pow2
      mezzo formats bf16 --json
    """
    from mezzo.formats import FORMATS, SCALED, get_format

    chosen = [get_format(name) for name in names] or [*FORMATS.values(), *SCALED.values()]
    hardware, machine = this_machine()
    records = [_record(fmt, hardware, machine["reason"]) for fmt in chosen]
    if names:
        for fmt, record in zip(chosen, records, strict=True):
            record |= _details(fmt)
    if as_json:
        click.echo(json.dumps({"machine": machine, "formats": records}, indent=2))
        return
    console = table_console()
    if names:
        for i, record in enumerate(records):
            _print_page(console, record, machine, first=i == 0)
    else:
        _print_tables(console, records, machine)


def table_console() -> Console:
    """A console for tables: as wide as the terminal, and of one width and without colours elsewhere."""
    from rich.console import Console

    width = None if Console().is_terminal else 140
    return Console(width=width, markup=False, emoji=False, highlight=False)


def this_machine() -> tuple[Hardware | None, dict[str, Any]]:
    """What was measured here, or why nothing was; the formats themselves need no torch."""
    from mezzo import hardware

    name = hardware.processor()
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        what = "torch" if error.name == "torch" else f"{error.name}, which torch needs,"
        reason = f"{what} is not installed, so nothing was measured; run: pip install torch"
        return None, {"device": None, "name": name, "reason": reason}
    except (ImportError, OSError) as error:
        return None, {"device": None, "name": name, "reason": f"torch cannot be imported: {error}"}
    found = hardware.measure(hardware.gpu_status()[0])
    return found, {"device": found.device, "name": found.name, "reason": None}


def _record(fmt: AnyFormat, hardware: Hardware | None, unknown: str | None) -> dict[str, Any]:
    """What a format is, in numbers; those of scaled formats are relative to a group's scale."""
    from mezzo.formats import Format
    from mezzo.formats.scaled import SCALED_ALIASES
    from mezzo.formats.spec import ALIASES

    scaled = not isinstance(fmt, Format)
    element = fmt if isinstance(fmt, Format) else fmt.element
    route, reason = hardware.route(fmt) if hardware else ("unknown", unknown)
    record: dict[str, Any] = {
        "name": str(fmt),
        "kind": "scaled" if scaled else "element",
        "aliases": [alias for alias, name in (ALIASES | SCALED_ALIASES).items() if name == str(fmt)],
        "bits": fmt.bits,
        "sign_bits": int(element.signed),
        "exponent_bits": element.exponent_bits,
        "mantissa_bits": element.mantissa_bits,
        "largest": element.max,
        "lowest": element.min,
        "smallest_normal": element.min_normal,
        "smallest_subnormal": element.min_subnormal if _has_subnormals(element) else None,
        "epsilon": element.epsilon,
        "infinity": element.infinity,
        "nan": element.nan,
        "route": route,
        "reason": reason,
        "source": fmt.source,
        "bytes_of_1e9": round(COUNT * fmt.bits / 8),
    }
    if not isinstance(fmt, Format):
        group = list(fmt.group) if isinstance(fmt.group, tuple) else fmt.group
        record |= {
            "element": fmt.element.name,
            "group": group,
            "scaling": fmt.scaling,
            "scale_format": fmt.scale.name,
            "tensor_scale_format": "float32" if fmt.scaling == "nvfp4" else None,
        }
    return record


def _has_subnormals(fmt: Format) -> bool:
    return not (fmt.is_integer or fmt.is_scale)


def number(x: float | None) -> str:
    """448, 2^-126 where that is what it is, 3.40282e+38, NaN."""
    if x is None or math.isnan(x):
        return "–" if x is None else "NaN"
    mantissa, exponent = math.frexp(abs(x))
    if mantissa == 0.5 and not -4 <= exponent <= 11:
        return f"{'-' if x < 0 else ''}2^{exponent - 1}"
    return f"{x:.6g}"


def _specials(record: dict[str, Any]) -> str:
    return " ".join(name for name, there in (("inf", record["infinity"]), ("NaN", record["nan"])) if there) or "none"


def _layout(record: dict[str, Any]) -> str:
    return f"{record['sign_bits']}/{record['exponent_bits']}/{record['mantissa_bits']}"


def _group(record: dict[str, Any]) -> str:
    group = record["group"]
    return f"{group[0]}x{group[1]}" if isinstance(group, list) else str(group)


def _scale(record: dict[str, Any]) -> str:
    short = {"free": "f32", "pow2": "e8m0", "floor": "e8m0", "nvfp4": "e4m3·f32"}
    return short[record["scaling"]]


def _print_tables(console: Console, records: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    from rich.table import Table

    sources = list(dict.fromkeys(record["source"] for record in records))
    here = f"on {machine['device']}" if machine["device"] else "here"
    common = ("largest", "normal", "subnormal", "epsilon", "specials", here, "ref")
    elements = Table("format", "bits", "s/e/m", *common, box=None, pad_edge=False, header_style="bold")
    scaled = Table("scaled", "bits", "group", "scale", *common, box=None, pad_edge=False, header_style="bold")
    for table in (elements, scaled):
        table.collapse_padding = console.width < 100
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.overflow = "fold"  # on a narrow terminal; an ellipsis would hide digits
    for record in records:
        range_ = [number(record[key]) for key in ("largest", "smallest_normal", "smallest_subnormal", "epsilon")]
        ends = (_specials(record), record["route"], f"[{sources.index(record['source']) + 1}]")
        if record["kind"] == "element":
            elements.add_row(record["name"], f"{record['bits']}", _layout(record), *range_, *ends)
        else:
            relative = (f"{x}·s" for x in range_[:3])
            bits = f"{record['bits']:.6g}"
            scaled.add_row(record["name"], bits, _group(record), _scale(record), *relative, range_[3], *ends)
    console.print(elements)
    console.print("")
    console.print(scaled)
    text = [
        "",
        "bits: of an element, with its share of the group's scale; s/e/m: sign, exponent and mantissa bits; s: the "
        "group's scale",
        "normal, subnormal: the smallest above zero; epsilon: from 1 to the next value",
        "group: rows x columns that share a scale, columns along the axis that a product sums over",
        "scale: e8m0: the smallest power of two with which amax fits; e4m3·f32: e4m3 of a block, float32 of the tensor",
        "other groups and scales are written e4m3@1x128+pow2, e5m2@tensor, e4m3@row, mxfp8+floor",
        _here(machine),
        *(f"[{i}] {source}" for i, source in enumerate(sources, 1)),
        "One format in full: mezzo formats nvfp4",
    ]
    console.print("\n".join(text))


def _here(machine: dict[str, Any]) -> str:
    if machine["device"] is None:
        return f"here: unknown: {machine['reason']}"
    meaning = "; ".join(f"{route}: {text}" for route, text in MEANING.items())
    return f"on {machine['device']} ({machine['name']}): {meaning}"


def _details(fmt: AnyFormat) -> dict[str, Any]:
    """What is too long for a table: rules in words, and what `quantize` makes of difficult numbers."""
    from mezzo.formats import Format

    if isinstance(fmt, Format):
        return {"overflow": _element_overflow(fmt), "outcomes": _element_outcomes(fmt)}
    return {"rules": _rules(fmt), "outcomes": _group_outcomes(fmt)}


def _element_overflow(fmt: Format) -> dict[str, str]:
    more = f"what rounds to more than {number(fmt.max)}, infinities too, becomes"
    beyond = "infinity" if fmt.infinity else "NaN" if fmt.nan else "the largest value: there is no infinity or NaN"
    return {"saturate": f"{more} the largest value", "cast": f"{more} {beyond}"}


def _element_outcomes(fmt: Format) -> list[dict[str, str]]:
    import numpy as np

    from mezzo.formats import quantize

    smallest = fmt.min_subnormal
    inputs = {
        "1.5 times the largest": fmt.max * 1.5,
        "infinity": math.inf,
        "NaN": math.nan,
        "negative zero": -0.0,
        "0.75 times the smallest": 0.75 * smallest,
        "half the smallest": 0.5 * smallest,
    }
    if not fmt.signed:
        inputs["-1"] = -1.0
    outcomes = []
    for what, x in inputs.items():
        if (math.isinf(x) and what != "infinity") or (fmt.mantissa_bits >= 52 and "smallest" in what):
            continue  # float64 itself cannot say it
        both = {o: float(quantize(np.array([x]), fmt, overflow=o)[0]) for o in ("saturate", "cast")}
        outcomes.append({"given": f"{what}: {number(x)}" if what != "-1" else what}
                        | {o: number(y) for o, y in both.items()})  # fmt: skip
    return outcomes


def _rules(fmt: ScaledFormat) -> dict[str, str]:
    """`mezzo/formats/blocks.py` in words, with this format's numbers."""
    from mezzo.formats.blocks import MIN_SCALE, max_scale

    element = fmt.element
    top, step = number(element.max), number(element.min_subnormal)
    below = "the group's scale" if fmt.scaling != "nvfp4" else "the block's scale"
    nonfinite = "the whole group becomes NaN, and so does its scale"
    cast = "infinity" if element.infinity else "NaN" if element.nan else f"{top}·s as well"
    fits = "nothing is beyond, since the scale follows amax"
    if fmt.scaling == "free":
        scale = f"s = float32(amax / {top}), kept in {number(MIN_SCALE)} … {number(max_scale(element.max))}"
        zero = f"s = {number(MIN_SCALE)}; the elements stay zero"
        tiny = f"{below} stops at {number(MIN_SCALE)}: below half of {step} · {number(MIN_SCALE)} a number becomes zero"
        over = f"{fits}; with a scale that you give: saturate: {top}·s, cast: {cast}"
    elif fmt.scaling == "nvfp4":
        scale = (
            "s = float8_e4m3fn((amax / 6) · encode), encode = (448 · 6) / amax of the tensor; t = 1 / encode, float32; "
            "value = q · s · t"
        )
        zero = "a block of zeros has s = 0 and stays zero; in a tensor of zeros t = 1"
        nonfinite = "the whole tensor becomes NaN: t depends on every element"
        tiny = "a block whose amax is at most 2^-10 / 448 (2.2e-06) of the tensor's has s = 0 and becomes zero"
        over = (
            "where s was rounded down, the block's largest are beyond 6·s·t and become 6·s·t, with saturate and cast "
            "alike: the element has neither infinity nor NaN"
        )
    else:
        rounded = (
            f"the smallest with amax <= {top} · 2^e"
            if fmt.scaling == "pow2"
            else f"e = floor(log2 amax) - {element.max_exponent}"
        )
        scale = f"s = 2^e, {rounded}, e kept in -127 … 127; dividing by it and multiplying with it is exact"
        zero = "s = 2^-127; the elements stay zero"
        tiny = f"{below} stops at 2^-127: below half of {step} · 2^-127 a number becomes zero"
        binade = number(2.0 ** (element.max_exponent + 1))
        over = f"what rounds to more than {top}·s, which reaches up to {binade}·s: saturate: {top}·s, cast: {cast}"
        over = fits if fmt.scaling == "pow2" else over
        over += "; within half a gap of float32's largest number rounding may leave float32 and give infinity"
    return {"scale": scale, "zeros": zero, "inf or NaN": nonfinite, "tiny": tiny, "overflow": over}


GROUPS = {
    "zeros": (0.0, 0.0),
    "NaN": (1.0, math.nan),
    "infinity": (1.0, math.inf),
    "tiny": (2.0**-140, 2.0**-149),
    "wide": (1.0, 2.0**-12),
    "1.9 and 1": (1.9, 1.0),
    "huge": (2.0**127, 1.0),
}


def _group_outcomes(fmt: ScaledFormat) -> list[dict[str, str]]:
    """Groups that begin with two such numbers, zeros after them; another group, all ones, lies beside them."""
    import numpy as np

    from mezzo.formats import decode, encode_scaled, quantize

    rows, columns = fmt.group if isinstance(fmt.group, tuple) else (1, 8)
    outcomes = []
    for what, (first, second) in GROUPS.items():
        x = np.ones((rows, 2 * columns if isinstance(fmt.group, tuple) else columns), np.float32)
        x[:, :columns] = 0
        at = [(0, 0), (0, 1) if columns > 1 else (1, 0)]
        x[at[0]], x[at[1]] = first, second
        encoded = encode_scaled(x, fmt)
        scales = encoded.scales if fmt.scaling == "free" else decode(encoded.scales, fmt.scale)
        scale = number(float(np.ravel(scales)[0]))
        tensor_scale = "" if encoded.tensor_scale is None else f", t = {number(float(encoded.tensor_scale))}"
        outcome = {"given": f"{what}: {number(first)}, {number(second)}", "scale": f"s = {scale}{tensor_scale}"}
        for overflow in ("saturate", "cast"):
            y = quantize(x, fmt, overflow=overflow)
            outcome[overflow] = f"{number(float(y[at[0]]))}, {number(float(y[at[1]]))}"
            if isinstance(fmt.group, tuple):
                outcome[overflow] += f" | {number(float(y[0, -1]))}"
        outcomes.append(outcome)
    return outcomes


def _print_page(console: Console, record: dict[str, Any], machine: dict[str, Any], first: bool) -> None:
    from rich.table import Table

    rows = _page(record)
    if not first:
        console.print("")
    here = f"{record['route']}: {record['reason']}"
    if machine["device"]:
        here += f" ({machine['device']}, {machine['name']})"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in (*rows, ("here", here), ("source", record["source"])):
        table.add_row(name, text)
    console.print(table)
    console.print("")
    outcomes = record["outcomes"]
    table = Table(*outcomes[0], box=None, pad_edge=False, header_style="bold")
    for outcome in outcomes:
        table.add_row(*outcome.values())
    console.print(table)
    if record["kind"] == "scaled":
        beside = "; after the bar: a number of the next group, which holds ones"
        blocks = isinstance(record["group"], list)
        console.print(f"given: the first two numbers of a group, the others are zero{beside if blocks else ''}")


def _page(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of a format's page, (name, text)."""
    also = ", ".join(record["aliases"])
    rows = [("format", record["name"] + (f"   (also {also})" if also else ""))]
    layout = (
        f"{record['sign_bits']} sign, {record['exponent_bits']} exponent, {record['mantissa_bits']} mantissa"
        + ("; kept in a float32" if record["name"] == "tf32" else "")
        + ("; two's complement" if record["exponent_bits"] == 0 else "")
    )
    relative = ""
    if record["kind"] == "scaled":
        relative = "·s"
        count = math.prod(record["group"]) if isinstance(record["group"], list) else None
        share = f" and 1/{count} of a {record['scale_format']} scale" if count else ""
        scaled = {"row": "all along the axis", "tensor": "the whole tensor"}
        group = _group(record)
        rows.append(("bits", f"{record['bits']:.6g}: {record['element']} ({layout}){share}"))
        rows.append(("group", f"{scaled.get(group, f'{group} elements')}, one {record['scale_format']} scale s"))
    else:
        rows.append(("bits", f"{record['bits']}: {layout}"))
    signs = "±" if record["sign_bits"] else ""
    largest = f"{signs}{number(record['largest'])}{relative}"
    if signs and -record["lowest"] != record["largest"]:
        largest += f", lowest {number(record['lowest'])}{relative}"
    rows.append(("largest", largest))
    rows.append(("smallest normal", _exact(record["smallest_normal"], relative)))
    if record["smallest_subnormal"] is not None:
        rows.append(("subnormal", f"{_exact(record['smallest_subnormal'], relative)}, the smallest above zero"))
    rows.append(("epsilon", f"{_exact(record['epsilon'])}: to nearest, a normal number errs by at most half of it"))
    codes = f"codes for {_specials(record).replace(' ', ' and ')}"
    if not record["nan"]:
        codes = "no codes for inf and NaN; in mezzo, which keeps values in wider tensors, a NaN stays NaN"
    rows.append(("specials", codes))
    rules = record.get("rules") or {f"overflow {name}": text for name, text in record["overflow"].items()}
    rows += rules.items()
    rows.append(("memory", _memory(record)))
    return rows


def _exact(x: float, relative: str = "") -> str:
    shown = number(x)
    return f"{shown}{relative} ({x:.4g})" if shown.startswith("2^") else f"{shown}{relative}"


def _memory(record: dict[str, Any]) -> str:
    """Of COUNT elements, packed and as frameworks keep them."""
    packed = f"{record['bytes_of_1e9'] / 1e9:.6g} GB for 1e9 elements"
    if record["kind"] == "scaled":
        if not isinstance(record["group"], list):
            packed += f", and 4 bytes for each {record['group']}'s scale"
        if record["tensor_scale_format"]:
            packed += ", and 4 bytes for the tensor's scale"
    element_bits = record["exponent_bits"] + record["mantissa_bits"] + record["sign_bits"]
    if element_bits < 8:
        loose = (record["bytes_of_1e9"] / 1e9) + 1 - element_bits / 8
        packed += f"; {loose:.6g} GB with one code in a byte"
    return packed
