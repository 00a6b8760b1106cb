"""Does gpt-proof lose quality in bfloat16 or float16? Paired runs on the stdlib corpus, with a control arm.

    python benchmarks/quality.py [--steps 1000] [--seeds 8]

For each seed every arm starts from the same weights and sees the same batches in the same order. Arms: fp32; control
(fp32 with every gradient element multiplied by 1 + 1e-7·N(0, 1)); bf16; fp16. Held-out loss is evaluated in float32.
The figure is the paired relative gap to fp32 with its 90% interval, which is what two one-sided tests at 5% compare
with the margin, 0.25%, fixed here in advance (numerics.md, "Proof"; DeepSeek-V3, arXiv 2412.19437).

Restartable: finished runs are kept in runs/quality/. Two processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from math import sqrt
from pathlib import Path
from typing import Any

from common import write_result

ARMS = {"fp32": "fp32", "control": "fp32", "bf16": "bf16", "fp16": "fp16"}
MARGIN = 0.0025
PERTURBATION = 1e-7
KEPT = Path("runs/quality")


def one_run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm with one seed; the result is kept on disk and taken from there next time."""
    kept = KEPT / f"{arm}-{seed}-{steps}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    import torch

    torch.set_num_threads(1)
    from mezzo.data.batches import Batches, bits_per_byte, valid_batches
    from mezzo.models.gpt_torch import GPT
    from mezzo.torch import Precision
    from mezzo.train.config import load
    from mezzo.train.loop import evaluate
    from mezzo.train.schedule import learning_rate
    from mezzo.train.session import make_optimizer, model_config, prepare_corpus

    config = load(None, [f"train.steps={steps}", "train.batch=8"])
    t, corpus = config.train, prepare_corpus(config)
    shape = model_config(config, corpus)
    model = GPT(shape, generator=torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model, config)
    precision = Precision(model, optimizer, ARMS[arm], max_norm=t.clip)
    batches = Batches(corpus.train, batch=t.batch, seq_len=shape.seq_len, seed=seed)
    noise = torch.Generator().manual_seed(seed + 1000)
    begin, losses, skipped = time.perf_counter(), [], 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps=steps, peak=t.lr, warmup=t.warmup, kind=t.schedule, min_lr=t.min_lr, decay=t.decay
            )
        x, y = (torch.from_numpy(a) for a in batches.batch_at(step))
        loss = model(x, y)
        precision.backward(loss)
        if arm == "control":
            for p in model.parameters():
                p.grad.mul_(1 + PERTURBATION * torch.randn(p.shape, generator=noise))
        skipped += precision.step().skipped_now()
        losses.append(loss.item())
    valid = list(valid_batches(corpus.valid, t.batch, shape.seq_len))
    under, tokens = evaluate(model, iter(valid), torch.device("cpu"))
    with precision.using("fp32"):
        in_fp32, _ = evaluate(model, iter(valid), torch.device("cpu"))
    text_bytes = int(sum(corpus.tokenizer.byte_lengths()[y].sum() for _, y in valid))
    result = {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "val_loss_fp32": in_fp32,
        "val_loss_policy": under,
        "bits_per_byte": bits_per_byte(in_fp32, tokens, text_bytes),
        "train_loss_last_50": statistics.fmean(losses[-50:]),
        "skipped": skipped,
        "seconds": time.perf_counter() - begin,
        "corpus": corpus.sha256,
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".tmp")
    part.write_text(json.dumps(result))
    part.rename(kept)
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per arm: mean loss, and the paired relative gap to fp32 with its 90% interval and verdict."""
    from scipy.stats import t as student

    by = {(r["arm"], r["seed"]): r for r in runs}
    seeds = sorted({r["seed"] for r in runs})
    table = {}
    for arm in ARMS:
        mine = [by[arm, s] for s in seeds]
        row: dict[str, Any] = {
            "val_loss_fp32": statistics.fmean(r["val_loss_fp32"] for r in mine),
            "bits_per_byte": statistics.fmean(r["bits_per_byte"] for r in mine),
            "evaluation_gap": statistics.fmean(r["val_loss_policy"] / r["val_loss_fp32"] - 1 for r in mine),
            "skipped": sum(r["skipped"] for r in mine),
        }
        if arm != "fp32":
            gaps = [by[arm, s]["val_loss_fp32"] / by["fp32", s]["val_loss_fp32"] - 1 for s in seeds]
            mean, n = statistics.fmean(gaps), len(gaps)
            half = float(student.ppf(0.95, n - 1)) * statistics.stdev(gaps) / sqrt(n)
            low, high = mean - half, mean + half
            verdict = "equivalent" if max(-low, high) < MARGIN else "worse" if low > MARGIN else "not enough evidence"
            row |= {"gap": mean, "gap_90": [low, high], "gaps": gaps, "verdict": verdict}
        table[arm] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    jobs = [(arm, seed, args.steps) for seed in range(args.seeds) for arm in ARMS]
    with ProcessPoolExecutor(2) as pool:
        futures = [pool.submit(one_run, *job) for job in jobs]
        runs = []
        for future in futures:
            runs.append(future.result())
            r = runs[-1]
            what = f"{r['arm']} seed {r['seed']}: {r['val_loss_fp32']:.4f} ({r['seconds']:.0f} s)"
            print(f"{len(runs)}/{len(jobs)} {what}", file=sys.stderr, flush=True)
    table = summary(runs)
    about = {"model": "gpt-proof, batch 8, lr 3e-3 cosine", "margin": MARGIN, "steps": args.steps, "seeds": args.seeds}
    path = write_result("quality", {**about, "table": table, "runs": runs})
    for arm, row in table.items():
        gap = "" if arm == "fp32" else (
            f"  gap {row['gap']:+.4%} (90%: {row['gap_90'][0]:+.4%} … {row['gap_90'][1]:+.4%})  {row['verdict']}"
        )  # fmt: skip
        print(f"{arm:8} val loss {row['val_loss_fp32']:.4f}  bits/byte {row['bits_per_byte']:.4f}{gap}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
