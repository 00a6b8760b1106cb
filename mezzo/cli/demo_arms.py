"""The demo's comparators: plain PyTorch float32, stock autocast, and autocast under `fast_cpu`.

python -m mezzo.cli.demo_arms CONFIG ARM STEPS      one arm alone in a process, for its peak memory and its speed;
                                                    prints one JSON line
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mezzo.models.gpt_torch import GPT
from mezzo.torch import Precision
from mezzo.train import memory
from mezzo.train.assemble import choose_device, make_optimizer, model_config, prepare_corpus
from mezzo.train.config import Config, load
from mezzo.train.schedule import learning_rate

ARMS = ("plain", "mezzo", "autocast", "fast_cpu")


def plain_loop(config: Config, batch_at: Any, model: GPT, device: torch.device, low: Any = None) -> Iterator[Any]:
    """An ordinary PyTorch loop: the same weights, batches, rates and clipping as mezzo's, and nothing of mezzo in it.

    low      a dtype for torch.autocast, or None for float32
    yields   (loss, seconds) after each step
    """
    t = config.train
    optimizer = make_optimizer(model, config)
    for step in range(t.steps):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps=t.steps, peak=t.lr, warmup=t.warmup, kind=t.schedule, min_lr=t.min_lr, decay=t.decay
            )
        x, y = (torch.from_numpy(a).to(device) for a in batch_at(step))
        with torch.autocast(device.type, low) if low is not None else nullcontext():
            loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        yield value, time.perf_counter() - begin


def run_alone(config: Config, arm: str, steps: int) -> dict[str, Any]:
    """Some steps of one arm: seconds a step (median, the first left out if there are more) and peak memory."""
    from mezzo.data.batches import Batches

    corpus = prepare_corpus(config)
    device = choose_device(config.train.device)
    shape = model_config(config, corpus)
    batches = Batches(corpus.train, batch=config.train.batch, seq_len=shape.seq_len, seed=config.train.seed)
    batches.batch_at(0)
    done = None
    if arm == "fast_cpu":
        from mezzo.torch import fast_cpu

        done = str(fast_cpu())
    memory.reset_peak(device)
    resting = memory.in_use(device)
    model = GPT(shape, generator=torch.Generator().manual_seed(config.train.seed)).to(device)
    times = []
    if arm == "mezzo":
        optimizer = make_optimizer(model, config)
        precision = Precision(model, optimizer, config.resolved_policy(), max_norm=config.train.clip)
        for step in range(steps):
            begin = time.perf_counter()
            x, y = (torch.from_numpy(a).to(device) for a in batches.batch_at(step))
            precision.backward(model(x, y))
            bool(precision.step().skipped)  # waits for the device
            times.append(time.perf_counter() - begin)
    else:
        low = torch.bfloat16 if arm in ("autocast", "fast_cpu") else None
        loop = plain_loop(config, batches.batch_at, model, device, low)
        times = [seconds for _, (_, seconds) in zip(range(steps), loop, strict=False)]
    return {
        "seconds": statistics.median(times[1:] or times),
        "memory": memory.peak(device) - resting,
        "note": done,
    }


if __name__ == "__main__":
    print(json.dumps(run_alone(load(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]))))
