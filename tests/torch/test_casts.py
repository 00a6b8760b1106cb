import ml_dtypes
import numpy as np
import pytest
import torch

from mezzo.formats import FORMATS, quantize
from mezzo.torch.rounding import CARRIERS, carrier, cast

SIXTEEN = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def bits(x: np.ndarray) -> np.ndarray:
    """As integers, so that -0 and 0 differ; every NaN alike."""
    return np.where(np.isnan(x), -1, x.view(f"i{x.itemsize}"))


def hard_cases(fmt: str, dtype: type) -> np.ndarray:
    """Every value of a 16-bit format, the ties between neighbours, the neighbours of both, and the special values."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = np.arange(2**16, dtype=np.uint16).view(SIXTEEN[fmt]).astype(np.float64)
    grid = np.unique(values[np.isfinite(values)])
    edge = FORMATS[fmt].max * (1 + FORMATS[fmt].epsilon / 4)  # halfway to what would be the next value
    base = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [np.inf, -np.inf, np.nan, 0.0, -0.0, edge, -edge, 1e-46]])
    with np.errstate(all="ignore"):
        base = base.astype(dtype)
        up, down = np.nextafter(base, dtype(np.inf)), np.nextafter(base, dtype(-np.inf))
        return np.concatenate([base, up, down])


@pytest.mark.parametrize("fmt", SIXTEEN)
def test_every_value_tie_and_neighbour_is_rounded_as_ml_dtypes_does(fmt):
    x = hard_cases(fmt, np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(SIXTEEN[fmt]).astype(np.float32)
    got = cast(torch.from_numpy(x), FORMATS[fmt])
    assert got.dtype is carrier(FORMATS[fmt])
    assert np.array_equal(bits(got.float().numpy()), bits(want))


@pytest.mark.parametrize("fmt", SIXTEEN)
def test_float64_is_rounded_once(fmt):
    x = hard_cases(fmt, np.float64)  # neighbours in float64 are ties again after a detour through float32
    got = cast(torch.from_numpy(x), FORMATS[fmt]).double().numpy()
    assert np.array_equal(bits(got), bits(quantize(x, fmt, overflow="cast")))
    detour = torch.from_numpy(x).to(CARRIERS[fmt]).double().numpy()
    assert not np.array_equal(bits(got), bits(detour)), "torch's own cast is no longer a double rounding: drop ours"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tf32_is_rounded_as_the_numpy_reference_does(dtype):
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ends = np.concatenate([patterns & 0xFFFFE000 | low for low in (0x0FFF, 0x1000, 0x1001)])  # around the ties
    x = np.concatenate([patterns, ends.astype(np.uint32)]).view(np.float32)
    x = np.concatenate([x, np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e35, 3.4028235e38, 1e-45])])
    with np.errstate(invalid="ignore", over="ignore"):
        x = x.astype(dtype)
        want = quantize(x, "tf32", overflow="cast").astype(np.float32)
    if dtype is np.float64:
        x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf)])
        with np.errstate(over="ignore", invalid="ignore"):
            want = quantize(x, "tf32", overflow="cast").astype(np.float32)
    got = cast(torch.from_numpy(x), FORMATS["tf32"])
    assert got.dtype is torch.float32
    assert np.array_equal(bits(got.numpy()), bits(want))


@pytest.mark.parametrize("have", ["bfloat16", "float16"])
@pytest.mark.parametrize("want", ["tf32", "bfloat16", "float16"])
def test_a_16_bit_tensor_is_rounded_once_to_every_other_format(have, want):
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(CARRIERS[have])
    got = cast(codes, FORMATS[want]).double().numpy()
    assert np.array_equal(bits(got), bits(quantize(codes.double().numpy(), want, overflow="cast")))


def test_nothing_is_copied_where_nothing_changes():
    for fmt in map(FORMATS.get, CARRIERS):
        x = torch.randn(3).to(carrier(fmt))
        assert (cast(x, fmt) is x) == (fmt.name != "tf32")


def test_a_cast_keeps_the_shape_and_the_order_in_memory():
    x = torch.randn(3, 4).t()
    for fmt in FORMATS.values():
        assert cast(x, fmt).stride() == x.stride()
        assert cast(torch.zeros(0, 3), fmt).shape == (0, 3)
        assert cast(torch.tensor(1.5), fmt).shape == ()
