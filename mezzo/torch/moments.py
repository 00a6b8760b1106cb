"""Moments of an optimizer at rest, between steps: a tensor in bfloat16, or codes and scales of a scaled format.

    float32 ──► at_rest ──► Packed ──► values ──► float32

Blocks lie along the tensor flattened: the order of its elements, whatever its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mezzo.formats import AnyFormat, Format, ScaledFormat
from mezzo.formats.blocks import Groups
from mezzo.formats.rounding import Rounding
from mezzo.formats.spec import BFLOAT16, E2M1
from mezzo.policy import Spec
from mezzo.torch.groups import divide, group_scales, join
from mezzo.torch.pack import CONTAINERS, pack, unpack
from mezzo.torch.quantize import quantize

WIDE = ("float32", "float64")
# What torch's optimizers divide an update by (Adam and its kin, Adamax, Adagrad, RMSprop, Adadelta): one that became
# zero would make the update explode.
NEVER_ZERO = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg")
Words = tuple[int, int, str]  # seed, step, site


@dataclass
class Packed:
    """A moment at rest.

    fmt      None: as the optimizer made it
    tensors  the tensor itself; of a scaled format uint8 codes and scales
    """

    fmt: AnyFormat | None
    tensors: tuple[Tensor, ...]

    def values(self, like: Tensor) -> Tensor:
        """In the dtype, shape and order of memory of `like`; the tensor itself where fmt is None."""
        if self.fmt is None:
            return self.tensors[0]
        out = torch.empty_like(like, requires_grad=False)
        if isinstance(self.fmt, Format):
            return out.copy_(self.tensors[0])
        codes, scales = self.tensors
        if self.fmt.element is not E2M1:  # two elements of 4 bits share a byte
            codes = codes.view(CONTAINERS[self.fmt.element])
        flat = unpack((codes, scales, scales.new_empty(0)), (like.numel(),), self.fmt, -1)
        return out.copy_(flat.view(like.shape))


def at_rest(x: Tensor, spec: Spec, key: str, words: Words) -> Packed:
    """A moment as the rules say.

    x         float32 or float64, of the weight's shape
    key       what the optimizer calls it. Second moments in a scaled format never become zero: a positive number below
              half of its block's smallest is rounded up to that
    words     key of stochastic rounding
    """
    if spec.fmt.name in WIDE:
        return Packed(None, (x,))
    if isinstance(spec.fmt, Format):
        return Packed(spec.fmt, (to_bfloat16(x, spec.rounding, words),))
    flat = x.reshape(-1).float()
    y = quantize(flat, spec.fmt, rounding=spec.rounding, key=words if spec.rounding == "stochastic" else None)
    if key in NEVER_ZERO:
        y = _lift(flat, y, spec.fmt)
    codes, scales, _ = pack(flat, y, spec.fmt, -1)
    return Packed(spec.fmt, (codes.view(torch.uint8), scales))


def to_bfloat16(x: Tensor, rounding: Rounding, words: Words | None) -> Tensor:
    """`x` rounded once; what is too large becomes infinite."""
    if rounding == "nearest" and x.dtype is not torch.float64:
        return x.to(torch.bfloat16)
    key = words if rounding == "stochastic" else None
    return quantize(x, BFLOAT16, rounding=rounding, overflow="cast", key=key).to(torch.bfloat16)


def _lift(x: Tensor, y: Tensor, fmt: ScaledFormat) -> Tensor:
    """`y`, which is x rounded, with the block's smallest positive value where a positive number became zero."""
    lost = (x > 0) & (y == 0)
    if not x.numel() or (x.device.type == "cpu" and not lost.any()):  # elsewhere the question would wait for the device
        return y
    groups = Groups(tuple(x.shape), fmt, -1)
    least = group_scales(groups, divide(groups, x), fmt, None).scales * fmt.element.min_subnormal
    smallest = join(groups, least.expand(-1, -1, groups.rows, -1, groups.columns))
    return torch.where(lost, smallest, y)
