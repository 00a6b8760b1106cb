"""`mezzo probe`: what this machine multiplies natively, what mezzo emulates on it, and at what measured rates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from mezzo.formats import AnyFormat

Work = dict[str, tuple[float, Callable[[], object]]]

EMULATED = ("bfloat16", "float16", "float8_e4m3fn", "mxfp8_e4m3", "nvfp4")
OWN = ("float64", "float32")
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square tensor that is rounded and copied: 16 and 256 MiB
PRODUCT = {"cpu": 1024, "cuda": 4096}  # of the square matrices that are multiplied


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--fresh", is_flag=True, help="Measure anew instead of showing what was measured before.")
def probe(as_json: bool, fresh: bool) -> None:
    """What this machine multiplies natively, what mezzo emulates on it, and how fast it rounds.

    Measured once for each machine, torch version and number of threads, in about ten seconds, and then remembered.

    \b
    Examples:
      mezzo probe
      mezzo probe --fresh
      mezzo probe --json
    """
    from mezzo.errors import require

    require("torch", extra="torch", option="mezzo probe")
    found = _probe(fresh)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from mezzo.cli.formats import table_console

    _print(table_console(), found)


def _probe(fresh: bool) -> dict[str, Any]:
    from mezzo import hardware
    from mezzo.torch import helper

    kind, why = hardware.gpu_status()
    sets = hardware.instruction_sets()
    return {
        "machine": hardware.machine() | {"usable_cores": hardware.usable_cores(), "instruction_sets": sets},
        "gpu": _gpu() if kind == "cuda" else {"usable": False, "reason": why},
        "helper": helper.status(),
        "devices": [_device(device, fresh) for device in dict.fromkeys(("cpu", kind))],
    }


def _gpu() -> dict[str, Any]:
    """The GPU and its products below 16 bits, by what it says of itself and what torch offers: not measured."""
    import torch

    from mezzo import hardware

    gpu: dict[str, Any] = {"usable": True, "reason": None, "name": torch.cuda.get_device_name()}
    if torch.version.hip is not None:
        return gpu | {"capability": None, "low_products": {}}  # AMD counts its architectures in another way
    capability = torch.cuda.get_device_capability()
    functions = [
        name
        for name, module in (("torch.nn.functional.scaled_mm", torch.nn.functional), ("torch._scaled_mm", torch))
        if hasattr(module, name.rpartition(".")[2])
    ]
    products = hardware.low_products(capability, functions)
    return gpu | {
        "capability": ".".join(map(str, capability)),
        "low_products": {name: {"exists": there, "reason": reason} for name, (there, reason) in products.items()},
    }


def _device(device: str, fresh: bool) -> dict[str, Any]:
    """One device's routes and rates, as JSON has them."""
    import torch

    from mezzo import hardware
    from mezzo._version import __version__
    from mezzo.formats import FORMATS, SCALED
    from mezzo.torch import helper

    own = hardware.measure(device, fresh=fresh)
    side, product = SIDE[device], PRODUCT[device]
    helped = device == "cpu" and helper.load() is not None  # builds the helper if need be: not part of what is timed
    state = helper.status() if device == "cpu" else "the helper is for the CPU"
    what = f"mezzo {__version__}: {side}², {product}³, {' '.join([*OWN, *EMULATED, *_rounded()])}; {state}"
    measured = hardware.measure_rates(device, what, lambda: _work(device, side, product, helped), fresh=fresh)
    rates = measured.rates
    threads = torch.get_num_threads() if device == "cpu" else None
    products = []
    every: list[AnyFormat] = [*FORMATS.values(), *SCALED.values()]
    for fmt in every:
        route, reason = own.route(fmt)
        products.append({
            "format": str(fmt),
            "route": route,
            "reason": reason,
            "own_gflops": own.gflops.get(str(fmt)),
            "own_large_gflops": _rate(rates, f"own {fmt}"),
            "emulation_gflops": _rate(rates, f"emulated {fmt}"),
        })  # fmt: skip
    copy = rates["copy"]
    rounding = []
    for name in _rounded():
        row: dict[str, Any] = {"format": name}
        for path in ("torch", "helper"):
            rate = rates.get(f"{path} {name}")
            row[f"{path}_melem_s"] = None if rate is None else _digits(rate / 1e6)
            row[f"{path}_share_of_copy"] = None if rate is None else _digits(rate / copy)
        rounding.append(row)
    return {
        "device": device,
        "name": own.name,
        "measured": measured.when,
        "threads": threads,
        "native": sorted(own.native),
        "own_size": hardware.SIZE[device],
        "own_threads": 1 if device == "cpu" else None,
        "emulation_size": product,
        "products": products,
        "rounding_elements": side * side,
        "copy": {"melem_s": _digits(copy / 1e6), "gb_s": _digits(8 * copy / 1e9)},
        "rounding": rounding,
    }  # fmt: skip


def _rounded() -> list[str]:
    """The formats that a float32 tensor can be rounded to: not the wider ones, nor that of scales."""
    from mezzo.formats import FORMATS, SCALED

    return [name for name, fmt in FORMATS.items() if name not in OWN and not fmt.is_scale] + [*SCALED]


def _rate(rates: dict[str, float], name: str) -> float | None:
    return _digits(rates[name] / 1e9) if name in rates else None


def _digits(x: float) -> float:
    """Three digits: no rate here is known better."""
    return float(f"{x:.3g}")


def _work(device: str, side: int, product: int, helped: bool) -> Work:
    """What is timed: name → (amount, run). Operands are those of a linear layer: x · weightᵀ, blocks along the sum."""
    import torch

    from mezzo.formats import get_format
    from mezzo.torch import helper
    from mezzo.torch.quantize import quantize
    from mezzo.torch.rounding import cast, widen

    generator = torch.Generator(device).manual_seed(0)  # its own: the caller's random state stays
    x = torch.randn(side, side, device=device, generator=generator)
    copy = torch.empty_like(x)
    a, b = torch.randn(2, product, product, device=device, generator=generator)
    wide_a, wide_b = a.double(), b.double()

    def emulate(fmt: Any) -> None:
        torch.mm(widen(cast(a, fmt), torch.float32), widen(cast(b, fmt), torch.float32).T)

    def without_helper(fmt: Any) -> None:
        with helper.off():
            quantize(x, fmt)

    flops = 2.0 * product**3
    work: Work = {
        "copy": (x.numel(), lambda: copy.copy_(x)),
        "own float32": (flops, lambda: torch.mm(a, b.T)),
        "own float64": (flops, lambda: torch.mm(wide_a, wide_b.T)),
    }
    for name in EMULATED:
        work[f"emulated {name}"] = flops, partial(emulate, get_format(name))
    for name in _rounded():
        fmt = get_format(name)
        work[f"torch {name}"] = x.numel(), partial(without_helper, fmt)
        if helped:
            work[f"helper {name}"] = x.numel(), partial(quantize, x, fmt)
    return work


def _print(console: Console, found: dict[str, Any]) -> None:
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in _facts(found):
        facts.add_row(name, text)
    console.print(facts)
    for device in found["devices"]:
        console.print("")
        _print_products(console, device)
        console.print("")
        _print_rounding(console, device, found["helper"])


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines above the tables."""
    machine, gpu = found["machine"], found["gpu"]
    sets = machine["instruction_sets"]
    if sets is None:
        instructions = "unknown: the system has no /proc/cpuinfo that says"
    else:
        lacking = ", ".join(name for name, there in sets.items() if not there)
        instructions = ", ".join(name for name, there in sets.items() if there) or "none of those that matter"
        instructions += f"   (not {lacking})" if lacking else ""
    usable = machine["usable_cores"]
    cores = f"{machine['cores'] or 'unknown'}" + (f", {usable} of them usable" if usable != machine["cores"] else "")
    memory = "unknown" if machine["memory_gib"] is None else f"{machine['memory_gib']} GiB"
    facts = [
        ("processor", machine["processor"]),
        ("cores", f"{cores}; torch uses {machine['threads']} threads"),
        ("memory", memory),
        ("instructions", instructions),
        ("software", f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}"),
        ("helper", f"{found['helper']} (C++ rounding on the CPU)"),
    ]
    if not gpu["usable"]:
        return [*facts, ("GPU", f"none used: {gpu['reason']}")]
    capability = "AMD" if gpu["capability"] is None else f"compute capability {gpu['capability']}"
    facts.append(("GPU", f"{gpu['name']}, {capability}"))
    for kind, product in gpu["low_products"].items():
        facts.append((f"  {kind}", f"{'exists' if product['exists'] else 'no product'}: {product['reason']}"))
    return facts


def _print_products(console: Console, device: dict[str, Any]) -> None:
    from rich.table import Table

    size, large = device["own_size"], device["emulation_size"]
    one = "\n1 thread" if device["own_threads"] else ""
    many = f"\n{device['threads']} threads" if device["threads"] else ""
    table = Table(
        "product of", f"own kernel\n{size}³{one}", f"own kernel\n{large}³{many}", f"emulation\n{large}³{many}",
        "route", "why", box=None, pad_edge=False, header_style="bold",
    )  # fmt: skip
    for column in table.columns[1:4]:
        column.justify = "right"
    shown = [row for row in device["products"] if row["format"] in (*OWN, "tf32", *EMULATED)]
    for row in shown:
        rates = (_cell(row[key]) for key in ("own_gflops", "own_large_gflops", "emulation_gflops"))
        table.add_row(row["format"], *rates, row["route"], row["reason"])
    console.print(
        f"Products on {device['device']} ({device['name']}) in GFLOP/s, measured {device['measured']}", style="bold"
    )
    console.print(table)
    console.print(
        "own kernel: PyTorch's product in that format; emulation: the speed of software that rounds both operands and "
        "runs the float32 product, no speed of hardware; –: not measured. All other formats are emulated."
    )


def _print_rounding(console: Console, device: dict[str, Any], state: str) -> None:
    from rich.table import Table

    helped = any(row["helper_melem_s"] is not None for row in device["rounding"])
    side = math.isqrt(device["rounding_elements"])
    columns = ("torch", "of a copy", *(("helper", "of a copy") if helped else ()))
    table = Table("rounding to", *columns, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in device["rounding"]:
        cells = [row["format"]]
        for path in ("torch", "helper") if helped else ("torch",):
            share = row[f"{path}_share_of_copy"]
            cells += [
                _cell(row[f"{path}_melem_s"]),
                "–" if share is None else f"{share:.0%}" if share > 0.1 else f"{share:.1%}",
            ]
        table.add_row(*cells)
    console.print(f"Rounding {side} × {side} float32 on {device['device']} in Melem/s", style="bold")
    console.print(table)
    copy = device["copy"]
    text = f"a plain copy: {_cell(copy['melem_s'])} Melem/s, {_cell(copy['gb_s'])} GB/s read and written"
    if not helped and device["device"] == "cpu":
        text += f"; no figures for the helper: {state}"
    console.print(text)


def _cell(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f}" if x >= 10 else f"{x:.2g}"
