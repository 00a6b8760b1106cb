"""How exact mezzo's emulated products are: worst error as a multiple of a bound that theory gives.

    python benchmarks/exactness.py

Random shapes and scales of every kind of product under every recipe that rounds. Each result (forward, gradient of the
input, gradient of the weight) is compared with float64 on the operands as the recipe rounds them (by the NumPy
reference, not by mezzo.torch). The bound, for K terms of absolute sum S and u = 2^-24:

    K u / (1 - K u) S, then half a unit in the last place of the result (none for float32)

A ratio above 1 would be an error of mezzo or of the kernel. "median_unrounded" is the same ratio for plain float32 on
operands that nobody rounded: what the check would show if the rounding were missing.
Writes benchmarks/results/exactness.json.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzo import hardware
from mezzo.hardware import Hardware
from mezzo.policy import Policy, Site
from mezzo.torch import Precision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "torch"))  # the tests' reference: float64, no mezzo.torch
from common import write_result
from reference import rounded, three, worst

CASES_EACH = 60
RECIPES = ("bf16", "fp16", "tf32", "bf16; *:wgrad.out=bfloat16; *:dgrad.out=float32")
EMULATES = Hardware("cpu", "emulates 16 bits", {"float32": 1.0}, 1.0, "exactness")
Op = Callable[[Tensor, Tensor], Tensor]
Shape = tuple[int, ...]


def pick(low: int, high: int) -> int:
    return random.randint(low, high)


def linear() -> tuple[Op, Shape, Shape]:
    k = pick(1, 300)
    return F.linear, (pick(1, 20), pick(1, 8), k), (pick(1, 40), k)


def matmul() -> tuple[Op, Shape, Shape]:
    k, batch = pick(1, 300), random.choice([(), (3,), (2, 3)])
    return torch.matmul, (*batch, pick(1, 20), k), (*random.choice([batch, ()]), k, pick(1, 20))


def vectors() -> tuple[Op, Shape, Shape]:
    k = pick(1, 1000)
    return torch.matmul, (k,), random.choice([(k,), (k, pick(1, 20))])


def bmm() -> tuple[Op, Shape, Shape]:
    b, k = pick(1, 6), pick(1, 200)
    return torch.bmm, (b, pick(1, 20), k), (b, k, pick(1, 20))


def einsum() -> tuple[Op, Shape, Shape]:
    i, j, k = pick(1, 6), pick(1, 12), pick(1, 40)
    return lambda a, b: torch.einsum("bijk,jkl->bli", a, b), (pick(1, 4), i, j, k), (j, k, pick(1, 9))


def conv1d() -> tuple[Op, Shape, Shape]:
    groups, width, stride, pad = pick(1, 3), pick(1, 5), pick(1, 3), pick(0, 2)
    inner = pick(1, 6)
    return (
        lambda a, b: F.conv1d(a, b, stride=stride, padding=pad, groups=groups),
        (pick(1, 4), groups * inner, pick(width, 20)),
        (groups * pick(1, 6), inner, width),
    )


def conv2d() -> tuple[Op, Shape, Shape]:
    groups, width, stride, pad = pick(1, 3), pick(1, 3), pick(1, 2), pick(0, 1)
    inner = pick(1, 6)
    return (
        lambda a, b: F.conv2d(a, b, stride=stride, padding=pad, groups=groups),
        (pick(1, 3), groups * inner, pick(width, 9), pick(width, 9)),
        (groups * pick(1, 6), inner, width, width),
    )


def conv_transpose2d() -> tuple[Op, Shape, Shape]:
    stride, inner = pick(1, 2), pick(1, 6)
    return (
        lambda a, b: F.conv_transpose2d(a, b, stride=stride),
        (pick(1, 3), inner, pick(1, 6), pick(1, 6)),
        (inner, pick(1, 6), pick(1, 3), pick(1, 3)),
    )


KINDS = (linear, matmul, vectors, bmm, einsum, conv1d, conv2d, conv_transpose2d)


class Product(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.op(a, b)


def products(op: Op, a: Tensor, b: Tensor, g: Tensor, policy: str) -> dict[str, Tensor]:
    model = Product(op)
    precision = Precision(model, policy=policy)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    out = model(a, b)
    da, db = torch.autograd.grad(out, (a, b), g)
    precision.remove()
    return {"fprop": out.detach(), "dgrad": da, "wgrad": db}


def ratios(kind: Callable[[], tuple[Op, Shape, Shape]], policy: str) -> Iterator[tuple[str, float, float]]:
    """(product, ratio of the recipe, ratio without any rounding) of one random case."""
    op, a_shape, b_shape = kind()
    # Scales whose results float16 can hold; operands and results in its subnormal range are among them.
    a, b = (torch.randn(shape) * 2.0 ** pick(-14, 1) for shape in (a_shape, b_shape))
    g = torch.randn(op(a, b).shape) * 2.0 ** pick(-14, 1)
    table = Policy.parse(policy)

    def fmt(role: str) -> str:
        found = table.format(Site("x", role))
        assert found is not None
        return found.name

    g_in = rounded(g, fmt("fprop.out")) if fmt("fprop.out") != "float32" else g
    want = three(
        op,
        {"fprop": rounded(a, fmt("fprop.a")), "dgrad": rounded(a, fmt("fprop.a")), "wgrad": rounded(a, fmt("wgrad.b"))},
        {"fprop": rounded(b, fmt("fprop.b")), "dgrad": rounded(b, fmt("dgrad.b")), "wgrad": rounded(b, fmt("fprop.b"))},
        {"dgrad": rounded(g_in, fmt("dgrad.a")), "wgrad": rounded(g_in, fmt("wgrad.a"))},
    )
    got, plain = products(op, a, b, g, policy), products(op, a, b, g, "fp32")
    for product in got:
        out = fmt(f"{product}.out")
        yield product, worst(got[product], *want[product], out), worst(plain[product], *want[product], out)


def main() -> None:
    hardware.measure = lambda device="cpu", *, fresh=False: EMULATES  # type: ignore[assignment]
    torch.manual_seed(0)
    random.seed(0)
    begin, rows, elements = time.perf_counter(), [], 0
    for policy in RECIPES:
        for kind in KINDS:
            found = [row for _ in range(CASES_EACH) for row in ratios(kind, policy)]
            row = {"policy": policy, "product": kind.__name__, "results": len(found)}
            for name in ("fprop", "dgrad", "wgrad"):
                row[f"worst_{name}"] = round(max(r for product, r, _ in found if product == name), 4)
            row["median_unrounded"] = round(statistics.median(r for *_, r in found), 1)
            rows.append(row)
            elements += len(found)
            print(*row.values(), sep="\t", flush=True)
    highest = max(row[f"worst_{name}"] for row in rows for name in ("fprop", "dgrad", "wgrad"))
    path = write_result(
        "exactness",
        {"results_compared": elements, "worst_ratio_to_bound": highest, "all_within_bound": highest <= 1,
         "seconds": round(time.perf_counter() - begin, 1), "rows": rows},
    )  # fmt: skip
    print(f"{elements} results, worst ratio to the bound {highest} → {path}")
    sys.exit(highest > 1)


if __name__ == "__main__":
    main()
