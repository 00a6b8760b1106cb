"""What this machine accelerates: measured once per machine and torch version, kept in the user's cache folder.

Nothing is probed at import. A format is native on a device where its product runs at least as fast as float32's: on a
CPU without 16-bit matrix units PyTorch's own bfloat16 product is about 150 times slower, and mezzo then rounds the
operands and runs the float32 product.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

if TYPE_CHECKING:
    import torch

SIZE = {"cpu": 256, "cuda": 4096}
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Hardware:
    """What was measured on one device.

    device  "cpu" or "cuda"
    name    of the processor
    gflops  format → best rate of a square product of SIZE in GFLOP/s, on the CPU by one thread
    peak    dense peak in GFLOP/s: float32's on the CPU, bfloat16's on a GPU, at PEAK_SIZE
    key     what the measurement holds for
    """

    device: str
    name: str
    gflops: dict[str, float]
    peak: float
    key: str

    @property
    def native(self) -> frozenset[str]:
        """Formats whose own product is worth calling: float32 and float64 always, 16 bits where they are not slower."""
        low = {name for name in ("bfloat16", "float16") if self.gflops.get(name, 0.0) >= 0.9 * self.gflops["float32"]}
        tf32 = {"tf32"} if "tf32" in self.gflops else set()
        return frozenset({"float32", "float64", *low, *tf32})


def measure(device: str = "cpu", *, fresh: bool = False) -> Hardware:
    """The machine's measured rates, from the cache or measured now (below a second).

    device   "cpu" or "cuda"
    fresh    measure even if a cached result fits
    """
    import torch

    name = processor() if device == "cpu" else torch.cuda.get_device_name()
    what = [device, name, torch.__version__, str(torch.get_num_threads()), str(SIZE[device]), str(PEAK_SIZE[device])]
    key = hashlib.sha256("|".join(what).encode()).hexdigest()[:16]
    path = _path(key)
    if not fresh:
        try:
            found = Hardware(**json.loads(path.read_text()))
            if found.key == key and all(found.gflops[name] > 0 for name in ("float32", "bfloat16", "float16")):
                return found
        except (OSError, ValueError, TypeError, KeyError):
            pass  # never measured, torn, or written by another version
    found = Hardware(device, name, _rates(torch.device(device)), _peak_rate(torch.device(device)), key)
    _store(path, asdict(found))
    return found


def measure_peak(device: str) -> float:
    """The dense peak in FLOP/s, measured once more; the best ever seen on this machine counts.

    A machine that was busy when it was first measured would otherwise show an MFU above 1 for ever.
    """
    import torch

    known = measure(device)
    best = max(known.peak, _peak_rate(torch.device(device)))
    if best > known.peak:
        _store(_path(known.key), asdict(replace(known, peak=best)))
    return best * 1e9


def processor() -> str:
    """The CPU's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_status() -> tuple[str, str]:
    """("cuda", what it is) if the installed torch can use a GPU, else ("cpu", why not)."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    if torch.version.cuda is None and torch.version.hip is None:
        present = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
        there = "an NVIDIA GPU is there, but " if present else ""
        return "cpu", f"{there}the installed torch {torch.__version__} is a build without GPU support"
    return "cpu", f"torch {torch.__version__} supports CUDA {torch.version.cuda} but finds no usable GPU"


def machine() -> dict[str, Any]:
    """What a benchmark's JSON says of the machine it ran on."""
    import torch

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _rates(device: torch.device) -> dict[str, float]:
    import torch

    size = SIZE[device.type]
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads that wait for each other would hide the difference
    try:
        gflops = dict(zip(dtypes, _best_rates([*dtypes.values()], size, device), strict=True))
    finally:
        torch.set_num_threads(threads)
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        gflops["tf32"] = gflops["float32"]
    return gflops


def _peak_rate(device: torch.device) -> float:
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return _best_rates([dtype], PEAK_SIZE[device.type], device)[0]


def _best_rates(dtypes: list[torch.dtype], size: int, device: torch.device, rounds: int = 8) -> list[float]:
    """GFLOP/s of a square product in each dtype: the best of interleaved runs, since other load only ever slows.

    A fast product gets as much time in each round as a slow one, not as many runs: on a busy machine one run in many
    finds its cores free.
    """
    import torch

    generator = torch.Generator(device).manual_seed(0)  # its own: the caller's random state stays
    square = torch.randn(2, size, size, device=device, generator=generator)
    operands = [square.to(dtype) for dtype in dtypes]
    best = [float("inf")] * len(dtypes)
    for _ in range(rounds):
        for i, (a, b) in enumerate(operands):
            until = time.perf_counter() + 0.03
            while (begin := time.perf_counter()) < until:
                torch.mm(a, b)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best[i] = min(best[i], time.perf_counter() - begin)
    return [2 * size**3 / seconds / 1e9 for seconds in best]


def _path(key: str) -> Path:
    return Path(platformdirs.user_cache_dir("mezzo")) / f"hardware-{key}.json"


def _store(path: Path, data: dict[str, Any]) -> None:
    """Keep the measurement; a read-only home only costs measuring again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps(data))
        part.replace(path)
    except OSError:
        pass
