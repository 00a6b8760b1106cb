"""Run 16-bit products on a CPU that has no 16-bit matrix hardware: as float32 products, rounded once.

PyTorch's own bfloat16 and float16 products are tens of times slower than float32 ones on such a CPU; what `fast_cpu()`
returns says how slow they are here. It puts other kernels in their place, in PyTorch's dispatcher and below autograd,
so code that knows nothing of it runs faster:

    autocast, modules in 16 bits, torch.compile
            │   aten::mm, addmm, bmm, …            (autograd records the op as ever)
            ▼
    16 bits? ── no ──► PyTorch's own kernel, unchanged
            │ yes
            ▼
    operands to float32 ─► PyTorch's own float32 kernel ─► result rounded once to 16 bits

Not touched: aten::mv, addmv and dot, and products of up to four rows with a weight stored row by row (a decoding
step), whose 16-bit kernels are as fast as float32 ones because they only stream the matrix.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mezzo.errors import ConfigError

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# A product in 16 bits counts as slow from this multiple of the float32 product's time. The detour through float32
# costs up to 1.5 on small products (three conversions of n² values beside 2n³ operations), so below it nothing is won.
SLOW_FROM = 1.5

# Up to this many rows, x @ w.t() streams w once and PyTorch's 16-bit dot products keep pace with float32
# (1024 x 1024, 4 rows: 0.45 ms against 0.51 ms in float32 and 0.64 ms by conversion, on two AVX2 cores).
DECODE_ROWS = 4

# A product with a float32 temporary of 32 MiB or more is made in blocks of rows with temporaries of 16 MiB: glibc maps
# each larger one anew, and the page faults cost more than the conversion (64 MiB: 52 ms against 8 ms). It keeps the
# peak of memory down, too. Each element's sum stays whole.
BLOCKS_FROM, BLOCK = 2**23, 2**22  # elements


@dataclass(frozen=True)
class _Op:
    """One aten operator whose CPU kernel is replaced.

    name      the operator, with its overload
    product   the operator whose float32 kernel does the work (itself, unless `name` writes into an argument)
    operands  positions of the tensors that must all have one 16-bit dtype; otherwise PyTorch's own kernel answers,
              with its own error
    kept      positions in the result that stay in float32, as PyTorch's own 16-bit kernel leaves them
    rows      positions (x, w) of the matrices of a plain product x @ w, whose rows of x may be served apart; or None
    """

    name: str
    product: str
    operands: tuple[int, ...]
    kept: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None

    @property
    def writes_first(self) -> bool:
        """Whether the operator works in place (`addmm_`)."""
        return self.name.endswith("_")


def _variants(name: str, operands: tuple[int, ...], *, inplace: bool, rows: tuple[int, int] | None = None) -> list[_Op]:
    """The functional form, the `.out` form that Inductor calls, and the in-place form."""
    names = [name, f"{name}.out"] + ([f"{name}_"] if inplace else [])
    return [_Op(each, name, operands, rows=rows) for each in names]


_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"

_OPS: tuple[_Op, ...] = (
    *_variants("mm", (0, 1), inplace=False, rows=(0, 1)),
    *_variants("addmm", (0, 1, 2), inplace=True, rows=(1, 2)),
    *_variants("_addmm_activation", (0, 1, 2), inplace=False),
    *_variants("bmm", (0, 1), inplace=False),
    *_variants("baddbmm", (0, 1, 2), inplace=True),
    *_variants("addbmm", (0, 1, 2), inplace=True),
    _Op("convolution", "convolution", (0, 1, 2)),
    _Op("convolution_backward", "convolution_backward", (0, 1, 2)),
    _Op("conv_tbc", "conv_tbc", (0, 1, 2)),  # its backward is made of the products above
    _Op("mkldnn_rnn_layer", "mkldnn_rnn_layer", (0, 1, 2, 3, 4, 5, 6)),
    _Op("mkldnn_rnn_layer_backward", "mkldnn_rnn_layer_backward", (0, 1, 2, 3, 4, 5, 6, 7)),
    _Op(_ATTENTION, _ATTENTION, (0, 1, 2), kept=(1,)),  # kept: the log of the softmax's sums
    _Op(f"{_ATTENTION}_backward", f"{_ATTENTION}_backward", (0, 1, 2, 3, 4)),
)


class FastCpu:
    """What `fast_cpu()` did. `str()` says it in words; `with fast_cpu():` undoes it at the end of the block.

    active     True while 16-bit products run as float32 products
    dtypes     the 16-bit dtypes that are served; empty if nothing was done
    ops        the aten operators whose 16-bit kernels were replaced; empty if nothing was done
    slowdown   by dtype, how many times longer than float32 PyTorch's own product took (empty: not measured)
    """

    def __init__(
        self,
        dtypes: tuple[torch.dtype, ...],
        ops: tuple[str, ...],
        slowdown: Mapping[torch.dtype, float],
        library: torch.library.Library | None,
    ) -> None:
        self.dtypes = dtypes
        self.ops = ops
        self.slowdown = dict(slowdown)
        self._library = library
        self._holders = 1

    @property
    def active(self) -> bool:
        return self._library is not None

    def undo(self) -> None:
        """Give the operators their own kernels back, whoever asked for others. Once done, does nothing."""
        global _installed
        if self._library is not None:
            self._library._destroy()
            self._library = None
            _installed = None

    def __enter__(self) -> FastCpu:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holders -= 1
        if self._holders == 0:  # else an outer `with`, or a call without one, still wants it
            self.undo()

    def __str__(self) -> str:
        measured = ", ".join(f"{_name(dtype)} {ratio:.3g}" for dtype, ratio in self.slowdown.items())
        times = f"a product's time as a multiple of float32's: {measured}" if measured else "speed not measured"
        if not self.ops:
            return f"fast_cpu: nothing to do, this CPU is fast at 16 bits ({times})"
        if not self.active:
            return "fast_cpu: undone, 16-bit products run in PyTorch's own kernels"
        served = " and ".join(_name(dtype) for dtype in self.dtypes)
        return (
            f"fast_cpu: {served} products on the CPU run as float32 products, rounded once ({times})\n"
            f"  covered: {', '.join(self.ops)}"
        )

    __repr__ = __str__


# The dispatcher belongs to the whole process; this remembers what was put there, to take it out again.
_installed: FastCpu | None = None


def fast_cpu(*, force: bool = False) -> FastCpu:
    """Let 16-bit products on this CPU run at nearly float32 speed, in code that is not changed.

    Serves `torch.autocast("cpu", …)`, modules in bfloat16 or float16 and `torch.compile`, forward and backward:
    matrix products, convolutions and attention. Each is computed in float32 from the 16-bit operands and rounded
    once to 16 bits. Other dtypes reach PyTorch's own kernels, at the price of some microseconds a call.
    It holds for this process and for those forked from it; one that is spawned calls it again. A second call
    changes nothing and returns what the first one did.

    force     serve both dtypes without measuring whether this CPU is slow at them
    returns   FastCpu, which says what was done, or that this CPU is fast at 16 bits and nothing was
    raises    ConfigError if torch is too old, or if Inductor's C++ wrapper, which goes past the dispatcher, is on
    """
    global _installed
    if not hasattr(torch.library, "get_kernel"):
        raise ConfigError(
            f"fast_cpu() needs torch.library.get_kernel, which torch {torch.__version__} does not have; "
            "install torch 2.10 or newer"
        )
    inductor = sys.modules.get("torch._inductor.config")  # not imported: it would cost every caller half a second
    if inductor is not None and inductor.cpp_wrapper:
        raise ConfigError(
            "fast_cpu() cannot serve torch.compile with torch._inductor.config.cpp_wrapper = True, whose code calls "
            "PyTorch's kernels past the dispatcher; set it to False"
        )
    if _installed is not None and (not force or _installed.dtypes == SIXTEEN_BITS):
        _installed._holders += 1
        return _installed
    slowdown = {} if force else _slowdown()
    dtypes = SIXTEEN_BITS if force else tuple(dtype for dtype, ratio in slowdown.items() if ratio >= SLOW_FROM)
    if not dtypes:
        return FastCpu((), (), slowdown, None)
    if _installed is not None:
        _installed.undo()
    _installed = FastCpu(dtypes, tuple(op.name for op in _OPS), slowdown, _replace(_OPS, frozenset(dtypes)))
    return _installed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _slowdown(size: int = 128, seconds: float = 0.04) -> dict[torch.dtype, float]:
    """By 16-bit dtype, the time of a product of two `size` x `size` matrices as a multiple of float32's.

    On one thread, because on a busy machine two threads wait for each other for longer than the product takes.
    The fastest of up to 20 runs counts; each dtype gets about `seconds`.
    """
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))

    def fastest(x: Tensor) -> float:
        torch.mm(x, x)  # the first call also prepares the kernel
        times: list[float] = []
        while sum(times) < seconds and len(times) < 20:
            start = time.perf_counter()
            torch.mm(x, x)
            times.append(time.perf_counter() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            single = fastest(a)
            return {dtype: fastest(a.to(dtype)) / single for dtype in SIXTEEN_BITS}
    finally:
        torch.set_num_threads(threads)


def _replace(ops: tuple[_Op, ...], dtypes: frozenset[torch.dtype]) -> torch.library.Library:
    """Register the kernels of `ops` for `dtypes`; they live as long as the returned library."""
    names = {op.name for op in ops} | {op.product for op in ops}
    own = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in sorted(names)}
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            # PyTorch says, once a process, that a kernel was overridden. That is what was asked for.
            warnings.filterwarnings("ignore", re.escape("Warning only once for all operators"), UserWarning)
            for op in ops:
                kernel = _kernel(op, own[op.name].call_boxed, own[op.product].call_boxed, dtypes)
                library.impl(op.name, kernel, "CPU", with_keyset=True)
    except BaseException:
        library._destroy()  # all of them or none
        raise
    return library


def _kernel(
    op: _Op, own: Callable[..., Any], product: Callable[..., Any], dtypes: frozenset[torch.dtype]
) -> Callable[..., Any]:
    """The kernel that replaces `own`: `product` in float32 for operands in `dtypes`, `own` for all others.

    Both take a dispatch key set and then the operator's arguments: positional ones by position, trailing defaults
    left out, keyword-only ones by keyword.
    """
    first, *others = op.operands

    def kernel(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        dtype = args[first].dtype
        if dtype not in dtypes:
            return own(keys, *args, **kwargs)
        target = args[0] if op.writes_first else kwargs.get("out")
        if (
            any(args[i] is not None and args[i].dtype is not dtype for i in others)
            or (target is not None and target.dtype is not dtype)
            or (op.rows is not None and _streams(args[op.rows[0]], args[op.rows[1]]))
        ):
            return own(keys, *args, **kwargs)
        wide_kwargs = {key: _widen(value, dtype) for key, value in kwargs.items() if key != "out"}
        if op.rows is not None and (step := _block(op, args, target)):
            x, w = (args[i] for i in op.rows)
            if target is None:
                target = x.new_empty(x.shape[0], w.shape[1])
            w = _widen(w, dtype)
            for i in range(0, x.shape[0], step):
                part = slice(i, i + step)
                addend = [_widen(t[part] if t.shape[:-1] == x.shape[:1] else t, dtype) for t in args[: op.rows[0]]]
                target[part].copy_(product(keys, *addend, _widen(x[part], dtype), w, **wide_kwargs))
            return target
        result = product(keys, *(_widen(arg, dtype) for arg in args), **wide_kwargs)
        if target is None:
            return _narrow(result, dtype, op.kept)
        if target.shape != result.shape:
            if op.writes_first:
                return own(keys, *args, **kwargs)  # raises: an argument written in place cannot grow
            torch.mul(result, 1, out=target)  # resizes, warns and rounds as PyTorch's own kernel does
            return target
        return target.copy_(result)  # rounds

    return kernel


def _streams(x: Tensor, w: Tensor) -> bool:
    """Whether x @ w is a decoding step: few rows, and both read along the inner axis, without a stride."""
    return (
        x.dim() == 2 == w.dim()
        and x.shape[0] <= DECODE_ROWS
        and w.shape[1] > DECODE_ROWS
        and x.stride(1) == 1
        and w.stride(0) == 1
    )


def _block(op: _Op, args: tuple[Any, ...], target: Tensor | None) -> int:
    """How many rows to serve at a time, or 0 for all at once: also where a shape is wrong or memory is shared."""
    assert op.rows is not None
    addends, (x, w) = args[: op.rows[0]], (args[i] for i in op.rows)
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[0]:
        return 0
    widest = max(w.shape)
    if x.shape[0] * widest < BLOCKS_FROM:
        return 0
    step: int = max(64, BLOCK // widest // 64 * 64)
    shape = (x.shape[0], w.shape[1])
    fits = all(len(t.shape) < 2 or tuple(t.shape) in (shape, (1, shape[1]), (shape[0], 1), (1, 1)) for t in addends)
    if target is not None:
        read = [x, w, *(t for t in addends if t is not target)]
        memory = target.untyped_storage().data_ptr()
        fits = fits and target.shape == shape and all(t.untyped_storage().data_ptr() != memory for t in read)
    return step if fits and step < x.shape[0] else 0


def _widen(value: Any, dtype: torch.dtype) -> Any:
    """`value` in float32 if it is a tensor of `dtype`; strides are kept, so a transposed view costs no more."""
    return value.to(torch.float32) if isinstance(value, Tensor) and value.dtype is dtype else value


def _narrow(result: Any, dtype: torch.dtype, kept: tuple[int, ...]) -> Any:
    """Each float32 tensor of `result` rounded to `dtype`, but for the positions in `kept`."""
    if isinstance(result, Tensor):
        return result.to(dtype)
    return tuple(
        part.to(dtype) if isinstance(part, Tensor) and part.dtype is torch.float32 and i not in kept else part
        for i, part in enumerate(result)
    )
