"""Which tensors the compiled helper takes."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def check_tensors(x: Tensor, other: Tensor, name: str) -> None:
    """Raise ValueError unless both lie alike, without gaps, in the CPU's memory; `name` is what to call the other."""
    for tensor in (x, other):
        if tensor.device.type != "cpu" or tensor.dtype not in TYPES or not dense(tensor):
            raise ValueError(f"the helper takes dense float32, bfloat16 or float16 tensors of the CPU, not {tensor}")
    aligned = x.stride() == other.stride() or (x.is_contiguous() and other.is_contiguous())
    if x.shape != other.shape or not aligned:
        raise ValueError(f"{name} must have the shape and the strides of x")


def dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order of the axes."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
