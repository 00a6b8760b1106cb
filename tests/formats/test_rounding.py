import ml_dtypes
import numpy as np
import pytest

from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, get_format, quantize

ORACLE = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def hard_cases(fmt):
    """Every value of a 16-bit format, its neighbours in float32 and the ties between neighbours."""
    codes = np.arange(2**16, dtype=np.uint16)
    values = codes.view(ORACLE[fmt]).astype(np.float32)
    values = values[np.isfinite(values)]
    grid = np.unique(values)
    ties = (grid[1:].astype(np.float64) + grid[:-1]) / 2
    base = np.concatenate([grid, ties, [np.inf, -np.inf, np.nan, 0.0, -0.0, 65519.99, 65520.0, 3.3961e38, 3.4e38]])
    with np.errstate(over="ignore"):
        base = base.astype(np.float32)
        return np.concatenate([base, np.nextafter(base, np.float32(np.inf)), np.nextafter(base, np.float32(-np.inf))])


@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
def test_rounding_agrees_with_ml_dtypes_on_every_value_tie_and_neighbour(fmt):
    x = hard_cases(fmt)
    with np.errstate(over="ignore"):
        want = x.astype(ORACLE[fmt]).astype(np.float32)
    got = quantize(x, fmt, overflow="cast")
    assert np.array_equal(np.isnan(got), np.isnan(want))
    ok = ~np.isnan(want)
    assert np.array_equal(got[ok].view(np.uint32), want[ok].view(np.uint32))


def test_float64_input_is_rounded_once():
    # 1 + 2^-8 + 2^-40 lies just above a bfloat16 tie: through float32 it becomes the tie and rounds down to 1.
    assert quantize(np.float64(1 + 2**-8 + 2**-40), "bfloat16") == 1 + 2**-7
    assert np.float64(1 + 2**-8 + 2**-40).astype(np.float32).astype(ml_dtypes.bfloat16) == 1


def test_tf32_keeps_ten_bits_and_the_exponents_of_float32():
    x = np.array([1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 1e38, 2.0**-149, np.inf], np.float32)
    want = np.array([1 + 2**-10, 1, 1 + 2**-9, 1e38, 0, np.inf], np.float64)
    got = quantize(x, "tf32", overflow="cast").astype(np.float64)
    assert got[3] == pytest.approx(1e38, rel=2**-11)
    assert np.array_equal(np.delete(got, 3), np.delete(want, 3))


def test_derived_constants_are_those_of_ml_dtypes():
    for name, dtype in [*ORACLE.items(), ("float64", np.float64)]:
        info, fmt = ml_dtypes.finfo(dtype), FORMATS[name]
        assert fmt.max == float(info.max)
        assert fmt.min_normal == float(info.smallest_normal)
        assert fmt.min_subnormal == float(info.smallest_subnormal)
        assert fmt.epsilon == float(info.eps)


def test_an_unknown_format_or_an_integer_array_is_refused():
    with pytest.raises(ConfigError, match="unknown number format 'fp17'; known: float64, float32"):
        get_format("fp17")
    with pytest.raises(ConfigError, match="float16, bfloat16, float32 or float64 arrays, got int64"):
        quantize(np.arange(3), "bfloat16")
