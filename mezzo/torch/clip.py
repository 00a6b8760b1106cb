"""Gradient clipping, on the device and without waiting for it: adaptive, by value, by norm, in this order.

    gradients × loss scale ──► ÷ scale ──► adaptive, unit by unit ──► by value ──► norm of the rest ──► divisor
                           └───────────────── by norm alone ─────────────────────────────────────────┘

Clipping by norm changes no gradient here: it makes the number larger by which the optimizer's step divides gradients,
the loss scale. Thresholds of the other two are for unscaled gradients, so these two unscale first, in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mezzo.errors import ConfigError

EPS = 1e-3  # weights that are (almost) zero may still move: the paper's ε


def norms(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Euclidean norms: of each tensor, and the total over all, 0-d each.

    tensors   gradients; norms of 16-bit ones are taken in float32, or in float64 if one of them is float64
    """
    dtypes = {t.dtype for t in tensors}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    narrow = dtypes & {torch.bfloat16, torch.float16}  # whose norms would have 16 bits too
    each = torch._foreach_norm(tensors, 2, wide if narrow else None)
    alike = [n.to(torch.float64 if n.dtype is torch.float64 else torch.float32) for n in each]
    return tuple(each), torch.linalg.vector_norm(torch.stack(alike))


def unit_norms(x: Tensor) -> Tensor:
    """Norms of the units of a weight or its gradient: of each row, each output channel, the whole of a vector.

    x         (out, ...), a vector or a number; a matrix with one row or one column is a vector
    returns   (out, 1, ...) or 0-d, float32 or float64
    source    Brock et al. 2021 (arXiv 2102.06171), section 4.1, and the function `unitwise_norm` of its code
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if sum(size > 1 for size in x.shape) <= 1:
        whole: Tensor = torch.linalg.vector_norm(x, dtype=wide)
        return whole
    units: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True, dtype=wide)
    return units


@torch.no_grad()
def clip_adaptive_(grads: list[Tensor], weights: list[Tensor], factor: float, eps: float = EPS) -> None:
    """Scale down each unit i of a gradient G whose norm is above factor · max(‖W_i‖, eps), to that norm, in place.

    grads     unscaled, one for each of `weights`
    factor    λ of the paper, about 0.01
    source    Brock et al. 2021 (arXiv 2102.06171), equation 3
    """
    for grad, weight in zip(grads, weights, strict=True):
        limit = factor * unit_norms(weight).clamp(min=eps)
        share = (limit / unit_norms(grad)).clamp(max=1.0)  # infinite for a gradient of zeros, which then stays
        grad.mul_(share)


@torch.no_grad()
def clip_value_(grads: list[Tensor], value: float) -> None:
    """Bring every element of the gradients into [-value, value], in place."""
    torch._foreach_clamp_min_(grads, -value)
    torch._foreach_clamp_max_(grads, value)


@dataclass(frozen=True)
class Clipping:
    """What gradients are held to before an optimizer's step; None leaves a way out.

    max_norm    total norm of what the other two left
    max_value   magnitude of each element
    adaptive    norm of each unit against that of its weights: λ of Brock et al.
    raises      ConfigError for a number that is not positive
    """

    max_norm: float | None = None
    max_value: float | None = None
    adaptive: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is a positive number or None, got {value!r}")

    @torch.no_grad()
    def divisor(self, grads: list[Tensor], weights: list[Tensor], scale: Tensor, grad_norm: Tensor) -> Tensor:
        """Clip; what by norm would do is left to a division that is still to come.

        grads       scaled; changed in place if clipped by value or adaptively
        weights     one for each gradient
        scale       0-d float32, what gradients were multiplied by
        grad_norm   0-d, their total norm without the scale
        returns     0-d float32: what the optimizer's step divides gradients by
        """
        divisor = scale
        if self.adaptive is not None or self.max_value is not None:
            torch._foreach_div_(grads, scale)
            divisor = torch.ones_like(scale)
            if self.adaptive is not None:
                clip_adaptive_(grads, weights, self.adaptive)
            if self.max_value is not None:
                clip_value_(grads, self.max_value)
            if self.max_norm is not None:
                grad_norm = norms(grads)[1].float()
        if self.max_norm is not None:
            divisor = divisor * torch.clamp(grad_norm / self.max_norm, min=1.0)
        return divisor
