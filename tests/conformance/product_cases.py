"""Products and their gradients for products.json: exact sums of rounded operands in fractions, and a derived bound.

y = a·bᵀ, da = g·b, db = gᵀ·a. Each product rounds its own two operands, with blocks along the axis that it sums over,
and its result. Where y has 16 bits, so has the gradient that comes back to it: g is rounded to those first.

The bound is that of docs/numerics.md: with u = 2^-24 a sum of K products in float32, in any order, errs by at most
gamma(K) · S, gamma(K) = K u / (1 - K u), S the sum of absolute values (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1), and by half of 2^-149 for each operation below float32's smallest normal number. Rounding the
result to M bits of fraction adds |y| 2^-(M + 1), or half of the smallest subnormal number.
"""

import math
from fractions import Fraction

import numpy as np
from block_oracle import SCALED, blocks
from oracles import GFLOAT, hexed, numbers, round_to

U = Fraction(1, 2**24)
WIDE = ("float32", "tf32", "bfloat16", "float16")  # formats that keep infinities; operands below them saturate
ROLES = [f"{product}.{role}" for product in ("fprop", "dgrad", "wgrad") for role in ("a", "b", "out")]


def formats(weight, gradient, out, weight_gradient="float32"):
    """Role → format: `weight` for weights and inputs, `gradient` for the incoming one, `out` for results."""
    same = dict.fromkeys(ROLES, weight)
    outs = {"fprop.out": out, "dgrad.out": out, "wgrad.out": weight_gradient}
    return same | {"dgrad.a": gradient, "wgrad.a": gradient} | outs


# (what, shape (rows, in, out), formats, routes). One dimension is long enough for a block and a short one.
RECIPES = [
    ("bf16", (4, 20, 5), formats("bfloat16", "bfloat16", "bfloat16"), ["emulated"]),
    ("bf16 throughout", (4, 16, 5), formats(*["bfloat16"] * 4), ["emulated", "native"]),
    ("fp16 throughout", (4, 16, 5), formats(*["float16"] * 4), ["emulated", "native"]),
    ("tf32", (3, 24, 4), formats("tf32", "tf32", "float32"), ["emulated"]),
    ("e4m3 and e5m2", (3, 20, 4), formats("float8_e4m3fn", "float8_e5m2", "bfloat16"), ["emulated"]),
    ("scaled e4m3 and e5m2", (4, 12, 5), formats("float8_e4m3fn@tensor", "float8_e5m2@tensor", "bfloat16"),
     ["emulated"]),
    ("mxfp8, long inputs", (3, 36, 3), formats("mxfp8_e4m3", "mxfp8_e5m2", "bfloat16"), ["emulated"]),
    ("mxfp8, many rows", (34, 2, 2), formats("mxfp8_e4m3", "mxfp8_e4m3", "float32"), ["emulated"]),
    ("mxfp8, many outputs", (2, 2, 34), formats("mxfp8_e4m3", "mxfp8_e4m3", "float32"), ["emulated"]),
    ("nvfp4", (3, 20, 4), formats("nvfp4", "nvfp4", "bfloat16"), ["emulated"]),
    ("nvfp4, many rows", (18, 2, 2), formats("nvfp4", "nvfp4", "float32"), ["emulated"]),
    ("nvfp4, many outputs", (2, 2, 18), formats("nvfp4", "nvfp4", "float32"), ["emulated"]),
    ("nvfp4 in squares", (17, 5, 3), formats("nvfp4_16x16", "bfloat16", "float32"), ["emulated"]),
    ("another format in each product", (4, 16, 5), {
        "fprop.a": "bfloat16", "fprop.b": "float8_e4m3fn@tensor", "fprop.out": "float32",
        "dgrad.a": "float32", "dgrad.b": "bfloat16", "dgrad.out": "float16",
        "wgrad.a": "float8_e5m2", "wgrad.b": "mxfp4", "wgrad.out": "float32"}, ["emulated"]),
]  # fmt: skip


def operand(x, fmt, axis):
    """float64 array of `x` as a product sees it that sums over `axis`."""
    if fmt in SCALED:
        return blocks(x.astype(np.float32), fmt, axis=axis).values.astype(np.float64)
    return round_to(x, fmt, "nearest", "cast" if fmt in WIDE else "saturate")


def within(terms, exact, absolute, out):
    """How far a result may be off, a fraction."""
    error = terms * U / (1 - terms * U) * absolute + Fraction(terms, 2**149)
    if out == "float32":
        return error
    info = GFLOAT[out]
    return error + Fraction(float(info.eps)) / 2 * (abs(exact) + error) + Fraction(float(info.smallest_subnormal)) / 2


def upward(x):
    """A fraction as a decimal number of four digits that is not below it."""
    digits = 3 - math.floor(math.log10(x))
    return float(f"{math.ceil(x * Fraction(10) ** digits)}e{-digits}")


def multiply(a, b, out):
    """a (m, K) · b (K, n): the exact sums to float64, and the bound."""
    exact, limit = np.empty((a.shape[0], b.shape[1])), []
    columns = [[Fraction(v) for v in column] for column in b.T.tolist()]
    for i, row in enumerate(a.tolist()):
        left = [Fraction(v) for v in row]
        for j, right in enumerate(columns):
            terms = [p * q for p, q in zip(left, right, strict=True)]
            total = sum(terms, Fraction(0))
            exact[i, j] = float(total)
            # float64's own rounding of the exact sum is below what rounding the bound upward adds, but for S = 0.
            limit.append(upward(within(len(terms), total, sum(map(abs, terms)), out) + abs(total) / 2**53))
    return {"exact": hexed(exact), "within": limit}


def product_cases():
    cases = []
    for what, (rows, inputs, outputs), chosen, routes in RECIPES:
        # Powers of two over the rows: an amax of its own for each block, and sums that cancel little.
        a = numbers(f"a/{what}", (rows, inputs)) * np.float32(2.0) ** (np.arange(rows, dtype=np.float32) % 4)[:, None]
        b, g = numbers(f"b/{what}", (outputs, inputs)), numbers(f"g/{what}", (rows, outputs))
        back = round_to(g, chosen["fprop.out"], "nearest", "cast") if chosen["fprop.out"] in WIDE[2:] else g
        results = {
            "fprop": multiply(operand(a, chosen["fprop.a"], 1), operand(b, chosen["fprop.b"], 1).T,
                              chosen["fprop.out"]),
            "dgrad": multiply(operand(back, chosen["dgrad.a"], 1), operand(b, chosen["dgrad.b"], 0),
                              chosen["dgrad.out"]),
            "wgrad": multiply(operand(back, chosen["wgrad.a"], 0).T, operand(a, chosen["wgrad.b"], 0),
                              chosen["wgrad.out"]),
        }  # fmt: skip
        cases.append({"what": what, "shape": [rows, inputs, outputs], "formats": chosen, "routes": routes,
                      "a": hexed(a), "b": hexed(b), "g": hexed(g), **results})  # fmt: skip
    return cases
