"""What a rounding lost, measured by measure.cpp in one pass over the numbers before it and after it."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mezzo.formats import ScaledFormat, get_format
from mezzo.formats.blocks import Groups
from mezzo.torch.helper.tensors import TYPES, check_tensors

SUMS = ("count", "zeros", "nonfinite", "underflow", "overflow", "amax", "signal", "noise")
BINS = 256
BlockTensors = tuple[Tensor, Tensor, Tensor, Tensor]  # amax, signal, noise, lossy


class _Job(ctypes.Structure):
    """`struct MeasureJob` of measure.cpp, where the fields are explained."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("x_type", ctypes.c_int32),
        ("y_type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("over", ctypes.c_float),
        ("sums", ctypes.c_void_p),
        ("histogram", ctypes.c_void_p),
    )


class _BlocksJob(ctypes.Structure):
    """`struct MeasureBlocksJob` of measure.cpp, where the fields are explained."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("x_type", ctypes.c_int32),
        ("y_type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("upright", ctypes.c_int32),
        ("outer", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("tall", ctypes.c_int64),
        ("wide", ctypes.c_int64),
        ("amax", ctypes.c_void_p),
        ("signal", ctypes.c_void_p),
        ("noise", ctypes.c_void_p),
        ("lossy", ctypes.c_void_p),
    )


def routine(compiled: ctypes.CDLL) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """`Helper.measure` of a library."""
    measure = compiled.mezzo_measure
    measure.argtypes, measure.restype = [ctypes.POINTER(_Job)], None

    def call(x: Tensor, y: Tensor, over: float) -> tuple[Tensor, Tensor]:
        check_tensors(x, y, "y")
        if not over >= 0:
            raise ValueError(f"over is a magnitude, not {over}")
        sums = torch.empty(len(SUMS), dtype=torch.float64, device="cpu")
        histogram = torch.empty(BINS, dtype=torch.int64, device="cpu")
        job = _Job(
            x=x.data_ptr(),
            y=y.data_ptr(),
            count=x.numel(),
            x_type=TYPES[x.dtype],
            y_type=TYPES[y.dtype],
            threads=torch.get_num_threads(),
            over=over,
            sums=sums.data_ptr(),
            histogram=histogram.data_ptr(),
        )
        measure(ctypes.byref(job))
        return sums, histogram

    return call


def blocks_routine(compiled: ctypes.CDLL) -> Callable[[Tensor, Tensor, tuple[int, ...], bool], BlockTensors]:
    """`Helper.measure_blocks` of a library, which is given the layout of the blocks and whether they stand upright."""
    measure = compiled.mezzo_measure_blocks
    measure.argtypes, measure.restype = [ctypes.POINTER(_BlocksJob)], None

    def call(x: Tensor, y: Tensor, layout: tuple[int, ...], upright: bool) -> BlockTensors:
        outer, inner, height, width, stride, tall, wide = layout
        count = outer * inner * -(-height // tall) * -(-width // wide) if x.numel() else 0
        amax = torch.empty(count, dtype=torch.float32, device="cpu")
        signal = torch.empty(count, dtype=torch.float64, device="cpu")
        noise = torch.empty(count, dtype=torch.float64, device="cpu")
        lossy = torch.empty(count, dtype=torch.bool, device="cpu")
        job = _BlocksJob(
            x=x.data_ptr(),
            y=y.data_ptr(),
            count=x.numel(),
            x_type=TYPES[x.dtype],
            y_type=TYPES[y.dtype],
            threads=torch.get_num_threads(),
            upright=upright,
            outer=outer,
            inner=inner,
            height=height,
            width=width,
            stride=stride,
            tall=tall,
            wide=wide,
            amax=amax.data_ptr(),
            signal=signal.data_ptr(),
            noise=noise.data_ptr(),
            lossy=lossy.data_ptr(),
        )
        measure(ctypes.byref(job))
        return amax, signal, noise, lossy

    return call


def self_check(compiled: ctypes.CDLL, numbers: np.ndarray) -> str | None:
    """Hold a library that was built just now against NumPy; what differs, or None. `numbers` are float32 of all kinds.

    There are several chunks, the last one short. Squares of quarters add up without an error in any order.
    """
    measure = routine(compiled)
    wild = torch.from_numpy(np.resize(numbers, 40_009))
    quarters = torch.arange(40_009, dtype=torch.float32, device="cpu") % 253 / 4 - 31
    for x, y, over in ((wild, wild.flip(0), 1e6), (quarters, quarters.round(), 25.0)):
        for x_type, y_type in itertools.product(TYPES, TYPES):
            before, after = x.to(x_type), y.to(y_type)
            sums, histogram = (found.numpy() for found in measure(before, after, over))
            expected, bins = _reference(before.float().numpy(), after.float().numpy(), over)
            near = np.isclose(sums, expected, rtol=1e-12, atol=0) if x is wild else sums == expected
            if not (near.all() and np.array_equal(sums[:6], expected[:6]) and np.array_equal(histogram, bins)):
                return f"measure, {x_type} to {y_type}".replace("torch.", "")
    return None


def self_check_blocks(
    measure_blocks: Callable[[Tensor, Tensor, ScaledFormat, int], BlockTensors], numbers: np.ndarray
) -> str | None:
    """As `self_check`, for `Helper.measure_blocks`; squares of quarters are exact here, too."""
    quarters = (np.arange(36 * 5 * 650) % 253 / 4 - 31).astype(np.float32)
    for name in ("e2m1@1x16", "mxfp4", "e4m3@1x20", "e4m3@row", "e2m1@16x16", "e4m3@3x600"):
        fmt = get_format(name)
        assert isinstance(fmt, ScaledFormat)
        for kind, axis in itertools.product((quarters, numbers), (0, 1, 2)):
            before = np.resize(kind, (36, 5, 650))
            after = np.where(np.arange(650) % 7 < 2, np.float32(0), before[::-1])
            groups = Groups(before.shape, fmt, axis)
            x, y = (groups.divide(side.astype(np.float64)) for side in (before, after))
            most, lost = np.abs(x).max(axis=(2, 4)).ravel(), np.any((x != 0) & (y == 0), axis=(2, 4)).ravel()
            with np.errstate(invalid="ignore"):
                power, error = (np.sum(side**2, axis=(2, 4)).ravel() for side in (x, x - y))
            found = measure_blocks(torch.from_numpy(before), torch.from_numpy(after), fmt, axis)
            amax, signal, noise, lossy = (one.numpy() for one in found)
            finite = np.isfinite(most)
            right = (
                np.array_equal(np.isfinite(amax), finite)
                and np.array_equal(amax[finite], most[finite])
                and np.allclose(signal[finite], power[finite], rtol=1e-12, atol=0)
                and np.allclose(noise[finite], error[finite], rtol=1e-12, atol=0, equal_nan=True)
                and np.array_equal(lossy, lost)
            )
            if not right:
                return f"measure, blocks of {fmt} along axis {axis}"
    return None


def _reference(x: np.ndarray, y: np.ndarray, over: float) -> tuple[np.ndarray, np.ndarray]:
    """What `Helper.measure` says of float32, by NumPy."""
    finite, kept = np.isfinite(x), np.isfinite(y)
    both = finite & kept
    before, after = x[both].astype(np.float64), y[both].astype(np.float64)
    sums = (
        x.size,
        np.sum(x == 0),
        np.sum(~finite),
        np.sum(finite & (x != 0) & (y == 0)),
        np.sum(finite & ((np.abs(x) > over) | ~kept)),
        np.max(np.abs(x[finite]), initial=0),
        math.fsum(before**2),
        math.fsum((before - after) ** 2),
    )
    exponents = x[finite].view(np.uint32) >> 23 & 255
    return np.array(sums, dtype=np.float64), np.bincount(exponents, minlength=BINS)
