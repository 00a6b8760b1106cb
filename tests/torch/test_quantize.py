"""`mezzo.torch.quantize` gives what `mezzo.formats.quantize` gives, to the bit: helper, torch operations, compiled."""

import contextlib
import functools
import itertools
import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mezzo import formats
from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, get_format, philox
from mezzo.torch import helper
from mezzo.torch.quantize import HELPER_FROM, quantize

KEY = (2**63 + 5, 7, "blocks.3.attn.qkv/wgrad/a")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BOTH = list(itertools.product(("nearest", "toward_zero", "stochastic"), ("saturate", "cast")))
SCALED = ["mxfp8_e4m3", "mxfp8_e5m2+floor", "mxfp6_e2m3", "mxfp4", "nvfp4", "nvfp4_16x16", "e4m3@tensor", "e5m2@row",
          "e4m3@1x128", "int8@1x16", "e4m3@16x16"]  # fmt: skip
SIZES = pytest.mark.parametrize("size", [8, 2 * HELPER_FROM], ids=["small", "large"])  # torch operations, helper


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small gain by no second one; `test_helper.py` has the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def key_of(rounding):
    return KEY if rounding == "stochastic" else None


def as_numpy(x):
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def reference(x, fmt, **options):
    return formats.quantize(as_numpy(x), fmt, **options)


def same(got, expected):
    """The same dtype, shape and bits; one NaN is as good as another."""
    got, expected = as_numpy(got.contiguous()), np.ascontiguousarray(expected).reshape(np.shape(expected))
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    whole = f"u{got.dtype.itemsize}"
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of NaN that signal
        equal = (got.view(whole) == expected.view(whole)) | (np.isnan(got) & np.isnan(expected))
    assert equal.all(), (got[~equal][:5], expected[~equal][:5], np.argwhere(~equal)[:5])


def check(x, fmt, **options):
    """With the helper, where it takes x, and by torch's operations."""
    expected = reference(x, fmt, **options)
    same(quantize(x, fmt, **options), expected)
    with helper.off():
        same(quantize(x, fmt, **options), expected)


@functools.cache
def hard(name):
    """float64 of both signs: values of a format, ties, what is next to them, subnormals, limits, what is no number."""
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    digits = fmt.mantissa_bits
    # Every binade of small formats, 120 of large ones, from below the smallest value to above the largest.
    exponents = rng.permutation(np.arange(fmt.min_exponent - digits - 2, fmt.max_exponent + 2))[:120]
    gaps = np.maximum(exponents, fmt.min_exponent) - digits
    whole = 2.0 ** (exponents - gaps)  # a value in gaps; below 1 for what is less than the smallest
    steps = np.floor(whole * (1 + rng.random((4, len(exponents)))))
    top = np.array([fmt.max, -fmt.min, fmt.min_normal, fmt.min_subnormal])
    with np.errstate(over="ignore"):
        values = np.ldexp(np.concatenate([steps, steps + 0.5, steps + 0.25]), gaps).ravel()
        limits = np.concatenate([top * near for near in (0.5, 0.75, 1, 1 + 2.0 ** -(digits + 2), 1.07, 1.2, 2)])
        values = np.concatenate([values, limits])
        values = np.concatenate([values * near for near in (1, 1 - 2.0**-53, 1 + 2.0**-52, 1 - 2.0**-24, 1 + 2.0**-23)])
    values = np.concatenate([values, [0.0, math.inf, math.nan, 2.0**-1074, 2.0**-149, 2.0**-133, 2.0**-24]])
    return torch.from_numpy(np.concatenate([values, -values]))


@functools.cache
def numbers(name, dtype):
    """Numbers that are hard for an element format, and all of 16 bits, or random ones of every exponent."""
    size = dtype.itemsize
    if size == 2:
        anything = torch.arange(1 << 16).to(torch.int16).view(dtype)
    else:
        high = torch.iinfo(INTEGERS[size]).max
        anything = torch.randint(-high, high, (8192,), dtype=INTEGERS[size], generator=generator()).view(dtype)
    return torch.cat([hard(name).to(dtype), anything, torch.randn(2048, generator=generator()).to(dtype)])


def generator():
    return torch.Generator().manual_seed(0)


def tame(*shape, dtype=torch.float32):
    """Normal numbers of some twenty binades, so that blocks differ and elements within them too; a few zeros."""
    g = generator()
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-4, 5, shape, generator=g))
    x = x * torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=g)) * (torch.rand(shape, generator=g) < 0.95)
    return x.to(dtype)


@functools.cache
def groups(dtype):
    """(96, 130) rows that blocks do not divide: tame ones, subnormal and huge ones, rows of zeros, ties, specials."""
    x = tame(96, 130, dtype=torch.float64)
    span = math.log2(torch.finfo(dtype).max)
    x[8:16] = torch.exp2((torch.rand(8, 130, generator=generator(), dtype=torch.float64) * 2 - 1) * span)
    x[16:24] *= torch.finfo(dtype).tiny  # subnormal, or next to it
    x[24:26] = 0.0
    x[25] = -0.0
    x[32:48] = torch.randint(-64, 65, (16, 130), generator=generator()) / 4.0  # ties of coarse elements
    x[32:48, ::16] = 6.0 * 2.0 ** torch.arange(9)  # the largest of e2m1: the scale is a power of two
    return x.to(dtype)


def layouts(x):
    """The same values in other strides: where they lie must not matter."""
    wide = torch.full((*x.shape, 2), 99.0, dtype=x.dtype)
    wide[..., 0] = x
    return {
        "transposed": x.t().contiguous().t(),
        "every second": wide[..., 0],
        "part of rows": torch.cat([x, x], 1)[:, : x.shape[1]],
        "rows apart": torch.stack([x, x], 1)[:, 0],
        "one row many times": x[:1].expand(len(x), -1),
        "one column many times": x[:, :1].expand(-1, x.shape[1]),
        "backward columns": x.t().reshape(2, -1, x.shape[0]).permute(1, 2, 0),
    }


# ------------------------------------------------------------------------------------------------------------ same bits


@pytest.mark.parametrize(("rounding", "overflow"), BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_elements_are_those_of_the_reference(name, dtype, rounding, overflow):
    x = numbers(name, dtype)
    assert x.numel() >= HELPER_FROM
    check(x, name, rounding=rounding, overflow=overflow, key=key_of(rounding))


@pytest.mark.parametrize(("rounding", "overflow"), BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_groups_are_those_of_the_reference(name, dtype, rounding, overflow):
    x = groups(dtype)
    for part in (x, x[:8], x[16:26], x[32:48].contiguous()):  # nvfp4 and @tensor see one largest number in each
        for axis in (0, 1):
            check(part, name, axis=axis, rounding=rounding, overflow=overflow, key=key_of(rounding))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_groups_that_hold_infinities_and_nan_become_nan(name, dtype):
    x = tame(64, 130, dtype=dtype)
    x[3, 5], x[20, 70], x[40, 129], x[63, 0] = math.inf, -math.inf, math.nan, torch.finfo(dtype).max
    for overflow in ("saturate", "cast"):
        check(x, name, overflow=overflow)
    y = quantize(x, name)
    assert all(y[i, j].isnan() for i, j in ((3, 5), (20, 70), (40, 129)))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(1, 1), (3, 0, 2), (0, 4), (5, 7), (3, 40, 20), (2, 3, 12, 35)])
def test_groups_lie_along_every_axis(shape, name):
    for axis in range(len(shape)):
        check(tame(*shape), name, axis=axis)
        check(tame(*shape), name, axis=axis - len(shape), rounding="stochastic", key=KEY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*FORMATS, "e4m3@tensor", "mxfp4"])
def test_empty_tensors_and_single_numbers_are_rounded_too(name, dtype):
    for shape in ((0,), (0, 4), (3, 0, 2)):
        check(torch.empty(shape, dtype=dtype), name)
        check(torch.empty(shape, dtype=dtype), name, rounding="stochastic", key=KEY)
    for value in (1.3, -0.0, 1e9, math.nan):
        check(torch.tensor([value], dtype=dtype), name)
        if name != "mxfp4":  # whose blocks need an axis
            check(torch.tensor(value, dtype=dtype), name)
            check(torch.tensor(value, dtype=dtype), name, rounding="stochastic", key=KEY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["float8_e4m3fn", "bfloat16", "int8", "mxfp4", "nvfp4", "e5m2@row", "e4m3@16x16"])
def test_strides_do_not_matter(name, dtype):
    for x in layouts(tame(48, 44, dtype=dtype)).values():
        assert not x.is_contiguous()
        check(x, name, axis=0)
        check(x, name, axis=1, rounding="stochastic", key=KEY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["e4m3@tensor", "e5m2@row", "int8@1x16", "e2m1@16x16", "e4m3@1x128"])
def test_scales_may_be_given_one_for_all_or_one_for_each_group(name, dtype):
    fmt = get_format(name)
    for shape, axis in (((70, 66), 0), ((70, 66), -1), ((7, 40, 9), 1)):
        x = tame(*shape, dtype=dtype)
        x.view(-1)[:4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])  # with a given scale, NaN for itself only
        one_each = formats.blocks.Groups(shape, fmt, axis).scales_shape
        scales = torch.exp2(torch.rand(one_each, generator=generator()) * 20 - 10)
        for scale in (0.37, torch.tensor(0.37), scales, scales.double()):
            expected = {"scale": np.asarray(scale, np.float32)}
            for rounding in ("nearest", "stochastic"):
                options = {"axis": axis, "rounding": rounding, "overflow": "cast", "key": key_of(rounding)}
                want = reference(x, name, **options, **expected)
                same(quantize(x, name, **options, scale=scale), want)
                with helper.off():
                    same(quantize(x, name, **options, scale=scale), want)
        assert int(quantize(x, name, axis=axis, scale=0.37).isnan().sum()) == 3


@SIZES
def test_the_helper_takes_large_tensors_of_the_cpu_and_no_others(size, monkeypatch):
    found = helper.load()
    if found is None:
        pytest.skip(f"no compiled helper: {helper.status()}")
    calls = []

    class Watched:
        def elements(self, *args):
            calls.append("elements")
            return found.elements(*args)

        def blocks(self, *args):
            calls.append("blocks")
            return found.blocks(*args)

    monkeypatch.setattr(helper, "load", Watched)
    x = torch.ones(size // 4, 4)
    for layout in (x, x.half(), x.bfloat16(), x.t()):
        quantize(layout, "e4m3")
        quantize(layout, "mxfp4")
    assert calls == (["elements", "blocks"] * 4 if size >= HELPER_FROM else [])
    calls.clear()
    quantize(x.double(), "e4m3")
    quantize(x, "float64")
    quantize(x, "e8m0")
    quantize(x.t(), "e4m3", rounding="stochastic", key=KEY)  # whose words go by the order in memory there
    assert calls == []


# -------------------------------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("name", ["int8", "int8@tensor"])
def test_element_i_takes_word_i_wherever_it_lies(name):
    """A quarter rounds up where its word is below 2**30: known from the words alone, without any other rounding."""
    scale = {} if name == "int8" else {"scale": 1.0}
    x = torch.full((64, 66), 3.25)
    words = philox.bits(*KEY, x.numel()).reshape(x.shape)
    want = np.where(words < 1 << 30, 4.0, 3.0).astype(np.float32)
    for layout in (x, *layouts(x).values()):
        n = math.prod(layout.shape)
        flat = quantize(layout, name, rounding="stochastic", key=KEY, **scale).reshape(-1)
        same(flat, want.reshape(-1)[:n])
        with helper.off():
            same(quantize(layout, name, rounding="stochastic", key=KEY, **scale).reshape(-1), want.reshape(-1)[:n])


@pytest.mark.parametrize("name", ["int8", "int8@tensor"])
def test_a_fraction_that_equals_the_word_rounds_down_and_the_next_one_up(name):
    scale = {} if name == "int8" else {"scale": 1.0}
    words = philox.bits(*KEY, 1 << 16).astype(np.int64)
    short = words % 256 == 0  # 24 bits: such a fraction fits into a float32
    assert short.sum() > 100
    for dtype, these in ((torch.float64, words >= 0), (torch.float32, short)):
        for more, want in ((0, 0.0), (256, 1.0)):
            x = torch.from_numpy(np.where(these, (words + more) / 2.0**32, 0.0)).to(dtype)
            for switch in (contextlib.nullcontext(), helper.off()):
                with switch:
                    y = quantize(x, name, rounding="stochastic", key=KEY, **scale)
                assert bool((y[torch.from_numpy(these)] == want).all())


@SIZES
@pytest.mark.parametrize("name", ["float8_e5m2", "nvfp4"])
def test_a_step_is_a_number_or_a_tensor(name, size):
    x = tame(size // 4, 4)
    seed, _, site = KEY
    results = []
    for step in (0, 5, 2**32 - 1):
        by_number = quantize(x, name, rounding="stochastic", key=(seed, step, site))
        by_tensor = quantize(x, name, rounding="stochastic", key=(seed, torch.tensor(step), philox.site_id(site)))
        assert torch.equal(by_number, by_tensor)
        results.append(by_number)
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


# ----------------------------------------------------------------------------------------------------------------- out=


@SIZES
@pytest.mark.parametrize(("rounding", "overflow"), [("nearest", "saturate"), ("stochastic", "cast")])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "bfloat16", "tf32", "int8", "float32", "mxfp4", "nvfp4", "e5m2@row"])
def test_a_tensor_is_rounded_in_place(name, rounding, overflow, size):
    options = {"rounding": rounding, "overflow": overflow, "key": key_of(rounding)}
    x = tame(size // 4, 4)
    wide = torch.full((size // 4, 8), 99.0)
    for y in (x.clone(), x.t().contiguous().t(), wide[:, ::2].copy_(x)):
        assert quantize(y, name, **options, out=y) is y
        same(y, reference(x, name, **options))
    assert bool((wide[:, 1::2] == 99.0).all())


@SIZES
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float8_e4m3fn", torch.bfloat16), ("float4_e2m1fn", torch.float16), ("int8", torch.bfloat16),
     ("float8_e5m2", torch.float64), ("bfloat16", torch.bfloat16), ("float16", torch.float32)],
    ids=str,
)  # fmt: skip
def test_a_result_goes_to_any_dtype_that_holds_the_format(name, dtype, x_dtype, size):
    x = tame(size // 4, 4, dtype=x_dtype)
    out = torch.full(x.shape, 99.0, dtype=dtype)
    assert quantize(x, name, out=out) is out
    assert torch.equal(out.double(), torch.from_numpy(reference(x, name).astype(np.float64)))


def test_groups_go_to_float32_or_wider():
    x = tame(64, 64, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        out = torch.empty(64, 64, dtype=dtype)
        assert torch.equal(quantize(x, "nvfp4", out=out).float(), quantize(x, "nvfp4"))


@pytest.mark.parametrize(
    ("name", "out", "advice", "has"),
    [
        ("e4m3", torch.empty(4, 5), "float8_e4m3fn (such as float32)", "(4, 5), cpu, torch.float32"),
        ("bf16", torch.empty(4, 4, dtype=torch.float16), "bfloat16 (such as float32)", "(4, 4), cpu, torch.float16"),
        ("fp64", torch.empty(4, 4), "float64 (such as float64)", "(4, 4), cpu, torch.float32"),
        ("e4m3", torch.empty(4, 4, dtype=torch.int8), "float8_e4m3fn (such as float32)", "(4, 4), cpu, torch.int8"),
        ("mxfp4", torch.empty(4, 4).bfloat16(), "mxfp4 (such as float32)", "(4, 4), cpu, torch.bfloat16"),
        ("e4m3", torch.empty(4, 4, device="meta"), "float8_e4m3fn (such as float32)", "(4, 4), meta, torch.float32"),
    ],
    ids=["shape", "range", "float64", "integers", "groups", "device"],
)
def test_an_out_that_does_not_fit_is_refused(name, out, advice, has):
    told = (
        f"out must have the shape (4, 4), the device cpu and a dtype that holds every value of {advice}; it has {has}"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
        quantize(torch.ones(4, 4), name, out=out)


@SIZES
def test_out_is_refused_where_gradients_are_recorded(size):
    leaf, plain = torch.full((size,), 1.3, requires_grad=True), torch.full((size,), 1.3)
    told = r"^out= is for tensors whose gradient is not recorded; use torch.no_grad\(\)$"
    for x, out in ((leaf, plain.clone()), (plain, leaf * 1), (leaf, leaf)):
        with pytest.raises(ConfigError, match=told):
            quantize(x, "e4m3", out=out)
    with torch.no_grad():
        assert quantize(leaf, "e4m3", out=leaf) is leaf
    assert torch.equal(leaf, torch.full((size,), 1.25))


@SIZES
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float8_e4m3fn", "mxfp4", "e4m3@tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_shares_no_memory_with_the_input(name, dtype, size):
    """Not even where nothing has to be rounded: a change of the one must not change the other."""
    for overflow in ("saturate", "cast"):
        x = torch.ones(size, dtype=dtype)
        quantize(x, name, overflow=overflow).zero_()
        assert bool((x == 1).all())


# ------------------------------------------------------------------------------------------------------------- gradient


@SIZES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "int8", "mxfp4", "nvfp4", "e4m3@tensor"])
def test_the_gradient_passes_straight_through_in_the_dtype_of_the_input(name, dtype, size):
    for rounding in ("nearest", "stochastic"):
        x = (tame(size // 4, 4) * 1e4).to(dtype).requires_grad_()  # saturated ones among them
        y = quantize(x, name, rounding=rounding, key=key_of(rounding))
        same(y.detach(), reference(x.detach(), name, rounding=rounding, key=key_of(rounding)))
        grad = torch.randn(y.shape, generator=generator()).to(y.dtype)
        y.backward(grad)
        assert x.grad.dtype is dtype
        assert torch.equal(x.grad, grad.to(dtype))


@SIZES
def test_nothing_is_recorded_where_nothing_asks_for_it(size):
    leaf, plain = torch.ones(size, requires_grad=True), torch.ones(size)
    assert quantize(leaf, "e4m3").requires_grad
    with torch.no_grad():
        assert not quantize(leaf, "e4m3").requires_grad
    assert not quantize(plain, "e4m3").requires_grad
    # A scale is data here: only x has a gradient.
    assert not quantize(plain, "e4m3@tensor", scale=torch.tensor(0.5, requires_grad=True)).requires_grad


# --------------------------------------------------------------------------------------------------------------- errors


@SIZES
@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("e4m4", {}, r"unknown number format 'e4m4'; known: float64, .*; did you mean e4m3\?$"),
        ("e4m3", {"rounding": "up"}, "^unknown rounding 'up'; known: nearest, stochastic, toward_zero$"),
        ("e4m3", {"overflow": "wrap"}, "^unknown overflow 'wrap'; known: saturate, cast$"),
        ("e4m3", {"rounding": "stochastic"}, r"^stochastic rounding needs key=\(seed, step, site\), which its random"),
        ("e4m3", {"key": KEY}, "^key is for stochastic rounding; the rounding is 'nearest'$"),
        ("e4m3", {"scale": 1.0}, "^a scale can be given to formats scaled by a float32, such as .*; not to float8_e4m"),
        ("mxfp4", {"scale": 1.0}, "^a scale can be given to formats scaled by a float32, such as .*; not to mxfp4$"),
        ("mxfp4", {"axis": 2}, "^mxfp4 needs an axis of the array: 2 is none of its 2 dimensions$"),
        (
            "e4m3@1x2",
            {"scale": torch.ones(3)},
            r"^the scale must have the shape \(\) or \(\d+, 2\), one for each group",
        ),
        ("e4m3@tensor", {"scale": 0.0}, "^a given scale must be positive and finite$"),
        ("e4m3@1x4", {"scale": -1.0}, "^a given scale must be positive and finite$"),
        ("e4m3@row", {"scale": torch.tensor(math.nan)}, "^a given scale must be positive and finite$"),
        ("e4m3@tensor", {"scale": 1e39}, "^a given scale must be positive and finite$"),
    ],
)
def test_what_cannot_be_meant_is_refused_as_the_reference_refuses_it(name, options, told, size):
    x = torch.ones(size // 4, 4)
    with pytest.raises(ConfigError, match=told):
        quantize(x, name, **options)
    with pytest.raises(ConfigError, match=told), np.errstate(over="ignore"):
        formats.quantize(x.numpy(), name, **options)


@SIZES
@pytest.mark.parametrize("key", [(2**64, 0, 0), (-1, 0, 0), (0, 2**32, 0), (0, -1, 0), (0, 0, 2**32), (0, 0, -1)])
def test_numbers_of_a_key_have_their_range(key, size):
    with pytest.raises(ConfigError, match=r"seed.* below 2\*\*64, step"):
        quantize(torch.ones(size), "e4m3", rounding="stochastic", key=key)
    with pytest.raises(ValueError, match="must be in 0"):
        formats.quantize(np.ones(size), "e4m3", rounding="stochastic", key=key)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_only_floating_point_tensors_are_rounded(dtype):
    told = f"quantize takes float16, bfloat16, float32 or float64 tensors, got {dtype}"
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
        quantize(torch.ones(4).to(dtype), "e4m3")


def test_blocks_of_several_rows_need_two_axes():
    with pytest.raises(ConfigError, match=r"^nvfp4_16x16 has blocks of 16 rows; the array has one dimension$"):
        quantize(torch.ones(32), "nvfp4_16x16")
    with pytest.raises(ConfigError, match=r"^mxfp4 needs an axis of the array: -1 is none of its 0 dimensions$"):
        quantize(torch.tensor(1.0), "mxfp4")


# ------------------------------------------------------------------------------------------------------------- compiled

compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own imports


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def scalings(x, step, scale):
    """Roundings of every kind, in one graph."""
    key = (KEY[0], step, KEY[2])
    return (
        quantize(x, "e4m3"),
        quantize(x, "bf16", rounding="toward_zero", overflow="cast"),
        quantize(x, "float32", overflow="cast"),
        quantize(x.bfloat16(), "e5m2", rounding="stochastic", key=key),
        quantize(x.double(), "fp16", rounding="stochastic", key=(3, step, 4)),
        quantize(x, "mxfp8_e4m3", axis=0),
        quantize(x.half(), "nvfp4", rounding="stochastic", key=key),
        quantize(x.t(), "int8@1x16", rounding="stochastic", key=(3, 9, "site")),
        quantize(x[:, ::2], "e4m3@row", scale=scale),
        quantize(x, "e5m2@tensor", scale=0.37),
    )


@compiles
@pytest.mark.usefixtures("fresh")
def test_compiled_code_gives_the_eager_bits_and_is_not_compiled_again_for_a_new_step():
    x = groups(torch.float32)
    counter = CompileCounterWithBackend("inductor")
    call = torch.compile(scalings, fullgraph=True, backend=counter)
    scale = torch.rand(96, 1, generator=generator()) + 0.1
    before = None
    for step in (torch.tensor(7), torch.tensor(8), torch.tensor(2**32 - 1)):
        got = call(x, step, scale)
        for one, want in zip(got, scalings(x, step, scale), strict=True):
            same(one, as_numpy(want.contiguous()))
        assert before is None or not torch.equal(got[3], before[3])
        before = got
    assert counter.frame_count == 1
    with helper.off():
        for one, want in zip(call(x, torch.tensor(2**32 - 1), scale), got, strict=True):
            same(one, as_numpy(want))


@compiles
@pytest.mark.usefixtures("fresh")
def test_a_step_that_is_a_number_is_compiled_anew_which_shows_that_the_count_can_rise():
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(
        lambda x, step: quantize(x, "e4m3", rounding="stochastic", key=(1, step, 2)), fullgraph=True, backend=counter
    )
    x = tame(8, 8)
    for step in (7, 8, 2**32 - 1):
        assert torch.equal(call(x, step), quantize(x, "e4m3", rounding="stochastic", key=(1, step, 2)))
    assert counter.frame_count > 1


def in_a_row(rounded, x):
    """Arithmetic around roundings of (x, name): what a compiler would fuse, and simplify if it could look inside."""
    once = rounded(x, "bfloat16")
    return (
        once - x,
        rounded(rounded(x, "float16"), "bfloat16") - once,
        rounded(once * 3, "float16") - once,
        rounded(x + 1, "bfloat16") - x,
    )


def naive(x, name):
    return x.to(getattr(torch, name)).float()


def rounding(x, name):
    return quantize(x, name, overflow="cast")


@pytest.fixture
def precision_casts_are_not_emulated():
    with torch._inductor.config.patch(emulate_precision_casts=False):
        yield


@compiles
@pytest.mark.usefixtures("fresh", "precision_casts_are_not_emulated")
def test_the_rounding_is_really_there_where_a_compiler_would_drop_it():
    x = tame(64, 66)
    call = torch.compile(lambda x: (in_a_row(rounding, x), in_a_row(naive, x)), fullgraph=True)
    rounded, simplified = call(x)
    eager = in_a_row(rounding, x)
    for one, want, by_cast in zip(rounded, eager, in_a_row(naive, x), strict=True):
        same(one, want.numpy())
        same(one, by_cast.numpy())  # which shows that both mean the same, eager
    # The check can fail: Inductor drops the casts that it can look into.
    assert bool((eager[0] != 0).any())
    assert bool((simplified[0] == 0).all())
    assert not any(torch.equal(a, b) for a, b in zip(simplified, eager, strict=True))


@compiles
@pytest.mark.usefixtures("fresh")
def test_the_compiled_gradient_passes_straight_through():
    def loss(x, weights):
        y = quantize(x, "e4m3", rounding="stochastic", key=(1, 2, "x"))
        z = quantize(x * 2, "mxfp4", axis=0)
        return (y * weights).sum() + (z * weights).sum()

    for dtype in (torch.float32, torch.bfloat16):
        x = tame(64, 32, dtype=dtype).requires_grad_()
        weights = torch.randint(-8, 9, (64, 32), generator=generator()).float()
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weights).backward()
        assert x.grad.dtype is dtype
        assert torch.equal(x.grad, (3 * weights).to(dtype))  # small whole numbers, exact in bfloat16


@compiles
@pytest.mark.usefixtures("fresh")
def test_compiled_code_rounds_into_out_and_refuses_it_where_gradients_are_recorded():
    call = torch.compile(lambda x, out: quantize(x, "e4m3", out=out), backend="aot_eager")
    x, out = tame(64, 64), torch.empty(64, 64, dtype=torch.bfloat16)
    call(x, out)
    assert torch.equal(out.float(), quantize(x, "e4m3"))
    call(y := x.clone(), y)
    assert torch.equal(y, quantize(x, "e4m3"))
    with pytest.raises(ConfigError, match=r"^out= is for tensors whose gradient is not recorded"):
        call(x.clone().requires_grad_(), torch.empty(64, 64))


@compiles
@pytest.mark.usefixtures("fresh")
def test_a_batch_of_another_size_needs_no_new_graph():
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(
        lambda x: quantize(x, "e4m3") + quantize(x, "nvfp4"), fullgraph=True, dynamic=True, backend=counter
    )
    for rows in (5, 64, 130):
        x = tame(rows, 48)
        assert torch.equal(call(x), quantize(x, "e4m3") + quantize(x, "nvfp4"))
    assert counter.frame_count == 1


def test_the_operator_declares_what_it_returns():
    x = tame(64, 40)
    for name, dtype in itertools.product(["bfloat16", "float64", "mxfp4", "e4m3@tensor"], DTYPES):
        for layout in (x.to(dtype), x.to(dtype).t(), x.to(dtype)[:0]):
            arguments = (name, -1, "nearest", "cast", 0, torch.tensor(0), 0, None)
            torch.library.opcheck(
                torch.ops.mezzo.quantize, (layout, *arguments), test_utils=("test_schema", "test_faketensor")
            )
