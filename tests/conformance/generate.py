"""Write the cases of the conformance kit from the oracles: `python tests/conformance/generate.py`.

    codes.json        every code of a format and its value
    elements.json     hard inputs of every element format: ties, what lies beside them, the ends of the range
    stochastic.json   rounding with random words
    blocks.json       scaled formats: values, codes and scales; some worked out by hand
    philox.json       words of the generator
    hadamard.json     the random Hadamard transform
    products.json     a product and its gradients: exact sums of the rounded operands, and how far a result may be off
    loss_scale.json   the loss scale's state after each step

Nothing here uses mezzo. Numbers are the hexadecimal bits of their dtype, which is named first. Random numbers are
Philox words, so that no release of NumPy changes a file.
"""

import hashlib
import json
from pathlib import Path

import gfloat
import numpy as np
from block_oracle import SCALED, blocks, hadamard
from oracles import DTYPES, GFLOAT, hexed, numbers, round_to, stream
from product_cases import product_cases

CASES = Path(__file__).parent / "cases"
ELEMENTS = [*GFLOAT, "float8_e8m0fnu", "int8"]


def code_cases():
    """All values of formats of at most 8 bits; of the 16-bit ones the digest of all 65,536, as little-endian float32
    with 7fc00000 for every NaN."""
    cases = []
    for name in ELEMENTS[2:]:
        if name in ("bfloat16", "float16"):
            values = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[name]).astype(np.float32)
            values = np.where(np.isnan(values), np.float32(np.nan), values)
            cases.append({"format": name, "sha256": hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()})
            continue
        if name == "int8":
            values = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
        elif name == "float8_e8m0fnu":
            values = np.arange(256, dtype=np.uint8).view(DTYPES[name]).astype(np.float32)
        else:
            info = GFLOAT[name]
            values = np.array([gfloat.decode_float(info, code).fval for code in range(1 << info.k)], np.float32)
            other = np.arange(1 << info.k, dtype=np.uint8).view(DTYPES[name]).astype(np.float32)
            assert np.array_equal(values, other, equal_nan=True), name
        cases.append({"format": name, "values": hexed(values)})
    return cases


def grid_of(name):
    """Values of a format, float64, >= 0: all of those with few bits, else the ends of the range and both sides of the
    smallest normal and of one, in runs of neighbours."""
    info = GFLOAT[name]
    if info.k <= 8:
        values = np.array([gfloat.decode_float(info, code).fval for code in range(1 << (info.k - 1))])
        return [np.unique(values[np.isfinite(values)])]
    tiny, normal, eps, top = (
        float(v) for v in (info.smallest_subnormal, info.smallest_normal, info.eps, info.max)
    )  # fmt: skip
    gap = 2.0**info.emax * eps
    return [
        np.arange(4) * tiny,
        np.array([normal - tiny, normal, normal + tiny]),
        np.array([1 - eps / 2, 1.0, 1 + eps, 1 + 2 * eps]),
        np.array([top - 2 * gap, top - gap, top]),
    ]


def hard_inputs(name):
    """float64 >= 0: ties between neighbours, and the edge of the range. The values themselves are in codes.json."""
    if name == "int8":
        return np.array([0.5, 1.0, 1.5, 2.5, 126.5, 127.0, 127.5, 128.0, 128.5, 129.0, 1e6])
    if name == "float8_e8m0fnu":
        powers = [2.0**e * m for e in (-127, -126, -1, 0, 1, 126) for m in (1, 1.25, 1.5, 1.75)]
        return np.array([*powers, 2.0**127, 1.5 * 2.0**127, 2.0**-128, 2.0**-149])
    runs, tiny = grid_of(name), float(GFLOAT[name].smallest_subnormal)
    ties = np.concatenate([(run[1:] + run[:-1]) / 2 for run in runs])
    top, gap = runs[-1][-1], runs[-1][-1] - runs[-1][-2]
    edge = np.array([top, top + gap / 4, top + gap / 2, top + gap, 2 * top, 4 * top])
    return np.concatenate([ties, edge, tiny / 2.0 ** np.arange(1, 4)])


def with_neighbours(values, dtype):
    """The values that dtype holds, what lies beside them, their signs in turns, and what is special with both signs."""
    container = np.dtype(f"u{np.dtype(dtype).itemsize}")
    with np.errstate(over="ignore"):
        bits = np.unique(np.abs(values).astype(dtype).view(container))
        special = np.array([0, np.inf, np.nan, np.finfo(np.float32).max], np.float64).astype(dtype).view(container)
    one = container.type(1)
    positive = np.unique(np.concatenate([bits, bits + one, bits[bits > 0] - one])).view(dtype)
    with np.errstate(invalid="ignore"):
        positive = positive[np.isfinite(positive.astype(np.float64))]
    turns = np.where(np.arange(positive.size) % 2, -positive, positive).astype(dtype)
    return np.concatenate([turns, special.view(dtype), -special.view(dtype)])


def result_dtype(name, dtype):
    """The dtype of the input if it holds every value of the format, else float32; both are tried out."""
    if name == "int8":
        values = np.arange(-128, 128.0)
    elif name == "float8_e8m0fnu":
        values = 2.0 ** np.arange(-127, 128)
    else:
        values = np.concatenate(grid_of(name))
    with np.errstate(over="ignore"):
        held = values.astype(DTYPES[dtype]).astype(np.float64)
    return dtype if np.array_equal(held, values) else "float32"


def element_cases():
    cases = []
    for name in ELEMENTS:
        hard = hard_inputs(name)
        for dtype in ("float32", "float64", "float16", "bfloat16"):
            if dtype == name:
                continue
            # float32 has the full list. float64 shows what a rounding through float32 would get wrong, and narrow
            # inputs that they are read as they are: a few of each.
            chosen = hard if dtype == "float32" else hard[:: max(1, len(hard) // 12)]
            x = with_neighbours(chosen, DTYPES[dtype])
            answers = {}
            for rounding in ("nearest", "toward_zero"):
                for overflow in ("saturate", "cast"):
                    y = round_to(x.astype(np.float64), name, rounding, overflow)
                    answers[f"{rounding} {overflow}"] = hexed(y.astype(np.float32))
            cases.append(
                {"format": name, "dtype": result_dtype(name, dtype), "x": hexed(x), "y": answers},
            )
    return cases


def stochastic_cases():
    cases = []
    for name in ELEMENTS[1:]:
        if name == "float8_e8m0fnu":
            x = np.abs(numbers(name, (48,))) * 2.0 ** np.arange(-24, 24)
        elif name == "int8":
            x = numbers(name, (48,)) * 2.0 ** (np.arange(48) % 8)
        else:
            info, spread = GFLOAT[name], numbers(name, (48,)).astype(np.float64)
            near_top = np.copysign(float(info.max), spread[:6]) * np.array([0.97, 1.01, 1.2, 0.99, 0.93, 0.96])
            x = np.concatenate([spread[:30], spread[30:42] * float(info.smallest_normal), near_top])
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        x = np.where(np.isfinite(x), x, np.float32(1.01))
        key = [11, 7, f"stochastic/{name}"]
        y = round_to(x.astype(np.float64), name, "stochastic", "saturate", stream(*key, x.size))
        cases.append({"format": name, "key": key, "x": hexed(x), "y": hexed(y.astype(np.float32))})
    for name in ("bfloat16", "float8_e4m3fn"):
        # float64 of fractions just at the word and one 2**32nd above it: the first stays down, the second goes up.
        key, eps = [0, 0, f"edge/{name}"], float(GFLOAT[name].eps)
        words = stream(*key, 16)
        x = (1 + (words.astype(np.float64) + np.arange(16) % 2) / 2.0**32 * eps) * np.where(words & 4, -1, 1)
        y = round_to(x, name, "stochastic", "saturate", words)
        assert np.array_equal(np.abs(y), 1 + np.arange(16) % 2 * eps)
        cases.append({"format": name, "key": key, "x": hexed(x), "y": hexed(y)})
    for fmt in ("mxfp4", "nvfp4", "float8_e4m3fn@1x16"):
        x, key = numbers(f"stochastic/{fmt}", (3, 40)), [2**63 + 5, 3, 77]
        y = blocks(x, fmt, rounding="stochastic", key=key).values
        cases.append({"format": fmt, "shape": [3, 40], "key": key, "x": hexed(x), "y": hexed(y)})
    return cases


def lines(fmt):
    """What → float32 numbers of one block: plain ones, an outlier, tiny, huge, zeros of both signs, ties."""
    count = 16 if SCALED[fmt][1] == (1, 16) else 32
    plain = numbers(f"blocks/{fmt}", (count,))
    third = np.arange(count) == 3
    top = np.float32(127 if SCALED[fmt][0] == "int8" else GFLOAT[SCALED[fmt][0]].max)
    return {
        "an outlier": np.where(third, np.float32(300), plain),
        "whole numbers": np.arange(count, dtype=np.float32) - count // 2,
        "subnormal numbers": (plain * np.float32(1e-40)).astype(np.float32),
        "near float32's largest": np.where(third, np.finfo(np.float32).max, plain * np.float32(1e38)),
        "zeros": np.copysign(np.float32(0), plain),
        "amax is the largest element": np.where(third, top, plain),
        "amax just above the largest element": np.where(third, np.nextafter(top, np.float32(np.inf)), plain),
    }


def grid_2d(what, shape):
    """(rows, columns) of very different rows, with a block of zeros, one of tiny numbers and one of signed zeros."""
    x = numbers(what, shape) * np.float32(2.0) ** (3 * np.arange(shape[0], dtype=np.float32))[:, None]
    x[0, :16] = 0
    x[1, :16] *= np.float32(2.0**-40)
    x[2, 16:] = np.copysign(np.float32(0), x[2, 16:])
    return x.astype(np.float32)


def block_case(fmt, what, x, *, codes=True, **options):
    found = blocks(x, fmt, **options)
    case = {"format": fmt, "what": what, "shape": list(x.shape), "x": hexed(x), "y": hexed(found.values), **options}
    if codes:
        case |= {"codes": hexed(found.codes), "scales": hexed(found.scales), "scales_shape": list(found.scales.shape)}
        if found.tensor_scale is not None:
            case["tensor_scale"] = hexed(found.tensor_scale)
    return case


def around(x):
    """float32 numbers and the three on either side of each, flat."""
    raw = np.asarray(x, np.float32).reshape(-1, 1).view(np.int32) + np.arange(-3, 4, dtype=np.int32)
    return raw.view(np.float32).reshape(-1)


def beside_ties():
    """NVFP4 blocks whose scale or whose elements lie so near a tie that another order of the operations, an ulp away,
    rounds to the other side: (amax / 6) · encode against amax · encode / 6, x · (1 / inner) against x / inner."""
    one, six, top = np.float32(1), np.float32(6), np.float32(7.3)
    encode = np.float32(2688) / top
    rows, by_element = [np.full(16, top)], []
    for eighths in range(17, 32, 2):  # ties between the e4m3 numbers of 128 … 256
        amax = around(np.float32(48 * eighths) / encode)
        scale, other = (round_to(s, "float8_e4m3fn") for s in (amax / six * encode, amax * encode / six))
        rows += [np.append(np.zeros(15, np.float32), m) for m in amax[scale != other][:1]]
    for sixteenths in range(16, 32):  # those numbers
        amax = np.float32(48 * sixteenths) / encode
        inner = np.float32(8 * sixteenths) * (one / encode)
        x = around(np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5], np.float32) * inner)
        told = x[round_to(x * (one / inner), "float4_e2m1fn") != round_to(x / inner, "float4_e2m1fn")]
        by_element += [np.append(np.resize(told, 15), amax)] if told.size else []
    assert len(rows) > 1
    assert by_element
    return np.array(rows + by_element[:3], np.float32)


def block_cases():
    cases = []
    for fmt, (_, group, _) in SCALED.items():
        if isinstance(group, tuple) and group[0] == 1:
            # The elements and the blocks of the floor rule are those of the formats without it.
            some = list(lines(fmt).items())[slice(2, None, 2) if fmt.endswith("floor") else slice(None)]
            cases += [block_case(fmt, what, x) for what, x in some]
    for fmt in ("mxfp8_e4m3", "nvfp4", "float8_e4m3fn@1x16", "float8_e4m3fn@2x8", "float8_e5m2@row", "int8@row",
                "float8_e4m3fn@tensor", "float8_e5m2@tensor"):  # fmt: skip
        x = grid_2d(f"2d/{fmt}", (3, 40))
        cases.append(block_case(fmt, "rows, the last block short", x))
        if fmt in ("mxfp8_e4m3", "nvfp4", "float8_e4m3fn@2x8", "float8_e5m2@row"):
            cases.append(block_case(fmt, "columns", np.ascontiguousarray(x.T), axis=0))
        broken = x[:, :20].copy()
        broken[0, 18], broken[1, 2] = np.nan, -np.inf
        cases.append(block_case(fmt, "a NaN and an infinity", broken))
    for axis in (0, 1):
        cases.append(block_case("nvfp4_16x16", f"short blocks, axis {axis}", grid_2d("16x16", (17, 18)), axis=axis))
    # Enough groups that another order of the last two multiplications shows in some of them.
    wide = numbers("order", (12, 16)) * np.float32(1.37) ** (np.arange(12, dtype=np.float32) % 11)[:, None]
    cases.append(block_case("nvfp4", "the order of scale operations", wide.astype(np.float32), codes=False))
    cases.append(block_case("nvfp4", "an ulp from ties", beside_ties()))
    for fmt in ("mxfp8_e4m3", "float8_e4m3fn@1x16"):
        x = numbers(f"double/{fmt}", (32,)).astype(np.float64) * (1 + 2.0**-30)
        cases.append(block_case(fmt, "float64", x, codes=False))
        narrow = numbers(f"narrow/{fmt}", (32,)).astype(DTYPES["bfloat16"])
        cases.append(block_case(fmt, "bfloat16", narrow, codes=False))
    x = np.concatenate([numbers("given", (12,)) * 100, [np.nan, np.inf, -np.inf, 1e30]]).astype(np.float32)
    cases.append(block_case("float8_e4m3fn@tensor", "a given scale", x, codes=False, given=0.3125))
    x = np.where(np.arange(32) == 3, np.float32(480), numbers("cast", (32,)))
    cases.append(block_case("mxfp8_e4m3+floor", "beyond the largest, cast", x, codes=False, overflow="cast"))
    return cases + [by_hand(*case) for case in HAND]


# By hand, for a reader with a pencil. MXFP4 of 0.5, 1, 3, 7, zeros: amax 7, above 6 · 2^0, so the scale is 2 and the
# elements 0.25, 0.5, 1.5, 3.5. 0.25 is halfway between 0 and 0.5: to even, 0. 3.5 is halfway between 3 and 4: to the
# even code, 4. So 0, 1, 3, 8. With the floor rule the scale is 2^(2 - 2) = 1, and 7 saturates at 6: 0.5, 1, 3, 6.
# NVFP4 of the same: encode = 2688 / 7 = 384, scale = e4m3(7/6 · 384 = 448) = 448, and x · 1/(448/384): 6/7 of x, that
# is 0.4286, 0.857, 2.571, 6 → 0.5, 1, 3, 6; times 448, which is exact: 224, 448, 1344, 2688; times the tensor scale.
# That is float32(1/384), a third of its ulp above 1/384. So 224 of it lie at 0.33 + 0.29 of an ulp above 0x3f155555,
# and round up to 0x3f155556, which 7/12 itself would not; 1344 of it lie 0.44 of an ulp above 3.5, and give 3.5.
# MXFP8: 449 is above 448, so the scale is 2; 224.5 → 224 (gap 16), 0.5, -0.53125 is halfway between 0.5 and 0.5625: to
# even, 0.5. With the floor rule the scale is 1: 449 → 448, 1, and -1.0625 is again halfway: 1.
# int8: the scale is 127/127 = 1; 0.5 → 0, 1.5 → 2, -2.5 → -2.
HAND = [
    ("mxfp4", [0.5, 1, 3, 7], [0, 1, 3, 8]),
    ("mxfp4+floor", [0.5, 1, 3, 7], [0.5, 1, 3, 6]),
    ("nvfp4", [0.5, 1, 3, 7], [7 / 12 + 2.0**-24, 7 / 6 + 2.0**-23, 3.5, 7]),
    ("mxfp8_e4m3", [449, 1, -1.0625, 0], [448, 1, -1, 0]),
    ("mxfp8_e4m3+floor", [449, 1, -1.0625, 0], [448, 1, -1, 0]),
    ("int8@row", [127, 0.5, 1.5, -2.5], [127, 0, 2, -2]),
]


def by_hand(fmt, x, y):
    case = block_case(fmt, "by hand", np.array(x, np.float32))
    assert case["y"] == hexed(np.array(y, np.float32)), (fmt, case["y"], hexed(np.array(y, np.float32)))
    return case


def philox_cases():
    keys = [
        (0, 0, 0),
        (1, 2, 3),
        (2**64 - 1, 2**32 - 1, 2**32 - 1),
        (2**32, 1, "x"),
        (11, 7, "stochastic"),
        (5, 0, "blocks.0.attn.qkv:wgrad.a"),
    ]
    return [{"key": list(key), "words": hexed(stream(*key, 13))} for key in keys]


def hadamard_cases():
    whole = (numbers("hadamard", (4, 16)) * 16).astype(np.int64).astype(np.float32)
    inputs = [
        ("whole numbers", whole, {}),
        ("inverse", whole, {"inverse": True}),
        ("another seed", numbers("hadamard/2", (3, 32)), {"seed": 12345678901}),
        ("along axis 0", numbers("hadamard/3", (16, 3)), {"axis": 0}),
        ("four", numbers("hadamard/4", (2, 8)), {"block": 4}),
        ("sixty-four", numbers("hadamard/5", (64,)), {"block": 64, "seed": 3}),
        ("float64", numbers("hadamard/6", (16,)).astype(np.float64) / 3, {}),
    ]
    cases = []
    for what, x, options in inputs:
        y = hadamard(x, **options)
        cases.append({"what": what, "shape": list(x.shape), "options": options, "x": hexed(x), "y": hexed(y)})
    # Sums of whole numbers are exact, so they are those of the matrix itself: H[i, j] = (-1)^(bits that i and j share).
    matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)])
    signs = 1 - 2 * (stream(0, 0, "mezzo.hadamard", 16) & 1).astype(np.int64)
    assert np.array_equal(hadamard(whole), (whole * signs) @ matrix / 4)
    return cases


def loss_scale_cases():
    """The state machine as one would explain it, on three settings and three kinds of runs. After each step: the scale,
    good steps since it last grew, overflows in a row since it last backed off, overflows in a row at the floor."""
    settings = [
        {"growth_interval": 3},
        {"init": 4.0, "floor": 2.0, "ceiling": 16.0, "growth_interval": 2, "hysteresis": 2},
        {"init": 8.0, "ceiling": 64.0, "growth_interval": 1, "growth_factor": 4.0, "backoff_factor": 0.25},
    ]
    defaults = {"init": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "floor": 1.0, "ceiling": 2.0**24}
    cases = []
    for number, given in enumerate(settings):
        s = defaults | {"hysteresis": 1} | given
        for share in (0.15, 0.5, 0.85):
            overflows = [bool(w < share * 2**32) for w in stream(3, number, f"overflows {share}", 60)]
            scale, good, bad, at_floor, states = s["init"], 0, 0, 0, []
            for overflow in overflows:
                at_floor = at_floor + 1 if overflow and scale == s["floor"] else 0
                if overflow:
                    good, bad = 0, bad + 1
                    if bad == s["hysteresis"]:
                        scale, bad = max(scale * s["backoff_factor"], s["floor"]), 0
                else:
                    bad, good = 0, good + 1
                    if good == s["growth_interval"]:
                        scale, good = min(scale * s["growth_factor"], s["ceiling"]), 0
                states.append([scale, good, bad, at_floor])
            cases.append({"scaling": given, "overflows": overflows, "states": states})
    return cases


def files():
    """File name → its text, one case a line."""
    made = {
        "codes": code_cases(),
        "elements": element_cases(),
        "stochastic": stochastic_cases(),
        "blocks": block_cases(),
        "philox": philox_cases(),
        "hadamard": hadamard_cases(),
        "products": product_cases(),
        "loss_scale": loss_scale_cases(),
    }
    return {f"{name}.json": "[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n" for name, cases in made.items()}


if __name__ == "__main__":
    CASES.mkdir(exist_ok=True)
    for name, text in files().items():
        (CASES / name).write_text(text)
        print(f"{name}: {len(text):,} bytes")
