"""Rounded operands as codes and scales: what a product keeps for its backward pass, in the format's own bits.

    y (rounded, float32) ──► pack ──► codes of a byte, or of half a byte in 4 bits, and scales ──► unpack ──► y

An element's code is the byte of the smallest torch dtype that holds every element: float8_e4m3fn, float8_e5m2 or int8;
two elements of 4 bits share a byte. Scales are kept as e8m0 or e4m3 codes, or in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mezzo.formats import AnyFormat, Format, ScaledFormat, get_format
from mezzo.formats.blocks import Groups
from mezzo.formats.spec import E2M1, E2M3, E3M2, E4M3, E5M2, INT8
from mezzo.torch.groups import divide, group_scales, join

CONTAINERS = {
    E4M3: torch.float8_e4m3fn,
    E2M3: torch.float8_e4m3fn,
    E2M1: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
    E3M2: torch.float8_e5m2,
    INT8: torch.int8,
}


def packs(fmt: AnyFormat, given: bool = False) -> bool:
    """Whether tensors rounded to a format can be packed.

    given    the scale is not the tensor's own: single elements may then be NaN, for which int8 has no code
    """
    if isinstance(fmt, ScaledFormat):
        return fmt.element is not INT8 or not given
    return fmt in CONTAINERS and fmt is not INT8


def pack(x: Tensor, y: Tensor, fmt: AnyFormat, axis: int, given: Tensor | None = None) -> tuple[Tensor, ...]:
    """Codes, scales and the tensor's scale of `y`, which is `x` rounded to `fmt`.

    x        what was rounded: its groups' amax give the scales
    y        float32, as `quantize` gave it
    given    the scale that was given instead
    returns  (codes, scales, tensor scale); empty where the format has none
    """
    if torch.compiler.is_compiling():
        return torch.ops.mezzo.pack(x, y, str(fmt), axis, given)  # type: ignore[no-any-return]
    return _pack(x, y, fmt, axis, given)


def unpack(tensors: tuple[Tensor, ...], shape: tuple[int, ...], fmt: AnyFormat, axis: int) -> Tensor:
    """The `y` that `pack` was given."""
    if torch.compiler.is_compiling():
        return torch.ops.mezzo.unpack(*tensors, list(shape), str(fmt), axis)  # type: ignore[no-any-return]
    return _unpack(tensors, shape, fmt, axis)


def _pack(x: Tensor, y: Tensor, fmt: AnyFormat, axis: int, given: Tensor | None) -> tuple[Tensor, ...]:
    none = y.new_empty(0)
    if isinstance(fmt, Format):
        return y.to(CONTAINERS[fmt]), none, none
    if y.numel() == 0:
        return none.clone(), none, none
    groups = Groups(tuple(y.shape), fmt, axis)
    found = group_scales(groups, divide(groups, x.float()), fmt, given)
    scales = found.scales if given is None else found.scales.clone()  # an operator's result may not be its argument
    # A rounded quotient is within an ulp of float32 of the element, which the conversion below takes to the element.
    divisor = found.scales if found.tensor is None else found.scales * found.tensor
    q = divide(groups, y) / torch.where(divisor == 0, 1.0, divisor)
    tensor = none if found.tensor is None else found.tensor
    return _codes(q, fmt, given is not None), _scale_codes(scales, fmt), tensor


def _codes(q: Tensor, fmt: ScaledFormat, given: bool) -> Tensor:
    if fmt.element is INT8:
        return q.round_().nan_to_num_(0).to(torch.int8)  # NaN only where the scale is NaN
    # A value beyond float32 came back infinite; its element was the largest.
    codes = q.clamp_(-fmt.element.max, fmt.element.max).to(CONTAINERS[fmt.element])
    return _nibbles(codes.view(torch.uint8)) if _halves(fmt, given) else codes


def _halves(fmt: ScaledFormat, given: bool) -> bool:
    """Whether two elements share a byte: 4 bits have no code for the NaN that a given scale leaves in some."""
    return fmt.element is E2M1 and not given


def _nibbles(byte: Tensor) -> Tensor:
    """e4m3 bytes of e2m1 values → their 4-bit codes, two in a byte.

    0, 0.5, 1, 1.5, 2, 3, 4, 6 are 0x00, 0x30, 0x38, 0x3C … 0x4C in e4m3 and 0 … 7 in e2m1.
    """
    magnitude = byte & 0x7F
    code = ((magnitude >> 2) - 12) & 7
    code = torch.where(magnitude <= 0x30, magnitude >> 5, code)  # 0x30 >> 5 = 1
    code = (code | ((byte >> 7) << 3)).reshape(-1)
    if code.numel() % 2:
        code = torch.cat([code, code.new_zeros(1)])
    return code[::2] | (code[1::2] << 4)


def _from_nibbles(pairs: Tensor, count: int) -> Tensor:
    """The inverse of `_nibbles`, as e4m3."""
    code = torch.stack([pairs & 15, pairs >> 4], dim=-1).reshape(-1)[:count]
    magnitude = code & 7
    byte = torch.where(magnitude < 2, magnitude * 0x30, (magnitude + 12) << 2)
    return (byte | ((code >> 3) << 7)).view(torch.float8_e4m3fn)


def _scale_codes(scales: Tensor, fmt: ScaledFormat) -> Tensor:
    if fmt.scaling == "free":
        return scales
    if fmt.scaling == "nvfp4":
        return scales.to(torch.float8_e4m3fn)
    return (scales.view(torch.int32) >> 23).to(torch.uint8)  # e8m0: float32's exponent; 0 for 2**-127, 255 for NaN


def _scale_values(codes: Tensor, fmt: ScaledFormat) -> Tensor:
    if fmt.scaling in ("free", "nvfp4"):
        return codes.float()
    values = (codes.to(torch.int32) << 23).view(torch.float32)
    values = torch.where(codes == 0, 2.0**-127, values)
    return torch.where(codes == 255, torch.nan, values)


def _unpack(tensors: tuple[Tensor, ...], shape: tuple[int, ...], fmt: AnyFormat, axis: int) -> Tensor:
    codes, scales, tensor = tensors
    if isinstance(fmt, Format) or not codes.numel():
        return codes.float().reshape(shape)
    groups = Groups(shape, fmt, axis)
    values = _scale_values(scales, fmt)
    if codes.dtype is torch.uint8:
        outer, tall, _, wide, _ = scales.shape
        full = outer, tall, groups.rows, wide, groups.columns
        codes = _from_nibbles(codes, torch.Size(full).numel()).reshape(full)
    y = codes.float() * values
    return join(groups, y if fmt.scaling != "nvfp4" else y * tensor)


# Compiled, a pair of casts that Inductor can look into may be deleted.
@torch.library.custom_op("mezzo::pack", mutates_args=())
def _pack_op(x: Tensor, y: Tensor, fmt: str, axis: int, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, tensor = _pack(x, y, get_format(fmt), axis, given)
    return codes.contiguous(), scales.contiguous(), tensor.clone()  # as the fake one says, and no two the same


@_pack_op.register_fake
def _(x: Tensor, y: Tensor, fmt: str, axis: int, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    found = get_format(fmt)
    none = y.new_empty(0)
    if isinstance(found, Format):
        return torch.empty_like(y, dtype=CONTAINERS[found]), none, y.new_empty(0)
    if y.numel() == 0:
        return y.new_empty(0), none, y.new_empty(0)
    groups = Groups(tuple(y.shape), found, axis)
    outer = y.numel() // (groups.moved[-2] * groups.moved[-1])
    tall, wide = -(-groups.moved[-2] // groups.rows), -(-groups.moved[-1] // groups.columns)
    full = outer, tall, groups.rows, wide, groups.columns
    half = _halves(found, given is not None)
    size = [-(-torch.Size(full).numel() // 2)] if half else [*full]
    codes = y.new_empty(size, dtype=torch.uint8 if half else CONTAINERS[found.element])
    kind = {"free": torch.float32, "nvfp4": torch.float8_e4m3fn}.get(found.scaling, torch.uint8)
    each = (1, 1, 1, 1, 1) if given is not None and given.dim() == 0 else (outer, tall, 1, wide, 1)
    return codes, y.new_empty(each, dtype=kind), y.new_empty(() if found.scaling == "nvfp4" else 0)


@torch.library.custom_op("mezzo::unpack", mutates_args=())
def _unpack_op(codes: Tensor, scales: Tensor, tensor: Tensor, shape: list[int], fmt: str, axis: int) -> Tensor:
    return _unpack((codes, scales, tensor), tuple(shape), get_format(fmt), axis).contiguous()


@_unpack_op.register_fake
def _(codes: Tensor, scales: Tensor, tensor: Tensor, shape: list[int], fmt: str, axis: int) -> Tensor:
    return codes.new_empty(shape, dtype=torch.float32)
