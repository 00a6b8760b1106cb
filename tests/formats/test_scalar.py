"""The scalar reference in exact arithmetic and the vectorised rounding: the same bits for the same numbers.

Neither is the oracle of the other. They share no arithmetic (fractions here, frexp and rint there), so an error in one
shows as a difference.
"""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzo.formats import FORMATS, decode, encode_scaled, get_format, quantize
from mezzo.formats.philox import bits
from mezzo.formats.rounding import round_elements
from mezzo.formats.scalar import round_group_scalar, round_scalar
from mezzo.formats.spec import FLOAT32, FLOAT64

KEY = (2**63 + 5, 7, "blocks.3.attn.qkv/wgrad/a")
ROUNDINGS = ("nearest", "stochastic", "toward_zero")
OVERFLOWS = ("saturate", "cast")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
SCALED = ("mxfp8", "mxfp4+floor", "nvfp4", "nvfp4_16x16", "e4m3@row", "e5m2@tensor", "int8@1x16", "e2m3@1x8+pow2")
FLOATS32 = st.floats(width=32)


def as_bits(x):
    """float64 numbers as codes that keep the signs of zeros apart and make every NaN the same."""
    wide = np.asarray(x).astype(np.float64)
    return np.where(np.isnan(wide), np.float64(np.nan), wide).view(np.uint64)


def same(got, want, x):
    equal = as_bits(got) == as_bits(want)
    assert equal.all(), [
        (float(a), float(b), float(c))
        for a, b, c in zip(*(np.asarray(v).ravel()[~equal.ravel()][:5] for v in (x, got, want)), strict=True)
    ]


def words_of(rounding, count):
    return bits(*KEY, count).tolist() if rounding == "stochastic" else [0] * count


def key_of(rounding):
    return KEY if rounding == "stochastic" else None


def hard_cases(fmt, dtype):
    """Values of the format, ties between them, and all of their neighbours in the dtype, of both signs."""
    gap, top_gap = fmt.min_subnormal, 2.0 ** (fmt.max_exponent - fmt.mantissa_bits)
    near_zero = [gap * q for q in (0.25, 0.5, 0.75, 1, 1.5, 2.5, 3.5)]
    near_normal = [fmt.min_normal - gap / 2, fmt.min_normal, fmt.min_normal + gap / 2, fmt.min_normal + 1.5 * gap]
    near_one = [1 + fmt.epsilon * q for q in (0, 0.25, 0.5, 1, 1.5, 2.5, 2.25)]
    with np.errstate(over="ignore"):
        near_top = np.float64(fmt.max) + top_gap * np.array([-1.5, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.5])
        large = np.array([2 * np.float64(fmt.max), 6e4, 3e38, 1.7e308, math.inf])
        base = np.concatenate([[0.0, math.nan], near_zero, near_normal, near_one, near_top, large]).astype(dtype)
        base = np.concatenate([base, np.random.default_rng(0).standard_normal(9).astype(dtype)])
    up, down = (np.nextafter(base, dtype(way)) for way in (math.inf, -math.inf))
    x = np.concatenate([base, up, down])
    code = np.concatenate([x, -x]).view(f"u{np.dtype(dtype).itemsize}")
    return np.unique(code).view(dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # nextafter of the largest number
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_the_scalar_and_the_vectorised_rounding_agree_on_hard_cases(name, dtype):
    fmt = FORMATS[name]
    x = hard_cases(fmt, DTYPES[dtype])
    if name == "float64":
        x = x[::4]  # two milliseconds a number, and all of them stay as they are
    for rounding, overflow in itertools.product(ROUNDINGS, OVERFLOWS):
        got = quantize(x, fmt, rounding=rounding, overflow=overflow, key=key_of(rounding))
        want = [
            round_scalar(float(v), fmt, rounding, overflow, word)
            for v, word in zip(x, words_of(rounding, x.size), strict=True)
        ]
        same(got, want, x)


@settings(deadline=None, max_examples=150)  # a shared machine may be slow for a moment
@given(
    name=st.sampled_from(sorted(FORMATS)),
    rounding=st.sampled_from(ROUNDINGS),
    overflow=st.sampled_from(OVERFLOWS),
    x=st.lists(st.one_of(FLOATS32, st.floats(), st.floats(-600, 600)), min_size=1, max_size=4),
)
def test_the_scalar_and_the_vectorised_rounding_agree_on_any_numbers(name, rounding, overflow, x):
    got = quantize(np.array(x), name, rounding=rounding, overflow=overflow, key=key_of(rounding))
    want = [
        round_scalar(v, FORMATS[name], rounding, overflow, word)
        for v, word in zip(x, words_of(rounding, len(x)), strict=True)
    ]
    same(got, want, x)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float64"])
def test_both_round_away_from_zero_for_exactly_the_words_below_the_fraction(name):
    fmt = FORMATS[name]
    low = fmt.min_normal if fmt.is_integer else 1.0
    gap = low * fmt.epsilon
    # 7 and 29 bits after the gap, so that x is exact in float64 behind float32's 23.
    for fraction in (Fraction(1, 128), Fraction(77, 128), Fraction(127, 128), Fraction(2**29 - 1, 2**29)):
        x = low + float(fraction) * gap
        threshold = math.floor(fraction * 2**32)
        words = np.array([0, threshold - 1, threshold, 2**32 - 1], np.uint32)
        want = [low + gap, low + gap, low, low]
        assert round_elements(np.full(4, x), fmt, "stochastic", "saturate", words).tolist() == want
        assert [round_scalar(x, fmt, "stochastic", word=int(word)) for word in words] == want


# --------------------------------------------------------------------------------------------------------------- groups


def groups_of(shape, fmt):
    """Flat indices of the elements that share a scale, along the last axis of a matrix."""
    index = np.arange(math.prod(shape)).reshape(shape)
    if fmt.group == "tensor":
        return [index.ravel()]
    rows, columns = (1, shape[1]) if fmt.group == "row" else fmt.group
    starts = itertools.product(range(0, shape[0], rows), range(0, shape[1], columns))
    return [index[i : i + rows, j : j + columns].ravel() for i, j in starts]


def check_groups(x, fmt, rounding="nearest", overflow="saturate"):
    got = quantize(x, fmt, rounding=rounding, overflow=overflow, key=key_of(rounding))
    work = FLOAT64 if x.dtype == np.float64 else FLOAT32
    assert got.dtype.name == work.name
    flat, words = x.ravel().tolist(), words_of(rounding, x.size)
    tensor_amax = float(np.abs(x).max()) if fmt.scaling == "nvfp4" else None
    want, scales = np.zeros(x.size), []
    for index in groups_of(x.shape, fmt):
        part, drawn = [flat[i] for i in index], [words[i] for i in index]
        want[index], scale = round_group_scalar(part, fmt, tensor_amax, rounding, overflow, drawn, work)
        scales.append(scale)
    same(got, want.reshape(x.shape), x)
    stored = encode_scaled(x, fmt).scales.ravel()
    stored = stored if fmt.scaling == "free" else decode(stored, fmt.scale)
    same(stored, np.array(scales), np.arange(len(scales)))


def shape_for(fmt):
    """Two groups or more, the last ones short; small, since the scalar takes a millisecond for each number."""
    rows, columns = fmt.group if isinstance(fmt.group, tuple) else (1, 8)
    return (rows + 1, columns + 3) if rows == 1 else (rows + 1, 5)


def tensors(fmt, dtype):
    """Named matrices of the dtype: ordinary ones, and those at every limit of the scales."""
    shape = shape_for(fmt)
    rng = np.random.default_rng(1)
    usual = rng.standard_normal(shape)
    info = np.finfo(dtype)
    with np.errstate(over="ignore", under="ignore"):
        made = {
            "usual": usual,
            "zero": np.zeros(shape) * np.sign(usual),
            "tiny": np.abs(usual) * 2.0**-147,
            "subnormal": rng.integers(-9, 10, shape) * float(info.smallest_subnormal),
            "near the smallest scale": usual * 2.0**-126,
            "huge": np.clip(usual * 1e38, -3.4e38, 3.4e38),
            "the largest": np.where(usual > 0.5, float(FLOAT32.max), usual * 2.0**100),
            "at the element's limits": fmt.element.max * np.where(usual > 0, 1.0, 1 + 2.0**-20) * (usual > -1),
            "many binades": usual * 2.0 ** rng.integers(-40, 40, shape),
            "one zero row": usual * (np.arange(shape[0]) > 0)[:, None],
        }
        made = {what: x.astype(dtype) for what, x in made.items()}
    for what, value in (("NaN", math.nan), ("infinite", math.inf), ("negative infinite", -math.inf)):
        made[what] = usual.astype(dtype)
        made[what][0, 1] = value
    return made


@pytest.mark.parametrize(
    ("rounding", "overflow"), [("nearest", "saturate"), ("stochastic", "cast"), ("toward_zero", "saturate")]
)
@pytest.mark.parametrize("name", SCALED)
def test_groups_of_float32_agree_with_the_scalar(name, rounding, overflow):
    fmt = get_format(name)
    for x in tensors(fmt, np.float32).values():
        check_groups(x, fmt, rounding, overflow)


@pytest.mark.parametrize("name", SCALED)
def test_groups_of_float64_agree_with_the_scalar(name):
    fmt = get_format(name)
    made = tensors(fmt, np.float64)
    made["beyond float32"] = made["usual"] * 1e300
    made["below float32"] = made["usual"] * 1e-300
    for what in ("usual", "zero", "subnormal", "the largest", "many binades", "beyond float32", "below float32", "NaN"):
        check_groups(made[what], fmt)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SCALED)
def test_groups_of_sixteen_bits_agree_with_the_scalar(name, dtype):
    fmt = get_format(name)
    x = tensors(fmt, np.float32)["usual"].astype(DTYPES[dtype])
    check_groups(x, fmt)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(SCALED),
    rounding=st.sampled_from(ROUNDINGS),
    overflow=st.sampled_from(OVERFLOWS),
    x=st.lists(st.one_of(FLOATS32, st.floats(-8, 8, width=32)), min_size=1, max_size=10),
)
def test_groups_of_any_numbers_agree_with_the_scalar(name, rounding, overflow, x):
    check_groups(np.array([x], np.float32), get_format(name), rounding, overflow)
