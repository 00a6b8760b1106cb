"""Time and peak memory of a training step on a CPU: plain float32, mezzo, stock autocast, fast_cpu.

    python benchmarks/cpu_step.py [--rounds 12]

GPT of 4 layers, d 256, T 256, batch 16 (mezzo's own model: RMSNorm, RoPE, SwiGLU, vocabulary 4096), AdamW. "own" is a
user's own network of the same size, from torch.nn.TransformerEncoderLayer, LayerNorm and GELU. Every arm lives in its
own process; one step of each arm in turn, so that other load hits all; figures are ratios of medians. Stock autocast
takes minutes a step on a CPU without 16-bit units: it does one step a run at batch 1, projected to batch 16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from common import write_result

LAYERS, WIDTH, T, BATCH, VOCAB = 4, 256, 256, 16, 4096
ARMS = ["plain", "mezzo-fp32", "mezzo-bf16", "mezzo-fp16", "fast_cpu-bf16", "own-plain", "own-bf16"]


def own_network() -> Any:
    """A language model as a user might write it, with nothing of mezzo in it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.pos = nn.Parameter(torch.zeros(T, WIDTH))
            layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
            self.head = nn.Linear(WIDTH, VOCAB, bias=False)

        def forward(self, x: Any, y: Any) -> Any:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            h = self.blocks(self.embed(x) + self.pos, mask=mask, is_causal=True)
            return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())

    return Own()


def worker(arm: str) -> None:
    """Answer each line on standard input with one training step: its seconds and the peak memory so far."""
    import contextlib

    import torch

    from mezzo.models.gpt_torch import GPT
    from mezzo.models.shapes import GPTConfig
    from mezzo.torch import Precision, fast_cpu
    from mezzo.train import memory

    device = torch.device("cpu")
    kind, _, policy = arm.partition("-")
    batch = 1 if kind == "autocast" else BATCH
    if kind == "fast_cpu":
        print(fast_cpu(), file=sys.stderr)
    torch.manual_seed(0)
    idx = torch.randint(VOCAB, (batch, T + 1))
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    memory.reset_peak(device)
    resting = memory.in_use(device)
    if kind == "own":
        model = own_network()
    else:
        model = GPT(GPTConfig(vocab_size=VOCAB, layers=LAYERS, d_model=WIDTH, heads=4, seq_len=T))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    precision = Precision(model, optimizer, policy) if kind == "mezzo" or arm == "own-bf16" else None
    low = kind in ("autocast", "fast_cpu")
    for _ in sys.stdin:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            loss = model(x, y)
        if precision is not None:
            precision.backward(loss)
            precision.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "peak": memory.peak(device) - resting, "loss": loss.item()}), flush=True)


class Arm:
    """A worker process of one arm."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, __file__, "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.peak = 0
        self.loss = float("nan")

    def step(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.seconds.append(answer["seconds"])
        self.peak, self.loss = answer["peak"], answer["loss"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--worker")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    arms = [Arm(name) for name in ARMS]
    for round_ in range(args.rounds + 2):
        for arm in arms:
            arm.step()
        print(
            f"round {round_}: " + "  ".join(f"{a.name} {a.seconds[-1]:.2f}" for a in arms), file=sys.stderr, flush=True
        )
    stock = Arm("autocast-bf16")
    stock.step()
    arms[0].step()  # plain again, right beside it
    stock_seconds = stock.seconds[-1] * BATCH
    for arm in [*arms, stock]:
        arm.close()
    warm = {a.name: a.seconds[2:] for a in arms}
    median = {name: statistics.median(s) for name, s in warm.items()}
    base = {name: "own-plain" if name.startswith("own") else "plain" for name in median}
    rows = {
        a.name: {
            "median_seconds": median[a.name],
            "ratio_to_plain": median[a.name] / median[base[a.name]],
            "tokens_per_s": BATCH * T / median[a.name],
            "peak_bytes_above_resting": a.peak,
            "seconds": warm[a.name],
        }
        for a in arms
    }
    rows["mezzo-bf16"]["ratio_to_mezzo_fp32"] = median["mezzo-bf16"] / median["mezzo-fp32"]
    rows["autocast-bf16"] = {
        "projected_seconds": stock_seconds,
        "how": "one first step at batch 1, times 16",
        "ratio_to_plain": stock_seconds / median["plain"],
        "tokens_per_s": BATCH * T / stock_seconds,
        "fast_cpu_is_faster_by": stock_seconds / median["fast_cpu-bf16"],
    }
    model = f"GPT {LAYERS} layers, d {WIDTH}, T {T}, batch {BATCH}, vocabulary {VOCAB}"
    path = write_result("cpu_step", {"model": model, "rounds": args.rounds, "arms": rows})
    for name, row in rows.items():
        peak = row.get("peak_bytes_above_resting")
        memory = f"  {peak / 2**20:.0f} MiB" if peak else ""
        print(f"{name:15} {row['ratio_to_plain']:7.3f} × plain  {row['tokens_per_s']:7.0f} tok/s{memory}")
    print(f"mezzo bf16 over mezzo fp32: {rows['mezzo-bf16']['ratio_to_mezzo_fp32']:.3f}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
