import pytest
import torch

from mezzo import hardware

SLOW_16_BITS = hardware.Hardware("cpu", "a test", {"float32": 100.0, "bfloat16": 1.0, "float16": 1.0}, 100.0, "test")


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture
def slow_16_bits(monkeypatch):
    """A CPU that emulates 16-bit products, whatever the machine is; one thread, for tensors this small gain by none."""
    monkeypatch.setattr(hardware, "measure", lambda device="cpu", **_: SLOW_16_BITS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
