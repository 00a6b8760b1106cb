import math

import ml_dtypes
import numpy as np
import pytest

from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, decode, get_format, quantize
from mezzo.formats.philox import bits

ORACLE = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
KEY = (2026, 3, "blocks.0.mlp.up/fprop/a")
NARROW = [name for name in FORMATS if name != "float64"]  # those that round a float64 at all


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


@pytest.mark.parametrize(
    ("dtype", "fmt", "result"),
    [
        (np.float16, "float8_e4m3fn", "float16"),
        (np.float16, "bfloat16", "float32"),
        (np.float16, "float8_e8m0fnu", "float32"),
        (ml_dtypes.bfloat16, "int8", "bfloat16"),
        (ml_dtypes.bfloat16, "float16", "float32"),
        (ml_dtypes.bfloat16, "float8_e8m0fnu", "bfloat16"),
        (np.float32, "tf32", "float32"),
        (np.float32, "float64", "float64"),
        (np.float64, "float4_e2m1fn", "float64"),
    ],
)
def test_the_result_has_the_dtype_of_the_argument_where_that_holds_it(dtype, fmt, result):
    x = np.ones((2, 3), dtype)
    got = quantize(x, fmt)
    assert got.dtype.name == result
    assert got.shape == x.shape
    assert (got == 1).all()


@pytest.mark.parametrize("fmt", NARROW)
def test_rounding_toward_zero_never_grows_a_number_nor_moves_it_by_a_whole_gap(fmt):
    fmt = get_format(fmt)
    rng = np.random.default_rng(0)
    lowest = -3 if fmt.is_integer else fmt.min_exponent
    x = rng.uniform(1, 2, 2000) * 2.0 ** rng.integers(lowest, fmt.max_exponent + 1, 2000)
    x = x if fmt.is_scale else x * rng.choice([-1, 1], 2000)
    got = quantize(x, fmt, rounding="toward_zero", overflow="cast")
    limit = np.abs(np.clip(x, fmt.min, fmt.max))
    assert (np.abs(got) <= np.abs(x)).all()
    assert (np.signbit(got) == np.signbit(x))[got != 0].all()
    gap = 1.0 if fmt.is_integer else 2.0 ** (np.frexp(x)[1] - 1.0 - fmt.mantissa_bits)
    assert (np.abs(got) > limit - gap).all()


# ---------------------------------------------------------------------------------------------------------- stochastic


def some_values(fmt):
    """Every finite number of a format of up to 16 bits; twenty thousand of a wider one."""
    codes = np.arange(1 << fmt.bits) if fmt.bits <= 16 else bits(1, 2, 3, 20_000)
    values = decode(codes, fmt).astype(np.float64)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("fmt", NARROW)
def test_no_rounding_moves_a_number_of_the_format(fmt):
    x = some_values(FORMATS[fmt])
    for rounding, key in (("nearest", None), ("toward_zero", None), ("stochastic", KEY)):
        for overflow in ("saturate", "cast"):
            got = quantize(x, fmt, rounding=rounding, overflow=overflow, key=key)
            assert np.array_equal(got.view(np.uint64), x.view(np.uint64)), (rounding, overflow)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fmt", NARROW)
def test_the_share_of_ups_is_the_fraction_of_the_gap(fmt, sign):
    fmt, n = FORMATS[fmt], 20_000
    sign = 1 if fmt.is_scale else sign
    # Between two normals, and between the two smallest numbers (a power of two has no zero below it).
    low_and_gap = [(2.0, 1.0 if fmt.is_integer else 2 * fmt.epsilon)]
    if not fmt.is_scale:
        low_and_gap += [(0.0, fmt.min_subnormal), (fmt.min_subnormal, fmt.min_subnormal)]
    for step, (low, gap) in enumerate(low_and_gap):
        for fraction in (2.0**-8, 0.25, 0.5, 0.703125, 1 - 2.0**-8):
            x = sign * (low + fraction * gap)
            got = quantize(np.full(n, x), fmt, rounding="stochastic", key=(7, step, f"{fmt}{fraction}{sign}"))
            up = got == sign * (low + gap)
            assert (up | (got == sign * low)).all()
            # n draws at p: the share's standard deviation is sqrt(p (1 - p) / n); three of them. The fractions are
            # multiples of 2**-32, so p is exact.
            assert abs(up.mean() - fraction) <= 3 * math.sqrt(fraction * (1 - fraction) / n), (low, fraction, up.mean())


@pytest.mark.parametrize("fmt", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8"])
def test_stochastic_rounding_keeps_a_sum_where_truncation_loses_it(fmt):
    fmt, n = FORMATS[fmt], 50_000
    x = np.random.default_rng(1).uniform(0, min(fmt.max, 1000), n)
    down = quantize(x, fmt, rounding="toward_zero")
    gap = np.where(x < fmt.min_normal, fmt.min_subnormal, 2.0 ** (np.frexp(x)[1] - 1.0 - fmt.mantissa_bits))
    gap = np.ones(n) if fmt.is_integer else gap
    p = (x - down) / gap
    # Independent errors, each of variance p (1 - p) gap**2; three standard deviations of their sum. p is off by less
    # than 2**-32, which moves the sum by n gap 2**-32.
    sigma = math.sqrt((p * (1 - p) * gap**2).sum())
    got = quantize(x, fmt, rounding="stochastic", key=KEY)
    assert abs((got - x).sum()) <= 3 * sigma + n * gap.max() * 2.0**-32
    assert (x - down).sum() > 30 * sigma


def test_half_of_a_tie_goes_up_whatever_its_neighbours():
    # To even, 1.0625 always goes down and 1.1875 always up (e4m3 has 1, 1.125, 1.25).
    x = np.repeat([1.0625, 1.1875], 5000)
    assert set(quantize(x, "e4m3")) == {1.0, 1.25}
    up = quantize(x, "e4m3", rounding="stochastic", key=KEY) > x
    for half in (up[:5000], up[5000:]):
        assert abs(half.mean() - 0.5) <= 3 * 0.5 / math.sqrt(5000)


def test_element_i_takes_word_i_in_any_shape():
    x = np.random.default_rng(2).standard_normal(60)
    flat = quantize(x, "e4m3", rounding="stochastic", key=KEY)
    assert np.array_equal(quantize(x.reshape(3, 4, 5), "e4m3", rounding="stochastic", key=KEY), flat.reshape(3, 4, 5))
    assert np.array_equal(quantize(x[:7], "e4m3", rounding="stochastic", key=KEY), flat[:7])
    lines = np.asfortranarray(x.reshape(6, 10))  # counted by index, not by memory
    assert np.array_equal(quantize(lines, "e4m3", rounding="stochastic", key=KEY), flat.reshape(6, 10))


def test_seed_step_and_site_each_change_which_go_up():
    x = np.full(64, 1.0625)
    runs = [quantize(x, "e4m3", rounding="stochastic", key=key) for key in ((1, 1, "a"), (2, 1, "a"), (1, 2, "a"))]
    runs.append(quantize(x, "e4m3", rounding="stochastic", key=(1, 1, "b")))
    assert len({run.tobytes() for run in runs}) == 4
    assert np.array_equal(quantize(x, "e4m3", rounding="stochastic", key=(1, 1, "a")), runs[0])


def test_stochastic_rounding_beyond_the_largest_value_does_as_the_overflow_says():
    x = np.full(4000, 464.0)  # in the middle between 448 and 480, which e4m3 does not have
    assert (quantize(x, "e4m3", rounding="stochastic", key=KEY) == 448).all()
    cast = quantize(x, "e4m3", rounding="stochastic", key=KEY, overflow="cast")
    assert ((cast == 448) | np.isnan(cast)).all()
    assert abs(np.isnan(cast).mean() - 0.5) <= 3 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "^unknown rounding 'up'; known: nearest, stochastic, toward_zero$"),
        ({"overflow": "wrap"}, "^unknown overflow 'wrap'; known: saturate, cast$"),
        ({"rounding": "stochastic"}, r"^stochastic rounding needs key=\(seed, step, site\), which its random bits"),
        ({"key": KEY}, "^key is for stochastic rounding; the rounding is 'nearest'$"),
        ({"rounding": "toward_zero", "key": KEY}, "the rounding is 'toward_zero'$"),
    ],
)
@pytest.mark.parametrize("fmt", ["bfloat16", "mxfp8"])
def test_options_that_are_unknown_or_do_not_go_together_are_refused(fmt, options, message):
    with pytest.raises(ConfigError, match=message):
        quantize(np.ones(32), fmt, **options)
