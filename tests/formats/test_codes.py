"""Codes to values and back: every code of every format, against ml_dtypes or the format's own definition."""

import math

import ml_dtypes
import numpy as np
import pytest

from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, decode, encode
from mezzo.formats.codes import digits

DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "float6_e2m3fn": ml_dtypes.float6_e2m3fn,
    "float6_e3m2fn": ml_dtypes.float6_e3m2fn,
    "float4_e2m1fn": ml_dtypes.float4_e2m1fn,
    "int8": np.int8,
}
SIXTEEN = ("bfloat16", "float16")
# The quiet NaN with the lowest payload, or the only one there is.
NAN = {
    "float64": 0x7FF8 << 48,
    "float32": 0x7FC0_0000,
    "tf32": 0x7FC0_0000,
    "bfloat16": 0x7FC0,
    "float16": 0x7E00,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7E,
    "float8_e8m0fnu": 0xFF,
}
SIGN = {"float64": 1 << 63, "float32": 1 << 31, "tf32": 1 << 31, "bfloat16": 1 << 15, "float16": 1 << 15}


def all_codes(name):
    return np.arange(1 << FORMATS[name].bits, dtype=np.uint16 if name in SIXTEEN else np.uint8)


@np.errstate(invalid="ignore")  # ml_dtypes quiets signalling NaN
def values_of(name):
    return all_codes(name).view(DTYPES[name]).astype(np.float32)


def same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    raw = f"u{want.dtype.itemsize}"
    equal = (got.view(raw) == want.view(raw)) | (np.isnan(got) & np.isnan(want))
    assert equal.all(), (np.argwhere(~equal)[:5].tolist(), got[~equal][:5], want[~equal][:5])


@pytest.mark.parametrize("name", DTYPES)
def test_every_code_has_the_value_of_ml_dtypes(name):
    same(decode(all_codes(name), name), values_of(name))


@pytest.mark.parametrize("name", DTYPES)
def test_every_number_has_its_own_code(name):
    codes, values = all_codes(name), values_of(name)
    numbers = ~np.isnan(values)
    got = encode(values[numbers], name, overflow="cast")
    assert got.dtype == codes.dtype
    assert np.array_equal(got, codes[numbers])
    assert np.array_equal(encode(values[numbers].astype(np.float64), name, overflow="cast"), codes[numbers])


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "int8"])
def test_numbers_between_the_codes_encode_as_ml_dtypes_casts_them(name):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(2000) * 2.0 ** rng.integers(-20, 20, 2000)).astype(np.float32)
    x = np.clip(x, -FORMATS[name].max, FORMATS[name].max)
    x = np.abs(x) if name == "float8_e8m0fnu" else x
    want = x.astype(DTYPES[name]).view(np.uint16 if name in SIXTEEN else np.uint8)
    low = (1 << FORMATS[name].bits) - 1  # ml_dtypes may leave anything in the bits above six and four
    assert np.array_equal(encode(x, name), want & low)


@pytest.mark.parametrize("name", ["float32", "tf32", "float64"])
def test_codes_of_wide_formats_are_the_bits_of_the_float_they_live_in(name):
    fmt = FORMATS[name]
    unsigned, dtype = (np.uint64, np.float64) if name == "float64" else (np.uint32, np.float32)
    codes = np.random.default_rng(1).integers(0, 1 << fmt.bits, 20_000, dtype=unsigned)
    limits = [0, 1 << fmt.bits - digits(fmt), NAN[name], SIGN[name], SIGN[name] | NAN[name]]
    codes = np.concatenate([codes, np.array(limits, unsigned)])
    codes = codes >> unsigned(fmt.bits - digits(fmt)) << unsigned(fmt.bits - digits(fmt))  # tf32 has no lower bits
    values = codes.view(dtype)
    same(decode(codes, name), values)
    numbers = ~np.isnan(values)
    got = encode(values[numbers], name, overflow="cast")
    assert got.dtype == unsigned
    assert np.array_equal(got, codes[numbers])


def test_tf32_forgets_the_thirteen_bits_it_does_not_have():
    codes = np.array([0x3F80_0000, 0x3F80_1FFF, 0x3F80_2000], np.uint32)
    assert decode(codes, "tf32").tolist() == [1.0, 1.0, 1 + 2**-10]
    assert encode(np.float32([1 + 2**-10, 1 + 2**-12]), "tf32").tolist() == [0x3F80_2000, 0x3F80_0000]


def test_a_power_of_two_has_its_exponent_for_its_code():
    codes = np.arange(255)
    values = np.ldexp(1.0, codes - 127)
    assert decode(codes, "e8m0").astype(np.float64).tolist() == values.tolist()
    assert encode(values, "e8m0").tolist() == codes.tolist()
    assert math.isnan(decode(255, "e8m0"))
    assert encode(np.float64([0.0, 2.0**-200, math.inf, -1.0, math.nan]), "e8m0").tolist() == [0, 0, 254, 255, 255]
    assert encode(np.float64([0.0, 2.0**-200, math.inf, -1.0]), "e8m0", overflow="cast").tolist() == [255, 0, 255, 255]


def test_int8_codes_are_two_s_complement():
    assert decode([0, 1, 127, 128, 255], "int8").tolist() == [0, 1, 127, -128, -1]
    assert encode(np.float32([-0.0, 2.5, 3.5, -2.5, 300, -300]), "int8").tolist() == [0, 2, 4, 254, 127, 128]


@pytest.mark.parametrize("name", NAN)
def test_nan_is_the_quiet_one_with_the_lowest_payload_and_keeps_its_sign(name):
    fmt = FORMATS[name]
    sign = 1 << fmt.bits - 1 if fmt.signed else 0
    x = np.array([math.nan, math.copysign(math.nan, -1)])
    assert encode(x, name).tolist() == [NAN[name], NAN[name] | sign]
    assert np.isnan(decode(encode(x, name), name)).all()


@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fn", "float6_e3m2fn", "float4_e2m1fn", "int8", "float16"])
def test_what_is_beyond_saturates_unless_it_is_cast(name):
    fmt = FORMATS[name]
    x = np.array([math.inf, -math.inf, 1e30, -1e30])
    assert decode(encode(x, name), name).tolist() == [fmt.max, fmt.min, fmt.max, fmt.min]
    cast = decode(encode(x, name, overflow="cast"), name)
    if fmt.infinity:
        assert cast.tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    elif fmt.nan:
        assert np.isnan(cast).all()
    else:
        assert cast.tolist() == [fmt.max, fmt.min, fmt.max, fmt.min]


def test_codes_may_be_rounded_toward_zero():
    x = np.float32([1.99, -1.99, 0.49, 5.99])
    assert decode(encode(x, "e2m1", rounding="toward_zero"), "e2m1").tolist() == [1.5, -1.5, 0.0, 4.0]
    assert decode(encode(x, "e2m1"), "e2m1").tolist() == [2.0, -2.0, 0.5, 6.0]


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 1)])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_have_the_shape_of_the_values(name, shape):
    codes = encode(np.ones(shape, np.float32), name)
    assert codes.shape == shape
    assert codes.dtype.itemsize == FORMATS[name].item_bytes
    values = decode(codes, name)
    assert values.shape == shape
    assert values.dtype == (np.float64 if name == "float64" else np.float32)
    assert (values == 1).all()


@pytest.mark.parametrize("name", ["float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn", "int8"])
def test_nan_is_refused_where_there_is_no_code_for_it(name):
    with pytest.raises(ConfigError, match=f"^{name} has no code for NaN, and the array holds 2$"):
        encode(np.array([1.0, math.nan, math.nan]), name)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].bits < 64])
def test_a_code_out_of_range_is_refused(name):
    bits = FORMATS[name].bits
    for codes in ([1 << bits], [-1], [0.5], ["a"]):
        with pytest.raises(ConfigError, match=rf"codes of {name} are whole numbers in 0 … 2\*\*{bits} - 1"):
            decode(codes, name)


def test_stochastic_rounding_and_scaled_formats_are_refused():
    with pytest.raises(ConfigError, match="quantize stochastically first, then encode"):
        encode(np.ones(3), "e4m3", rounding="stochastic")
    for convert in (lambda: encode(np.ones(3), "mxfp8"), lambda: decode([1], "nvfp4")):
        with pytest.raises(
            ConfigError, match=r"is a scaled format; a format of single elements is needed here: float64"
        ):
            convert()
    with pytest.raises(ConfigError, match="unknown number format 'fp9'"):
        decode([1], "fp9")
    with pytest.raises(ConfigError, match="float16, bfloat16, float32 or float64 arrays, got int64"):
        encode(np.arange(3), "e4m3")
