"""Rounding, and what it lost, in compiled C++ for CPU tensors: one pass over memory instead of a dozen.

What is rounded has the bits that `mezzo.formats` gives.

Optional. The first `load()` of a machine builds the sources here with the C++ compiler that is there, which takes some
seconds; later ones find the library in the cache. Without a compiler, and with MEZZO_HELPER=off, `load()` is None and
torch's own operations do the work.

The threads are torch's own, borrowed through the OpenMP runtime that torch runs on. In a process forked by
`multiprocessing`, or forked after `load()`, threads come and go with each call instead: OpenMP's do not survive a fork.
"""

from __future__ import annotations

import ctypes
import functools
import math
import multiprocessing
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, Format, ScaledFormat, get_format, quantize
from mezzo.formats.blocks import MIN_SCALE, Groups, max_scale
from mezzo.formats.philox import site_id
from mezzo.formats.rounding import OVERFLOWS, ROUNDINGS, Key, Overflow, Rounding
from mezzo.torch.helper import measure
from mezzo.torch.helper.build import BuildError, find_compiler, library
from mezzo.torch.helper.tensors import TYPES, check_tensors

ROUNDING_CODES = {"nearest": 0, "toward_zero": 1, "stochastic": 2}
SCALING_CODES = {"pow2": 0, "floor": 0, "free": 1, "nvfp4": 3}
GIVEN = 2
INFINITY_BITS = 0x7F800000

_switched_off: ContextVar[bool] = ContextVar("_switched_off", default=False)


class _Job(ctypes.Structure):
    """`struct Job` of rounding.cpp, where the fields are explained."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("x_type", ctypes.c_int32),
        ("out_type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
        ("dropped", ctypes.c_int32),
        ("cap", ctypes.c_int32),
        ("integer", ctypes.c_int32),
        ("mantissa_bits", ctypes.c_int32),
        ("min_exponent", ctypes.c_int32),
        ("max_exponent", ctypes.c_int32),
        ("max", ctypes.c_float),
        ("lowest", ctypes.c_float),
        ("over", ctypes.c_float),
        ("infinite", ctypes.c_float),
        ("step", ctypes.c_uint32),
        ("site", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("scaling", ctypes.c_int32),
        ("round_up", ctypes.c_int32),
        ("scale_min", ctypes.c_float),
        ("scale_max", ctypes.c_float),
        ("outer", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("tall", ctypes.c_int64),
        ("wide", ctypes.c_int64),
        ("given", ctypes.c_void_p),
        ("given_count", ctypes.c_int64),
    )


class Helper:
    """The compiled routines. Any number of Python threads may call them at once; the GIL is not held meanwhile."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        compiled.mezzo_use_threads.argtypes = [ctypes.c_void_p]
        compiled.mezzo_use_threads.restype = None
        for routine in (compiled.mezzo_elements, compiled.mezzo_blocks):
            routine.argtypes = [ctypes.POINTER(_Job)]
            routine.restype = None
        self._elements, self._blocks = compiled.mezzo_elements, compiled.mezzo_blocks
        self._measure = measure.routine(compiled)
        self._measure_blocks = measure.blocks_routine(compiled)
        compiled.mezzo_use_threads(_torch_threads())

    def elements(
        self,
        x: Tensor,
        out: Tensor,
        fmt: Format,
        rounding: Rounding,
        overflow: Overflow,
        key: Key | None,
    ) -> None:
        """Round `x` to an element format, as `mezzo.formats.quantize`.

        x         float32, bfloat16 or float16 on the CPU, without gaps in memory
        out       where the result goes, of x's shape and strides, in one of these dtypes that holds all values of fmt;
                  may be x
        fmt       any element format but float64 and float8_e8m0fnu
        key       (seed, step, site) for stochastic rounding; words go by the order in memory
        raises    ValueError if the tensors or the format are none of these; ConfigError if the key is not
        """
        check_tensors(x, out, "out")
        if not supports(fmt):
            raise ValueError(f"the helper does not round to {fmt}")
        job = _job(x, out, fmt, rounding, overflow, key)
        self._elements(ctypes.byref(job))

    def blocks(
        self,
        x: Tensor,
        out: Tensor,
        fmt: ScaledFormat,
        axis: int,
        rounding: Rounding,
        overflow: Overflow,
        key: Key | None,
        scale: Tensor | None,
    ) -> None:
        """Round `x` to a scaled format, as `mezzo.formats.quantize`.

        x         contiguous float32, bfloat16 or float16 on the CPU
        out       where the result goes, contiguous, of x's shape; float32, or bfloat16 or float16 where that holds
                  every value; may be x
        scale     for formats scaled by a float32: 0-d, or one a group; positive and finite
        raises    ConfigError if x has no such groups or the scale is none of these; ValueError as in `elements`
        """
        check_tensors(x, out, "out")
        if not (x.is_contiguous() and out.is_contiguous()):
            raise ValueError("blocks are taken from contiguous tensors")
        groups = Groups(tuple(x.shape), fmt, axis)
        job = _job(x, out, fmt.element, rounding, overflow, key)
        job.scaling = SCALING_CODES[fmt.scaling]
        job.round_up = fmt.scaling == "pow2"
        job.scale_min, job.scale_max = MIN_SCALE, _max_scale(fmt.element)
        job.outer, job.inner, job.height, job.width, job.stride, job.tall, job.wide = _layout(groups)
        if scale is not None:
            if fmt.scaling != "free":
                raise ConfigError(f"a scale can be given to formats scaled by a float32, not to {fmt}")
            scale = scale.detach().to("cpu", torch.float32).contiguous()  # the name keeps it alive through the call
            if not bool(torch.all((scale > 0) & torch.isfinite(scale))):
                raise ConfigError("a given scale must be positive and finite")
            expected = groups.scales_shape
            if scale.dim() > 0 and tuple(scale.shape) != expected:
                raise ConfigError(
                    f"the scale must have the shape () or {expected}, one for each group, not {tuple(scale.shape)}"
                )
            job.scaling, job.given, job.given_count = GIVEN, scale.data_ptr(), 1 if scale.dim() == 0 else scale.numel()
        self._blocks(ctypes.byref(job))

    def measure(self, x: Tensor, y: Tensor, over: float) -> tuple[Tensor, Tensor]:
        """What a rounding of `x` to `y` lost. The number of threads changes no bit of it.

        x, y      float32, bfloat16 or float16 on the CPU, without gaps in memory, of one shape and the same strides
        over      the largest magnitude that the rounding keeps, as a float32; may be infinite
        returns   (sums, histogram):
                  sums       float64: how many numbers there are; how many x are zero; are infinite or NaN; are finite
                             and not zero while y is zero; are finite and beyond `over`, or while y is not finite;
                             the largest magnitude of a finite x, or 0; and, where x and y are finite, the sums of
                             x**2 and of (x - y)**2
                  histogram  int64, how many finite x have each of the 256 exponents of a float32 (its eight bits);
                             zeros and subnormals have 0
        raises    ValueError if the tensors or `over` are none of these
        """
        return self._measure(x, y, over)

    def measure_blocks(
        self, x: Tensor, y: Tensor, fmt: ScaledFormat, axis: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a rounding of `x` to `y` lost in each block of `fmt`. The number of threads changes no bit of it.

        x, y      contiguous float32, bfloat16 or float16 on the CPU, of one shape
        returns   (amax, signal, noise, lossy), flat, the blocks in the order (outer, R, C) of `Groups.divide`:
                  amax            float32, the largest magnitude in x; NaN or infinite where x has one of these
                  signal, noise   float64, the sums of x**2 and of (x - y)**2; infinite or NaN where a number is
                  lossy           bool, whether an x that is not zero has a y that is
        raises    ConfigError if x has no such blocks; ValueError if the tensors are none of these
        """
        check_tensors(x, y, "y")
        if not (x.is_contiguous() and y.is_contiguous()):
            raise ValueError("blocks are measured in contiguous tensors")
        groups = Groups(tuple(x.shape), fmt, axis)
        upright = groups.axis % len(groups.flat) < len(groups.flat) - 1
        return self._measure_blocks(x, y, _layout(groups), upright)


def supports(fmt: Format) -> bool:
    """Whether `Helper.elements` rounds to an element format: to all but float64 and float8_e8m0fnu."""
    return fmt.mantissa_bits <= 23 and not fmt.is_scale


def load() -> Helper | None:
    """The helper, built if this machine has none yet; None where there can be none. Remembered in the process."""
    return None if _why_off() else _load()[0]


def status() -> str:
    """One line for people: "built with g++ 12.2.0", or "absent: " and why."""
    why = _why_off()
    return f"absent: {why}" if why else _load()[1]


@contextmanager
def off() -> Iterator[None]:
    """Inside, in this thread, `load()` is None: what torch's own operations do can be measured and tested."""
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


def _why_off() -> str | None:
    if os.environ.get("MEZZO_HELPER") == "off":
        return "switched off by MEZZO_HELPER=off"
    return "switched off by mezzo.torch.helper.off()" if _switched_off.get() else None


@functools.cache
def _load() -> tuple[Helper | None, str]:
    try:
        compiler = find_compiler()
        return Helper(library(compiler, self_check)), f"built with {compiler.label}"
    except BuildError as error:
        return None, f"absent: {error}"
    except Exception as error:  # it is never worth a crash: there are torch's operations
        return None, f"absent: {type(error).__name__}: {error}"


def self_check(compiled: ctypes.CDLL) -> str | None:
    """Hold a library that was built just now against `mezzo.formats.quantize` and NumPy; what differs, or None.

    A few hundred numbers for each routine that rounds: subnormals, ties, limits, infinities and NaN are among them.
    """
    helper = Helper(compiled)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 512, dtype=np.uint32)
    edges = [
        sign * fmt.max * near for fmt in FORMATS.values() if supports(fmt) for sign in (1, -1) for near in (1, 1.1)
    ]
    whole = [sign * n / 4 for sign in (1, -1) for n in range(64)]
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, 2.0**-126, -(2.0**-127)]
    with np.errstate(over="ignore"):
        numbers = np.concatenate([bits.view(np.float32), np.array([*edges, *whole, *special], dtype=np.float32)])
    numbers = np.where(np.isnan(numbers), np.float32(math.nan), numbers)
    tame = np.where(np.abs(numbers) < 1e6, numbers, np.float32(1.5))
    tame = np.resize(tame, 24 * 33).reshape(24, 33)
    wild = np.resize(numbers, 24 * 33).reshape(24, 33)
    scaled = ("mxfp8_e4m3", "mxfp4+floor", "nvfp4", "nvfp4_16x16", "e5m2@tensor", "e3m2@row", "int8@1x16", "e2m3@8x8")
    for rounding in ROUNDINGS:
        key = (1, 2, 3) if rounding == "stochastic" else None
        for overflow in OVERFLOWS:
            for element in filter(supports, FORMATS.values()):
                x = torch.from_numpy(numbers.copy())
                helper.elements(x, x, element, rounding, overflow, key)  # type: ignore[arg-type]
                expected = quantize(numbers, element, rounding=rounding, overflow=overflow, key=key)  # type: ignore
                if not _same(x.numpy(), expected):
                    return f"{element}, {rounding}, {overflow}"
            for name in scaled:
                fmt = get_format(name)
                assert isinstance(fmt, ScaledFormat)
                for array, axis in ((tame, 0), (tame, 1), (wild, 1)):
                    x = torch.from_numpy(array.copy())
                    helper.blocks(x, x, fmt, axis, rounding, overflow, key, None)  # type: ignore[arg-type]
                    expected = quantize(array, fmt, axis=axis, rounding=rounding, overflow=overflow, key=key)  # type: ignore
                    if not _same(x.numpy(), expected):
                        return f"{fmt} along axis {axis}, {rounding}, {overflow}"
    return measure.self_check(compiled, numbers) or measure.self_check_blocks(helper.measure_blocks, numbers)


def _same(got: np.ndarray, expected: np.ndarray) -> bool:
    nan = np.isnan(got) & np.isnan(expected)
    return bool(np.all((got.view(np.uint32) == expected.view(np.uint32)) | nan))


def _torch_threads() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch is linked with."""
    forked = multiprocessing.get_start_method(allow_none=True) in (None, "fork")
    if multiprocessing.parent_process() is not None and forked:
        return None
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            found = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None


def _job(x: Tensor, out: Tensor, fmt: Format, rounding: str, overflow: str, key: Key | None) -> _Job:
    if rounding not in ROUNDINGS or overflow not in OVERFLOWS or (rounding == "stochastic") != (key is not None):
        raise ValueError(f"rounding {rounding!r} with overflow {overflow!r} and key {key!r} is unknown")
    job = _Job.from_buffer_copy(_template(fmt, rounding, overflow))
    job.x, job.out, job.count = x.data_ptr(), out.data_ptr(), x.numel()
    job.x_type, job.out_type = TYPES[x.dtype], TYPES[out.dtype]
    job.threads = torch.get_num_threads()
    if key is not None:
        seed, step, site = key
        site = site_id(site) if isinstance(site, str) else site
        if not (0 <= seed < 1 << 64 and 0 <= step < 1 << 32 and 0 <= site < 1 << 32):
            raise ConfigError(f"the key is (seed below 2**64, step below 2**32, site below 2**32), not {key}")
        job.seed, job.step, job.site = seed, step, site
    return job


@functools.lru_cache(maxsize=256)
def _template(fmt: Format, rounding: str, overflow: str) -> bytes:
    """The bytes of a job's fields that depend on the format only."""
    beyond = fmt.max
    if overflow == "cast" and fmt.nan:
        beyond = math.inf if fmt.infinity else math.nan
    job = _Job(
        rounding=ROUNDING_CODES["toward_zero" if fmt.mantissa_bits == 23 else rounding],  # float32 is exact
        dropped=23 - fmt.mantissa_bits if fmt.exponent_bits == 8 else -1,
        cap=INFINITY_BITS if overflow == "cast" else struct.unpack("<I", struct.pack("<f", fmt.max))[0],
        integer=fmt.is_integer,
        mantissa_bits=fmt.mantissa_bits,
        min_exponent=fmt.min_exponent,
        max_exponent=fmt.max_exponent,
        max=fmt.max,
        lowest=-fmt.min,
        over=beyond,
        infinite=beyond,
    )
    return bytes(job)


@functools.lru_cache
def _max_scale(element: Format) -> float:
    return max_scale(element.max)


def _layout(groups: Groups) -> tuple[int, int, int, int, int, int, int]:
    """(outer, inner, height, width, stride, tall, wide) of `struct Job` for an array's groups."""
    shape, rows, columns = groups.flat, groups.rows, groups.columns
    axis, count = groups.axis % len(shape), math.prod(shape)
    if axis == len(shape) - 1:
        if rows > 1:
            return math.prod(shape[:-2]), 1, shape[-2], shape[-1], shape[-1], rows, columns
        if shape[-1] % columns == 0:  # the rows follow each other without a seam
            return 1, 1, 1, count, count, 1, columns
        return 1, 1, count // shape[-1], shape[-1], shape[-1], 1, columns
    # Blocks stand upright: their columns lie along an outer axis, their rows along the last.
    outer, height = math.prod(shape[:axis]), shape[axis]
    if rows == 1:
        width = math.prod(shape[axis + 1 :])
        return outer, 1, height, width, width, columns, 1
    inner = math.prod(shape[axis + 1 : -1])
    return outer, inner, height, shape[-1], inner * shape[-1], columns, rows


__all__ = ["Helper", "load", "off", "status", "supports"]
