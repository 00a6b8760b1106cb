"""The random bits of `mezzo.formats.philox` in torch: the same words, on any device, eager or compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats import philox

_LOW = 0xFFFFFFFF


def bits(seed: int, step: int | Tensor, site: int | str, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random words of the elements 0 … count - 1 of one site at one step: `mezzo.formats.philox.bits` in int64.

    step      int, or a 0-d int64 tensor on the device, which a compiled step need not be recompiled for
    count     how many words
    returns   (count,) int64 in 0 … 2**32 - 1 (torch has next to no arithmetic for uint32)
    raises    ConfigError if a number is out of its range
    """
    number = philox.site_id(site) if isinstance(site, str) else site
    if not 0 <= seed < 1 << 64 or not 0 <= number < 1 << 32 or (isinstance(step, int) and not 0 <= step < 1 << 32):
        raise ConfigError(f"seed is below 2**64, step and site below 2**32, none negative; got {seed}, {step}, {site}")
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    c0, c1 = blocks & _LOW, blocks >> 32
    c2, c3 = torch.zeros_like(blocks) + step, torch.full_like(blocks, number)
    k0, k1 = seed & _LOW, seed >> 32
    for r in range(10):
        if r:
            k0, k1 = (k0 + philox.W0) & _LOW, (k1 + philox.W1) & _LOW
        # The product of two 32-bit words wraps around in int64, which leaves its 64 bits as they are.
        p0, p1 = c0 * philox.M0, c2 * philox.M1
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1).reshape(-1)[:count]
