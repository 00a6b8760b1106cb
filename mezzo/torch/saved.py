"""What operations other than products keep for the backward pass, in the format that `saved` rules give it.

    forward   x ──► norm, activation, softmax, loss ──► y          computed from x as it is
                └─► pack ──► codes and scales, or 16 bits ──┐
    backward                                  unpack ◄──────┘      computed from x rounded

Products and attention keep their operands in the formats of their own roles (`SiteSpec.keep`), and parameters stay.
source: COAT (arXiv 2410.19313) and DeepSeek-V3 (arXiv 2412.19437, section 3.3.3) keep such activations in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mezzo.policy import Site, Spec
from mezzo.torch.pack import pack, unpack
from mezzo.torch.quantize import quantize
from mezzo.torch.rounding import CARRIERS, carrier
from mezzo.torch.table import SiteEvent

if TYPE_CHECKING:
    from mezzo.torch.intercept import SiteMode
    from mezzo.torch.precision import Precision

STATISTICS = 16  # a tensor with fewer values along its last axis holds a norm's mean or scale, and stays


@dataclass(frozen=True)
class Rounded:
    """A tensor as it is kept: its shape and dtype, the format, and what `pack` made of it (one tensor: 16 bits)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: Spec
    tensors: tuple[Tensor, ...]

    def restore(self) -> Tensor:
        if len(self.tensors) == 1:
            return self.tensors[0].to(self.dtype)
        return unpack(self.tensors, self.shape, self.spec.fmt, -1).to(self.dtype)


@contextmanager
def saving(mode: SiteMode, model: nn.Module) -> Iterator[None]:
    """Keep what is saved in here as the table of `mode` says."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    # The residual stream, say, is kept by several operations: it is packed once. A storage that is gone does not count.
    packed: dict[tuple[object, ...], tuple[StorageWeakRef, Rounded]] = {}

    def keep(x: Tensor) -> Tensor | Rounded:
        kept = choose(x)
        if mode.kept is not None:
            mode.kept |= {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                for t in ((kept,) if isinstance(kept, Tensor) else kept.tensors)
                if t.untyped_storage()._cdata not in own
            }
        return kept

    def choose(x: Tensor) -> Tensor | Rounded:
        spec = None if mode.in_product else mode.table.saved(mode.path)
        if spec is None or not _shrinks(x, spec) or x.untyped_storage()._cdata in own:
            return x
        storage = StorageWeakRef(x.untyped_storage())
        key = (storage.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version, spec)
        there = packed.get(key)
        if there is None or there[0].expired():
            packed[key] = there = storage, _round(mode, x, spec)
        return there[1]

    def give(kept: Tensor | Rounded) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.restore()

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield


def kept_bytes(precision: Precision, forward: Callable[[], object]) -> int:
    """Bytes that autograd holds of one forward pass until the backward pass: each storage once, parameters left out.

    forward   runs the model once, with gradients, and returns something that holds the graph, such as the loss
    """
    mode = precision.mode
    found: dict[int, int] = {}
    mode.kept = found
    try:
        result = forward()
    finally:
        mode.kept = None
    del result  # until here everything was alive, and no two storages had one address
    return sum(found.values())


def _shrinks(x: Tensor, spec: Spec) -> bool:
    smaller = x.numel() * spec.fmt.bits < 8 * x.untyped_storage().nbytes()  # of an expanded tensor it is not
    wide = (
        smaller and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and 8 * x.element_size() > spec.fmt.bits
    )
    return wide and x.dim() > 1 and x.shape[-1] >= STATISTICS


@torch.no_grad()
def _round(mode: SiteMode, x: Tensor, spec: Spec) -> Rounded:
    with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
        source = x.detach().float()
        y = quantize(source, spec.fmt, axis=-1, overflow="saturate")
        for tap in mode.table.hooks.taps:
            tap(SiteEvent(Site(mode.path, "saved"), source, y, spec, -1, None, source))
        if spec.fmt.name in CARRIERS:
            tensors: tuple[Tensor, ...] = (y.to(carrier(spec.fmt)),)
        else:
            tensors = pack(source, y, spec.fmt, -1)
        return Rounded(tuple(x.shape), x.dtype, spec, tensors)
