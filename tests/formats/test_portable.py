"""The algorithms that JAX and TensorFlow share, over NumPy: they give the bits of the reference, every input of it.

The frameworks themselves are held by tests/conformance.
"""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, get_format, hadamard, philox, quantize
from mezzo.formats.portable import hadamard as portable_hadamard
from mezzo.formats.portable import philox as portable_philox
from mezzo.formats.portable.numpy_arrays import NumpyArrays
from mezzo.formats.portable.quantize import quantize as portable_quantize

XP = NumpyArrays()
KEY = (2026, 3, "blocks.0.mlp.up/fprop/a")
DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
SCALED = (
    "mxfp8",
    "mxfp8_e5m2+floor",
    "mxfp6",
    "mxfp6_e3m2",
    "mxfp4+floor",
    "nvfp4",
    "nvfp4_16x16",
    "e2m1@3x5+nvfp4",
    "e4m3@tensor",
    "e4m3@2x8",
    "e5m2@row",
    "e3m2@row",
    "e2m3@1x5",
    "e2m1@1x4",
    "int8@row",
    "int8@1x16+pow2",
)
ROUNDINGS = [("nearest", None), ("toward_zero", None), ("stochastic", KEY)]


def same(got, want, what=None):
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    raw = f"u{want.dtype.itemsize}"
    equal = (got.view(raw) == want.view(raw)) | (np.isnan(got) & np.isnan(want))
    assert equal.all(), (what, np.argwhere(~equal)[:5].tolist(), got[~equal][:5], want[~equal][:5])


def any_bits(rng, shape, dtype):
    """Numbers of all sizes, subnormal ones, infinities and NaN."""
    dtype = np.dtype(dtype)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return raw.view(dtype)[..., 0]


def of_sizes(rng, shape, dtype, lowest, highest):
    return np.ldexp(rng.standard_normal(shape), rng.integers(lowest, highest, shape)).astype(dtype)


@np.errstate(all="ignore")
def arrays(shape, dtype):
    """What → array: bits at random, usual numbers, numbers about the smallest, a large range and no NaN, zeros."""
    rng = np.random.default_rng(0)
    wide = any_bits(rng, shape, dtype)
    zeros = of_sizes(rng, shape, dtype, -3, 3)
    zeros[:, : shape[1] // 2] *= 0
    return {
        "any bits": wide,
        "usual": of_sizes(rng, shape, dtype, -12, 13),
        "subnormal": of_sizes(rng, shape, dtype, -152, -110),
        "wide": np.where(np.isfinite(wide), wide, wide.dtype.type(1)),
        "zeros": zeros,
    }


@np.errstate(all="ignore")
def hold(x, fmt, *, axis=-1, overflow="saturate", scale=None, what=None):
    for rounding, key in ROUNDINGS:
        want = quantize(x, fmt, axis=axis, rounding=rounding, overflow=overflow, key=key, scale=scale)
        given = None if scale is None else np.float32(scale)
        got = portable_quantize(XP, x, get_format(fmt), axis, rounding, overflow, key, given)
        same(got, want, (fmt, what, rounding, overflow, axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("fmt", FORMATS)
def test_elements_are_rounded_as_the_reference_rounds_them(fmt, dtype):
    for what, x in arrays((70, 61), dtype).items():
        for overflow in ("saturate", "cast"):
            hold(x, fmt, overflow=overflow, what=what)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_number_of_sixteen_bits_is_read_and_written_right(fmt, dtype):
    hold(np.arange(1 << 16, dtype=np.uint16).view(dtype), fmt, overflow="cast")


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "float64"])
def test_ties_and_their_neighbours_are_rounded_as_the_reference_rounds_them(fmt):
    found = FORMATS[fmt]
    rng = np.random.default_rng(1)
    lowest, highest = max(found.min_exponent - found.mantissa_bits, -149), min(found.max_exponent, 127)
    step = rng.integers(0, 4 << min(found.mantissa_bits, 20), 3000) / 2.0 ** (found.mantissa_bits + 2)
    x = np.ldexp(1 + step, rng.integers(lowest - 2, highest + 1, 3000))
    for dtype in (np.float32, np.float64):
        with np.errstate(all="ignore"):
            y = np.concatenate([x, -x]).astype(dtype)
            y = np.concatenate([y, np.nextafter(y, dtype(np.inf)), np.nextafter(y, dtype(-np.inf))])
        hold(y, fmt, overflow="cast")
        hold(y, fmt)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("fmt", SCALED)
def test_groups_are_rounded_as_the_reference_rounds_them(fmt, dtype):
    for what, x in arrays((40, 37), dtype).items():
        for overflow in ("saturate", "cast"):
            hold(x, fmt, overflow=overflow, what=what)
        hold(x, fmt, axis=0, what=what)
    hold(arrays((4, 90), dtype)["usual"].reshape(2, 3, 4, 15), fmt, axis=1)


@pytest.mark.parametrize("scale", [0.3125, 3.0, 2.0**-149, 1e-40, 2.0**-126, 3e38])
def test_given_scales_divide_as_the_reference_divides(scale):
    for fmt in ("e4m3@tensor", "e5m2@row", "int8@1x16"):
        for dtype in (np.float32, np.float64):
            for what, x in arrays((20, 37), dtype).items():
                for overflow in ("saturate", "cast"):
                    hold(x, fmt, overflow=overflow, scale=scale, what=what)


def test_a_given_scale_for_each_group():
    x = arrays((6, 5, 37), np.float32)["usual"]
    rng = np.random.default_rng(2)
    for fmt, axis, shape in (("e4m3@1x16", 1, (6, 1, 37)), ("e4m3@1x16", 2, (6, 5, 3)), ("e4m3@2x8", 0, (1, 3, 37))):
        # The groups lie in the order of the array's own axes.
        shape = (6, 1, 37) if axis == 1 else shape
        shape = (1, 5, 19) if fmt == "e4m3@2x8" else shape
        hold(x, fmt, axis=axis, scale=rng.uniform(0.01, 3, shape).astype(np.float32))
    with pytest.raises(ConfigError, match=r"the scale must have the shape \(\) or \(6, 5, 3\)"):
        portable_quantize(XP, x, get_format("e4m3@1x16"), -1, "nearest", "saturate", None, np.ones((6, 5), np.float32))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.sampled_from([*SCALED[:5], "nvfp4", "e4m3@tensor", "e5m2@row", "int8@row"]),
)
def test_any_numbers_are_rounded_as_the_reference_rounds_them(x, fmt):
    hold(np.array(x, np.float32), fmt, overflow="cast")


@pytest.mark.parametrize("largest", [2.0**-149, 2.0**-133, 3e-36, 3e-35, 2.0**-126, 1.0, 3.4e38])
def test_nvfp4_of_tensors_of_any_size_of_numbers(largest):
    # From 7.9e-36 to 3.2e-35, 2688 · 2**-126, the scale of the tensor is subnormal and rounded.
    rng = np.random.default_rng(3)
    for _ in range(60):
        x = (rng.uniform(-1, 1, (8, 32)) * rng.uniform(0.3, 1) * largest).astype(np.float32)
        hold(x, "nvfp4")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("inverse", [False, True])
@np.errstate(all="ignore")
def test_the_hadamard_transform_has_the_bits_of_the_reference(dtype, inverse):
    found = arrays((64, 64), dtype)
    found["small beside large"] = np.where(np.arange(64) % 7 == 0, found["usual"], found["subnormal"])
    found["sums that cancel"] = np.where(np.arange(64) % 16 < 2, dtype(1), found["subnormal"])
    if dtype is np.float64:
        found["subnormal in float64"] = found["subnormal"] * 2.0**-920
    for what, x in found.items():
        for block, axis in ((4, 0), (16, 1), (64, 1)):
            want = hadamard(x, axis=axis, block=block, seed=5, inverse=inverse)
            same(portable_hadamard.hadamard(XP, x, axis, block, 5, inverse), want, (what, block))


@pytest.mark.parametrize("key", [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), KEY, (2**32, np.int64(7), 1)])
def test_the_words_are_those_of_the_generator(key):
    assert np.array_equal(portable_philox.bits(XP, *key, 4099), philox.bits(*key, 4099))


@pytest.mark.parametrize("fmt", ["bfloat16", "e4m3", "e8m0", "mxfp8"])
def test_a_fraction_goes_up_if_its_word_is_below_it_and_not_if_it_is_equal(fmt):
    words = philox.bits(*KEY, 64)
    up = np.arange(64) % 2
    found = get_format(fmt)
    eps = getattr(found, "element", found).epsilon
    x = 1 + (words.astype(np.float64) + up) / 2.0**32 * eps
    x[-1] = 448.0 if fmt == "mxfp8" else x[-1]  # its scale is 1
    hold(x, fmt)
    got = portable_quantize(XP, x, found, -1, "stochastic", "saturate", KEY, None)
    assert np.array_equal(got[:-1], (1 + up * eps)[:-1])


def test_words_that_cannot_be_are_refused():
    for key in ((-1, 0, 0), (0, 2**32, 0), (0, 0, 2**32), (2**64, 0, 0)):
        with pytest.raises(ConfigError, match=r"seed is below 2\*\*64, step and site below 2\*\*32"):
            portable_philox.bits(XP, *key, 4)
    with pytest.raises(ConfigError, match="takes fewer than"):
        portable_philox.bits(XP, 0, 0, 0, 2**34)


@pytest.mark.parametrize("fmt", ["bfloat16", "mxfp8", "nvfp4", "e4m3@tensor"])
def test_empty_arrays_and_single_numbers(fmt):
    hold(np.zeros((3, 0), np.float32), fmt)
    hold(np.ones((1, 1), np.float32), fmt)
    if fmt in ("bfloat16", "e4m3@tensor"):
        hold(np.float32(1.01).reshape(()), fmt)
