"""What the cases' answers come from: ml_dtypes, gfloat and exact arithmetic. Nothing here uses mezzo.

Where two oracles know an answer it is taken only if both agree; the places where they are known to differ are named.
"""

import hashlib
import math
from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
from gfloat import RoundMode, formats
from gfloat.types import Domain, FormatInfo

TF32 = FormatInfo("tf32", 19, 11, bias=127, is_signed=True, domain=Domain.Extended, has_nz=True, num_high_nans=1023,
                  has_subnormals=True, is_twos_complement=False)  # fmt: skip
GFLOAT = {
    "float32": formats.format_info_binary32,
    "tf32": TF32,
    "bfloat16": formats.format_info_bfloat16,
    "float16": formats.format_info_binary16,
    "float8_e4m3fn": formats.format_info_ocp_e4m3,
    "float8_e5m2": formats.format_info_ocp_e5m2,
    "float6_e2m3fn": formats.format_info_ocp_e2m3,
    "float6_e3m2fn": formats.format_info_ocp_e3m2,
    "float4_e2m1fn": formats.format_info_ocp_e2m1,
}
NO_NAN = ("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")
DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    **{name: getattr(ml_dtypes, name) for name in [*GFLOAT, "float8_e8m0fnu"] if hasattr(ml_dtypes, name)},
}


def hexed(x):
    """An array as its dtype and the bits of its elements in hexadecimal; every NaN is the positive quiet one."""
    x = np.asarray(x)
    if x.dtype.kind != "u":
        x = np.where(np.isnan(x), np.array(np.nan, x.dtype), x)
    bits = x.reshape(-1).view(f"u{x.itemsize}")
    return " ".join([x.dtype.name, *(f"{int(v):0{2 * x.itemsize}x}" for v in bits)])


def round_to(x, name, rounding="nearest", overflow="saturate", words=None):
    """float64 array rounded to an element format; float64."""
    x = np.asarray(x, np.float64)
    if name == "int8":
        return _int8(x, rounding, words)
    if name == "float8_e8m0fnu":
        drawn = [0] * x.size if words is None else words.reshape(-1).tolist()
        powers = [power_of_two(v, rounding, overflow, w) for v, w in zip(x.reshape(-1).tolist(), drawn, strict=True)]
        return np.array(powers, np.float64).reshape(x.shape)
    y = _by_gfloat(x, name, rounding, overflow, words)
    if (rounding, overflow) == ("nearest", "cast") and name in DTYPES:
        _hold_against_ml_dtypes(x, y, name)
    return y


def _int8(x, rounding, words):
    down = np.floor(np.abs(x))
    if rounding == "nearest":
        whole = np.rint(x)
    elif rounding == "toward_zero":
        whole = np.trunc(x)
    else:
        whole = np.copysign(down + (words < np.floor((np.abs(x) - down) * 2.0**32)), x)
    return np.where(np.isnan(x), np.nan, np.clip(whole, -128, 127) + 0.0)  # -0 + 0 is 0


def _by_gfloat(x, name, rounding, overflow, words):
    info = GFLOAT[name]
    saturates = overflow == "saturate" or name in NO_NAN
    # gfloat has no answer for NaN in formats without one; mezzo keeps it. Infinities saturate by definition.
    tame = np.where(np.isnan(x), 0.0, x)
    if saturates:
        tame = np.where(np.isinf(x), np.copysign(float(info.max), x), tame)
    if rounding == "stochastic":
        # gfloat rounds up where fraction + bits / 2**32 >= 1; mezzo where word < fraction · 2**32.
        y = gfloat.round_ndarray(
            info,
            tame.reshape(-1),
            RoundMode.StochasticFastest,
            sat=saturates,
            srbits=2**32 - 1 - words.reshape(-1).astype(np.int64),
            srnumbits=32,
        ).reshape(x.shape)
    else:
        mode = RoundMode.TiesToEven if rounding == "nearest" else RoundMode.TowardZero
        y = gfloat.round_ndarray(info, tame, mode, sat=saturates)
    return np.where(np.isnan(x), np.nan, y)


def _hold_against_ml_dtypes(x, y, name):
    """Two differences are known: ml_dtypes takes float64 through float32, a double rounding, and makes zero of NaN in
    formats without one."""
    with np.errstate(all="ignore"):
        single = x.astype(np.float32)
        other = single.astype(DTYPES[name]).astype(np.float64)
    same = (y == other) & (np.signbit(y) == np.signbit(other)) | (np.isnan(y) & np.isnan(other))
    wrong = (single == x) & ~same
    assert not wrong.any(), (name, x[wrong][:4], y[wrong][:4], other[wrong][:4])


def power_of_two(x, rounding, overflow, word=0):
    """float8_e8m0fnu, from its definition, held against ml_dtypes.

    gfloat takes ties to the even code, which IEEE 754-2019 (4.3.1) and ml_dtypes do not: of two odd significands the
    larger magnitude wins. ml_dtypes makes 2**-126 of all subnormal float32 above 2**-127, also of those nearer to that.
    """
    y = _power_of_two(x, rounding, overflow, word)
    known = not 0 < x < 2.0**-126
    if (rounding, overflow) == ("nearest", "cast") and known and float(np.float32(x)) == x:
        other = float(np.float32(x).astype(ml_dtypes.float8_e8m0fnu))
        assert y == other or (math.isnan(y) and math.isnan(other)), (x, y, other)
    return y


def _power_of_two(x, rounding, overflow, word):
    smallest, top = 2.0**-127, 2.0**127
    if math.isnan(x) or x < 0:
        return math.nan
    if x == 0:
        return smallest if overflow == "saturate" else math.nan
    if math.isinf(x):
        return top if overflow == "saturate" else math.nan
    fraction, exponent = math.frexp(x)
    power, rest = exponent - 1, 2 * fraction - 1  # x = (1 + rest) · 2**power
    if rounding == "nearest":
        power += rest >= 0.5
    elif rounding == "stochastic":
        power += word < math.floor(rest * 2**32)
    if power <= 127:
        return max(2.0**power, smallest)
    return top if overflow == "saturate" or rounding == "toward_zero" else math.nan


# float32 and float64 in fractions

F32_MAX = Fraction(float(np.finfo(np.float32).max))


def exponent_of(x):
    """The whole number e with 2**e <= x < 2**(e + 1), of a fraction above zero."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def to_grid(x, digits, lowest):
    """A fraction rounded to `digits` binary digits, ties to even; below 2**lowest the grid gets no finer."""
    if x == 0:
        return x
    gap = Fraction(2) ** (max(exponent_of(abs(x)), lowest) - digits + 1)
    return round(x / gap) * gap  # Python's round takes ties to even


def single(x):
    """A fraction rounded to float32 as if it had no largest value."""
    return to_grid(x, 24, -126)


def double(x):
    return to_grid(x, 53, -1022)


# Random words

M0, M1, W0, W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85


def philox(counter, key):
    """Salmon et al. 2011, section 3.2: ten rounds in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = M0 * c[0], M1 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + W0) & 0xFFFFFFFF, (k[1] + W1) & 0xFFFFFFFF]
    return c


# Random123's known answers for philox4x32-10 (kat_vectors): ten rounds of all zeros and of all ones.
assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
assert philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def site_number(site):
    if isinstance(site, str):
        return int.from_bytes(hashlib.blake2b(site.encode(), digest_size=4).digest(), "little")
    return site


def stream(seed, step, site, count):
    """(count,) words of one site at one step."""
    key, number = [seed & 0xFFFFFFFF, seed >> 32], site_number(site)
    words = [w for i in range(-(-count // 4)) for w in philox([i & 0xFFFFFFFF, i >> 32, step, number], key)]
    return np.array(words[:count], np.uint32)


def numbers(what, shape):
    """float32 numbers about 0 with a spread of about 1: sums of four uniform words, the same under every NumPy."""
    count = math.prod(shape)
    words = stream(1, 0, what, 4 * count).astype(np.float64).reshape(count, 4)
    return (words.sum(axis=1) / 2.0**31 - 4).astype(np.float32).reshape(shape)
