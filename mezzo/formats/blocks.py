"""Scaled formats in NumPy: one scale for each group of elements.

Working precision W: float32, or float64 for float64 arrays. amax: the largest magnitude of the group. Each arrow is one
rounding in W unless another format is named.

free     scale = float32(amax / max), at least 2**-126          q = element(x / scale)         value = q · scale
pow2     scale = 2**e, the smallest with amax <= max · 2**e      q = element(x / scale)  exact  value = q · scale  exact
floor    scale = 2**(floor(log2 amax) - max_exponent)            the same
         e is kept in -127 … 127, so a group of zeros has the scale 2**-127
nvfp4    amax first rounded to float32, from where all scales are computed in it
         encode = (448 · 6) / tensor amax, at most float32's max, 1 for a tensor of zeros;  tensor scale = 1 / encode
         scale  = e4m3((amax / 6) · encode), saturating
         q = e2m1(x · min(1 / (scale · tensor scale), float32's max))
         value = (q · scale) · tensor scale                      q · scale is exact
         A group whose scale rounds to zero becomes zero.

A group that holds an infinity or a NaN becomes NaN, and so does its scale: nothing that went wrong is hidden behind a
largest value. (In nvfp4 that is the whole tensor, since the tensor scale depends on every element; and a
float64 beyond float32 counts as infinite there.) Where the scale was
given, only that element becomes NaN. With powers of two, a number within half an element's gap of W's largest may round
up out of W and becomes infinite. x / scale rounds before the element does; sums of the two errors are within
0.5 ulp of the element plus 2**-24 of its value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzo.errors import ConfigError
from mezzo.formats.codes import codes_of, decode
from mezzo.formats.rounding import Overflow, Rounding, as_float, check, random_words, round_elements
from mezzo.formats.scaled import AnyFormat, ScaledFormat, get_format
from mezzo.formats.spec import E8M0

Array = npt.NDArray[Any]

FLOAT32_MAX = float(np.finfo(np.float32).max)
MIN_SCALE = 2.0**-126


def max_scale(element_max: float) -> float:
    """The largest float32 scale whose product with the largest element does not overflow float32."""
    scale = np.float32(FLOAT32_MAX / element_max)
    while np.float32(element_max) > np.float32(FLOAT32_MAX) / scale:  # decided by division, which cannot overflow
        scale = np.nextafter(scale, np.float32(0))
    return float(scale)


class Groups:
    """How an array's elements fall into groups: (outer, R, r, C, c), where r x c elements share a scale.

    raises    ConfigError where the array has no such axis, or no second one for blocks of several rows
    """

    def __init__(self, shape: tuple[int, ...], fmt: ScaledFormat, axis: int) -> None:
        self.shape = shape
        if fmt.group == "tensor":
            shape, axis = (math.prod(shape),), -1
        if not -len(shape) <= axis < len(shape):
            raise ConfigError(f"{fmt} needs an axis of the array: {axis} is none of its {len(shape)} dimensions")
        self.flat, self.axis = shape, axis
        moved = [n for i, n in enumerate(shape) if i != axis % len(shape)] + [shape[axis]]
        self.moved = (1, *moved) if len(moved) == 1 else tuple(moved)
        self.rows, self.columns = fmt.group if isinstance(fmt.group, tuple) else (1, max(1, shape[axis]))
        if self.rows > 1 and len(self.flat) < 2:
            raise ConfigError(f"{fmt} has blocks of {self.rows} rows; the array has one dimension")

    def divide(self, x: Array) -> Array:
        """(outer, R, r, C, c) of an array of `shape`; where a last block is short, zeros fill it."""
        x = np.moveaxis(x.reshape(self.flat), self.axis, -1).reshape(math.prod(self.moved[:-2]), *self.moved[-2:])
        empty_tensor = self.flat != self.shape and not x.size  # it has its one scale even so
        short = 1 if empty_tensor else -x.shape[2] % self.columns
        x = np.pad(x, [(0, 0), (0, -x.shape[1] % self.rows), (0, short)])
        tall, wide = x.shape[1] // self.rows, x.shape[2] // self.columns
        return x.reshape(x.shape[0], tall, self.rows, wide, self.columns)

    def join(self, x: Array) -> Array:
        """The array of `shape` again."""
        outer, tall, rows, wide, columns = x.shape
        x = x.reshape(outer, tall * rows, wide * columns)[:, : self.moved[-2], : self.moved[-1]]
        if len(self.flat) == 1:
            return x.reshape(self.shape)
        return np.moveaxis(x.reshape(self.moved), -1, self.axis).reshape(self.shape)

    def scales(self, x: Array) -> Array:
        """One number a group as people index it: (…, R, C) in the order of the array's own axes, () for a tensor."""
        outer, tall, _, wide, _ = x.shape
        x = x.reshape(outer, tall, wide)
        if self.flat != self.shape:
            return x.reshape(())
        if len(self.flat) == 1:
            return x.reshape(wide)
        return np.moveaxis(x.reshape(*self.moved[:-2], tall, wide), -1, self.axis)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """The shape of what `scales` gives."""
        if self.flat != self.shape:
            return ()
        tall, wide = -(-self.moved[-2] // self.rows), -(-self.moved[-1] // self.columns)
        if len(self.flat) == 1:
            return (wide,)
        shape = [*self.moved[:-2], tall]
        shape.insert(self.axis % len(self.flat), wide)
        return tuple(shape)

    def unscales(self, scales: Array) -> Array:
        """The inverse of `scales`: (outer, R, 1, C, 1)."""
        if len(self.flat) == 1:
            return scales.reshape(1, 1, 1, -1, 1)
        x = np.moveaxis(scales, self.axis, -1)
        return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])[:, :, None, :, None]


@dataclass(frozen=True)
class Split:
    """An array taken apart: elements (outer, R, r, C, c) in W, scales (outer, R, 1, C, 1), the tensor's scale."""

    groups: Groups
    fmt: ScaledFormat
    elements: Array
    scales: Array
    tensor_scale: np.float32 | None

    def values(self) -> Array:
        """The array that the parts stand for."""
        with np.errstate(all="ignore"):
            y = self.elements * self.scales
            if self.tensor_scale is not None:
                y = y * self.tensor_scale
        return self.groups.join(y)


def split(
    x: Array,
    fmt: ScaledFormat,
    axis: int,
    rounding: Rounding,
    overflow: Overflow,
    words: npt.NDArray[np.uint32] | None,
    given: npt.ArrayLike | None,
) -> Split:
    """Scales and rounded elements of `x`; see the head of the file."""
    work = np.float64 if x.dtype == np.float64 else np.float32
    groups = Groups(x.shape, fmt, axis)
    blocks = groups.divide(x.astype(work))
    amax = np.max(np.abs(blocks), axis=(2, 4), keepdims=True, initial=0.0)
    amax = np.where(np.isfinite(amax), amax, np.nan)
    tensor_scale: np.float32 | None = None
    with np.errstate(all="ignore"):
        if given is not None:
            scales = _given(given, groups).astype(work)
            blocks = np.where(np.isfinite(blocks), blocks, np.nan)
        elif fmt.scaling == "free":
            scales = np.clip((amax / work(fmt.element.max)).astype(np.float32), MIN_SCALE, max_scale(fmt.element.max))
            scales = scales.astype(work)
        elif fmt.scaling == "nvfp4":
            encode, tensor_scale = nvfp4_tensor_scales(amax.max(initial=0.0) if x.size else np.float32(0))
            scales = amax.astype(np.float32) / np.float32(6) * encode
            scales = round_elements(scales.astype(np.float64), fmt.scale, "nearest", "saturate").astype(work)
        else:
            scales = power_scales(amax, fmt).astype(work)
        if tensor_scale is None:
            scaled = blocks / scales
        else:
            back = np.minimum(np.float32(1) / (scales.astype(np.float32) * tensor_scale), np.float32(FLOAT32_MAX))
            scaled = blocks * back.astype(work)
        scaled = np.where(np.isnan(scales), work(np.nan), scaled)
        ordered = None if words is None else groups.divide(words)
        elements = round_elements(scaled.astype(np.float64), fmt.element, rounding, overflow, ordered).astype(work)
    return Split(groups, fmt, elements, scales, tensor_scale)


def power_scales(amax: Array, fmt: ScaledFormat) -> Array:
    """Scales that are powers of two, from the groups' amax; NaN where that is NaN."""
    mantissa, exponent = np.frexp(np.where(np.isfinite(amax), amax, 0))  # 0.5 <= mantissa < 1, or 0
    top, top_exponent = math.frexp(fmt.element.max)
    power = exponent - top_exponent
    if fmt.scaling == "pow2":
        power = power + (mantissa > top)
    power = np.where(mantissa == 0, E8M0.min_exponent, np.clip(power, E8M0.min_exponent, E8M0.max_exponent))
    return np.where(np.isnan(amax), np.nan, np.ldexp(1.0, power))


def nvfp4_tensor_scales(amax: Any) -> tuple[np.float32, np.float32]:
    """(encode, tensor scale) of NVFP4 from the tensor's amax, in float32."""
    with np.errstate(all="ignore"):
        encode = np.float32(448 * 6) / np.float32(amax)
        encode = np.float32(1) if amax == 0 else np.minimum(encode, np.float32(FLOAT32_MAX))
        return encode, np.float32(1) / encode


def _given(scale: npt.ArrayLike, groups: Groups) -> Array:
    """Scales that the caller gave, one for all or one for each group."""
    scales = np.asarray(scale, dtype=np.float32)
    if not bool(np.all((scales > 0) & np.isfinite(scales))):
        raise ConfigError("a given scale must be positive and finite")
    if scales.ndim == 0:
        return scales.reshape(1, 1, 1, 1, 1)
    if scales.shape != groups.scales_shape:
        raise ConfigError(
            f"the scale must have the shape () or {groups.scales_shape}, one for each group, not {scales.shape}"
        )
    return groups.unscales(scales)


@dataclass(frozen=True)
class Encoded:
    """A scaled array as codes.

    codes         uint8 of the array's shape; 6 and 4 bits in the low bits of a byte
    scales        one for each group, in the order of the array's axes: uint8 codes of fmt.scale, or float32 values
    tensor_scale  float32, for nvfp4
    """

    fmt: ScaledFormat
    axis: int
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    tensor_scale: np.float32 | None


@np.errstate(all="ignore")
def encode_scaled(
    x: npt.ArrayLike,
    fmt: str | AnyFormat,
    *,
    axis: int = -1,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    key: tuple[int, int, int | str] | None = None,
) -> Encoded:
    """The codes and scales of `x` in a scaled format; arguments as in `quantize`.

    A group that held an infinity or a NaN has a NaN for its scale, and elements of code 0.

    raises    ConfigError if fmt is no scaled format
    """
    fmt = _scaled(fmt)
    array = as_float(x)
    check(fmt, rounding, overflow, key, False)
    words = random_words(array.size, key).reshape(array.shape) if rounding == "stochastic" else None
    parts = split(array, fmt, axis, rounding, overflow, words, None)
    elements = parts.groups.join(np.where(np.isnan(parts.elements), 0.0, parts.elements)).astype(np.float64)
    scales = parts.groups.scales(parts.scales).astype(np.float32)
    if fmt.scaling != "free":
        scales = codes_of(scales.astype(np.float64), fmt.scale, np.signbit(scales))
    return Encoded(fmt, axis, codes_of(elements, fmt.element, np.signbit(elements)), scales, parts.tensor_scale)


def decode_scaled(encoded: Encoded) -> npt.NDArray[np.float32]:
    """What an `Encoded` stands for: `quantize` of the same float32 array, to the bit."""
    fmt = encoded.fmt
    groups = Groups(encoded.codes.shape, fmt, encoded.axis)
    scales = encoded.scales if fmt.scaling == "free" else decode(encoded.scales, fmt.scale)
    elements = groups.divide(decode(encoded.codes, fmt.element))
    values = Split(groups, fmt, elements, groups.unscales(scales), encoded.tensor_scale).values()
    return values.astype(np.float32)


def _scaled(fmt: str | AnyFormat) -> ScaledFormat:
    found = get_format(fmt)
    if not isinstance(found, ScaledFormat):
        raise ConfigError(f"{found} has no scales; use mezzo.formats.encode")
    return found
