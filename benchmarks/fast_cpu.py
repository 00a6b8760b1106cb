"""How long a training step takes with `mezzo.torch.fast_cpu()`, beside plain float32 and stock CPU autocast.

    python benchmarks/fast_cpu.py [--rounds 12] [--threads N] [--clock wall|cpu] [--out FILE.json]

The network is a GPT in plain PyTorch that knows nothing of mezzo: 4 layers, width 256, 4 heads, 256 tokens,
batch 16, vocabulary 4096, AdamW. In each round every arm takes one step, one after the other, so that what else the
machine does hits them alike; figures are medians over rounds, and ratios are medians of each round's own ratio.

Stock autocast is too slow to be run like that: it is timed at batch 1, in the same rounds, and projected to the full
batch as (forward + backward) x batch + optimizer. The JSON says "projected".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzo.torch.cpu16 import FastCpu, fast_cpu

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, VOCABULARY = 4, 256, 4, 256, 16, 4096
TARGET_FLOAT32, TARGET_STOCK = 1.20, 20.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, T, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Arm:
    """One way to train the network: its own copy, its own optimizer, and what surrounds a step."""

    def __init__(
        self, around: Callable[[], AbstractContextManager[object]], autocast: torch.dtype | None, module: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        self.model = Network().to(module)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.around, self.autocast = around, autocast
        self.losses: list[float] = []

    def step(self, ids: Tensor, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
        """Train on `ids`; seconds on `clock` of forward and backward, and of the optimizer."""
        with self.around():
            start = clock()
            with torch.autocast("cpu", self.autocast) if self.autocast else nullcontext():
                logits = self.model(ids[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            middle = clock()
            self.optimizer.step()
            self.optimizer.zero_grad()
            end = clock()
        self.losses.append(loss.item())
        return middle - start, end - middle


@contextmanager
def served() -> Iterator[FastCpu]:
    with fast_cpu(force=True) as report:
        yield report


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    wanted = {"avx2", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "avx_ne_convert"}
    return {
        "cpu": fields.get("model name", platform.processor()),
        "flags": sorted(wanted & set(fields.get("flags", "").split())),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fast_cpu.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]

    host = machine()
    slow = fast_cpu()
    print(slow)
    slow.undo()

    arms = {
        "float32": Arm(nullcontext, None, torch.float32),
        "fast_cpu_autocast_bfloat16": Arm(served, torch.bfloat16, torch.float32),
        "fast_cpu_autocast_float16": Arm(served, torch.float16, torch.float32),  # its speed; no loss scaling
        "fast_cpu_module_bfloat16": Arm(served, None, torch.bfloat16),
        "stock_autocast_bfloat16": Arm(nullcontext, torch.bfloat16, torch.float32),
    }
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(-1, options.rounds):  # the first round warms up
        ids = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
        for name, arm in arms.items():
            stock = name.startswith("stock")
            if stock and round_ % 4:
                continue  # one round in four is enough: a step at batch 1 takes seconds
            gradient, update = arm.step(ids[:1] if stock else ids, clock)
            if round_ >= 0:
                seconds[name].append((gradient * BATCH if stock else gradient) + update)
        print(f"round {round_}: " + "  ".join(f"{n} {s[-1]:.3f}" for n, s in seconds.items() if s), flush=True)

    def ratio(name: str, to: str) -> float:
        pairs = zip(seconds[name], seconds[to][:: 4 if name.startswith("stock") else 1], strict=True)
        return statistics.median(a / b for a, b in pairs)

    fast = "fast_cpu_autocast_bfloat16"
    to_float32 = {name: ratio(name, "float32") for name in arms}
    stock_to_fast = ratio("stock_autocast_bfloat16", fast)
    result = {
        "script": "benchmarks/fast_cpu.py",
        "machine": host | {"load_at_end": os.getloadavg()[0]},
        "network": {
            "layers": LAYERS,
            "width": WIDTH,
            "heads": HEADS,
            "context": CONTEXT,
            "batch": BATCH,
            "vocabulary": VOCABULARY,
        },
        "rounds": options.rounds,
        "clock": options.clock,
        "slowdown_of_a_product": {str(dtype): value for dtype, value in slow.slowdown.items()},
        "median_step_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "tokens_per_second": {name: BATCH * CONTEXT / statistics.median(times) for name, times in seconds.items()},
        "projected": {
            "stock_autocast_bfloat16": f"timed at batch 1 in {len(seconds['stock_autocast_bfloat16'])} rounds; "
            f"(forward + backward) x {BATCH} + optimizer"
        },
        "ratio_to_float32": to_float32,
        "stock_to_fast_cpu": stock_to_fast,
        "last_loss": {name: arm.losses[-1] for name, arm in arms.items() if not name.startswith("stock")},
        "targets": {
            f"fast_cpu <= {TARGET_FLOAT32} x float32": to_float32[fast] <= TARGET_FLOAT32,
            f"stock >= {TARGET_STOCK} x fast_cpu": stock_to_fast >= TARGET_STOCK,
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        json.dumps({k: result[k] for k in ("ratio_to_float32", "stock_to_fast_cpu", "last_loss", "targets")}, indent=2)
    )


if __name__ == "__main__":
    main()
