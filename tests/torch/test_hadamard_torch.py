"""The Hadamard transform in torch: the bits of the NumPy one, differentiable, and orthogonal in its gradient."""

import ml_dtypes
import numpy as np
import pytest
import torch

from mezzo.errors import ConfigError
from mezzo.formats import hadamard as in_numpy
from mezzo.torch.hadamard import hadamard


def wide_range(shape, dtype):
    """Numbers of some forty binades, so that sums round; some subnormal results of cancellation among them."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape)).astype(dtype)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_gives_the_bits_of_numpy(dtype, block, inverse):
    x = wide_range((64, 3, 128), dtype)
    for axis in (0, 2, -1):
        for seed in (0, 2**63 + 5):
            got = hadamard(torch.from_numpy(x), axis=axis, block=block, seed=seed, inverse=inverse).numpy()
            want = in_numpy(x, axis=axis, block=block, seed=seed, inverse=inverse)
            assert got.dtype == want.dtype == dtype
            assert got.tobytes() == want.tobytes()
    # The check can fail: in another order the same sums round otherwise.
    assert got.tobytes() != in_numpy(x[..., ::-1], block=block, inverse=inverse)[..., ::-1].tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_come_in_and_float32_comes_out(dtype):
    x = torch.from_numpy(wide_range((5, 32), np.float32)).clamp(-1e4, 1e4).to(dtype)
    array = x.view(torch.int16).numpy().view(np.float16 if dtype is torch.float16 else ml_dtypes.bfloat16)
    got = hadamard(x)
    assert got.dtype is torch.float32
    assert got.numpy().tobytes() == in_numpy(array).tobytes()


def test_a_tensor_that_is_not_contiguous_is_transformed_all_the_same():
    x = torch.from_numpy(wide_range((32, 48), np.float32))
    assert torch.equal(hadamard(x.t()), hadamard(x.t().contiguous()))
    assert torch.equal(hadamard(x[:, ::3]), hadamard(x[:, ::3].contiguous()))


def test_the_gradient_is_the_inverse_transform():
    x = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 32, dtype=torch.float64)
    hadamard(x, seed=3).backward(grad)
    # A sum of 16 terms in one order or another: 4 roundings of sums below 16 * 4 (no normal number here is above 4).
    assert torch.allclose(x.grad, hadamard(grad, seed=3, inverse=True), rtol=0, atol=2 * 4 * 2.0**-53 * 16 * 4)


def test_infinities_and_nan_reach_their_block_only():
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 20] = torch.nan, torch.inf
    y = hadamard(x)
    assert y[0, :16].isnan().all()
    assert not y[1, 16:].isfinite().any()
    assert torch.equal(torch.cat([y[0, 16:], y[1, :16]]).abs(), torch.zeros(32))


def test_errors_are_those_of_the_numpy_one():
    with pytest.raises(ConfigError, match=r"^a Hadamard block is a power of four \(4, 16, 64, …\), not 8$"):
        hadamard(torch.ones(2, 16), block=8)
    with pytest.raises(ConfigError, match=r"^a Hadamard block of 16 does not divide an axis of 40$"):
        hadamard(torch.ones(2, 40))
    with pytest.raises(ConfigError, match=r"^hadamard takes floating-point tensors, got torch.int64$"):
        hadamard(torch.ones(2, 16, dtype=torch.int64))
