"""The random words of `mezzo.formats.philox` in uint32 arithmetic, which every framework has."""

from __future__ import annotations

from mezzo.errors import ConfigError
from mezzo.formats import philox
from mezzo.formats.portable.arrays import Array, Arrays, Size

_LOW = 0xFFFFFFFF


def bits(xp: Arrays, seed: int, step: Array, site: int | str, count: Size) -> Array:
    """Random words of the elements 0 … count - 1 of one site at one step.

    step      int, or an array of no dimensions
    count     how many words, below 2**34
    returns   (count,) uint32
    raises    ConfigError if a number is out of its range
    """
    number = philox.site_id(site) if isinstance(site, str) else site
    known = not hasattr(step, "dtype") or xp.is_known(step)
    if known:
        step = int(step)
    if not 0 <= seed < 1 << 64 or not 0 <= number < 1 << 32 or (known and not 0 <= step < 1 << 32):
        raise ConfigError(f"seed is below 2**64, step and site below 2**32, none negative; got {seed}, {step}, {site}")
    if isinstance(count, int) and not 0 <= count < 1 << 34:
        raise ConfigError(f"an array takes fewer than 2**34 random words, not {count}")
    # XLA would run through the rounds anew, one by one, for each of four words that lie side by side. Where it joins
    # all operations into one pass, every word's own run through them is cheaper.
    element = xp.arange(count) if xp.fuses and count < 1 << 32 else None
    c0 = xp.arange((count + 3) // 4) if element is None else xp.shift_right(element, 2)
    zero = c0 & 0
    c1, c2 = zero, zero + xp.array(step, "uint32") if known else zero + xp.cast(step, "uint32")
    c3 = zero + xp.array(number, "uint32")
    k0, k1 = seed & _LOW, seed >> 32
    m0, m1 = (xp.array(m, "uint32") for m in (philox.M0, philox.M1))
    for r in range(10):
        if r:
            k0, k1 = (k0 + philox.W0) & _LOW, (k1 + philox.W1) & _LOW
        high0, high1 = _high(xp, c0, philox.M0), _high(xp, c2, philox.M1)
        key0, key1 = xp.array(k0, "uint32"), xp.array(k1, "uint32")
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, c2 * m1, high0 ^ c3 ^ key1, c0 * m0
    if element is not None:
        first, odd = (element & 2) == 0, (element & 1) == 1
        return xp.where(odd, xp.where(first, c1, c3), xp.where(first, c0, c2))
    return xp.reshape(xp.stack([c0, c1, c2, c3], 1), (-1,))[:count]


def _high(xp: Arrays, x: Array, m: int) -> Array:
    """The upper word of x · m, from products of half words: JAX has 64 bits only where they were asked for."""
    m0, m1 = m & 0xFFFF, m >> 16
    x0, x1 = x & 0xFFFF, xp.shift_right(x, 16)
    middle = x1 * m0 + xp.shift_right(x0 * m0, 16)  # at most (2**16 - 1)**2 + 2**16 - 1 < 2**32
    other = x0 * m1 + (middle & 0xFFFF)
    return x1 * m1 + xp.shift_right(middle, 16) + xp.shift_right(other, 16)
