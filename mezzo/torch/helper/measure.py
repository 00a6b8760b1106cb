"""What a rounding lost, measured by measure.cpp in one pass over the numbers before it and after it."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mezzo.torch.helper.tensors import TYPES, check_tensors

SUMS = ("count", "zeros", "nonfinite", "underflow", "overflow", "amax", "signal", "noise")
BINS = 256


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
