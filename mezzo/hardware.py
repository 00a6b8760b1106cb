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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from mezzo.formats import AnyFormat, Format

if TYPE_CHECKING:
    import torch

SIZE = {"cpu": 256, "cuda": 4096}
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
FLOAT8 = ("float8_e4m3fn@tensor", "float8_e5m2@tensor")  # what torch multiplies with one scale a tensor
NEVER_MEASURED = ("float64", "float32")  # native wherever they are asked for, at whatever rate

CPUINFO = Path("/proc/cpuinfo")
# What decides how fast 16 bits are rounded and multiplied, as x86 and Arm kernels call it.
INSTRUCTIONS = {
    "AVX2": "avx2",
    "F16C": "f16c",
    "AVX512": "avx512f",
    "AVX512-BF16": "avx512_bf16",
    "AVX512-FP16": "avx512_fp16",
    "AMX-BF16": "amx_bf16",
    "AMX-FP16": "amx_fp16",
}
ARM_INSTRUCTIONS = {"NEON": "asimd", "FP16": "asimdhp", "BF16": "bf16", "SVE": "sve"}

# Products below 16 bits by the compute capability that first has them: Ada (8.9) and Hopper (9.0) multiply float8,
# Blackwell (10.0) blocks that share a scale. CUDA C++ Programming Guide, "Compute Capabilities".
LOW_PRODUCTS = {"float8": (8, 9), "mxfp8": (10, 0), "nvfp4": (10, 0)}


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
        """Formats whose own product is worth calling: float32 and float64 always, 16 bits where they are not slower.

        "float8" stands for the product of float8 tensors with one scale each.
        """
        low = {name for name in ("bfloat16", "float16") if self.gflops.get(name, 0.0) >= 0.9 * self.gflops["float32"]}
        tf32 = {"tf32"} if "tf32" in self.gflops else set()
        float8 = {"float8"} if self.gflops.get("float8", 0.0) > self.gflops.get("bfloat16", 0.0) else set()
        return frozenset({"float32", "float64", *low, *tf32, *float8})

    def route(self, fmt: AnyFormat) -> tuple[str, str]:
        """("native", "emulated" or "scale", the reason in words) for a product whose operands both have that format."""
        if isinstance(fmt, Format) and fmt.is_scale:
            return "scale", "a format for scales: no operand of a product"
        if fmt.name in FLOAT8 and "float8" in self.native:
            return "native", "PyTorch's own product of float8 tensors with one scale each, in linear layers"
        route = "native" if fmt.name in self.native else "emulated"
        if fmt.name in NEVER_MEASURED or fmt.name == "tf32":
            lacking = "a product of CUDA devices from compute capability 8.0 on"
            return route, "PyTorch's own product" if route == "native" else lacking
        if fmt.name not in self.gflops:
            return route, "mezzo has no product of its own for it: operands rounded, float32 product"
        own, ratio = self.gflops[fmt.name], self.gflops[fmt.name] / self.gflops["float32"]
        than = f"{_times(1 / ratio)} times slower than" if route == "emulated" else f"{_times(ratio)} times as fast as"
        return route, f"PyTorch's own product runs at {_times(own)} GFLOP/s, {than} float32's"


@dataclass(frozen=True)
class Rates:
    """How fast software rounds, copies and emulates on one device: never a speed of the hardware's own products.

    device  "cpu" or "cuda"
    what    what was measured, in words that change when that changes
    when    date and time of the measurement
    rates   name → amount per second
    key     what the measurement holds for
    """

    device: str
    what: str
    when: str
    rates: dict[str, float]
    key: str


def measure(device: str = "cpu", *, fresh: bool = False) -> Hardware:
    """The machine's measured rates, from the cache or measured now (below a second).

    device   "cpu" or "cuda"
    fresh    measure even if a cached result fits
    """
    import torch

    name = processor() if device == "cpu" else torch.cuda.get_device_name()
    key = _key(device, str(SIZE[device]), str(PEAK_SIZE[device]), *(["float8"] if device == "cuda" else []))
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


def measure_rates(
    device: str,
    what: str,
    prepare: Callable[[], Mapping[str, tuple[float, Callable[[], object]]]],
    *,
    fresh: bool = False,
    rounds: int = 3,
) -> Rates:
    """Amounts per second of work that the caller brings, from the cache or measured now.

    what      tells one piece of work from another: the same words give the cached result
    prepare   called only to measure: name → (amount of one run, the run)
    fresh     measure even if a cached result fits
    """
    key = _key(device, what)
    path = _path(key, "rates")
    if not fresh:
        try:
            found = Rates(**json.loads(path.read_text()))
            if (found.key, found.what) == (key, what) and found.rates and all(r > 0 for r in found.rates.values()):
                return found
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # never measured, torn, or written by another version
    work = prepare()
    for _, run in work.values():
        run()  # the first run pays for memory, threads and kernels
    best = _best_seconds([run for _, run in work.values()], device, rounds)
    rates = {name: amount / seconds for (name, (amount, _)), seconds in zip(work.items(), best, strict=True)}
    found = Rates(device, what, time.strftime("%Y-%m-%d %H:%M"), rates, key)
    _store(path, asdict(found))
    return found


def processor() -> str:
    """The CPU's name as the kernel gives it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> dict[str, bool] | None:
    """Which of the instruction sets that matter here the processor has; None where the kernel does not say."""
    info = _cpuinfo()
    for field, names in (("flags", INSTRUCTIONS), ("Features", ARM_INSTRUCTIONS)):
        if field in info:
            return {name: flag in info[field].split() for name, flag in names.items()}
    return None


def memory_gib() -> float | None:
    """The machine's memory; None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def usable_cores() -> int | None:
    """Cores that this process may run on, which a container or `taskset` can make fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count()


def low_products(capability: tuple[int, int], functions: Sequence[str]) -> dict[str, tuple[bool, str]]:
    """Whether PyTorch can multiply formats below 16 bits on a CUDA device: kind → (whether, why), nothing measured.

    capability  the device's compute capability
    functions   PyTorch's scaled products that the installed version has
    """
    here = ".".join(map(str, capability))
    found = {}
    for kind, needed in LOW_PRODUCTS.items():
        if capability < needed:
            found[kind] = False, f"needs compute capability {needed[0]}.{needed[1]}; this is {here}"
        elif not functions:
            found[kind] = False, "the installed torch has neither torch.nn.functional.scaled_mm nor torch._scaled_mm"
        else:
            found[kind] = True, f"by compute capability {here} and {functions[0]}; not measured, mezzo emulates it"
    return found


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
        "memory_gib": memory_gib(),
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
    if device.type == "cuda" and (rate := _float8_rate(size)) is not None:
        gflops["float8"] = rate
    return gflops


def _float8_rate(size: int) -> float | None:
    """GFLOP/s of the product of float8 tensors with one scale each; None where torch or the device has none."""
    import torch

    one = torch.ones((), device="cuda")
    a, b = (torch.ones(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))

    def run() -> object:
        return scaled_product(a, b.t(), one, one, torch.bfloat16)

    try:
        run()
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        return None
    return 2 * size**3 / _best_seconds([run], "cuda", 8)[0] / 1e9


def scaled_product(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """scale_a·scale_b·(a · b) by torch's own product of float8 tensors, exact float32 sums where the device has them.

    a        (rows, K) row by row, b (K, columns) column by column, both float8; sizes as the device wants them
    scale_a  0-d float32
    """
    import torch
    import torch.nn.functional as functional

    if hasattr(functional, "scaled_mm"):
        kind = functional.ScalingType.TensorWise
        return functional.scaled_mm(a, b, scale_a, kind, scale_b, kind, output_dtype=dtype)
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)


def _peak_rate(device: torch.device) -> float:
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return _best_rates([dtype], PEAK_SIZE[device.type], device)[0]


def _best_rates(dtypes: list[torch.dtype], size: int, device: torch.device, rounds: int = 8) -> list[float]:
    """GFLOP/s of a square product in each dtype: the best of interleaved runs, since other load only ever slows."""
    import torch

    generator = torch.Generator(device).manual_seed(0)  # its own: the caller's random state stays
    square = torch.randn(2, size, size, device=device, generator=generator)
    operands = [square.to(dtype) for dtype in dtypes]
    runs = [partial(torch.mm, a, b) for a, b in operands]
    return [2 * size**3 / seconds / 1e9 for seconds in _best_seconds(runs, device.type, rounds)]


def _best_seconds(runs: Sequence[Callable[[], object]], device: str, rounds: int, share: float = 0.03) -> list[float]:
    """Time of each run: the best of interleaved ones, `share` seconds for each in each round.

    A fast run gets as much time in each round as a slow one, not as many runs: on a busy machine one run in many finds
    its cores free.
    """
    import torch

    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            until = time.perf_counter() + share
            while (begin := time.perf_counter()) < until:
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                best[i] = min(best[i], time.perf_counter() - begin)
    return best


def _times(number: float) -> str:
    """Two digits for people: 0.68, 3.2, 140."""
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def _cpuinfo() -> dict[str, str]:
    """What the kernel says of the first processor; empty where there is no such file."""
    try:
        lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}


def _key(device: str, *more: str) -> str:
    """What a measurement holds for: the device, torch's version, its threads, and what the caller adds."""
    import torch

    name = processor() if device == "cpu" else torch.cuda.get_device_name()
    what = [device, name, torch.__version__, str(torch.get_num_threads()), *more]
    return hashlib.sha256("|".join(what).encode()).hexdigest()[:16]


def _path(key: str, kind: str = "hardware") -> Path:
    return Path(platformdirs.user_cache_dir("mezzo")) / f"{kind}-{key}.json"


def _store(path: Path, data: dict[str, Any]) -> None:
    """Keep the measurement; a read-only home only costs measuring again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps(data))
        part.replace(path)
    except OSError:
        pass
