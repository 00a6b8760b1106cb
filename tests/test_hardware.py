import json

import pytest
import torch

from mezzo import hardware
from mezzo.formats import FORMATS, SCALED, get_format
from mezzo.hardware import Hardware

RATES = {"float32": 100.0, "bfloat16": 0.9, "float16": 0.9}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and a measurement that takes no time; counts how often it was made."""
    monkeypatch.setattr(hardware.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "new" / name))
    made = []
    monkeypatch.setattr(hardware, "_rates", lambda device: made.append(device) or dict(RATES))
    monkeypatch.setattr(hardware, "_peak_rate", lambda device: 150.0)
    return tmp_path / "new" / "mezzo", made


@pytest.mark.parametrize(
    ("rates", "native"),
    [
        ({"float32": 145.0, "bfloat16": 0.9, "float16": 0.9}, set()),  # AVX2: 150 times slower
        ({"float32": 100.0, "bfloat16": 600.0, "float16": 50.0}, {"bfloat16"}),  # AMX without its float16
        ({"float32": 100.0, "bfloat16": 90.0, "float16": 89.9}, {"bfloat16"}),  # as fast as float32, within 10%
        ({"float32": 50e3, "bfloat16": 700e3, "float16": 700e3, "tf32": 50e3}, {"bfloat16", "float16", "tf32"}),
        ({"float32": 100.0}, set()),
    ],
)
def test_a_format_is_native_where_its_own_product_is_not_slower(rates, native):
    assert Hardware("cpu", "x", rates, 1.0, "k").native == native | {"float32", "float64"}


def test_a_measurement_is_made_once_and_kept(cache):
    folder, made = cache
    first = hardware.measure()
    assert hardware.measure() == first
    assert len(made) == 1
    assert [p.suffix for p in folder.iterdir()] == [".json"]
    hardware.measure(fresh=True)
    assert len(made) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[1]", '{"device": "cpu"}', "KEY", "RATES", "TYPES"],
)
def test_a_broken_cache_is_measured_anew(cache, text):
    folder, made = cache
    good = hardware.measure()
    (path,) = folder.iterdir()
    data = json.loads(path.read_text())
    broken = {
        "KEY": data | {"key": "other"},
        "RATES": data | {"gflops": {}},
        "TYPES": data | {"gflops": {"float32": "x"}},
    }
    path.write_text(json.dumps(broken[text]) if text in broken else text)
    assert hardware.measure() == good
    assert len(made) == 2
    assert hardware.measure() == good
    assert len(made) == 2


def test_another_number_of_threads_or_torch_is_another_measurement(cache, monkeypatch):
    _, made = cache
    hardware.measure()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 + 10**6)
    hardware.measure()
    assert len(made) == 2


def test_the_best_peak_ever_seen_counts(cache, monkeypatch):
    assert hardware.measure_peak("cpu") == 150e9
    for now, best in ((40.0, 150e9), (170.0, 170e9), (160.0, 170e9)):
        monkeypatch.setattr(hardware, "_peak_rate", lambda device, now=now: now)
        assert hardware.measure_peak("cpu") == best
    assert hardware.measure().peak == 170.0


def test_a_home_that_cannot_be_written_costs_only_the_measurement(cache):
    folder, made = cache
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    hardware.measure()
    hardware.measure()
    assert len(made) == 2


def test_rates_are_of_the_product_and_the_thread_count_is_given_back(monkeypatch):
    monkeypatch.setattr(hardware, "SIZE", {"cpu": 16})
    monkeypatch.setattr(hardware, "PEAK_SIZE", {"cpu": 32})
    threads = torch.get_num_threads()
    rates, peak = hardware._rates(torch.device("cpu")), hardware._peak_rate(torch.device("cpu"))
    assert torch.get_num_threads() == threads
    assert set(rates) == {"float32", "bfloat16", "float16"}
    assert all(rate > 0 for rate in (*rates.values(), peak))


def test_without_a_gpu_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert hardware.gpu_status() == ("cpu", f"torch {torch.__version__} supports CUDA 13.0 but finds no usable GPU")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert hardware.gpu_status()[1].endswith(f"the installed torch {torch.__version__} is a build without GPU support")


def test_the_machine_names_what_a_figure_needs():
    found = hardware.machine()
    assert found.keys() >= {"processor", "cores", "threads", "memory_gib", "gpu", "torch", "python", "system"}
    assert json.loads(json.dumps(found)) == found


WORK = {"copy": (8.0, lambda: None), "round": (4.0, lambda: None)}


@pytest.fixture
def timed(cache, monkeypatch):
    """Rates that take no time to measure: each run takes half a second; counts how often."""
    made = []
    monkeypatch.setattr(hardware, "_best_seconds", lambda runs, *rest: made.append(len(runs)) or [0.5] * len(runs))
    return cache[0], made


def test_rates_are_measured_once_for_each_kind_of_work_and_kept(timed):
    folder, made = timed
    first = hardware.measure_rates("cpu", "some work", lambda: WORK)
    assert first.rates == {"copy": 16.0, "round": 8.0}
    assert hardware.measure_rates("cpu", "some work", lambda: pytest.fail("it was in the cache")) == first
    hardware.measure_rates("cpu", "other work", lambda: WORK)
    hardware.measure_rates("cpu", "some work", lambda: WORK, fresh=True)
    assert made == [2, 2, 2]
    assert sorted(p.name[:6] for p in folder.iterdir()) == ["rates-", "rates-"], "beside the products, not in them"


@pytest.mark.parametrize("text", ["", "{", "null", '{"device": "cpu"}', "KEY", "WHAT", "RATES", "NONE", "TYPES"])
def test_broken_rates_are_measured_anew(timed, text):
    folder, made = timed
    good = hardware.measure_rates("cpu", "some work", lambda: WORK)
    (path,) = folder.iterdir()
    data = json.loads(path.read_text())
    broken = {
        "KEY": data | {"key": "other"},
        "WHAT": data | {"what": "other"},
        "RATES": data | {"rates": {}},
        "NONE": data | {"rates": None},
        "TYPES": data | {"rates": {"copy": "x"}},
    }
    path.write_text(json.dumps(broken[text]) if text in broken else text)
    assert hardware.measure_rates("cpu", "some work", lambda: WORK).rates == good.rates
    assert len(made) == 2


def test_a_slow_run_is_timed_once_a_round_and_a_fast_one_for_as_long():
    import time

    calls = [0, 0]

    def run(i, seconds):
        calls[i] += 1
        time.sleep(seconds)

    slow, fast = hardware._best_seconds([lambda: run(0, 0.02), lambda: run(1, 0)], "cpu", 2, share=0.01)
    assert calls[0] == 2
    assert calls[1] > 2
    assert slow >= 0.02 > fast


def test_the_route_of_every_format_has_a_reason():
    found = Hardware("cpu", "x", {"float32": 100.0, "bfloat16": 0.9, "float16": 95.0}, 1.0, "k")
    for fmt in (*FORMATS.values(), *SCALED.values(), get_format("e4m3@tensor")):
        route, reason = found.route(fmt)
        assert reason
        assert (route == "native") == (fmt.name in found.native)
    assert found.route(get_format("bf16")) == (
        "emulated",
        "PyTorch's own product runs at 0.9 GFLOP/s, 111 times slower than float32's",
    )
    assert found.route(get_format("fp16"))[1].endswith("95 GFLOP/s, 0.95 times as fast as float32's")
    assert found.route(get_format("e8m0"))[0] == "scale"
    assert found.route(get_format("tf32"))[0] == "emulated"
    assert Hardware("cuda", "x", found.gflops | {"tf32": 100.0}, 1.0, "k").route(get_format("tf32"))[0] == "native"


X86 = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 f16c avx512_bf16\n\nprocessor\t: 1\nmodel name\t: B\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\nCPU part\t: 0xd40\n"


def test_instruction_sets_are_read_as_the_kernel_spells_them(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "CPUINFO", file)
    assert hardware.instruction_sets() is None
    assert hardware.processor(), "by another way"
    file.write_text(X86)
    assert hardware.processor() == "A CPU"
    sets = hardware.instruction_sets()
    assert list(sets) == [*hardware.INSTRUCTIONS]
    assert [name for name, there in sets.items() if there] == ["AVX2", "F16C", "AVX512-BF16"]
    file.write_text(ARM)
    assert hardware.instruction_sets() == {"NEON": True, "FP16": True, "BF16": True, "SVE": False}
    file.write_text("cpu : POWER9\n")
    assert hardware.instruction_sets() is None


@pytest.mark.parametrize(
    ("capability", "kinds"),
    [((8, 0), []), ((8, 9), ["float8"]), ((9, 0), ["float8"]), ((10, 0), ["float8", "mxfp8", "nvfp4"]),
     ((12, 0), ["float8", "mxfp8", "nvfp4"])],
)  # fmt: skip
def test_low_products_go_by_compute_capability_and_say_that_they_were_not_measured(capability, kinds):
    found = hardware.low_products(capability, ["torch._scaled_mm"])
    assert [kind for kind, (there, _) in found.items() if there] == kinds
    for there, reason in found.values():
        assert ("torch._scaled_mm; not measured" in reason) == there
    assert not any(there for there, _ in hardware.low_products(capability, []).values())
