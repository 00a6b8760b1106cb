import json

import pytest
import torch

from mezzo import hardware
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
