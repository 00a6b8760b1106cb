"""Does gpt-proof lose quality under a recipe? Paired runs on the stdlib corpus, with a control arm.

    python benchmarks/quality.py [--steps 1000] [--seeds N] [--arms …] [--minutes M]

For each seed every arm starts from the same weights and sees the same batches in the same order. Arms: fp32; control
(fp32 with every gradient element multiplied by 1 + 1e-7·N(0, 1)); every recipe; and some recipes without the remedy
that they are known for. Held-out loss is evaluated in float32. The figure is the paired relative gap to fp32 with its
90% interval, which is what two one-sided tests at 5% compare with the margin, 0.25%, fixed here in advance
(numerics.md, "Proof"; DeepSeek-V3, arXiv 2412.19437). Eight seeds for the headline recipes, three for the others. fp8
and mxfp8, undecided after 8, went on to 16: the verdict is that of the first 8, planned; all 16 are shown beside it.

All formats below 32 bits take the emulated route, whatever the machine, so that runs of different machines agree but
for the order of float32 sums. Restartable: each finished run is a line of benchmarks/results/quality-runs.jsonl, and
pairs are made only of runs of one machine type and one version of torch. Two processes of one thread each.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import platform
import statistics
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from common import RESULTS, commit, write_result

from mezzo.policy import Policy, Site
from mezzo.policy.phases import named
from mezzo.proof.statistics import Plan, seeds_to_settle
from mezzo.proof.statistics import find as verdict_of

MARGIN = 0.0025
PERTURBATION = 1e-7
KEPT = RESULTS / "quality-runs.jsonl"
OPERANDS = ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b")


@dataclass(frozen=True)
class Arm:
    policy: str
    seeds: int = 3
    more: int = 0  # seeds in all, where a look at `seeds` was followed by others: they decide nothing
    perturbed: bool = False
    phase: str = ""  # a named schedule of phases, of which `policy` is the low one


def _everywhere(fmt: str) -> str:
    """Rules that give all operands of all products but the head's one format."""
    head = [f"head:{name}=bfloat16" for name in ("input", "weight", "grad_output")]
    return "; ".join(["bf16", *(f"*:{role}={fmt}" for role in OPERANDS), *head])


ARMS = {
    "fp32": Arm("fp32", 8, more=16),
    "control": Arm("fp32", 8, perturbed=True),
    **{name: Arm(name, 8) for name in ("bf16", "fp16", "nvfp4")},
    **{name: Arm(name, 8, more=16) for name in ("fp8", "mxfp8")},
    **{name: Arm(name) for name in ("fp64", "tf32", "bf16-pure", "bf16-pure-kahan", "bf16-pure-split", "fp8-row",
                                    "fp8-block", "mxfp4")},
    "fp8 delayed": Arm("; ".join(["fp8", *(f"*:{role}={fmt}@tensor delayed" for role, fmt in zip(
        OPERANDS, ("e4m3", "e4m3", "e5m2", "e4m3", "e5m2", "e4m3"), strict=True)),
        *(f"head:{name}=bfloat16" for name in ("input", "weight", "grad_output"))])),
    "fp8, activations in 8 bits": Arm("fp8; *:saved=mxfp8; (model):saved=bfloat16"),
    "nvfp4, bf16-finish": Arm("nvfp4", 8, phase="bf16-finish"),
    "nvfp4, dmp": Arm("nvfp4", 8, phase="dmp"),
    "fp16 without loss scaling": Arm("fp16; loss_scale=none"),
    "bf16-pure to nearest": Arm("bf16-pure; *:master=bfloat16; *:state=bfloat16"),
    "mxfp8, floor rule": Arm(_everywhere("mxfp8_e4m3+floor")),
    "mxfp4, floor rule": Arm(_everywhere("mxfp4+floor")),
    "mxfp4 without remedies": Arm(_everywhere("mxfp4")),
}  # fmt: skip


def one_run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm with one seed."""
    import torch

    torch.set_num_threads(1)
    from mezzo import hardware
    from mezzo.data.batches import Batches, bits_per_byte, valid_batches
    from mezzo.hardware import Hardware
    from mezzo.models.gpt_torch import GPT
    from mezzo.torch import Phases, Precision
    from mezzo.train.assemble import make_optimizer, model_config, prepare_corpus
    from mezzo.train.config import load
    from mezzo.train.schedule import learning_rate
    from mezzo.train.torch_steps import evaluate

    config = load(None, [f"train.steps={steps}", "train.batch=8"])
    t, corpus = config.train, prepare_corpus(config)
    shape = model_config(config, corpus)
    model = GPT(shape, generator=torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model, config)
    emulates = Hardware("cpu", "emulates", {"float32": 1.0}, 1.0, "quality")
    hardware.measure = lambda *_, **__: emulates
    precision = Precision(model, optimizer, ARMS[arm].policy, max_norm=t.clip, seed=seed)
    batches = Batches(corpus.train, batch=t.batch, seq_len=shape.seq_len, seed=seed)
    phases = Phases(precision, ARMS[arm].phase, steps) if ARMS[arm].phase else None
    noise = torch.Generator().manual_seed(seed + 1000)
    begin, losses, skipped = time.perf_counter(), [], 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (1.0 if phases is None else phases.lr) * learning_rate(
                step, steps=steps, peak=t.lr, warmup=t.warmup, kind=t.schedule, min_lr=t.min_lr, decay=t.decay
            )
        x, y = (torch.from_numpy(a) for a in batches.batch_at(step))
        loss = model(x, y)
        precision.backward(loss)
        if ARMS[arm].perturbed:
            for p in model.parameters():
                p.grad.mul_(1 + PERTURBATION * torch.randn(p.shape, generator=noise))
        done = precision.step()
        skipped += done.skipped_now()
        if phases is not None:
            phases.after({"step": step + 1, "skipped": done.skipped_now(), "loss_scale": float(done.loss_scale)})
        losses.append(loss.item())
    valid = list(valid_batches(corpus.valid, t.batch, shape.seq_len))
    under, tokens = evaluate(model, iter(valid), torch.device("cpu"))
    with precision.using("fp32"):
        in_fp32, _ = evaluate(model, iter(valid), torch.device("cpu"))
    text_bytes = int(sum(corpus.tokenizer.byte_lengths()[y].sum() for _, y in valid))
    return {
        "arm": arm,
        "policy": ARMS[arm].policy,
        "table": table_of(ARMS[arm].policy, ARMS[arm].phase),
        "seed": seed,
        "steps": steps,
        "val_loss_fp32": in_fp32,
        "val_loss_policy": under,
        "bits_per_byte": bits_per_byte(in_fp32, tokens, text_bytes),
        "train_loss_last_50": statistics.fmean(losses[-50:]),
        "skipped": skipped,
        "seconds": time.perf_counter() - begin,
        "corpus": corpus.sha256,
        "commit": commit(),
        **where(),
    }


@functools.cache
def table_of(policy: str, phase: str = "") -> str:
    """A hash of what a policy gives each site of gpt-proof, however its rules are written, and of its loss scaling.

    phase    a schedule of phases: the hash is of all their tables
    """
    if phase:
        parts = [f"{table_of(str(one.policy))} {one.until} {one.lr}" for one in named(phase, Policy.parse(policy))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    from mezzo.models.gpt_torch import GPT
    from mezzo.models.shapes import preset
    from mezzo.policy.policy import find
    from mezzo.policy.site import ROLES

    paths = [path or "(model)" for path, _ in GPT(preset("gpt-proof")).named_modules()]
    found = Policy.parse(policy)
    rules = found.rules_for(paths)
    given = {(path, role): find(rules, Site(path, role)) for path in paths for role in ROLES}
    # A role that is younger than the first runs counts only where a rule speaks of it.
    lines = [f"{path}:{role}={spec}" for (path, role), spec in given.items() if spec is not None or role != "saved"]
    return hashlib.sha256("\n".join([*lines, str(found.loss_scaling)]).encode()).hexdigest()[:12]


def where() -> dict[str, str]:
    """What runs must share to be paired."""
    import torch

    from mezzo import hardware

    sets = hardware.instruction_sets() or {}
    return {
        "machine": f"{platform.machine()}, {hardware.processor()}, {' '.join(n for n, there in sets.items() if there)}",
        "torch": torch.__version__,
    }


def kept(steps: int) -> list[dict[str, Any]]:
    """Finished runs of this machine type, one an arm and seed; those of a table that has changed do not count."""
    if not KEPT.exists():
        return []
    runs = {}
    for line in KEPT.read_text().splitlines():
        run = json.loads(line)
        arm = ARMS.get(run["arm"])
        if (
            arm is not None
            and run.get("table") == table_of(arm.policy, arm.phase)
            and run["steps"] == steps
            and where().items() <= run.items()
        ):
            runs[run["arm"], run["seed"]] = run
    return list(runs.values())


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per arm: mean loss, and the paired relative gap to fp32 with its 90% interval and verdict."""
    by = {(r["arm"], r["seed"]): r for r in runs}
    table = {}
    for arm in ARMS:
        seeds = sorted(s for a, s in by if a == arm and ("fp32", s) in by)
        if not seeds:
            continue
        mine = [by[arm, s] for s in seeds[: ARMS[arm].seeds]]
        row: dict[str, Any] = {
            "policy": ARMS[arm].policy,
            "seeds": min(len(seeds), ARMS[arm].seeds),
            "seeds_in_all": len(seeds),
            "val_loss_fp32": statistics.fmean(r["val_loss_fp32"] for r in mine),
            "bits_per_byte": statistics.fmean(r["bits_per_byte"] for r in mine),
            "evaluation_gap": statistics.fmean(r["val_loss_policy"] / r["val_loss_fp32"] - 1 for r in mine),
            "skipped": sum(r["skipped"] for r in mine),
        }
        if arm != "fp32" and len(seeds) > 1:
            gaps = [by[arm, s]["val_loss_fp32"] / by["fp32", s]["val_loss_fp32"] - 1 for s in seeds]
            planned = gaps[: ARMS[arm].seeds]
            found = verdict_of(planned, Plan.of(len(planned), MARGIN, looks=[len(planned)]))
            # What more seeds say is shown beside it: a verdict after a look that spent all of alpha would be none.
            later = verdict_of(gaps, Plan.of(len(gaps), MARGIN, looks=[len(gaps)]))
            ratios = [by[arm, s]["seconds"] / by["fp32", s]["seconds"] for s in seeds]
            row |= {
                "gap": found.gap,
                "interval": [found.low, found.high],
                "gaps": gaps,
                "verdict": found.verdict,
                "settled_by": 0 if found.more == 0 else seeds_to_settle(later.gap, later.sd, MARGIN),
                "all_seeds": {"gap": later.gap, "interval": [later.low, later.high]},
                "seconds_over_fp32": statistics.median(ratios),
            }
        table[arm] = row
    return table


def train(jobs: list[tuple[str, int, int]], until: float) -> None:
    """Run the jobs, two at a time; none is begun after `until`."""
    waiting, done = list(jobs), 0
    with ProcessPoolExecutor(2) as pool:
        running = {pool.submit(one_run, *waiting.pop(0)) for _ in range(min(2, len(waiting)))}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                run = future.result()
                with KEPT.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                done += 1
                what = f"{run['arm']} seed {run['seed']}: {run['val_loss_fp32']:.4f} ({run['seconds']:.0f} s)"
                print(f"{done}/{len(jobs)} {what}", file=sys.stderr, flush=True)
                if waiting and time.monotonic() < until:
                    running.add(pool.submit(one_run, *waiting.pop(0)))
    if waiting:
        print(f"time is up: {len(waiting)} runs left; the same command goes on", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, help="at most so many seeds an arm")
    parser.add_argument("--arms", nargs="*", default=[*ARMS], help="only these")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many minutes")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    have = {(r["arm"], r["seed"]) for r in kept(args.steps)}
    wanted = {name: max(arm.seeds, arm.more) for name, arm in ARMS.items()}
    most = args.seeds or max(wanted.values())
    jobs = [(arm, seed, args.steps) for seed in range(most) for arm in args.arms if seed < wanted[arm]]
    train([job for job in jobs if job[:2] not in have], until)
    runs = kept(args.steps)
    table = summary(runs)
    about = {"model": "gpt-proof, batch 8, lr 3e-3 cosine", "margin": MARGIN, "steps": args.steps,
             "routes": "emulated"}  # fmt: skip
    path = write_result("quality", {**about, "table": table, "runs": runs})
    for arm, row in table.items():
        gap = (
            f"  gap {row['gap']:+.4%} ({row['interval'][0]:+.4%} … {row['interval'][1]:+.4%})  {row['verdict']}"
            + f" ({row['settled_by']} seeds would settle it)" * (row["settled_by"] != 0)
            if "gap" in row
            else ""
        )
        print(f"{arm:26} {row['seeds']} seeds  val loss {row['val_loss_fp32']:.4f}  "
              f"bits/byte {row['bits_per_byte']:.4f}{gap}")  # fmt: skip
    print(f"written to {path}")


if __name__ == "__main__":
    main()
