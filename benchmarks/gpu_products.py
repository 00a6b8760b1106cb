"""Square products on one GPU under mezzo's routes: bf16, fp8 natively, MXFP8 and NVFP4 emulated.

    python benchmarks/gpu_products.py [--sizes 1024 2048 4096 8192 16384] [--device cuda]

A linear layer without bias, forward and backward (three products), with all its rounding: what a training step pays for
it. Policies in turn in each round; the figure is the ratio of medians to bf16's. `--device cpu --sizes 256` only shows
that the script works: it is no figure. Writes benchmarks/results/gpu_products.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import write_result
from torch import nn

from mezzo import hardware
from mezzo.torch import Precision

POLICIES = ("bf16", "fp8", "mxfp8", "nvfp4")


def arm(policy: str, size: int, device: str) -> tuple[Callable[[], None], str]:
    """(one forward and backward pass, the route of its operands)"""
    layer = nn.Sequential(nn.Linear(size, size, bias=False)).to(device)
    precision = Precision(layer, None, policy)
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(size, size, device=device)

    def run() -> None:
        layer(x).backward(g)
        x.grad = layer[0].weight.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    routes = {row.site: row.route for row in precision.sites(x)}
    return run, routes["0:fprop.a"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    kind, why = hardware.gpu_status()
    if options.device == "cuda" and kind != "cuda":
        raise SystemExit(f"no GPU: {why}; --device cpu --sizes 256 shows that the script works")
    rows = []
    for size in options.sizes:
        runs = {policy: arm(policy, size, options.device) for policy in POLICIES}
        seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for round_ in range(options.rounds + 3):
            for policy, (run, _) in runs.items():
                begin = time.perf_counter()
                run()
                if round_ >= 3:
                    seconds[policy].append(time.perf_counter() - begin)
        base = statistics.median(seconds["bf16"])
        for policy, (_, route) in runs.items():
            median = statistics.median(seconds[policy])
            rows.append({"size": size, "policy": policy, "route": route, "tflops": 6 * size**3 / median / 1e12,
                         "speed_over_bf16": base / median})  # fmt: skip
            print(f"{size:6} {policy:6} {route:9} {rows[-1]['tflops']:8.1f} TFLOP/s  {base / median:5.2f} × bf16")
    print(write_result("gpu_products", {"device": options.device, "rounds": options.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
