"""`mezzo probe`: on this machine in tiny sizes, and on machines that it is told of."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Mezzo

from mezzo import hardware
from mezzo.cli import probe
from mezzo.formats import FORMATS, SCALED
from mezzo.torch import helper

ROUNDED = [name for name in (*FORMATS, *SCALED) if name not in ("float64", "float32", "float8_e8m0fnu")]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sizes that take no time and are too small for the helper; a cache folder of the test's own."""
    monkeypatch.setattr(probe, "SIDE", {"cpu": 32})
    monkeypatch.setattr(probe, "PRODUCT", {"cpu": 32})
    monkeypatch.setattr(hardware, "SIZE", {"cpu": 16})
    monkeypatch.setattr(hardware, "PEAK_SIZE", {"cpu": 32})
    monkeypatch.setattr(hardware.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    real = hardware._best_seconds
    monkeypatch.setattr(hardware, "_best_seconds", lambda runs, device, rounds: real(runs, device, 1, share=0.0001))


@pytest.fixture
def no_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "load", lambda: None)
    monkeypatch.setattr(helper, "status", lambda: "absent: no C++ compiler found")


@pytest.fixture
def fake_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there and is never called: tensors as small as these are left to torch."""
    monkeypatch.setattr(helper, "load", object)
    monkeypatch.setattr(helper, "status", lambda: "built with a fake")


def run_json(mezzo: Mezzo, *arguments: str) -> dict[str, Any]:
    done = mezzo("probe", "--json", *arguments)
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("fake_helper")
def test_json_has_the_machine_each_formats_route_and_each_rate(mezzo: Mezzo) -> None:
    found = run_json(mezzo)
    assert list(found) == ["machine", "gpu", "helper", "devices"]
    assert found["machine"].keys() >= {
        "processor",
        "cores",
        "usable_cores",
        "threads",
        "memory_gib",
        "instruction_sets",
    }
    assert found["helper"] == "built with a fake"
    device = found["devices"][0]
    assert (device["device"], device["own_size"], device["emulation_size"]) == ("cpu", 16, 32)
    products = {row["format"]: row for row in device["products"]}
    assert list(products) == [*FORMATS, *SCALED]
    for row in products.values():
        assert list(row) == ["format", "route", "reason", "own_gflops", "own_large_gflops", "emulation_gflops"]
        assert (row["route"] == "native") == (row["format"] in device["native"])
    emulated = {name for name, row in products.items() if row["emulation_gflops"] is not None}
    assert emulated == set(probe.EMULATED)
    assert {name for name, row in products.items() if row["own_large_gflops"]} == {"float64", "float32"}
    assert [row["format"] for row in device["rounding"]] == ROUNDED
    for row in device["rounding"]:
        for path in ("torch", "helper"):
            share = row[f"{path}_melem_s"] / device["copy"]["melem_s"]
            assert row[f"{path}_share_of_copy"] == pytest.approx(share, rel=0.02), "of numbers with three digits"


@pytest.mark.usefixtures("no_helper")
def test_the_tables_label_an_emulations_speed_as_softwares(mezzo: Mezzo) -> None:
    done = mezzo("probe")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert max(map(len, done.out.splitlines())) <= 140
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    for name in ("processor", "cores", "memory", "instructions", "helper", "GPU", *probe.EMULATED, *ROUNDED):
        assert name in rows
    head = next(line for line in done.out.splitlines() if "own kernel" in line)
    assert head.split() == ["own", "kernel", "own", "kernel", "emulation"]
    text = " ".join(done.out.split())
    assert "emulation: the speed of software that rounds both operands" in text
    assert "no speed of hardware" in text


@pytest.mark.usefixtures("no_helper")
def test_without_the_helper_its_columns_are_gone_and_the_reason_is_there(mezzo: Mezzo) -> None:
    done = mezzo("probe")
    assert re.search(r"(?m)^helper +absent: no C\+\+ compiler found", done.out)
    assert "no figures for the helper: absent: no C++ compiler found" in done.out
    head = next(line for line in done.out.splitlines() if line.startswith("rounding to"))
    assert head.split() == ["rounding", "to", "torch", "of", "a", "copy"]
    assert all(row["helper_melem_s"] is None for row in run_json(mezzo)["devices"][0]["rounding"])


@pytest.mark.usefixtures("no_helper")
def test_it_measures_once_and_anew_when_told(mezzo: Mezzo, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_json(mezzo)
    real, calls = hardware._best_seconds, []
    monkeypatch.setattr(hardware, "_best_seconds", lambda *a: calls.append(1) or real(*a))
    assert run_json(mezzo) == first
    assert not calls
    run_json(mezzo, "--fresh")
    assert len(calls) == 3, "16-bit products, the peak, the rates"


def test_another_state_of_the_helper_is_another_measurement(mezzo: Mezzo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "load", lambda: None)
    monkeypatch.setattr(helper, "status", lambda: "absent: switched off")
    assert run_json(mezzo)["devices"][0]["rounding"][0]["helper_melem_s"] is None
    monkeypatch.setattr(helper, "load", object)
    monkeypatch.setattr(helper, "status", lambda: "built with g++ 12")
    assert run_json(mezzo)["devices"][0]["rounding"][0]["helper_melem_s"] > 0


def test_the_torch_path_is_timed_without_the_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = sys.modules["mezzo.torch.quantize"]  # mezzo.torch has a function of that name
    monkeypatch.setattr(module, "quantize", lambda x, fmt: seen.append((str(fmt), helper.load() is None)))
    monkeypatch.setattr(helper, "_load", lambda: (object(), "built"))
    monkeypatch.setattr(helper, "_why_off", lambda: "off" if helper._switched_off.get() else None)
    work = probe._work("cpu", 4, 4, helped=True)
    for path, without in (("torch", True), ("helper", False)):
        seen.clear()
        work[f"{path} nvfp4"][1]()
        assert seen == [("nvfp4", without)]


def test_an_emulated_product_is_the_product_of_the_rounded_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as one product: 2 n³ operations; operands are rounded along the axis that the product sums over."""
    from mezzo.torch import quantize

    seen = []
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append((a, b)))
    amount, run = probe._work("cpu", 4, 64, helped=False)["emulated mxfp8_e4m3"]
    run()
    ((a, b),) = seen
    assert amount == 2 * 64**3
    for operand in (a, b.T):
        assert operand.dtype == torch.float32
        assert torch.equal(operand, quantize(operand.contiguous(), "mxfp8_e4m3")), "already values of the format"


@pytest.mark.usefixtures("no_helper")
def test_a_system_without_proc_is_unknown_not_a_crash(
    mezzo: Mezzo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    done = mezzo("probe")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"(?m)^instructions +unknown: the system has no /proc/cpuinfo that says", done.out)
    assert re.search(r"(?m)^memory +unknown", done.out)
    assert run_json(mezzo)["machine"]["instruction_sets"] is None


def test_a_gpu_says_which_low_products_exist_and_that_none_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", print, raising=False)
    gpu = probe._gpu()
    assert (gpu["usable"], gpu["name"], gpu["capability"]) == (True, "H200", "9.0")
    assert {name: product["exists"] for name, product in gpu["low_products"].items()} == {
        "float8": True,
        "mxfp8": False,
        "nvfp4": False,
    }
    shown = dict(probe._facts({"machine": hardware.machine() | {"usable_cores": 3, "instruction_sets": {}},
                               "gpu": gpu, "helper": "absent: of no use"}))  # fmt: skip
    assert shown["GPU"] == "H200, compute capability 9.0"
    assert shown["  float8"].startswith(
        "exists: by compute capability 9.0 and torch.nn.functional.scaled_mm; not measured"
    )
    assert shown["  nvfp4"] == "no product: needs compute capability 10.0; this is 9.0"
    assert "3 of them usable" in shown["cores"]
    assert shown["instructions"] == "none of those that matter"


WITHOUT = """
import sys
sys.modules["torch"] = None
sys.argv = ["mezzo", "probe"]
from mezzo.cli.main import main
main()
"""


def test_without_torch_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mezzo: error: mezzo probe needs the package 'torch', which is not installed")
    assert "Traceback" not in done.stderr
