"""Packing gives back the rounded tensor to the bit, in as many bytes as the format has."""

import math

import pytest
import torch

from mezzo.formats import FORMATS, get_format
from mezzo.torch.pack import pack, packs, unpack
from mezzo.torch.quantize import quantize

SCALED = ["mxfp8_e4m3", "mxfp8_e5m2+floor", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxfp4+floor", "nvfp4",
          "nvfp4_16x16", "e4m3@tensor", "e5m2@row", "e4m3@1x128", "e4m3@16x16", "int8@1x32", "int8@tensor",
          "e2m1@row+pow2"]  # fmt: skip
ELEMENTS = [name for name in FORMATS if packs(FORMATS[name])]


def numbers(*shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-9, 9, (shape[0], 1), generator=g))
    x[0] = 0.0
    x[1] = -0.0
    return x


def same(a, b):
    nan = a.isnan() & b.isnan()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.view(torch.int32)[~nan], b.view(torch.int32)[~nan])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", SCALED)
def test_a_packed_tensor_comes_back_to_the_bit(name, axis):
    fmt = get_format(name)
    for x in (numbers(48, 64), numbers(7, 33), numbers(3, 1), numbers(48, 64) * 2.0**-140, numbers(48, 64) * 2.0**100):
        y = quantize(x, fmt, axis=axis)
        tensors = pack(x, y, fmt, axis)
        assert same(unpack(tensors, tuple(y.shape), fmt, axis), y)


@pytest.mark.parametrize("name", SCALED)
def test_groups_that_hold_nan_and_infinities_come_back_as_nan(name):
    fmt = get_format(name)
    x = numbers(48, 64)
    x[5, 7], x[20, 40], x[47, 0] = math.nan, math.inf, 3.4e38
    y = quantize(x, fmt)
    assert same(unpack(pack(x, y, fmt, -1), (48, 64), fmt, -1), y)


@pytest.mark.parametrize("rounding", ["stochastic", "toward_zero"])
def test_the_rounding_does_not_matter(rounding):
    x = numbers(48, 64)
    for name in ("nvfp4", "mxfp8", "e5m2@tensor"):
        fmt = get_format(name)
        y = quantize(x, fmt, rounding=rounding, key=(1, 2, 3) if rounding == "stochastic" else None)
        assert same(unpack(pack(x, y, fmt, -1), (48, 64), fmt, -1), y)


@pytest.mark.parametrize("name", ["e4m3@tensor", "e5m2@tensor", "e2m1@tensor", "e2m3@1x16"])
def test_with_a_scale_that_was_given_single_elements_may_be_nan(name):
    fmt = get_format(name)
    x = numbers(48, 64)
    x[5, 7] = math.nan
    scale = torch.tensor(0.37)
    y = quantize(x, fmt, scale=scale)
    tensors = pack(x, y, fmt, -1, scale)
    assert packs(fmt, given=True)
    assert same(unpack(tensors, (48, 64), fmt, -1), y)
    assert not packs(get_format("int8@tensor"), given=True)


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_without_a_scale_come_back_too(name):
    x = numbers(8, 16)
    x[3, 3] = math.nan
    fmt = get_format(name)
    y = quantize(x, fmt)
    assert same(unpack(pack(x, y, fmt, -1), (8, 16), fmt, -1), y)
    assert {"int8", "bfloat16", "float8_e8m0fnu"}.isdisjoint(ELEMENTS)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "nvfp4_16x16", "e4m3@1x128", "int8@1x32"])
def test_it_takes_the_bits_that_the_format_has(name):
    fmt = get_format(name)
    x = numbers(256, 128)
    tensors = pack(x, quantize(x, fmt), fmt, -1)
    size = sum(t.numel() * t.element_size() for t in tensors)
    tensor_scale = 4 if name.startswith("nvfp4") else 0
    assert size == x.numel() * fmt.bits / 8 + tensor_scale


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "e4m3@tensor"])
def test_compiled_code_packs_the_same(name):
    fmt = get_format(name)
    x = numbers(48, 40)
    y = quantize(x, fmt, axis=0)

    @torch.compile(fullgraph=True)
    def there_and_back(x, y):
        return unpack(pack(x, y, fmt, 0), tuple(y.shape), fmt, 0)

    assert same(there_and_back(x, y), y)
    for axis in (0, 1):
        with torch._subclasses.FakeTensorMode():
            seen = torch.ops.mezzo.pack(torch.empty(48, 40), torch.empty(48, 40), str(fmt), axis, None)
        real = torch.ops.mezzo.pack(x, y, str(fmt), axis, None)
        assert [(t.shape, t.stride(), t.dtype) for t in seen] == [(t.shape, t.stride(), t.dtype) for t in real]
