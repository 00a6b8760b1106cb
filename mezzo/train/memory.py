"""Memory in use and at its peak, of the process on a CPU (None is one) and of torch's allocator on a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def in_use(device: torch.device | None = None) -> int:
    """Bytes: the process' resident memory, or what torch's allocator holds on the GPU."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak(device: torch.device | None = None) -> None:
    """Start measuring the peak anew (on Linux, by clearing the high-water mark of the resident memory)."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # a container may forbid it: the peak is then that of the whole process


def peak(device: torch.device | None = None) -> int:
    """Bytes at the highest point since `reset_peak`."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return in_use(device)
