"""A site: one place in a network where a number format is chosen.

    path:role             blocks.3.attn.qkv:fprop.a
    path#call:role        blocks.3.attn.qkv#1:fprop.a      the second call of that path in a forward pass

Roles of a linear layer, convolution or matrix product (y = a·b, dx = a·b, dw = a·b):
    fprop.a input      fprop.b weight   fprop.out     forward
    dgrad.a gradient   dgrad.b weight   dgrad.out     gradient of the input
    wgrad.a gradient   wgrad.b input    wgrad.out     gradient of the weight
Roles of attention:
    fprop.query fprop.key fprop.value fprop.probs fprop.out     dgrad.dout dgrad.query dgrad.key dgrad.value
    (dgrad.dout is the incoming gradient; the last three are the gradients that leave)
Other roles:
    compute    what a norm, a softmax, an embedding or a loss computes in
    master     the stored weight
    saved      what any other operation than a product or attention keeps for the backward pass
    state.exp_avg state.exp_avg_sq state.max_exp_avg_sq state.momentum_buffer state.other
               the optimizer's moments between steps, by the names that torch.optim gives them
"""

from __future__ import annotations

from dataclasses import dataclass

ROOT = "(model)"  # the path of the model itself

PRODUCT_ROLES = tuple(
    f"{product}.{operand}" for product in ("fprop", "dgrad", "wgrad") for operand in ("a", "b", "out")
)
ATTENTION_ROLES = (
    *(f"fprop.{operand}" for operand in ("query", "key", "value", "probs", "out")),
    *(f"dgrad.{operand}" for operand in ("dout", "query", "key", "value")),
)
STATE_ROLES = tuple(f"state.{name}" for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "other"))
# Of tensors that come and go with a step; the others are stored.
TENSOR_ROLES = (*PRODUCT_ROLES, *(role for role in ATTENTION_ROLES if role not in PRODUCT_ROLES), "compute")
ROLES = (*TENSOR_ROLES, "master", "saved", *STATE_ROLES)

# A shorthand names one tensor in every product that it enters.
SHORTHANDS = {
    "input": ("fprop.a", "wgrad.b", "fprop.query", "fprop.key", "fprop.value"),
    "weight": ("fprop.b", "dgrad.b"),
    "grad_output": ("dgrad.a", "wgrad.a", "dgrad.dout"),
    "state": STATE_ROLES,
    "out": ("fprop.out", "dgrad.out", "wgrad.out", "dgrad.query", "dgrad.key", "dgrad.value"),
}


@dataclass(frozen=True, order=True)
class Site:
    """One place where a number format is chosen: `str(site)` is `path:role` or `path#call:role`."""

    path: str
    role: str
    call: int = 0

    def __str__(self) -> str:
        return f"{self.path}#{self.call}:{self.role}" if self.call else f"{self.path}:{self.role}"


@dataclass(frozen=True)
class SiteRow:
    """One site as resolved.

    site    `path:role`, or `path:op NAME` for an operation that no rule speaks of
    shape   of the tensor; () for a scalar
    format  what its values are rounded to, and how if not to nearest; or the dtype that an uncovered operation ran in
    route   "native", "emulated", "flash", "explicit", "kernel" (left to a kernel), "stored", "not covered"
    bytes   the tensor's size in that format; while an emulated product runs it lies in a wider tensor
    calls   how often the site was met in one forward pass; shape and bytes are those of one call
    """

    site: str
    shape: tuple[int, ...]
    format: str
    route: str
    bytes: int
    calls: int = 1
