"""What a rounding lost, on the device, is what the NumPy reference says: with the compiled helper and without it."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from mezzo.formats import ScaledFormat, decode, encode_scaled, get_format
from mezzo.formats.blocks import Groups
from mezzo.formats.measure import bound, measure
from mezzo.torch import helper, quantize
from mezzo.torch.measure import HELPER_FROM, read, take

ELEMENTS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
TENSOR = ("int8@tensor", "float8_e4m3fn@tensor", "float8_e4m3fn@tensor+floor")
BLOCKS = (
    "mxfp8_e4m3", "mxfp8_e4m3+floor", "mxfp4", "mxfp4+floor", "nvfp4", "nvfp4_16x16", "float8_e4m3fn@row",
    "float8_e4m3fn@1x128", "float8_e4m3fn@128x128", "int8@1x16", "int8@row",
)  # fmt: skip
SHAPES = ((67, 45), (64, 96), (5, 33, 20), (7, 6))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-127), 2.0**-126, 1e-30, -1e30, 470.0, 65520.0]


@pytest.fixture(params=["helper", "torch"])
def hands(request):
    """With the helper and without it."""
    if request.param == "helper" and helper.load() is None:
        pytest.skip(f"no compiled helper: {helper.status()}")
    with nullcontext() if request.param == "helper" else helper.off():
        yield


def numbers(kind, shape, seed=0):
    """float64 of each kind, with some zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * (rng.random(shape) < 0.95)
    if kind == "tiny":
        return torch.from_numpy(x * 1e-30)
    if kind == "spread":  # rows and columns of many sizes, so that blocks have them
        rows, columns = 2.0 ** rng.integers(-14, 6, (shape[-2], 1)), 2.0 ** rng.integers(-14, 6, (1, shape[-1]))
        rows[: shape[-2] // 2], columns[:, : shape[-1] // 2] = 1, 2.0**-7
        x = x * rows * columns
        x[..., : shape[-1] // 3] = 0
    if kind == "special":
        places = rng.permutation(x.size)[: max(2, x.size // 200)]
        x.flat[places] = np.resize(rng.permutation(SPECIAL), len(places))
    if kind == "zero":
        x = np.zeros(shape)
    return torch.from_numpy(x)


def limits(x, fmt, axis):
    """The magnitudes from which on elements overflow, from scales that NumPy computes; None for the format's own."""
    if not isinstance(fmt, ScaledFormat) or fmt.scaling not in ("floor", "nvfp4"):
        return None
    array = x.numpy() if x.dtype is torch.float64 else x.float().numpy()
    encoded = encode_scaled(array, fmt, axis=axis)
    scales = decode(encoded.scales, fmt.scale).astype(np.float64)
    if encoded.tensor_scale is not None:
        scales = scales * np.float64(encoded.tensor_scale)
    scales = np.where(scales == 0, math.inf, scales)  # everything underflows under them
    groups = Groups(array.shape, fmt, axis)
    blocks = groups.divide(array.astype(np.float64))
    return groups.join(np.broadcast_to(bound(fmt.element) * groups.unscales(scales), blocks.shape))


def check(x, y, fmt, axis):
    (found,) = read([take(x, y, fmt, axis)])
    expected = measure(x.double().numpy(), y.double().numpy(), fmt, axis=axis, limits=limits(x, fmt, axis))
    for name in ("count", "zeros", "nonfinite", "underflowed", "overflowed", "amax"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.signal == pytest.approx(expected.signal, rel=1e-12, abs=0)
    assert found.noise == pytest.approx(expected.noise, rel=1e-12, abs=0)
    assert found.histogram.tolist() == expected.histogram.tolist()
    assert (found.blocks is None) == (expected.blocks is None)
    if expected.blocks is not None:
        for name in ("count", "zero", "lossy"):
            assert getattr(found.blocks, name) == getattr(expected.blocks, name), name
        assert found.blocks.sqnr == pytest.approx(expected.blocks.sqnr, rel=0, abs=1e-3, nan_ok=True)
        assert found.blocks.amax.tolist() == expected.blocks.amax.tolist()
    return found


@pytest.mark.parametrize("kind", ["plain", "spread", "tiny", "special", "zero"])
@pytest.mark.parametrize("name", [*ELEMENTS, *TENSOR, *BLOCKS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("hands")
def test_it_is_the_reference(dtype, name, kind):
    fmt = get_format(name)
    for shape in SHAPES:
        x = numbers(kind, shape).to(dtype)
        for axis in (-1, 0):
            check(x, quantize(x, fmt, axis=axis), fmt, axis)


@pytest.mark.parametrize("name", ["mxfp8_e4m3+floor", "nvfp4", "float8_e4m3fn@row", "float8_e4m3fn@tensor+floor"])
@pytest.mark.usefixtures("hands")
def test_it_is_the_reference_whatever_the_rounding_did(name):
    """Such as a value that became infinite, which overflowed whether or not it lies beyond the limit."""
    fmt = get_format(name)
    for axis in (-1, 0, 1):
        x = numbers("spread", (3, 40, 50)).float()
        y = quantize(x, fmt, axis=axis).clone()
        for first, step, value in ((0, 397, math.inf), (1, 289, math.nan), (2, 83, 0.0), (3, 71, 1.0)):
            y.view(-1)[first::step] = value
        check(x, y, fmt, axis)
        check(x.transpose(0, 2), y.transpose(0, 2), fmt, axis)


@pytest.mark.usefixtures("hands")
def test_tensors_without_elements_and_vectors():
    for name in ("mxfp8_e4m3+floor", "nvfp4", "float8_e4m3fn@row", "bfloat16"):
        fmt = get_format(name)
        (found,) = read([take(torch.empty(0, 4), torch.empty(0, 4), fmt)])
        assert (found.count, found.amax, found.blocks) == (0, 0.0, None)
        x = numbers("spread", (1, 4001)).float()[0]
        check(x, quantize(x, fmt), fmt, 0)


@pytest.mark.usefixtures("hands")
def test_a_hand_made_overflow_of_blocks():
    """Blocks of amax 500 have the scale 1 with `floor`, where e4m3 ends at 448, its bound being 464; 2 without it."""
    x = torch.ones(128, 64)
    x[::2, :4] = torch.tensor([500.0, -470.0, 464.0, 450.0])
    for name, overflowed in (("mxfp8_e4m3+floor", 128), ("mxfp8_e4m3", 0)):
        fmt = get_format(name)
        assert check(x, quantize(x, fmt), fmt, -1).overflowed == overflowed


@pytest.mark.usefixtures("hands")
def test_a_hand_made_overflow_of_nvfp4():
    """The tensor's scale is 1, small blocks have subnormal ones: 1.45 · 2**-9 rounds down by a third, so that the
    block ends at 6 · 2**-9; 0.4 · 2**-9 rounds to zero, so that the block holds nothing: underflow, not overflow."""
    x = torch.full((128, 64), 2688.0)
    x[3, 16:32] = 6 * 1.45 * 2.0**-9
    x[5, 16:32] = 6 * 0.4 * 2.0**-9
    x[4, 0] = 0.0
    fmt = get_format("nvfp4")
    found = check(x, quantize(x, fmt), fmt, -1)
    assert (found.overflowed, found.underflowed, found.blocks.lossy) == (16, 16, 1)


def test_the_helper_measures_what_it_can(monkeypatch):
    if helper.load() is None:
        pytest.skip(f"no compiled helper: {helper.status()}")
    calls = []
    original = helper.Helper.measure_blocks
    monkeypatch.setattr(helper.Helper, "measure_blocks", lambda *given: calls.append(given) or original(*given))
    fmt, x = get_format("nvfp4"), torch.ones(HELPER_FROM // 16, 16)
    take(x[1:], x[1:], fmt)
    take(x.double(), x.double(), fmt)
    with helper.off():
        take(x, x, fmt)
    assert not calls
    take(x, x, fmt)
    take(x.t(), x.t(), fmt)
    assert len(calls) == 2
