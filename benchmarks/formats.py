"""Every format against the oracles: how many results were compared, and how many differ.

    python benchmarks/formats.py [--formats …] [--blocks 2000]

    rounding      float32: all 2**20 upper parts with six endings, so that every tie of every format with at most ten
                  fraction bits and both of its sides are there; float16 and bfloat16: all 2**16 codes; float64: each of
                  the 2**16 upper parts three times.
                  Oracles: ml_dtypes for the cast to nearest, gfloat for all else; NumPy's rint and trunc for int8; for
                  float8_e8m0fnu ml_dtypes' cast (but for one known error) and the definition for what it does not offer
    codes         all codes, decoded and encoded again
    scaled        blocks of normal numbers at many scales. Oracle: the definition in float32 arithmetic of NumPy, with
                  ml_dtypes' casts for elements and scales; gfloat's quantize_block beside it for OCP's floor rule

Implementations: "numpy" (mezzo.formats), "torch" (its own operations), "helper" (C++), "compiled" (torch.compile). A
result is the same if its bits are; NaN is NaN whatever its payload. Writes benchmarks/results/formats.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import gfloat
import ml_dtypes
import numpy as np
import torch
from common import write_result
from gfloat import RoundMode
from gfloat import formats as gf
from gfloat.types import Domain, FormatInfo

from mezzo.formats import FORMATS, Format, ScaledFormat, decode, encode, get_format
from mezzo.formats import quantize as numpy_quantize
from mezzo.formats.philox import bits
from mezzo.torch import helper
from mezzo.torch.quantize import quantize as torch_quantize

Array = np.ndarray[Any, Any]
KEY = (3, 1, "benchmark")
TF32 = FormatInfo("tf32", 19, 11, bias=127, is_signed=True, domain=Domain.Extended, has_nz=True, num_high_nans=1023,
                  has_subnormals=True, is_twos_complement=False)  # fmt: skip
GFLOAT = {
    "float64": gf.format_info_binary64,
    "float32": gf.format_info_binary32,
    "tf32": TF32,
    "bfloat16": gf.format_info_bfloat16,
    "float16": gf.format_info_binary16,
    "float8_e4m3fn": gf.format_info_ocp_e4m3,
    "float8_e5m2": gf.format_info_ocp_e5m2,
    "float6_e2m3fn": gf.format_info_ocp_e2m3,
    "float6_e3m2fn": gf.format_info_ocp_e3m2,
    "float4_e2m1fn": gf.format_info_ocp_e2m1,
}
FLOATS = {16: np.uint16, 32: np.uint32, 64: np.uint64}
SCALED = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxfp8_e4m3+floor", "mxfp4+floor", "nvfp4",
          "nvfp4_16x16", "e4m3@1x128", "e4m3@128x128", "e4m3@row", "e5m2@tensor", "int8@1x128"]  # fmt: skip
BLOCK_INFO = {
    "mxfp8_e4m3": gf.format_info_mxfp8_e4m3,
    "mxfp4": gf.format_info_mxfp4_e2m1,
}


# --------------------------------------------------------------------------------------------------------------- inputs


def inputs() -> Iterator[tuple[str, Array]]:
    """(dtype, numbers)"""
    upper = np.arange(1 << 20, dtype=np.uint32) << np.uint32(12)
    endings = np.array([0, 1, 0x7FF, 0x800, 0x801, 0xFFF], np.uint32)
    yield "float32", (upper[:, None] | endings).reshape(-1).view(np.float32)
    yield "float16", np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    yield "bfloat16", np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    top = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
    low = bits(7, 0, 0, 1 << 17).astype(np.uint64).reshape(1 << 16, 2) << np.uint64(16)
    yield "float64", np.concatenate([top[:, None], top[:, None] | low], 1).reshape(-1).view(np.float64)


# -------------------------------------------------------------------------------------------------------------- oracles


def oracle(x: Array, name: str, rounding: str, overflow: str, words: Array | None) -> tuple[str, Array]:
    """(whose answer it is, the answer in float64)"""
    wide = x.astype(np.float64)
    if name == "int8":
        return "numpy", np.where(np.isnan(wide), np.nan, np.clip(_whole(wide, rounding, words), -128, 127) + 0.0)
    if name == "float8_e8m0fnu":
        if (rounding, overflow) == ("nearest", "cast") and x.dtype != np.float64:
            y = x.astype(np.float32).astype(ml_dtypes.float8_e8m0fnu).astype(np.float64)
            # ml_dtypes 0.6 takes float32's subnormal numbers above 2**-127 to 2**-126, also those nearer to 2**-127.
            wrong = (wide > 2.0**-127) & (wide < 1.5 * 2.0**-127)
            return "ml_dtypes", np.where(wrong, 2.0**-127, y)
        return "definition", _power(wide, rounding, overflow, words)
    info = GFLOAT[name]
    keeps = info.num_nans == 0
    if (rounding, overflow) == ("nearest", "cast") and x.dtype != np.float64 and hasattr(ml_dtypes, name) and not keeps:
        return "ml_dtypes", x.astype(np.float32).astype(getattr(ml_dtypes, name)).astype(np.float64)
    # gfloat has no answer for what 6 and 4 bits cannot say: mezzo keeps NaN in every format and saturates infinities.
    finite = np.where(np.isfinite(wide) | (not keeps), wide, 0.0)
    mode = {"nearest": RoundMode.TiesToEven, "toward_zero": RoundMode.TowardZero}
    more: dict[str, Any] = {}
    if words is not None:  # up where fraction + (2**32 - 1 - word) / 2**32 reaches 1: word < fraction · 2**32
        mode, more = {"stochastic": RoundMode.StochasticFastest}, {"srbits": (1 << 32) - 1 - words, "srnumbits": 32}
    saturates = overflow == "saturate" or keeps
    nan = np.isnan(finite)
    y = gfloat.round_ndarray(info, np.where(nan, 0.0, finite), mode[rounding], sat=saturates, **more)
    y = np.where(np.isinf(wide) & keeps, np.copysign(float(info.max), wide), y)
    return "gfloat", np.where(np.isnan(wide), np.nan, y)


def _whole(x: Array, rounding: str, words: Array | None) -> Array:
    if rounding == "nearest":
        return np.rint(x)
    if words is None:
        return np.trunc(x)
    down = np.floor(np.abs(x))
    return np.copysign(down + (words < np.floor((np.abs(x) - down) * 2.0**32)), x)


def _power(x: Array, rounding: str, overflow: str, words: Array | None) -> Array:
    """float8_e8m0fnu from its definition: powers of two, ties to the larger, no zero and no sign."""
    positive = np.where((x > 0) & np.isfinite(x), x, 1.0)
    mantissa, exponent = np.frexp(positive)
    down = np.ldexp(1.0, np.maximum(exponent - 1, -127))
    if rounding == "nearest":
        y = np.where((mantissa >= 0.75) & (exponent - 1 >= -127), 2 * down, down)
    elif words is None:
        y = down
    else:
        up = words < np.floor((2 * mantissa - 1) * 2.0**32)
        y = np.where(up, np.ldexp(1.0, np.maximum(exponent, -127)), down)
    over = y > 2.0**127
    top = 2.0**127 if overflow == "saturate" else np.nan
    bounded = np.where(over, 2.0**127 if rounding == "toward_zero" else top, y)
    bounded = np.where(np.isposinf(x), top, bounded)
    bounded = np.where(x == 0, 2.0**-127 if overflow == "saturate" else np.nan, bounded)
    return np.where((x < 0) | np.isnan(x), np.nan, bounded)


def scaled_oracle(x: Array, fmt: ScaledFormat) -> Array:
    """The definition, for two-dimensional float32 arrays whose blocks are whole, with ml_dtypes' casts."""
    rows, columns = {"row": (1, x.shape[1]), "tensor": x.shape}.get(fmt.group, fmt.group)  # type: ignore[call-overload]
    blocks = x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    amax = np.abs(blocks).max(axis=(1, 3), keepdims=True)
    top = np.float32(fmt.element.max)
    one = np.float32(1)
    if fmt.scaling == "nvfp4":
        encode_scale = np.float32(2688) / amax.max()
        tensor = one / encode_scale
        scale = (amax / np.float32(6) * encode_scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        q = (blocks * (one / (scale * tensor))).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        return (q * scale * tensor).reshape(x.shape)
    if fmt.scaling == "free":
        scale = amax / top
    else:
        mantissa, exponent = np.frexp(amax)
        exponent = exponent - np.frexp(top)[1] + ((mantissa > np.frexp(top)[0]) if fmt.scaling == "pow2" else 0)
        scale = np.ldexp(one, exponent)
    scaled = np.clip(blocks / scale, -top, top)
    if fmt.element.name == "int8":
        q = np.rint(scaled) + np.float32(0)
    else:
        q = scaled.astype(getattr(ml_dtypes, fmt.element.name)).astype(np.float32)
    return (q * scale).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------ implementations


def as_tensor(x: Array) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def in_torch(x: Array, name: str, options: dict[str, Any], run: Callable[..., torch.Tensor], helped: bool) -> Array:
    with nullcontext() if helped else helper.off():
        y = run(as_tensor(x), name, **options)
    return y.double().numpy()


def implementations(which: list[str]) -> dict[str, Callable[..., Array]]:
    def compiled(x: Array, name: str, options: dict[str, Any]) -> Array:
        torch.compiler.reset()
        return in_torch(x, name, options, torch.compile(torch_quantize), True)

    known: dict[str, Callable[..., Array]] = {
        "numpy": lambda x, name, options: numpy_quantize(x, name, **options).astype(np.float64),
        "torch": lambda x, name, options: in_torch(x, name, options, torch_quantize, False),
        "helper": lambda x, name, options: in_torch(x, name, options, torch_quantize, True),
        "compiled": compiled,
    }
    return {name: known[name] for name in which}


def differing(got: Array, expected: Array) -> int:
    """Results whose bits differ; in float64, to which every format goes exactly."""
    nan = np.isnan(got) & np.isnan(expected)
    return int(np.count_nonzero((got.view(np.uint64) != expected.view(np.uint64)) & ~nan))


# ----------------------------------------------------------------------------------------------------------------- runs


class Tally:
    """(format, operation, implementation, oracle) → cases and mismatches"""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str, str], list[int]] = {}

    def add(self, fmt: str, operation: str, implementation: str, whose: str, got: Array, expected: Array) -> None:
        row = self.rows.setdefault((fmt, operation, implementation, whose), [0, 0])
        row[0] += expected.size
        row[1] += differing(np.asarray(got, np.float64), np.asarray(expected, np.float64))

    def records(self) -> list[dict[str, object]]:
        names = ("format", "operation", "implementation", "oracle")
        return [
            dict(zip(names, key, strict=True)) | {"cases": cases, "mismatches": wrong}
            for key, (cases, wrong) in self.rows.items()
        ]


@np.errstate(all="ignore")
def rounding(fmt: Format, tally: Tally, found: dict[str, Callable[..., Array]]) -> None:
    for dtype, x in inputs():
        if fmt.name == "float64" and dtype != "float64":
            continue
        words = bits(*KEY, x.size).astype(np.int64)
        for way in ("nearest", "toward_zero", "stochastic"):
            for overflow in ("saturate", "cast"):
                drawn = words if way == "stochastic" else None
                whose, expected = oracle(x, fmt.name, way, overflow, drawn)
                options = {"rounding": way, "overflow": overflow, "key": KEY if way == "stochastic" else None}
                for name, run in found.items():
                    if name == "compiled" and (dtype, overflow) != ("float32", "saturate"):
                        continue  # the same operator is behind all of them
                    tally.add(fmt.name, f"{way} {overflow}", name, whose, run(x, fmt.name, options), expected)


@np.errstate(all="ignore")
def codes(fmt: Format, tally: Tally) -> None:
    if fmt.bits > 16 or fmt.name == "int8":
        return
    dtype = np.dtype(np.float16) if fmt.name == "float16" else np.dtype(getattr(ml_dtypes, fmt.name))
    every = np.arange(1 << fmt.bits, dtype=FLOATS.get(fmt.bits, np.uint8))
    values = every.view(dtype).astype(np.float32)
    tally.add(fmt.name, "decode", "numpy", "ml_dtypes", decode(every, fmt), values)
    number = ~np.isnan(values)  # which NaN is a matter of payloads
    tally.add(fmt.name, "encode", "numpy", "ml_dtypes", encode(values[number], fmt, overflow="cast"), every[number])


@np.errstate(all="ignore")
def scaled(name: str, tally: Tally, found: dict[str, Callable[..., Array]], count: int) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, ScaledFormat)
    rng = np.random.default_rng(5)
    for shift in (-40, -8, 0, 6, 60):
        spread = np.exp2(rng.uniform(-6, 6, (count // 16 * 128, 1)))
        x = (rng.standard_normal((count // 16 * 128, 128)) * spread * 2.0**shift).astype(np.float32)
        expected = scaled_oracle(x, fmt)
        for implementation, run in found.items():
            tally.add(name, "scaled nearest", implementation, "numpy+ml_dtypes", run(x, name, {}), expected)
        base = name.removesuffix("+floor")
        if name.endswith("+floor"):
            info = BLOCK_INFO[base]
            part = x[:200].reshape(-1, 32)
            other = np.stack(
                [gfloat.quantize_block(info, v.astype(np.float64), gfloat.compute_scale_amax) for v in part]
            )
            for implementation, run in found.items():
                tally.add(name, "scaled nearest", implementation, "gfloat", run(part, name, {}), other)


@np.errstate(all="ignore")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=[*FORMATS, *SCALED])
    parser.add_argument("--blocks", type=int, default=320, help="rows of 128 numbers / 8, for each of five scales")
    options = parser.parse_args()
    which = ["numpy", "torch", *(["helper"] if helper.load() is not None else []), "compiled"]
    found, tally, begin = implementations(which), Tally(), time.perf_counter()
    for name in options.formats:
        fmt = get_format(name)
        if isinstance(fmt, Format):
            codes(fmt, tally)
            rounding(fmt, tally, found)
        else:
            scaled(name, tally, found, options.blocks)
        mine = [row for row in tally.records() if row["format"] == name]
        print(f"{name:18} {sum(int(str(r['cases'])) for r in mine):12,} compared, "
              f"{sum(int(str(r['mismatches'])) for r in mine)} differ")  # fmt: skip
    rows = tally.records()
    cases, wrong = (sum(int(str(row[key])) for row in rows) for key in ("cases", "mismatches"))
    path = write_result(
        "formats",
        {
            "oracles": {"ml_dtypes": ml_dtypes.__version__, "gfloat": version("gfloat"), "numpy": np.__version__},
            "helper": helper.status(),
            "cases": cases,
            "mismatches": wrong,
            "seconds": round(time.perf_counter() - begin, 1),
            "rows": rows,
        },
    )
    print(f"{cases:,} results compared, {wrong} differ → {path}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
