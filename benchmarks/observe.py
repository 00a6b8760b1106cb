"""What measuring the sites costs a run: time, memory, and that it changes no loss.

    python benchmarks/observe.py [--steps 300] [--policies bf16 …] [--every 5]

gpt-proof (2 layers, d 128, T 128, batch 8) on the stdlib corpus as `mezzo train` trains it, three runs of each policy
side by side, one step of each in turn in random order, so that other load on the machine hits all: nothing observed;
the defaults (a sample every 50 steps, incidents watched for); and a sample every `--every` steps, for the cost of a
sampled step.
Figures: the ratio of medians of a sampled step, and of one between two samples, to one of the run that nobody
observes; the overhead of the defaults is the weighted sum of both, beside the plain ratio of whole times. Losses are
compared bit for bit. Memory: each arm alone in a process for 60 steps, its peak above resting, with glibc told to give
freed blocks back. Writes benchmarks/results/observe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from common import write_result

from mezzo.observe.listener import RunObserver
from mezzo.torch.observer import EVERY
from mezzo.train.assemble import prepare_corpus
from mezzo.train.config import Config, load
from mezzo.train.listeners import Listener
from mezzo.train.session import Session

WARM = 3


def config(policy: str, steps: int) -> Config:
    return load(None, ["model.preset=gpt-proof", f"train.steps={steps}", "train.eval_every=100000",
                       "train.checkpoint_every=100000", f"policy={policy}"])  # fmt: skip


def listener(every: int | None) -> Any:
    return Listener() if every is None else RunObserver(every)


def compare(policy: str, steps: int, every: int, folder: Path) -> dict[str, Any]:
    corpus = prepare_corpus(config(policy, steps))
    arms = {"off": None, "default": EVERY, "often": every}
    sessions = {
        name: Session.start(config(policy, steps), folder / f"{policy}-{name}", listener(often), corpus)
        for name, often in arms.items()
    }
    runs = {name: session.train() for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    order, random = list(runs.items()), Random(0)
    for _ in range(steps):
        random.shuffle(order)  # what runs after what must not count
        for name, run in order:
            begin = time.perf_counter()
            losses[name].append(next(run)["loss"])  # the observer's own work and its files included
            seconds[name].append(time.perf_counter() - begin)
    for run in runs.values():
        assert next(run, None) is None
    sampled = {name: [n == 1 or n % often == 0 for n in range(1, steps + 1)] for name, often in arms.items() if often}
    base = statistics.median(seconds["off"][WARM:])

    def ratio(name: str, of: bool) -> float:
        chosen = [s for s, is_one in list(zip(seconds[name], sampled[name], strict=True))[WARM:] if is_one is of]
        return statistics.median(chosen) / base

    step, between = ratio("often", True), ratio("default", False)
    return {
        "policy": policy,
        "step_ms": base * 1e3,
        "sampled_step": step,
        "step_between": between,
        "overhead": (step + (EVERY - 1) * between) / EVERY - 1,
        "overhead_whole": sum(seconds["default"][WARM:]) / sum(seconds["off"][WARM:]) - 1,
        "samples": sum(sampled["often"]),
        "losses_equal": losses["off"] == losses["default"] == losses["often"],
        "sample_bytes": len((folder / f"{policy}-default" / "sites.jsonl").read_bytes().splitlines()[0]),
    }


def alone(policy: str, every: int | None, folder: str) -> int:
    """Peak bytes above resting of 60 steps in this process."""
    c = config(policy, 60)
    session = Session.start(c, Path(folder) / "run", listener(every), prepare_corpus(c))
    peak = 0
    for record in session.train():
        peak = max(peak, record["memory"])
    return peak


def memory(policy: str, every: int | None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--alone", json.dumps([policy, every, folder])]
        # glibc then gives each large block back at once: the peak is that of what is alive, not of what it keeps.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--policies", nargs="*", default=["fp32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4"])
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(alone(*json.loads(options.alone)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for policy in options.policies:
            row = compare(policy, options.steps, options.every, Path(folder))
            peaks = {name: [memory(policy, every) for _ in range(3)] for name, every in (("off", None), ("on", EVERY))}
            off, on = (statistics.median(peaks[name]) for name in ("off", "on"))
            rows.append(row | {"memory_off": off, "memory_on": on, "memory_more": on / off - 1})
            print(json.dumps(rows[-1]), flush=True)
    print(f"\nwritten to {write_result('observe', {'rows': rows, 'steps': options.steps, 'every': options.every})}")


if __name__ == "__main__":
    main()
