"""The random Hadamard transform: orthogonal, undone by its inverse, and without effect on a product of two."""

import math

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

from mezzo.errors import ConfigError
from mezzo.formats import hadamard
from mezzo.formats.hadamard import signs
from mezzo.formats.philox import bits

BLOCKS = [4, 16, 64, 256]


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def whole(shape, seed=0):
    """Whole numbers so small that float32 sums of thousands of them are exact."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_matrix_is_the_signs_times_sylvesters_over_the_root_of_the_block(block):
    flip = 1.0 - 2.0 * (bits(5, 0, "mezzo.hadamard", block) & 1)
    want = np.diag(flip) @ scipy.linalg.hadamard(block) / math.sqrt(block)
    assert np.array_equal(hadamard(np.eye(block, dtype=np.float32), block=block, seed=5), want)
    assert np.array_equal(signs(block, 5), flip)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_matrix_is_orthogonal(block):
    matrix = hadamard(np.eye(block), block=block, seed=3)
    # Entries are ±1/sqrt(block), a power of two: every sum is exact.
    assert np.array_equal(matrix @ matrix.T, np.eye(block))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_inverse_undoes_it(block, dtype):
    x = normal((6, 2 * block), dtype=dtype)
    back = hadamard(hadamard(x, block=block, seed=1), block=block, seed=1, inverse=True)
    assert back.dtype == dtype
    # 2 log2(block) sums on each number's way, each off by at most u of the sum of |x| over its block.
    u = np.finfo(dtype).eps / 2
    limit = 2 * math.log2(block) * u * np.abs(x).reshape(6, 2, block).sum(-1, keepdims=True)
    assert (np.abs(back - x).reshape(6, 2, block) <= limit).all()
    exact = whole((6, 2 * block))
    assert np.array_equal(hadamard(hadamard(exact, block=block), block=block, inverse=True), exact)
    # Transforming twice is no inverse: the signs come before the sums, not after.
    assert not np.array_equal(hadamard(hadamard(exact, block=block, seed=3), block=block, seed=3), exact)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_product_of_two_transformed_operands_is_that_of_the_originals(block):
    a, b = whole((5, 512)), whole((7, 512), seed=1)
    turned = hadamard(a, block=block, seed=9) @ hadamard(b, block=block, seed=9).T
    assert np.array_equal(turned, a @ b.T)  # all exact: multiples of 1/block below 2**24 of them
    other = hadamard(a, block=block, seed=9) @ hadamard(b, block=block, seed=10).T
    assert not np.array_equal(other, a @ b.T)


def test_an_outlier_is_spread_over_its_block_and_no_further():
    x = np.zeros((1, 48), np.float32)
    x[0, 20] = 64.0
    y = hadamard(x)
    assert np.array_equal(np.abs(y[0]), [0.0] * 16 + [16.0] * 16 + [0.0] * 16)


def test_the_length_of_each_block_stays():
    x = normal((4, 64), dtype=np.float64)
    before, after = (np.square(v.reshape(4, 4, 16)).sum(-1) for v in (x, hadamard(x)))
    # Each number errs by at most 4 u of the block's sum of |x|, which is at most 4 times its length.
    assert np.allclose(before, after, rtol=2 * 16 * 4 * 4 * 2.0**-53, atol=0)


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_it_lies_along_any_axis(axis):
    x = normal((16, 32, 64))
    want = np.moveaxis(hadamard(np.ascontiguousarray(np.moveaxis(x, axis, -1))), -1, axis)
    assert np.array_equal(hadamard(x, axis=axis), want)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_sixteen_bits_are_widened_before_they_are_added(dtype):
    x = normal((3, 32)).astype(dtype)
    y = hadamard(x)
    assert y.dtype == np.float32
    assert np.array_equal(y, hadamard(x.astype(np.float32)))


def test_seeds_choose_the_signs_and_are_the_same_for_ever():
    assert signs(16, 0).tolist() == [-1, -1, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1, -1, 1, 1, 1]
    assert len({signs(64, seed).tobytes() for seed in range(8)}) == 8
    assert np.array_equal(signs(16, 7), signs(64, 7)[:16])


def test_the_argument_is_left_alone_and_may_be_empty():
    x = normal((2, 16))
    before = x.copy()
    hadamard(x)
    assert np.array_equal(x, before)
    assert hadamard(np.zeros((0, 16), np.float32)).shape == (0, 16)
    assert hadamard(np.zeros((3, 0), np.float32)).shape == (3, 0)


@pytest.mark.parametrize("block", [-4, 0, 1, 2, 3, 8, 12, 32, 128])
def test_a_block_that_is_no_power_of_four_is_refused(block):
    with pytest.raises(ConfigError, match=rf"^a Hadamard block is a power of four \(4, 16, 64, …\), not {block}$"):
        hadamard(np.ones((2, 128), np.float32), block=block)


def test_a_block_that_does_not_divide_the_axis_is_refused():
    with pytest.raises(ConfigError, match=r"^a Hadamard block of 16 does not divide an axis of 40$"):
        hadamard(np.ones((16, 40), np.float32))
    with pytest.raises(ConfigError, match=r"^a Hadamard block of 64 does not divide an axis of 16$"):
        hadamard(np.ones((16, 64), np.float32), axis=0, block=64)


def test_whole_numbers_are_refused():
    with pytest.raises(ConfigError, match="takes float16, bfloat16, float32 or float64 arrays, got int64"):
        hadamard(np.ones(16, np.int64))
