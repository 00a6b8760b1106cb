"""What do moments at rest in low precision do to training? gpt-proof on the stdlib corpus, products in float32.

    python benchmarks/moments.py [--steps 100] [--seeds 1] [--batch 4]

Only the rules for `state` differ between the arms; weights, batches and their order are the same. For each arm:
held-out loss in float32; the largest |m| / (sqrt(v) + eps) seen at rest after any tenth step, which is what an update
is multiplied with but for bias corrections (in exact arithmetic at most (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2));
and the bytes an element that weights and moments take between steps. The arms "v may be zero" are without the remedy:
there second moments in 8 bits may round to zero.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from common import write_result

ARMS = {
    "float32": "fp32",
    "bfloat16": "fp32; *:state=bfloat16",
    "bfloat16 stochastic": "fp32; *:state=bfloat16 stochastic",
    "m e4m3@1x128, v bfloat16 stochastic": "fp32; *:state=e4m3@1x128; *:state.exp_avg_sq=bfloat16 stochastic",
    "m int8@1x256, v bfloat16 stochastic": "fp32; *:state=int8@1x256; *:state.exp_avg_sq=bfloat16 stochastic",
    "m mxfp8, v bfloat16 stochastic": "fp32; *:state=mxfp8; *:state.exp_avg_sq=bfloat16 stochastic",
    "e4m3@1x128": "fp32; *:state=e4m3@1x128",
    "e4m3@1x128 stochastic": "fp32; *:state=e4m3@1x128 stochastic",
    "e4m3@1x128 stochastic, v may be zero": "fp32; *:state=e4m3@1x128 stochastic",
    "int8@1x256 stochastic": "fp32; *:state=int8@1x256 stochastic",
    "int8@1x256 stochastic, v may be zero": "fp32; *:state=int8@1x256 stochastic",
}
BETAS = {"0.95": (0.9, 0.95), "0.999": (0.9, 0.999)}


def one_run(arm: str, beta2: str, seed: int, steps: int, batch: int) -> dict[str, Any]:
    """Train one arm."""
    import torch

    torch.set_num_threads(1)
    from mezzo.data.batches import Batches, valid_batches
    from mezzo.errors import NonfiniteError
    from mezzo.models.gpt_torch import GPT
    from mezzo.torch import Precision, moments
    from mezzo.torch.compact import stored_bytes
    from mezzo.train.assemble import make_optimizer, model_config, prepare_corpus
    from mezzo.train.config import load
    from mezzo.train.schedule import learning_rate
    from mezzo.train.torch_steps import evaluate

    moments.NEVER_ZERO = () if arm.endswith("may be zero") else ("exp_avg_sq", "max_exp_avg_sq")
    config = load(None, [f"train.steps={steps}", f"train.batch={batch}"])
    t, corpus = config.train, prepare_corpus(config)
    shape = model_config(config, corpus)
    model = GPT(shape, generator=torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["betas"] = BETAS[beta2]
    precision = Precision(model, optimizer, ARMS[arm], max_norm=t.clip, seed=seed)
    batches = Batches(corpus.train, batch=t.batch, seq_len=shape.seq_len, seed=seed)
    largest = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps=steps, peak=t.lr, warmup=t.warmup, kind=t.schedule, min_lr=t.min_lr, decay=t.decay
            )
        x, y = (torch.from_numpy(a) for a in batches.batch_at(step))
        loss = model(x, y)
        precision.backward(loss)
        try:
            precision.step()
        except NonfiniteError:
            return {
                "arm": arm,
                "policy": ARMS[arm],
                "beta2": beta2,
                "seed": seed,
                "val_loss": "diverged",
                "steps": step,
            }
        if step % 10 == 9:
            for p in model.parameters():
                m, v = (at_rest(precision, optimizer, p, key) for key in ("exp_avg", "exp_avg_sq"))
                largest = max(largest, (m.abs() / (v.sqrt() + 1e-8)).max().item())
    valid = list(valid_batches(corpus.valid, t.batch, shape.seq_len, 16))
    in_fp32, _ = evaluate(model, iter(valid), torch.device("cpu"))
    count = sum(p.numel() for p in model.parameters())
    found = {key: value / count for key, value in stored_bytes(precision).items()}
    return {
        "arm": arm,
        "policy": ARMS[arm],
        "beta2": beta2,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "val_loss": in_fp32 if math.isfinite(in_fp32) else "diverged",
        "largest": largest,
        "bytes": found,
    }


def at_rest(precision: Any, optimizer: Any, p: Any, key: str) -> Any:
    """The moment as the next step will see it."""
    slot = precision.compact.slots.get(p)
    return optimizer.state[p][key] if slot is None else slot.moments[key].values(p)


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    jobs = [(arm, beta2, seed) for seed in range(given.seeds) for beta2 in BETAS for arm in ARMS]
    runs = []
    with ProcessPoolExecutor(given.workers) as pool:
        for run in pool.map(one_run, *zip(*jobs, strict=True), [given.steps] * len(jobs), [given.batch] * len(jobs)):
            runs.append(run)
            more = f"|m|/sqrt(v) {run['largest']:.4g}, {sum(run['bytes'].values()):.2f} bytes" if "bytes" in run else ""
            say(f"{run['arm']:40} b2 {run['beta2']:5} loss {run['val_loss']} {more}")
    bounds = {name: (1 - b1) / math.sqrt(1 - b2) / math.sqrt(1 - b1**2 / b2) for name, (b1, b2) in BETAS.items()}
    say(f"written to {write_result('moments', {'bounds': bounds, 'runs': runs})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
