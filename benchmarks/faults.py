"""Faults planted in a training, and whether the first record after each names its site.

    python benchmarks/faults.py

The faults of tests/observe/faults.py (overflow, all-zero tensors, exploding attention logits, NaN and Inf in
activations, weights and gradients) in a two-layer GPT that trains under `mezzo train`'s observer: each in both blocks,
under fp32, bf16, fp16 and fp8, eager and with activation checkpointing; compiled in one block under bf16 and fp16.
Named right means: the record of that step, or its sample for faults that are finite, names exactly the site. Writes
benchmarks/results/faults.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from common import write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "observe"))

from faults import FAULTS, MODES, try_fault


def main() -> None:
    torch.set_num_threads(1)
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            for fault in FAULTS:
                for policy in fault.policies:
                    for block in (0, 1):
                        if mode == "compiled" and (block == 0 or policy not in ("bf16", "fp16")):
                            continue
                        out = Path(folder) / f"{len(rows)}"
                        named, right = try_fault(Path(folder), out, fault, policy, mode, block)
                        row = {"fault": fault.name, "mode": mode, "policy": policy, "block": block,
                               "named": named, "right": right}  # fmt: skip
                        rows.append(row)
                        if named != right:
                            wrong.append(row)
                            print("WRONG", row, flush=True)
    per_mode = {
        mode: {
            "tried": sum(row["mode"] == mode for row in rows),
            "right": sum(row["mode"] == mode and row["named"] == row["right"] for row in rows),
        }
        for mode in MODES
    }
    print(f"{len(rows) - len(wrong)} of {len(rows)} named right", per_mode)
    found = {"tried": len(rows), "right": len(rows) - len(wrong), "modes": per_mode, "wrong": wrong}
    print(f"written to {write_result('faults', found)}")


if __name__ == "__main__":
    main()
