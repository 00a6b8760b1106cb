"""`mezzo formats`: what every format can hold, with torch and without."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from in_process import Mezzo

from mezzo import hardware
from mezzo.cli.formats import number
from mezzo.formats import FORMATS, SCALED, ScaledFormat, get_format

RATES = {"float32": 100.0, "bfloat16": 0.5, "float16": 150.0}


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that multiplies float16 and not bfloat16, and takes no time to measure."""
    found = hardware.Hardware("cpu", "A Processor", RATES, 150.0, "key")
    monkeypatch.setattr(hardware, "measure", lambda device, fresh=False: found)
    monkeypatch.setattr(hardware, "gpu_status", lambda: ("cpu", "no reason"))
    monkeypatch.setattr(hardware, "processor", lambda: "A Processor")


def lines_of(out: str) -> dict[str, list[str]]:
    """First word → the others, of each line."""
    return {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words}


def page(mezzo: Mezzo, name: str) -> str:
    """A format's page with its spaces and line breaks folded."""
    done = mezzo("formats", name)
    assert (done.code, done.err) == (0, "")
    return re.sub(r"\s+", " ", done.out)


def test_the_tables_list_every_format_with_its_numbers(mezzo: Mezzo) -> None:
    done = mezzo("formats")
    assert (done.code, done.err) == (0, "")
    rows = lines_of(done.out)
    for name, fmt in FORMATS.items():
        bits, layout, largest, normal = rows[name][:4]
        assert int(bits) == fmt.bits
        assert layout == f"{int(fmt.signed)}/{fmt.exponent_bits}/{fmt.mantissa_bits}"
        assert (largest, normal) == (number(fmt.max), number(fmt.min_normal))
    for name, scaled in SCALED.items():
        assert float(rows[name][0]) == pytest.approx(scaled.bits)
        assert f"{number(scaled.element.max)}·s" in rows[name]
    assert rows["float8_e4m3fn"][4:8] == ["2^-9", "0.125", "NaN", "emulated"]
    assert rows["float16"][5:9] == ["2^-10", "inf", "NaN", "native"]
    assert rows["float8_e8m0fnu"][4] == "–", "a format without subnormals"
    assert (
        "on cpu (A Processor): native: PyTorch's own product; emulated: operands rounded, float32 product" in done.out
    )


def test_each_source_is_named_below_the_tables_under_its_number(mezzo: Mezzo) -> None:
    done = mezzo("formats")
    rows = lines_of(done.out)
    for name, fmt in (FORMATS | SCALED).items():
        assert f"\n{rows[name][-1]} {fmt.source}\n" in done.out


def test_piped_output_is_plain_and_as_wide_anywhere(mezzo: Mezzo, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = mezzo("formats").out
    assert "\x1b" not in wide
    assert max(map(len, wide.splitlines())) <= 140
    monkeypatch.setenv("COLUMNS", "40")
    assert mezzo("formats").out == wide


def test_a_narrow_terminal_hides_nothing(mezzo: Mezzo, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.setattr("mezzo.cli.formats.table_console", lambda: Console(width=80, markup=False, highlight=False))
    out = mezzo("formats").out
    assert "…" not in out
    assert set(lines_of(out)) >= {*FORMATS, *SCALED}


@pytest.mark.parametrize("name", [*FORMATS, *SCALED, "e4m3@1x128+pow2", "e5m2@tensor", "e4m3@row", "e3m2@8x1+floor"])
def test_every_format_has_a_page_of_its_own(mezzo: Mezzo, name: str) -> None:
    fmt = get_format(name)
    text = page(mezzo, name)
    assert text.startswith(f"format {fmt} ")
    assert fmt.source in text
    assert f"{fmt.bits / 8:.6g} GB for 1e9 elements" in text
    if isinstance(fmt, ScaledFormat):
        for rule in ("scale s = ", "zeros ", "inf or NaN ", "tiny ", "overflow "):
            assert f" {rule}" in text
    else:
        assert "overflow saturate" in text
        assert "overflow cast" in text


def test_an_alias_and_several_names_give_several_pages(mezzo: Mezzo) -> None:
    done = mezzo("formats", "bf16", "mxfp8")
    assert re.findall(r"(?m)^format +(\S+) +\(also (.*)\)", done.out) == [
        ("bfloat16", "bf16"),
        ("mxfp8_e4m3", "mxfp8"),
    ]


def test_the_reason_for_the_route_is_said(mezzo: Mezzo) -> None:
    assert "here emulated: PyTorch's own product runs at 0.5 GFLOP/s, 200 times slower than float32's" in page(
        mezzo, "bf16"
    )
    assert "here native: PyTorch's own product runs at 150 GFLOP/s, 1.5 times as fast as float32's" in page(
        mezzo, "fp16"
    )
    assert "here scale: a format for scales" in page(mezzo, "e8m0")


def outcomes(mezzo: Mezzo, name: str) -> dict[str, dict[str, str]]:
    (record,) = json.loads(mezzo("formats", name, "--json").out)["formats"]
    return {row.pop("given").partition(":")[0]: row for row in record["outcomes"]}


def test_what_becomes_of_difficult_numbers_is_what_quantize_gives(mezzo: Mezzo) -> None:
    e4m3 = outcomes(mezzo, "e4m3")
    assert e4m3["1.5 times the largest"] == {"saturate": "448", "cast": "NaN"}
    assert e4m3["half the smallest"] == {"saturate": "0", "cast": "0"}
    assert e4m3["0.75 times the smallest"] == {"saturate": "2^-9", "cast": "2^-9"}
    assert outcomes(mezzo, "bf16")["infinity"] == {"saturate": "3.38953e+38", "cast": "inf"}
    assert outcomes(mezzo, "e8m0")["-1"] == {"saturate": "NaN", "cast": "NaN"}
    floor = outcomes(mezzo, "mxfp8+floor")
    assert floor["1.9 and 1"] == {"scale": "s = 2^-8", "saturate": "1.75, 1 | 1", "cast": "NaN, 1 | 1"}
    assert floor["infinity"]["cast"] == "NaN, NaN | 1", "the next group is as it was"
    assert outcomes(mezzo, "nvfp4")["NaN"]["saturate"] == "NaN, NaN | NaN", "the tensor's scale is gone"
    assert outcomes(mezzo, "mxfp4")["zeros"] == {"scale": "s = 2^-127", "saturate": "0, 0 | 1", "cast": "0, 0 | 1"}


def test_json_has_every_format_with_one_set_of_keys_for_each_kind(mezzo: Mezzo) -> None:
    done = mezzo("formats", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["machine"] == {"device": "cpu", "name": "A Processor", "reason": None}
    records: dict[str, dict[str, Any]] = {record["name"]: record for record in found["formats"]}
    assert list(records) == [*FORMATS, *SCALED]
    common = set(records["float32"])
    assert all(set(records[name]) == common for name in FORMATS)
    assert all(
        set(records[name]) == common | {"element", "group", "scaling", "scale_format", "tensor_scale_format"}
        for name in SCALED
    )
    assert records["nvfp4_16x16"]["group"] == [16, 16]
    assert records["nvfp4"]["bytes_of_1e9"] == 562_500_000
    assert records["bfloat16"]["route"] == "emulated"
    assert records["int8"]["smallest_subnormal"] is None


def test_unknown_names_are_the_librarys_own_error(mezzo: Mezzo) -> None:
    for name in ("float7", "e4m3@1x1", "e4m3@1x32+nothing", "bf16@tensor"):
        done = mezzo("formats", "fp32", name)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("mezzo: error: ")
    assert "unknown number format 'nvfp5'" in mezzo("formats", "nvfp5").err
    assert "did you mean nvfp4?" in mezzo("formats", "nvfp5").err


WITHOUT = """
import sys
sys.modules["torch"] = None
sys.argv = ["mezzo", "formats", *sys.argv[1:]]
from mezzo.cli.main import main
main()
"""


@pytest.mark.parametrize("arguments", [(), ("nvfp4",), ("--json",)])
def test_without_torch_only_the_machines_column_is_unknown(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "torch is not installed, so nothing was measured; run: pip install torch" in done.stdout
    if not arguments:
        rows = lines_of(done.stdout)
        assert all("unknown" in rows[name] for name in (*FORMATS, *SCALED))
    if arguments == ("--json",):
        assert {record["route"] for record in json.loads(done.stdout)["formats"]} == {"unknown"}


def test_a_torch_that_cannot_be_loaded_is_no_crash(mezzo: Mezzo, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    done = mezzo("formats")
    assert done.code == 0
    assert "here: unknown: torch cannot be imported: libcudart.so.13" in done.out


@pytest.mark.parametrize(
    ("x", "shown"),
    [(448.0, "448"), (2.0**-126, "2^-126"), (-(2.0**127), "-2^127"), (0.0, "0"), (-0.0, "-0"), (0.125, "0.125"),
     (1.0, "1"), (1024.0, "1024"), (2048.0, "2^11"), (float("inf"), "inf"), (float("nan"), "NaN"), (None, "–"),
     (2.0**-1074, "2^-1074"), (3.3895313892515355e38, "3.38953e+38")],
)  # fmt: skip
def test_numbers_are_powers_of_two_where_they_are(x: float | None, shown: str) -> None:
    assert number(x) == shown


def test_the_smallest_numbers_of_the_table_are_exact() -> None:
    """Rounding with the shown numbers alone: `2^-9` is the smallest that float8_e4m3fn keeps."""
    from mezzo.formats import quantize

    for fmt in FORMATS.values():
        if fmt.name != "float64":
            shown = number(fmt.min_subnormal)
            value = 2.0 ** int(shown[2:]) if shown.startswith("2^") else float(shown)
            assert quantize(np.array([value]), fmt)[0] == value == fmt.min_subnormal
