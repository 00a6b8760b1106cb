"""The random Hadamard transform in torch: the bits of `mezzo.formats.hadamard`, and an orthogonal matrix."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as sylvester

from mezzo.errors import ConfigError
from mezzo.formats.hadamard import hadamard as reference
from mezzo.formats.hadamard import signs
from mezzo.torch.hadamard import hadamard

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WORKS = [torch.float32, torch.float64]


def numbers(*shape, dtype=torch.float32):
    """Numbers of thirty binades: sums in another order would have other bits."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-15, 15, shape, generator=g))).to(dtype)


def whole(*shape, dtype=torch.float32):
    """Whole numbers of 7 at most: their sums over a block, and products of those, are exact in float32."""
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def as_numpy(x):
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.numpy()


def same(got, expected):
    got = np.ascontiguousarray(got.numpy())
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    bits = f"u{got.dtype.itemsize}"
    equal = (got.view(bits) == np.ascontiguousarray(expected).view(bits)) | (np.isnan(got) & np.isnan(expected))
    assert equal.all(), (got[~equal][:5], expected[~equal][:5])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_reference(dtype, block, inverse):
    for shape, axis in (((128,), 0), ((3, 64), 1), ((192, 5), 0), ((2, 64, 3), -2), ((64, 2, 128), -1), ((0, 64), 1)):
        x = numbers(*shape, dtype=dtype)
        for seed in (0, 2**64 - 1):
            options = {"axis": axis, "block": block, "seed": seed, "inverse": inverse}
            same(hadamard(x, **options), reference(as_numpy(x), **options))


@pytest.mark.parametrize("dtype", WORKS, ids=str)
def test_the_bits_are_those_of_the_reference_at_the_ends_of_the_range(dtype):
    x, info = numbers(12, 64, dtype=dtype), torch.finfo(dtype)
    x[:3] *= info.tiny  # subnormal sums
    x[3:6] *= info.max / 2**20  # sums that overflow
    x[6, 0], x[7, 20], x[8, 40] = math.inf, -math.inf, math.nan
    x[9:] = -0.0
    with np.errstate(all="ignore"):
        for inverse in (False, True):
            same(hadamard(x, inverse=inverse), reference(x.numpy(), inverse=inverse))


@pytest.mark.parametrize("dtype", WORKS, ids=str)
def test_strides_do_not_matter(dtype):
    x = numbers(64, 32, dtype=dtype)
    for layout in (x.t(), x[:, ::2], x[:1].expand(8, -1), x.reshape(4, 16, 32).permute(2, 0, 1)):
        for axis in range(layout.dim()):
            if layout.shape[axis] % 16 == 0:
                same(hadamard(layout, axis=axis), reference(layout.numpy(), axis=axis))


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("dtype", WORKS, ids=str)
def test_it_is_the_product_with_sylvesters_matrix_and_signs(dtype, block):
    """Exact on both sides: sums of 64 whole numbers of 7 at most, times a power of two."""
    x, seed = whole(5, 128, dtype=dtype), 3
    matrix = torch.from_numpy(signs(block, seed)[:, None] * sylvester(block)).to(dtype)
    assert torch.equal(hadamard(x, block=block, seed=seed), (x.view(-1, block) @ matrix).view(5, 128) * block**-0.5)
    assert not torch.equal(hadamard(x, block=block, seed=seed), hadamard(x, block=block, seed=4))


@pytest.mark.parametrize("block", [4, 16, 64])
def test_products_are_those_of_the_originals(block):
    """Exact: transformed whole numbers are multiples of 1/8 up to 7·8, and 128 products of them fit into 24 bits."""
    a, b = whole(6, 128), whole(6, 128).flip(0)
    assert torch.equal(hadamard(a, block=block, seed=1) @ hadamard(b, block=block, seed=1).t(), a @ b.t())
    assert torch.equal(hadamard(hadamard(a, block=block), block=block, inverse=True), a)


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 32)
    x[0, 3] = 64.0
    y = hadamard(x)
    assert torch.equal(y[0, :16].abs(), torch.full((16,), 16.0))
    assert torch.equal(y[0, 16:], torch.zeros(16))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_gradient_is_the_transform_the_other_way(dtype, inverse):
    """Of an orthogonal matrix the transpose is the inverse. Sums of small whole numbers are exact in any order."""
    x = numbers(64, 3, dtype=dtype).requires_grad_()
    y = hadamard(x, axis=0, seed=7, inverse=inverse)
    grad = whole(64, 3, dtype=y.dtype)
    y.backward(grad)
    assert x.grad.dtype is dtype
    assert torch.equal(x.grad, hadamard(grad, axis=0, seed=7, inverse=not inverse).to(dtype))


def test_gradcheck_agrees():
    x = numbers(2, 16, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hadamard(x, block=4, seed=2), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own imports
def test_compiled_code_gives_the_same_bits_and_gradients():
    def there_and_back(x):
        y = hadamard(x * 3, seed=2**64 - 1)
        return y, hadamard(y + x, axis=0, block=4, inverse=True)

    torch._dynamo.reset()
    results = []
    for call in (there_and_back, torch.compile(there_and_back, fullgraph=True)):
        x = numbers(8, 32).requires_grad_()
        first, second = call(x)
        # Sums of small whole numbers and of their quarters: exact in any order.
        (first * whole(8, 32) + second * whole(8, 32).flip(0)).sum().backward()
        results.append((first.detach(), second.detach(), x.grad))
    for eager, compiled in zip(*results, strict=True):
        same(compiled, eager.numpy())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"block": 8}, r"^a Hadamard block is a power of four \(4, 16, 64, …\), not 8$"),
        ({"block": 0}, r"^a Hadamard block is a power of four \(4, 16, 64, …\), not 0$"),
        ({"block": 12}, r"^a Hadamard block is a power of four \(4, 16, 64, …\), not 12$"),
        ({"block": 64}, "^a Hadamard block of 64 does not divide an axis of 48$"),
        ({"axis": 0}, "^a Hadamard block of 16 does not divide an axis of 3$"),
    ],
)
def test_a_block_that_does_not_fit_is_refused_as_the_reference_refuses_it(options, told):
    with pytest.raises(ConfigError, match=told):
        hadamard(torch.ones(3, 48), **options)
    with pytest.raises(ConfigError, match=told):
        reference(np.ones((3, 48)), **options)


def test_only_floating_point_tensors_are_transformed():
    with pytest.raises(ConfigError, match=r"^hadamard takes floating-point tensors, got torch.int64$"):
        hadamard(torch.ones(16, dtype=torch.int64))


def test_infinities_and_nan_reach_their_block_only():
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 20] = torch.nan, torch.inf
    y = hadamard(x)
    assert y[0, :16].isnan().all()
    assert not y[1, 16:].isfinite().any()
    assert torch.equal(torch.cat([y[0, 16:], y[1, :16]]).abs(), torch.zeros(32))
