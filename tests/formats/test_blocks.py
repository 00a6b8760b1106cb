"""Scaled formats at their edges, as the head of mezzo/formats/blocks.py documents them, and their codes.

`test_scalar.py` holds the arithmetic of ordinary groups; here are the documented answers, written out.
"""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from mezzo.errors import ConfigError
from mezzo.formats import Encoded, decode_scaled, encode_scaled, get_format, quantize
from mezzo.formats.blocks import FLOAT32_MAX, MIN_SCALE, max_scale
from mezzo.formats.scaled import ELEMENTS

FORMATS = (
    "mxfp8",
    "mxfp8_e5m2+floor",
    "mxfp6",
    "mxfp6_e3m2",
    "mxfp4",
    "mxfp4+floor",
    "nvfp4",
    "nvfp4_16x16",
    "e2m1@3x5+nvfp4",
    "e4m3@tensor",
    "e5m2@row",
    "e3m2@row+pow2",
    "int8@1x16",
    "int8@1x16+floor",
    "e4m3@4x4",
    "e2m3@2x8+pow2",
)
FREE = ("e4m3@tensor", "e5m2@row", "int8@1x16", "e4m3@4x4", "e2m1@1x4")
SHAPES = ((37,), (1, 1), (17, 50), (3, 5, 34), (2, 2, 3, 18))


def usual(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 7, shape)).astype(np.float32)


def fits(fmt, shape):
    return not (isinstance(fmt.group, tuple) and fmt.group[0] > 1 and len(shape) < 2)


def same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    raw = f"u{want.dtype.itemsize}"
    equal = (got.view(raw) == want.view(raw)) | (np.isnan(got) & np.isnan(want))
    assert equal.all(), (np.argwhere(~equal)[:5].tolist(), got[~equal][:5], want[~equal][:5])


# ------------------------------------------------------------------------------------------------------------ the edges


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_with_their_signs(name):
    fmt = get_format(name)
    x = np.where(np.arange(60).reshape(4, 15) % 2, np.float32(-0.0), np.float32(0.0))
    want = np.abs(x) if fmt.element.is_integer else x  # two's complement has one zero
    same(quantize(x, fmt), want)
    stored = encode_scaled(x, fmt)
    # free: the smallest scale; powers of two: 2**-127, code 0; nvfp4: 0, code 0, with a tensor scale of 1.
    assert (stored.scales == (np.float32(2.0**-126) if fmt.scaling == "free" else 0)).all()
    assert stored.tensor_scale == (1 if fmt.scaling == "nvfp4" else None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_group_with_a_nan_or_an_infinity_becomes_nan_and_no_other_does(name, bad):
    fmt = get_format(name)
    x = usual((20, 70))
    clean = {overflow: quantize(x, fmt, overflow=overflow) for overflow in ("saturate", "cast")}
    x[18, 33] = bad
    lost = np.zeros(x.shape, bool)
    if fmt.group == "tensor" or fmt.scaling == "nvfp4":  # nvfp4's tensor scale depends on every element
        lost[:] = True
    elif fmt.group == "row":
        lost[18] = True
    else:
        r, c = fmt.group
        lost[18 // r * r : 18 // r * r + r, 33 // c * c : 33 // c * c + c] = True
    for overflow, want in clean.items():
        same(quantize(x, fmt, overflow=overflow), np.where(lost, np.float32(math.nan), want))
    stored = encode_scaled(x, fmt)
    assert (stored.codes[lost] == 0).all()
    nan = (
        np.isnan(stored.scales) if fmt.scaling == "free" else stored.scales == (0x7F if fmt.scaling == "nvfp4" else 255)
    )
    assert nan.any()
    assert nan.all() == lost.all()


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_tiny_groups_have_the_smallest_scale(element):
    x = np.float32([[2.0**-149, -(2.0**-140), 0.0, 2.0**-139]])
    free = quantize(x, f"{element}@row")
    assert encode_scaled(x, f"{element}@row").scales.tolist() == [[MIN_SCALE]]
    # Each a multiple of 2**-126 times the element's smallest number, rounded to nearest even, never beyond float32's.
    gap = element.min_subnormal * 2.0**-126
    assert (free / np.float64(gap) % 1 == 0).all()
    assert (np.abs(free - x.astype(np.float64)) <= max(gap / 2, 2.0**-149)).all()
    assert encode_scaled(x, f"{element}@row+pow2").scales.tolist() == [[0]]
    assert encode_scaled(x, f"{element}@row+floor").scales.tolist() == [[0]]


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_the_largest_scale_is_the_largest_whose_product_with_the_largest_element_is_finite(element):
    top, largest = np.float32(max_scale(element.max)), np.float32(element.max)
    assert np.isfinite(top * largest)
    with np.errstate(over="ignore"):
        assert np.isinf(np.nextafter(top, np.float32(math.inf)) * largest)
    x = np.float32([[FLOAT32_MAX, -FLOAT32_MAX, 1.0]])
    got = quantize(x, f"{element}@row")
    assert np.isfinite(got).all()
    assert encode_scaled(x, f"{element}@row").scales.tolist() == [[top]]
    assert abs(float(got[0, 0]) - FLOAT32_MAX) <= FLOAT32_MAX * 2.0**-22  # scale and product each round once


def test_with_powers_of_two_the_largest_numbers_may_round_out_of_float32():
    x = np.float32([[FLOAT32_MAX, 2.0**127, 1.75 * 2.0**127, 1.0]])
    # e4m3 has 4 digits: float32's largest is nearest to 2**128.
    assert quantize(x, "mxfp8").tolist() == [[math.inf, 2.0**127, 1.75 * 2.0**127, 0.0]]
    assert quantize(x.astype(np.float64), "mxfp8").tolist() == [[2.0**128, 2.0**127, 1.75 * 2.0**127, 0.0]]


def test_scales_of_float64_end_where_those_of_float32_do():
    x = np.array([[1e300, -1e300, 1.0]])
    assert encode_scaled(x, "e4m3@row").scales.tolist() == [[max_scale(448)]]
    assert quantize(x, "e4m3@row").tolist() == [[448 * max_scale(448), -448 * max_scale(448), 0.0]]
    assert encode_scaled(x, "mxfp8").scales.tolist() == [[254]]
    assert quantize(x, "mxfp8").tolist() == [[448 * 2.0**127, -448 * 2.0**127, 0.0]]
    assert np.isnan(quantize(x, "nvfp4")).all()  # beyond float32, which its tensor scale is counted in


def test_a_power_of_two_is_the_smallest_under_which_nothing_saturates():
    # 448 = 1.75 * 2**8, and the next float32 is one too many.
    above = np.nextafter(np.float32(448), np.float32(math.inf))
    x = np.float32([[448.0, 1.0], [above, 1.0], [224.0, 1.0]])
    assert encode_scaled(x, "e4m3@row+pow2").scales.tolist() == [[127], [128], [126]]
    assert quantize(x, "e4m3@row+pow2").tolist() == [[448.0, 1.0], [448.0, 1.0], [224.0, 1.0]]
    # The floor leaves e4m3's top binade 256 … 448 as it is, so 500 saturates.
    x = np.float32([[500.0, 1.0], [511.0, 256.0], [512.0, 1.0]])
    assert encode_scaled(x, "e4m3@row+floor").scales.tolist() == [[127], [127], [128]]
    assert quantize(x, "e4m3@row+floor").tolist() == [[448.0, 1.0], [448.0, 256.0], [512.0, 1.0]]
    assert np.isnan(quantize(x, "e4m3@row+floor", overflow="cast")).tolist() == [
        [True, False],
        [True, False],
        [False] * 2,
    ]


def test_nvfp4_has_two_scales():
    x = np.zeros((2, 32), np.float32)
    x[0, :3] = [2688, 448, -224]  # 2688 = 448 * 6: encode is 1, and so is the tensor scale
    x[1, :2] = [6, 3]
    x[1, 16] = 2.0**-12  # a scale of 2**-12 / 6, below half of e4m3's smallest, 2**-10
    stored = encode_scaled(x, "nvfp4")
    assert stored.tensor_scale == 1
    assert stored.scales.tolist() == [[0x7E, 0], [0x38, 0]]  # 448, 0; 1, 0
    got = quantize(x, "nvfp4")
    assert got[0, :3].tolist() == [2688, 448, -224]
    assert got[1, [0, 1, 16]].tolist() == [6, 3, 0]


@pytest.mark.parametrize("name", FORMATS)
def test_an_ordinary_group_is_off_by_half_an_ulp_of_the_element(name):
    fmt = get_format(name)
    x = usual((32, 64))
    got = quantize(x, fmt).astype(np.float64)
    amax = np.abs(x).max()
    # Nothing is off by more than half the gap at the top of the group with the largest amax: 2**(max_exponent -
    # mantissa_bits) of the element, times its scale, which is below 2 amax / max; "floor" also cuts off up to amax / 2,
    # and nvfp4's scale is off by 2**-4.
    gap = 2.0 ** (fmt.element.max_exponent - fmt.element.mantissa_bits) * 2 * amax / fmt.element.max
    cut = {"floor": amax / 2, "nvfp4": amax * 2.0**-4}.get(fmt.scaling, 0.0)
    assert np.abs(got - x).max() <= gap / 2 * (1 + 2.0**-20) + cut


# --------------------------------------------------------------------------------------------------------- given scales


@pytest.mark.parametrize("name", FREE)
def test_the_scale_that_amax_gives_may_be_given(name):
    for shape, axis in (((20, 37), 0), ((20, 37), 1), ((3, 8, 10), 1)):
        x = usual(shape)
        stored = encode_scaled(x, name, axis=axis)
        same(quantize(x, name, axis=axis, scale=stored.scales), quantize(x, name, axis=axis))


@pytest.mark.parametrize("name", FREE)
def test_one_scale_may_be_given_for_all(name):
    fmt = get_format(name)
    x = usual((6, 20))
    want = (quantize(x / np.float32(0.37), fmt.element) * np.float32(0.37)).astype(np.float32)
    same(quantize(x, name, scale=0.37), want)
    same(quantize(x, name, scale=np.float32(0.37)), want)


def test_a_given_scale_of_each_block_is_its_own():
    x = np.float32([[100, 1, 100, 1], [100, 1, 100, 1]])
    scales = [[0.25, 32.0], [16.0, 1.0]]
    # e2m1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    want = [[1.5, 1, 96, 0], [96, 0, 6, 1]]
    assert quantize(x, "e2m1@1x2", scale=scales).tolist() == want
    assert quantize(x.T, "e2m1@1x2", axis=0, scale=np.transpose(scales)).T.tolist() == want


def test_with_a_given_scale_only_the_element_itself_becomes_nan():
    x = np.float32([[1.0, math.nan, math.inf, -math.inf, 2.0]])
    same(quantize(x, "e4m3@tensor", scale=1.0), np.float32([[1.0, math.nan, math.nan, math.nan, 2.0]]))


def test_what_is_beyond_a_given_scale_saturates_or_is_cast():
    x = np.float32([[1e6, -1e6, 1.0]])
    assert quantize(x, "e4m3@row", scale=2.0).tolist() == [[896.0, -896.0, 1.0]]
    assert np.isnan(quantize(x, "e4m3@row", scale=2.0, overflow="cast")).tolist() == [[True, True, False]]
    assert quantize(x, "e5m2@row", scale=2.0, overflow="cast").tolist() == [[math.inf, -math.inf, 1.0]]
    assert quantize(x, "e5m2@row", scale=2.0, overflow="cast", rounding="toward_zero").tolist() == [
        [114688.0, -114688.0, 1.0]
    ]


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, math.inf, math.nan, 1e-60, 1e60, [[1.0], [0.0]]])
@pytest.mark.filterwarnings("ignore:overflow encountered")  # 1e60 is infinite as a float32
def test_a_given_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ConfigError, match=r"^a given scale must be positive and finite$"):
        quantize(np.ones((2, 3), np.float32), "e4m3@row", scale=scale)


@pytest.mark.parametrize(
    ("name", "axis", "shape"),
    [("e4m3@row", -1, "(4, 1)"), ("e4m3@row", 0, "(1, 40)"), ("e4m3@1x16", 1, "(4, 3)"), ("e4m3@3x16", 0, "(1, 14)")],
)
def test_given_scales_must_have_the_shape_of_the_groups(name, axis, shape):
    x = np.ones((4, 40), np.float32)
    for wrong in ((4,), (4, 4), (1,), (3, 4), (4, 40), (1, 1)):
        with pytest.raises(ConfigError) as caught:
            quantize(x, name, axis=axis, scale=np.ones(wrong))
        assert str(caught.value) == f"the scale must have the shape () or {shape}, one for each group, not {wrong}"
    with pytest.raises(ConfigError, match=r"must have the shape \(\) or \(\), one for each group, not \(1,\)"):
        quantize(x, "e4m3@tensor", scale=[1.0])


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4+floor", "nvfp4", "bfloat16", "e4m3"])
def test_a_scale_is_given_only_to_formats_scaled_by_a_float32(name):
    message = f"a scale can be given to formats scaled by a float32, such as e4m3@tensor; not to {get_format(name)}"
    with pytest.raises(ConfigError, match=f"^{message.replace('+', '[+]')}$"):
        quantize(np.ones((2, 32), np.float32), name, scale=1.0)


# ------------------------------------------------------------------------------------------------------ axes and shapes


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_along_an_axis_are_those_of_the_moved_array(name):
    fmt = get_format(name)
    for shape in SHAPES:
        if not fits(fmt, shape):
            continue
        x = usual(shape)
        for axis in range(len(shape)):
            got = quantize(x, fmt, axis=axis)
            same(got, np.moveaxis(quantize(np.moveaxis(x, axis, -1), fmt), -1, axis))
            same(got, quantize(x, fmt, axis=axis - len(shape)))


@pytest.mark.parametrize("name", FORMATS)
def test_each_block_is_rounded_as_if_it_were_alone(name):
    fmt = get_format(name)
    if fmt.scaling == "nvfp4" or not isinstance(fmt.group, tuple):
        pytest.skip("its groups share a scale, or are not blocks")
    x = usual((2, 7, 50))  # the last blocks are short both ways
    rows, columns = fmt.group
    got = quantize(x, fmt)
    for k, i, j in itertools.product(range(2), range(0, 7, rows), range(0, 50, columns)):
        part = x[k, i : i + rows, j : j + columns]
        same(got[k, i : i + rows, j : j + columns], quantize(part, fmt))


def test_rows_and_tensors_are_groups_too():
    x = usual((5, 9, 11))
    same(quantize(x, "e4m3@row"), np.stack([[quantize(row, "e4m3@tensor") for row in matrix] for matrix in x]))
    same(quantize(x, "e4m3@row"), quantize(x, "e4m3@1x11"))
    same(quantize(x, "e4m3@tensor"), quantize(x.ravel(), "e4m3@tensor").reshape(x.shape))
    for axis in range(3):  # a tensor has no axis
        same(quantize(x, "e4m3@tensor", axis=axis), quantize(x, "e4m3@tensor"))


@pytest.mark.parametrize(
    ("name", "shape", "axis", "scales"),
    [
        ("mxfp8", (64,), 0, (2,)),
        ("mxfp8", (65,), -1, (3,)),
        ("mxfp8", (4, 64), -1, (4, 2)),
        ("mxfp8", (64, 4), 0, (2, 4)),
        ("mxfp8", (3, 64, 5), 1, (3, 2, 5)),
        ("nvfp4_16x16", (33, 17), 1, (3, 2)),
        ("nvfp4_16x16", (33, 17), 0, (3, 2)),
        ("e4m3@4x8", (2, 9, 17), 2, (2, 3, 3)),
        ("e4m3@4x8", (2, 9, 17), 1, (2, 2, 5)),
        ("e4m3@4x8", (2, 9, 17), 0, (1, 9, 5)),
        ("e4m3@row", (3, 5), -1, (3, 1)),
        ("e4m3@row", (3, 5), 0, (1, 5)),
        ("e4m3@row", (5,), 0, (1,)),
        ("e4m3@tensor", (3, 5), 0, ()),
        ("e4m3@tensor", (), -1, ()),
        ("mxfp8", (0, 64), -1, (0, 2)),
        ("mxfp8", (4, 0), -1, (4, 0)),
    ],
)
def test_there_is_one_scale_for_each_group_in_the_order_of_the_axes(name, shape, axis, scales):
    stored = encode_scaled(usual(shape), name, axis=axis)
    assert stored.scales.shape == scales
    assert stored.codes.shape == shape
    assert decode_scaled(stored).shape == shape


@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0), (3, 0, 2)])
@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_array_stays_empty(name, shape):
    fmt, x = get_format(name), np.zeros(shape, np.float32)
    for axis in range(len(shape) if fits(fmt, shape) else 0):
        assert quantize(x, fmt, axis=axis).shape == shape
        stored = encode_scaled(x, fmt, axis=axis)
        assert decode_scaled(stored).shape == shape
        if fmt.scaling == "free":
            assert quantize(x, fmt, axis=axis, scale=stored.scales).shape == shape


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_result_is_float32_or_float64_and_the_argument_stays(dtype):
    x = usual((3, 40)).astype(dtype)
    before = x.copy()
    for name in FORMATS:
        got = quantize(x, name)
        assert got.dtype == (np.float64 if dtype is np.float64 else np.float32)
        assert np.array_equal(x, before)
        if dtype is not np.float64:
            same(got, quantize(x.astype(np.float32), name))


def test_float64_is_rounded_once():
    # 1 + 2**-4 is a tie of e4m3; 2**-40 above it, which float32 would lose, decides upward.
    x = np.array([[448.0, 1 + 2.0**-4 + 2.0**-40]])
    assert quantize(x, "mxfp8").tolist() == [[448.0, 1.125]]
    assert quantize(x.astype(np.float32), "mxfp8").tolist() == [[448.0, 1.0]]


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_that_is_not_there_is_refused(axis):
    with pytest.raises(
        ConfigError, match=f"^mxfp8_e4m3 needs an axis of the array: {axis} is none of its 2 dimensions$"
    ):
        quantize(np.ones((2, 32), np.float32), "mxfp8", axis=axis)


def test_a_number_has_no_axis_and_a_vector_no_rows():
    with pytest.raises(ConfigError, match=r"mxfp4 needs an axis of the array: -1 is none of its 0 dimensions"):
        quantize(np.float32(1), "mxfp4")
    with pytest.raises(ConfigError, match=r"^nvfp4_16x16 has blocks of 16 rows; the array has one dimension$"):
        quantize(np.ones(32, np.float32), "nvfp4_16x16")
    assert quantize(np.float32(1), "e4m3@tensor") == 1


# ---------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_decoded_codes_are_quantize_to_the_bit(name, shape):
    fmt = get_format(name)
    if not fits(fmt, shape):
        pytest.skip("blocks of several rows need two axes")
    x = usual(shape)
    for axis in range(len(shape)):
        for rounding, key in (("nearest", None), ("toward_zero", None), ("stochastic", (1, 2, "site"))):
            stored = encode_scaled(x, fmt, axis=axis, rounding=rounding, key=key)
            assert stored.codes.max() < 1 << fmt.element.bits
            same(decode_scaled(stored), quantize(x, fmt, axis=axis, rounding=rounding, key=key))


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_codes_are_quantize_at_the_edges_too(name):
    x = usual((20, 70))
    for special in (np.nan, np.inf, -0.0, 2.0**-149, FLOAT32_MAX):
        y = x.copy()
        y[3, 4:9] = special
        same(decode_scaled(encode_scaled(y, name)), quantize(y, name))
    for factor in (2.0**-140, 2.0**-126, 2.0**110, 0.0):
        y = (x * np.float64(factor)).astype(np.float32)
        same(decode_scaled(encode_scaled(y, name)), quantize(y, name))


def test_codes_say_what_they_are():
    stored = encode_scaled(np.float32([[448.0, -1.0, 0.0, 2.0**-9]]), "e4m3@row+pow2")
    assert isinstance(stored, Encoded)
    assert stored.fmt == get_format("e4m3@row+pow2")
    assert stored.axis == -1
    assert stored.codes.tolist() == [[0x7E, 0xB8, 0x00, 0x01]]
    assert stored.codes.dtype == stored.scales.dtype == np.uint8
    assert stored.scales.tolist() == [[127]]
    assert stored.tensor_scale is None
    assert encode_scaled(np.float32([[448.0, -1.0]]), "e4m3@row").scales.dtype == np.float32


def test_elements_have_no_scaled_codes():
    with pytest.raises(ConfigError, match=r"^float8_e4m3fn has no scales; use mezzo\.formats.encode$"):
        encode_scaled(np.ones((2, 2), np.float32), "e4m3")
    with pytest.raises(ConfigError, match="stochastic rounding needs key="):
        encode_scaled(np.ones((2, 2), np.float32), "mxfp8", rounding="stochastic")
