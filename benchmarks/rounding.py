"""How fast tensors are rounded on the CPU, as a share of what a plain copy of them takes.

    python benchmarks/rounding.py [--rounds 15] [--torch-rounds 3] [--elements 16777216] [--threads N] [--formats …]

Two implementations of `mezzo.torch.quantize`, float32 in and float32 out into a tensor that is there already: "helper",
the compiled one, and "torch", torch's own operations. In each round every arm runs once, right after a plain copy
`out.copy_(x)` of the same tensor; the share is the median time of those copies by the median time of the arm. Formats
scaled by the amax of the whole tensor (nvfp4 is one) must read it twice, all others once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from common import write_result
from torch import Tensor

from mezzo.formats import ScaledFormat, get_format
from mezzo.torch import helper
from mezzo.torch.quantize import quantize

TARGET_ELEMENTS, TARGET_BLOCKS = 0.80, 0.55
COLUMNS = 4096
SCALED = ("nvfp4", "nvfp4_16x16", "e4m3@tensor", "e4m3@row", "e4m3@1x128", "e4m3@128x128")
CASES = [
    *(
        (name, -1, "nearest")
        for name in ("bfloat16", "float16", "tf32", "e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "int8")
    ),
    *((name, -1, "nearest") for name in ("mxfp8_e4m3", "mxfp4", *SCALED)),
    ("mxfp8_e4m3", 0, "nearest"),
    ("e5m2", -1, "stochastic"),
    ("nvfp4", -1, "stochastic"),
]


@dataclass
class Arm:
    implementation: str
    name: str
    axis: int
    rounding: str
    seconds: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)

    def run(self, x: Tensor, out: Tensor) -> None:
        key = (1, 2, 3) if self.rounding == "stochastic" else None
        with helper.off() if self.implementation == "torch" else nullcontext():
            quantize(x, self.name, axis=self.axis, rounding=self.rounding, key=key, out=out)

    def row(self, count: int) -> dict[str, object]:
        scaled = isinstance(get_format(self.name), ScaledFormat)
        share = statistics.median(self.copies) / statistics.median(self.seconds)
        target = TARGET_BLOCKS if scaled else TARGET_ELEMENTS
        aimed = self.implementation == "helper" and self.rounding == "nearest"
        return {
            "implementation": self.implementation,
            "format": self.name,
            "axis": self.axis,
            "rounding": self.rounding,
            "rounds": len(self.seconds),
            "melem_per_second": count / statistics.median(self.seconds) / 1e6,
            "share_of_copy": share,
            "target": target if aimed else None,
            "met": share >= target if aimed else None,
        }


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--torch-rounds", type=int, default=3, help="torch's own operations take up to seconds a call")
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--formats", nargs="*", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_at_start = os.getloadavg()[0]

    x = torch.randn(options.elements // COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    cases = [case for case in CASES if not options.formats or case[0] in options.formats]
    implementations = ["helper", "torch"] if helper.load() is not None else ["torch"]
    print(helper.status())
    arms = [Arm(implementation, *case) for case in cases for implementation in implementations]
    rounds = {"helper": options.rounds, "torch": options.torch_rounds}
    for round_ in range(-1, max(rounds[name] for name in implementations)):  # the first round warms up
        for arm in arms:
            if round_ < rounds[arm.implementation]:
                copy, seconds = timed(lambda: out.copy_(x)), timed(lambda arm=arm: arm.run(x, out))
                if round_ >= 0:
                    arm.copies.append(copy)
                    arm.seconds.append(seconds)

    rows = [arm.row(x.numel()) for arm in arms]
    copies = [seconds for arm in arms for seconds in arm.copies]
    for row in rows:
        missed = "  below the target" if row["met"] is False else ""
        print(
            f"{row['implementation']:7} {row['format']:13} axis {row['axis']:2} {row['rounding']:11}"
            f"{row['melem_per_second']:8.0f} Melem/s {row['share_of_copy']:7.1%} of copy{missed}"
        )
    path = write_result(
        "rounding",
        {
            "helper": helper.status(),
            "load": {"at_start": load_at_start, "at_end": os.getloadavg()[0]},
            "elements": x.numel(),
            "shape": list(x.shape),
            "copy_melem_per_second": x.numel() / statistics.median(copies) / 1e6,
            "targets": {"elements": TARGET_ELEMENTS, "blocks": TARGET_BLOCKS},
            "results": rows,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
