"""Random bits from a counter, and a keyed shuffle without state.

Both are pure functions of integers: the same on every machine, under every framework and NumPy version, and after
every resume. Nothing here asks NumPy's own generators, whose streams may change between releases.

    bits(seed, step, site, count)      `count` random 32-bit words, for stochastic rounding
    bits_at(seed, step, site, element) the same words, looked up one by one
    permute(index, n, key)             a bijection of 0 … n-1; which bijection is chosen by the key
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

# Salmon et al. 2011, table 2 and section 3.2: the two multipliers, and the Weyl constants that bump the key
# (the golden ratio and sqrt(3) - 1, as 32-bit fractions).
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

# Twelve rounds: with eight, the orders of five or six elements are visibly unequal (chi-squared twice its mean);
# with twelve they are not. tests/formats/test_philox.py holds it.
_FEISTEL_ROUNDS = 12


def philox4x32(counter: ArrayLike, key: ArrayLike, *, rounds: int = 10) -> U32:
    """Encrypt counters with Philox4x32: each becomes four random 32-bit words.

    counter   (..., 4) integers below 2**32
    key       (..., 2) integers below 2**32, broadcast against the counters
    returns   (..., 4) uint32
    raises    ValueError if the last axis of counter is not 4, or that of key not 2
    source    Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC11); Random123's kat_vectors
    """
    counters = np.asarray(counter, dtype=np.uint64)
    keys = np.asarray(key, dtype=np.uint64)
    if counters.shape[-1:] != (4,) or keys.shape[-1:] != (2,):
        raise ValueError(f"counter must be (..., 4) and key (..., 2), not {counters.shape} and {keys.shape}")
    # uint64 holds the full product of two 32-bit words: its upper and lower halves are what Philox calls hi and lo.
    c0, c1, c2, c3 = (counters[..., i] for i in range(4))
    k0, k1 = keys[..., 0], keys[..., 1]
    for r in range(rounds):
        if r:
            k0, k1 = (k0 + np.uint64(W0)) & _LOW, (k1 + np.uint64(W1)) & _LOW
        p0, p1 = np.uint64(M0) * c0, np.uint64(M1) * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def site_id(name: str) -> int:
    """A site's name as a 32-bit number, the same on every machine: the first four bytes of its BLAKE2b hash.

    name      any text, for example "blocks.3.attn.qkv/wgrad/a"
    returns   int in 0 … 2**32 - 1
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def bits(seed: int, step: int, site: int | str, count: int, *, start: int = 0) -> U32:
    """Random words of the elements start … start + count - 1 of one site at one step.

    Element e is word e mod 4 of Philox4x32-10 at the counter (e div 4 as two words, step, site) under the key seed.

    seed      int in 0 … 2**64 - 1
    step      int in 0 … 2**32 - 1
    site      int in 0 … 2**32 - 1, or a name, which goes through site_id
    count     how many words
    returns   (count,) uint32, uniform
    raises    ValueError if a number is out of its range
    source    architecture.md, "Random bits"
    """
    if start < 0 or count < 0 or start + count > 1 << 64:
        raise ValueError(f"elements {start} … {start + count} are outside 0 … 2**64")
    first = start // 4
    # Python's int for the end: start + count may be 2**64 itself.
    blocks = np.uint64(first) + np.arange((start + count + 3) // 4 - first, dtype=np.uint64)
    words = _block_words(seed, step, site, blocks).reshape(-1)
    return words[start - 4 * first :][:count]


def bits_at(seed: int, step: int, site: int | str, element: ArrayLike) -> U32:
    """The words of `bits`, looked up at any elements in any order.

    element   (...) integers in 0 … 2**64 - 1
    returns   (...) uint32; bits_at(s, t, x, e) == bits(s, t, x, e + 1)[e]
    raises    ValueError if a number is out of its range
    """
    given = np.asarray(element)
    if given.size and given.min() < 0:
        raise ValueError(f"elements are counted from 0, not {given.min()}")
    elements = given.astype(np.uint64)
    words = _block_words(seed, step, site, elements >> np.uint64(2))
    lane = (elements & np.uint64(3)).astype(np.intp)
    picked: U32 = np.take_along_axis(words, lane[..., None], axis=-1)[..., 0]
    return picked


def permute(index: ArrayLike, n: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """Where a keyed shuffle of 0 … n-1 sends each index, at a cost that does not grow with n.

    An index is written as (left, right) in mixed radix, left below a = ceil(sqrt(n)) and right below b = ceil(n / a),
    and goes through twelve rounds of a Feistel network that adds to one half a keyed hash of the other, modulo that
    half's radix. Each round can be undone, so the whole is a bijection of 0 … ab-1; the few results that are n or more
    (ab < n + a) go round again until they fall below n, which keeps it a bijection of 0 … n-1. The hash is
    MurmurHash3's 32-bit finaliser over the half XOR a round key; the round keys are Philox words of the key.
    Good for shuffling; not a cipher.

    index     (...) integers in 0 … n-1
    n         1 … 2**62
    key       (seed, stream), each in 0 … 2**64 - 1; data order uses (seed, epoch)
    returns   (...) int64 in 0 … n-1, all different where the indices are
    raises    ValueError if n or an index is out of range
    source    Black and Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002): generalised Feistel, cycle walking
    """
    indices = np.asarray(index)
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"n must be in 1 … 2**62, not {n}")
    if indices.size and (indices.min() < 0 or indices.max() >= n):
        raise ValueError(f"indices must be in 0 … {n - 1}, not {indices.min()} … {indices.max()}")
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _round_keys(key)
    out = _feistel(indices.astype(np.uint64).reshape(-1), a, b, keys)
    outside = np.flatnonzero(out >= np.uint64(n))
    while outside.size:
        out[outside] = _feistel(out[outside], a, b, keys)
        outside = outside[out[outside] >= np.uint64(n)]
    return out.astype(np.int64).reshape(indices.shape)


def _block_words(seed: int, step: int, site: int | str, blocks: U64) -> U32:
    """(...) block numbers to (..., 4) words."""
    number = site_id(site) if isinstance(site, str) else site
    _check("step", step, 32)
    _check("site", number, 32)
    counter = np.empty((*blocks.shape, 4), dtype=np.uint64)
    counter[..., 0], counter[..., 1] = blocks & _LOW, blocks >> _32
    counter[..., 2], counter[..., 3] = step, number
    return philox4x32(counter, _halves("seed", seed))


@lru_cache(maxsize=8)
def _round_keys(key: tuple[int, int]) -> U32:
    """Twelve round keys: Philox words at the counters (stream as two words, 0 … 2, "permute") under the key seed."""
    seed, stream = key
    counter = [[*_halves("stream", stream), i, site_id("mezzo.permute")] for i in range(_FEISTEL_ROUNDS // 4)]
    keys = philox4x32(counter, _halves("seed", seed)).reshape(-1)
    keys.flags.writeable = False  # the cache hands out this very array
    return keys


def _feistel(x: U64, a: int, b: int, keys: U32) -> U64:
    """One pass of the network over 0 … ab-1."""
    ua, ub = np.uint64(a), np.uint64(b)
    left, right = x // ub, x % ub
    for r in range(0, _FEISTEL_ROUNDS, 2):
        left = (left + _scaled_hash(right, keys[r], ua)) % ua
        right = (right + _scaled_hash(left, keys[r + 1], ub)) % ub
    return left * ub + right


def _scaled_hash(half: U64, key: np.uint32, radix: np.uint64) -> U64:
    """MurmurHash3's fmix32 of half XOR key, scaled to 0 … radix-1 by its upper bits (radix is at most 2**31)."""
    h = half ^ np.uint64(key)
    h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & _LOW
    h = ((h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & _LOW
    h = h ^ (h >> np.uint64(16))
    scaled: U64 = (h * radix) >> _32
    return scaled


def _halves(name: str, value: int) -> tuple[int, int]:
    """A 64-bit number as (low word, high word)."""
    _check(name, value, 64)
    return value & 0xFFFFFFFF, value >> 32


def _check(name: str, value: Any, width: int) -> None:
    if not 0 <= int(value) < 1 << width:
        raise ValueError(f"{name} must be in 0 … 2**{width} - 1, not {value}")
