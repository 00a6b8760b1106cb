"""The random Hadamard transform: it spreads an outlier over its block, and a product of two transformed operands is
the product of the originals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mezzo.errors import ConfigError
from mezzo.formats.philox import bits
from mezzo.formats.rounding import as_float


def signs(block: int, seed: int, site: int | str = "mezzo.hadamard") -> npt.NDArray[np.float32]:
    """(block,) of ±1: the lowest bit of the Philox words of step 0."""
    return (1 - 2 * (bits(seed, 0, site, block) & 1).astype(np.float32)).astype(np.float32)


def check_block(block: int, length: int) -> None:
    """Refuse a block that is no power of four or does not divide the axis."""
    if block < 4 or block & (block - 1) or block.bit_length() % 2 == 0:
        # With 4**k the factor 1/sqrt(block) is a power of two: the transform rounds nothing but its sums.
        raise ConfigError(f"a Hadamard block is a power of four (4, 16, 64, …), not {block}")
    if length % block:
        raise ConfigError(f"a Hadamard block of {block} does not divide an axis of {length}")


def hadamard(
    x: npt.ArrayLike, *, axis: int = -1, block: int = 16, seed: int = 0, inverse: bool = False
) -> npt.NDArray[Any]:
    """Multiply each block along an axis by diag(signs)·H / sqrt(block), H the ±1 matrix of Sylvester.

    The matrix is orthogonal: hadamard(a)·hadamard(b)ᵀ = a·bᵀ when both are transformed along the summed axis.
    Sums are butterflies in float32 (float64 for float64): the same order, so the same bits, in every framework.

    x         (…, n, …), n a multiple of block along `axis`
    block     a power of four
    seed      chooses the signs
    inverse   undo it
    returns   float32 array of x's shape; float64 where x is float64
    raises    ConfigError if the block is no power of four or does not divide the axis
    source    arXiv 2509.25149, appendix C; Sylvester 1867
    """
    array = as_float(x)
    work = np.float64 if array.dtype == np.float64 else np.float32
    moved: npt.NDArray[Any] = np.moveaxis(array, axis, -1)
    check_block(block, moved.shape[-1])
    y: Any = moved.astype(work).reshape(-1, block)
    flip: Any = signs(block, seed).astype(work)
    if not inverse:
        y = y * flip
    half = 1
    while half < block:
        pairs = y.reshape(-1, block // (2 * half), 2, half)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(-1, block)
        half *= 2
    y = y * work(block**-0.5)
    if inverse:
        y = y * flip
    result: npt.NDArray[Any] = np.moveaxis(y.reshape(moved.shape), -1, axis)
    return result
