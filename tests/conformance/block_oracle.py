"""Scaled formats and the Hadamard transform in exact arithmetic, each step in the order that docs and cases promise.

Nothing here uses mezzo. W is float32, or float64 for float64 arrays. Elements are rounded by the oracles.
"""

from dataclasses import dataclass
from fractions import Fraction

import gfloat
import numpy as np
from gfloat import formats
from oracles import F32_MAX, GFLOAT, double, exponent_of, round_to, single, stream

# name → (element, group, rule of the scale); the group is (rows, columns), "row" or "tensor"
SCALED = {
    "mxfp8_e4m3": ("float8_e4m3fn", (1, 32), "pow2"),
    "mxfp8_e5m2": ("float8_e5m2", (1, 32), "pow2"),
    "mxfp6_e2m3": ("float6_e2m3fn", (1, 32), "pow2"),
    "mxfp6_e3m2": ("float6_e3m2fn", (1, 32), "pow2"),
    "mxfp4": ("float4_e2m1fn", (1, 32), "pow2"),
    "mxfp8_e4m3+floor": ("float8_e4m3fn", (1, 32), "floor"),
    "mxfp8_e5m2+floor": ("float8_e5m2", (1, 32), "floor"),
    "mxfp6_e2m3+floor": ("float6_e2m3fn", (1, 32), "floor"),
    "mxfp6_e3m2+floor": ("float6_e3m2fn", (1, 32), "floor"),
    "mxfp4+floor": ("float4_e2m1fn", (1, 32), "floor"),
    "nvfp4": ("float4_e2m1fn", (1, 16), "nvfp4"),
    "nvfp4_16x16": ("float4_e2m1fn", (16, 16), "nvfp4"),
    "float8_e4m3fn@1x16": ("float8_e4m3fn", (1, 16), "free"),
    "float8_e4m3fn@2x8": ("float8_e4m3fn", (2, 8), "free"),
    "float8_e4m3fn@tensor": ("float8_e4m3fn", "tensor", "free"),
    "float8_e5m2@tensor": ("float8_e5m2", "tensor", "free"),
    "float8_e5m2@row": ("float8_e5m2", "row", "free"),
    "float8_e5m2@1x16+pow2": ("float8_e5m2", (1, 16), "pow2"),
    "int8@row": ("int8", "row", "free"),
    "int8@1x16": ("int8", (1, 16), "free"),
}
OCP_BLOCKS = {  # gfloat's own block formats have the floor rule of OCP's section 6.3
    "mxfp8_e4m3+floor": formats.format_info_mxfp8_e4m3,
    "mxfp8_e5m2+floor": formats.format_info_mxfp8_e5m2,
    "mxfp6_e2m3+floor": formats.format_info_mxfp6_e2m3,
    "mxfp6_e3m2+floor": formats.format_info_mxfp6_e3m2,
    "mxfp4+floor": formats.format_info_mxfp4_e2m1,
}


@dataclass
class Blocks:
    """values: of x's shape in W; codes: uint8 of x's shape; scales: one a group, uint8 codes or float32; tensor_scale:
    float32 or None."""

    values: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    tensor_scale: np.ndarray | None


def groups_of(shape, group, axis):
    """(flat indices of each group's elements, shape of the groups with the axis last)."""
    index = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    if group == "tensor":
        return [index.reshape(-1)], ()
    moved = np.moveaxis(index, axis, -1)
    rows, columns = (1, moved.shape[-1]) if group == "row" else group
    matrices = moved.reshape(-1, *moved.shape[-2:]) if len(shape) > 1 else moved.reshape(1, 1, -1)
    tall, wide = -(-matrices.shape[1] // rows), -(-matrices.shape[2] // columns)
    found = [
        matrix[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].reshape(-1)
        for matrix in matrices
        for i in range(tall)
        for j in range(wide)
    ]
    return found, (*moved.shape[:-2], tall, wide) if len(shape) > 1 else (wide,)


def largest(element):
    return Fraction(127) if element == "int8" else Fraction(float(GFLOAT[element].max))


def scale_of(amax, element, rule, work):
    """The scale of a group in fractions; nvfp4 has its own."""
    top = largest(element)
    if rule == "free":
        scale = max(single(work(amax / top)), Fraction(2) ** -126)
        # Rounded up, the scale of the largest numbers would carry the largest element beyond float32.
        while single(scale * top) > F32_MAX:
            scale -= Fraction(2) ** (exponent_of(scale) - 23)
        return scale
    if amax == 0:
        return Fraction(2) ** -127
    power = exponent_of(amax) - exponent_of(top)
    if rule == "pow2" and amax > top * Fraction(2) ** power:
        power += 1
    return Fraction(2) ** min(max(power, -127), 127)


def to_float(x, dtype):
    """A fraction on the grid of dtype, infinite beyond its range."""
    if dtype is np.float32 and abs(x) > F32_MAX:
        return np.float32(np.inf) if x > 0 else np.float32(-np.inf)
    return dtype(float(x))


def element_codes(q, element):
    q = np.where(np.isnan(q), 0.0, q)
    if element == "int8":
        return q.astype(np.int64).astype(np.uint8)
    return np.array([gfloat.encode_float(GFLOAT[element], float(v)) for v in q], np.uint8)


def scale_code(scale, rule):
    """The code of a group's scale, None for NaN: e8m0, e4m3, or float32 itself."""
    if rule == "free":
        return np.float32(np.nan if scale is None else float(scale))
    if rule == "nvfp4":
        return np.uint8(0x7F if scale is None else gfloat.encode_float(GFLOAT["float8_e4m3fn"], float(scale)))
    return np.uint8(0xFF if scale is None else exponent_of(scale) + 127)


def blocks(x, fmt, *, axis=-1, rounding="nearest", overflow="saturate", key=None, given=None):
    """`x` in a scaled format; see the head of the file.

    given    the scale, one number for all groups
    """
    element, group, rule = SCALED[fmt]
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    work = double if dtype is np.float64 else single
    flat = x.reshape(-1).astype(dtype)
    words = None if key is None else stream(*key, flat.size)
    found, shape = groups_of(x.shape, group, axis)
    values, codes, scales = np.empty_like(flat), np.zeros(flat.size, np.uint8), []
    finite = np.isfinite(flat).all()
    encode = tensor = Fraction(1)
    if rule == "nvfp4" and finite and flat.any():
        encode = min(single(2688 / single(Fraction(float(np.abs(flat).max())))), F32_MAX)
        tensor = single(1 / encode)
    for index in found:
        part = flat[index]
        if given is None and not (finite if rule == "nvfp4" else np.isfinite(part).all()):
            values[index] = np.nan
            scales.append(scale_code(None, rule))
            continue
        xs = [Fraction(float(v)) if np.isfinite(v) else None for v in part]
        amax = max(abs(v) for v in xs if v is not None)
        if given is not None:
            scale = Fraction(float(np.float32(given)))
        elif rule == "nvfp4":
            wanted = single(single(single(amax) / 6) * encode)
            scale = Fraction(float(round_to([float(wanted)], "float8_e4m3fn")[0]))
        else:
            scale = scale_of(amax, element, rule, work)
        if rule == "nvfp4":
            inner = single(scale * tensor)
            back = min(single(1 / inner), F32_MAX) if inner else F32_MAX
            scaled = [work(v * back) for v in xs]
        else:
            scaled = [None if v is None else work(v / scale) for v in xs]
        plain = np.array([np.nan if v is None else float(v) for v in scaled])
        q = round_to(np.copysign(plain, part), element, rounding, overflow, None if words is None else words[index])
        whole = [
            to_float(work(Fraction(v) * scale * tensor), dtype) if np.isfinite(v) else dtype(v) for v in q.tolist()
        ]
        values[index] = np.copysign(np.array(whole, dtype), q)
        codes[index] = element_codes(q, element) if np.isfinite(q).all() else 0
        scales.append(scale_code(scale, rule))
    arranged = np.array(scales).reshape(shape)
    if len(x.shape) > 1 and shape:
        arranged = np.moveaxis(arranged, -1, axis)
    nan_tensor = rule == "nvfp4" and not finite
    tensor_scale = np.float32(np.nan if nan_tensor else float(tensor)) if rule == "nvfp4" else None
    result = Blocks(values.reshape(x.shape), codes.reshape(x.shape), arranged, tensor_scale)
    if (rounding, overflow) == ("nearest", "saturate"):
        _hold_against_gfloat(x, fmt, result)
    return result


def _hold_against_gfloat(x, fmt, result):
    """gfloat's scales stop at 2**-127 by another rule, so only blocks of usual size are compared."""
    whole = x.ndim == 1 and x.size == 32 and np.isfinite(x).all()
    if fmt in OCP_BLOCKS and whole and 2.0**-90 < np.abs(x).max() < 2.0**110:
        other = gfloat.quantize_block(OCP_BLOCKS[fmt], x.astype(np.float64), gfloat.compute_scale_amax)
        assert np.array_equal(other, result.values.astype(np.float64)), (fmt, x)


def hadamard(x, *, axis=-1, block=16, seed=0, inverse=False):
    """Butterflies one number at a time in NumPy's float32 (or float64), from strides of one upward."""
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    signs = [dtype(1 - 2 * int(w & 1)) for w in stream(seed, 0, "mezzo.hadamard", block)]
    moved = np.moveaxis(x, axis, -1).astype(dtype)
    out = np.empty(moved.size, dtype)
    for start in range(0, moved.size, block):
        y = list(moved.reshape(-1)[start : start + block])
        if not inverse:
            y = [v * s for v, s in zip(y, signs, strict=True)]
        half = 1
        while half < block:
            y = [y[i - half] - y[i] if i & half else y[i] + y[i + half] for i in range(block)]
            half *= 2
        y = [v * dtype(block**-0.5) for v in y]
        if inverse:
            y = [v * s for v, s in zip(y, signs, strict=True)]
        out[start : start + block] = y
    return np.moveaxis(out.reshape(moved.shape), -1, axis)
