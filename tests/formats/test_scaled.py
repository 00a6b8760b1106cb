"""Names of formats, scaled ones above all: what parses, what is printed, what is refused and in which words."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, SCALED, ScaledFormat, decode, get_element, get_format
from mezzo.formats.scaled import ELEMENTS, SCALED_ALIASES
from mezzo.formats.spec import ALIASES, E2M1, E2M3, E4M3, E5M2, E8M0, FLOAT32, INT8

# What people write, and what it is called.
CANONICAL = {
    "bf16": "bfloat16",
    "half": "float16",
    "fp32": "float32",
    "double": "float64",
    "e4m3": "float8_e4m3fn",
    "fp4": "float4_e2m1fn",
    "e8m0": "float8_e8m0fnu",
    "i8": "int8",
    "mxfp8": "mxfp8_e4m3",
    "mxfp6": "mxfp6_e2m3",
    "mxfp4_e2m1": "mxfp4",
    "mxfp8+floor": "mxfp8_e4m3+floor",
    "mxfp8+pow2": "mxfp8_e4m3",
    "e4m3@1x32+pow2": "mxfp8_e4m3",
    "float8_e5m2@1x32+floor": "mxfp8_e5m2+floor",
    "e2m1@1x16+nvfp4": "nvfp4",
    "e2m1@16x16+nvfp4": "nvfp4_16x16",
    "e2m1@3x5+nvfp4": "float4_e2m1fn@3x5+nvfp4",
    "e2m1@1x16": "float4_e2m1fn@1x16",
    "e2m1@1x16+pow2": "float4_e2m1fn@1x16+pow2",
    "e2m1@1x32+nvfp4": "float4_e2m1fn@1x32+nvfp4",
    "e4m3@1x32": "float8_e4m3fn@1x32",
    "e4m3@tensor": "float8_e4m3fn@tensor",
    "e5m2@row+pow2": "float8_e5m2@row+pow2",
    "int8@1x128": "int8@1x128",
    "e4m3@128x128": "float8_e4m3fn@128x128",
    "e4m3@01x0128": "float8_e4m3fn@1x128",
}


@pytest.mark.parametrize(("written", "canonical"), CANONICAL.items())
def test_a_name_means_one_format_and_is_printed_in_one_way(written, canonical):
    fmt = get_format(written)
    assert str(fmt) == fmt.name == canonical
    assert get_format(canonical) == fmt
    assert get_format(fmt) is fmt


@pytest.mark.parametrize("name", [*FORMATS, *SCALED])
def test_the_names_in_the_tables_are_their_own(name):
    assert str(get_format(name)) == name


@pytest.mark.parametrize("alias", [*ALIASES, *SCALED_ALIASES])
def test_an_alias_is_no_name_of_a_format_itself(alias):
    assert alias not in FORMATS
    assert alias not in SCALED
    assert str(get_format(alias)) == {**ALIASES, **SCALED_ALIASES}[alias]


def test_every_scaled_format_round_trips_through_its_name():
    groups = ["row", "tensor", (1, 2), (1, 16), (1, 32), (32, 1), (2, 1), (16, 16), (128, 128)]
    made = [ScaledFormat(*parts) for parts in itertools.product(ELEMENTS, groups, ("free", "pow2", "floor"))]
    made += [ScaledFormat(E2M1, group, "nvfp4") for group in groups if isinstance(group, tuple)]
    for fmt in made:
        assert get_format(str(fmt)) == fmt
    assert len({str(fmt) for fmt in made}) == len(made)


def test_the_parts_of_a_name_are_the_fields():
    assert get_format("e5m2@3x8+floor") == ScaledFormat(E5M2, (3, 8), "floor")
    assert get_format("int8@tensor") == ScaledFormat(INT8, "tensor", "free")
    assert get_format("mxfp6") == ScaledFormat(E2M3, (1, 32), "pow2")
    assert get_format("nvfp4") == ScaledFormat(E2M1, (1, 16), "nvfp4")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp8", 8 + 8 / 32),
        ("mxfp6_e3m2", 6 + 8 / 32),
        ("mxfp4", 4 + 8 / 32),
        ("nvfp4", 4 + 8 / 16),
        ("nvfp4_16x16", 4 + 8 / 256),
        ("e4m3@1x128", 8 + 32 / 128),
        ("e4m3@128x128", 8 + 32 / 128**2),
        ("int8@1x4+pow2", 8 + 8 / 4),
        ("e4m3@tensor", 8),
        ("e5m2@row", 8),
        ("bf16", 16),
        ("tf32", 32),
    ],
)
def test_bits_count_the_share_of_a_block_s_scale(name, bits):
    assert get_format(name).bits == bits


def test_the_scaling_decides_the_format_of_the_scales():
    assert [get_format(f"e2m1@1x8{s}").scale for s in ("", "+pow2", "+floor", "+nvfp4")] == [FLOAT32, E8M0, E8M0, E4M3]


def test_a_group_has_a_size_unless_the_tensor_decides_it():
    assert [get_format(f"e4m3@{g}").group_size for g in ("3x5", "1x32", "row", "tensor")] == [15, 32, None, None]


@pytest.mark.parametrize("name", [*FORMATS, *SCALED, "e4m3@tensor", "e4m3@128x128", "mxfp4+floor"])
def test_every_format_names_its_source(name):
    assert len(get_format(name).source) > 10 or name == "int8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bf17", r"unknown number format 'bf17'; known: float64, .*, nvfp4_16x16; scaled ones .*; did you mean bf16\?"),
        ("nvpf4", r"; did you mean nvfp4\?$"),
        ("", r"unknown number format ''; .* with \+pow2 or \+floor for powers of two$"),
        ("E4M3", "unknown number format 'E4M3'"),
        ("e9m9@1x32", "unknown number format 'e9m9@1x32'"),
        ("nvfp4+floor", r"unknown number format 'nvfp4\+floor'"),
        ("mxfp8+free", r"unknown number format 'mxfp8\+free'"),
        ("mxfp8+", r"unknown number format 'mxfp8\+'"),
        ("bf16+pow2", r"unknown number format 'bf16\+pow2'"),
        ("bf16@1x32", "bfloat16 needs no scale; formats that are scaled: float8_e4m3fn, float8_e5m2, .*, int8"),
        ("e8m0@tensor", "float8_e8m0fnu needs no scale"),
        ("e4m3@", r"unknown group ''; known: \(rows, columns\), row, tensor"),
        ("e4m3@column", "unknown group 'column'"),
        ("e4m3@1x32x2", "unknown group '1x32x2'"),
        ("e4m3@-1x32", "unknown group '-1x32'"),
        ("e4m3@1x32 ", "unknown group '1x32 '"),
        ("e4m3@1x1", r"a block is ROWSxCOLUMNS with at least two elements, got \(1, 1\)"),
        ("e4m3@0x32", r"a block is ROWSxCOLUMNS with at least two elements, got \(0, 32\)"),
        ("e4m3@1x32+pow3", "unknown scaling 'pow3'; known: free, pow2, floor, nvfp4"),
        ("e4m3@1x32+", "unknown scaling ''"),
        ("e4m3@1x16+nvfp4", "nvfp4 scaling is for blocks of float4_e2m1fn"),
        ("e2m1@tensor+nvfp4", "nvfp4 scaling is for blocks of float4_e2m1fn"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_known(name, message):
    with pytest.raises(ConfigError, match=message):
        get_format(name)


def test_a_block_has_two_sizes():
    with pytest.raises(ConfigError, match="a block is ROWSxCOLUMNS"):
        ScaledFormat(E4M3, (32,))


def test_a_scaled_format_is_no_element():
    assert get_element("e4m3") is E4M3
    with pytest.raises(
        ConfigError, match=r"^mxfp8_e4m3 is a scaled format; a format of single elements is needed here: "
    ):
        get_element("mxfp8")


# ---------------------------------------------------------------------------------------------------------------- holds


def numbers_of(fmt):
    """All finite numbers of a format of up to 16 bits; of a wider one its limits."""
    if fmt.bits <= 16:
        values = decode(np.arange(1 << fmt.bits), fmt).astype(np.float64)
        return values[np.isfinite(values)]
    return np.array([fmt.max, fmt.min, fmt.min_subnormal, 1 + fmt.epsilon, fmt.max / 2, fmt.min_normal])


def is_held(fmt, values):
    """Whether each is a number of the format, decided on the grid and its ends, without rounding."""
    if fmt.is_scale:
        return (values >= fmt.min) & (values <= fmt.max) & (np.frexp(values)[0] == 0.5)
    exponent = np.maximum(np.frexp(values)[1] - 1, fmt.min_exponent)
    on_grid = np.ldexp(values, fmt.mantissa_bits - exponent) % 1 == 0 if fmt.mantissa_bits < 52 else True
    return on_grid & (values >= fmt.min) & (values <= fmt.max)


@pytest.mark.parametrize("name", FORMATS)
def test_holds_is_true_exactly_where_every_number_is_one_of_the_format(name):
    fmt = FORMATS[name]
    for other in FORMATS.values():
        assert fmt.holds(other) == bool(is_held(fmt, numbers_of(other)).all()), (name, other.name)


def test_float32_and_bfloat16_hold_what_they_are_trusted_with():
    for name in ("tf32", "bfloat16", "float16", *(f.name for f in ELEMENTS), "float8_e8m0fnu"):
        assert FLOAT32.holds(FORMATS[name])
    held = {name for name, fmt in FORMATS.items() if FORMATS["bfloat16"].holds(fmt)}
    assert held == {"bfloat16", "float8_e8m0fnu", "int8", *(f.name for f in ELEMENTS)}
    assert float(np.float32(2.0**-127).astype(ml_dtypes.bfloat16)) == 2.0**-127  # a subnormal, and e8m0's smallest
