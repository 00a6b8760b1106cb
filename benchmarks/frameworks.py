"""Are three frameworks one? The conformance kit counted, one training step compared, and whole runs side by side.

    python benchmarks/frameworks.py kit
    python benchmarks/frameworks.py step [--policies …]
    python benchmarks/frameworks.py runs [--policies …] [--frameworks …] [--seeds N] [--minutes M]

kit   Every case of tests/conformance that an adapter answers: how many agree, and the worst deviation of a product as a
      multiple of its derived bound.
step  gpt-proof, one step from the same weights (PyTorch's) on the same batch: of the operands of every linear layer's
      products, the share whose rounded value is another than PyTorch's ("flips": apart by more than half a step of the
      format, so a scale's last bit is none), at the first product and at all, and how far the gradients are apart. One
      flip moves all sums that it enters, so flips grow along the step. Once under the policy itself, where PyTorch has
      16-bit activations between products and the others float32 ones, and once with *:fprop.out=float32, where all
      have float32 ones.
runs  gpt-proof, 1,000 steps on the stdlib corpus, the same initial weights (PyTorch's of that seed), batches and
      schedule: held-out loss in float32 against PyTorch's run of the same policy and seed, which benchmarks/quality.py
      made, beside that script's control ensemble (float32 against float32 perturbed by 1e-7), and beside what
      PyTorch's own runs of that policy scatter by (standard deviation of their paired gaps to float32): once operands
      are rounded, runs part much faster. Restartable; each run is a line of benchmarks/results/frameworks-runs.jsonl.

All formats below 32 bits take the emulated route. Each part writes its own results/frameworks-PART.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import RESULTS, commit, write_result

KEPT = RESULTS / "frameworks-runs.jsonl"
POLICIES = ("fp32", "bf16", "fp16", "fp8", "nvfp4")
OTHERS = ("jax", "tensorflow")
OPERANDS = ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b")


def one_thread() -> None:
    """Before any framework is imported."""
    os.environ.update(OMP_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="2", TF_NUM_INTRAOP_THREADS="1",
                      TF_NUM_INTEROP_THREADS="1", KERAS_BACKEND="tensorflow")  # fmt: skip
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def emulate_everything() -> None:
    """Whatever the machine has, PyTorch too rounds operands and multiplies in float32."""
    import torch

    from mezzo import hardware

    torch.set_num_threads(1)
    emulates = hardware.Hardware("cpu", "emulates", {"float32": 1.0}, 1.0, "frameworks")
    hardware.measure = lambda *_, **__: emulates


def config_of(framework: str, policy: str, seed: int, steps: int) -> Any:
    from mezzo.train.config import load

    given = [f"train.framework={framework}", f"policy={policy}", f"train.seed={seed}", f"train.steps={steps}",
             "train.batch=8", "observe.every=0", "train.device=cpu"]  # fmt: skip
    return load(None, given)


def first_weights(seed: int, config: Any, shape: Any) -> Any:
    """(groups, meta) of a PyTorch run before its first step, as a checkpoint has them."""
    import torch

    from mezzo.models.gpt_torch import GPT
    from mezzo.models.shapes import parameter_shapes
    from mezzo.policy import Policy
    from mezzo.train import adamw_state
    from mezzo.train.scale_state import Scales

    model = GPT(shape, generator=torch.Generator().manual_seed(seed))
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    options = adamw_state.Options(config.train.betas, config.train.weight_decay)
    zeros = {name: 0 * w for name, w in weights.items()}
    moments = adamw_state.AdamW(0, zeros, zeros, begun=False)
    optimizer, meta = adamw_state.to_disk(parameter_shapes(shape), moments, options, config.train.lr)
    policy = config.resolved_policy()
    groups = {"model": weights, "optimizer": optimizer, "precision": Scales.begin(Policy.of(policy)).to_disk()}
    return groups, {"optimizer": meta, "policy": str(policy)}


# --- runs ---


def one_run(framework: str, policy: str, seed: int, steps: int) -> dict[str, Any]:
    one_thread()
    from mezzo.data.batches import Batches, valid_batches
    from mezzo.train.assemble import model_config, prepare_corpus
    from mezzo.train.frameworks import make_engine
    from mezzo.train.schedule import learning_rate

    config = config_of(framework, policy, seed, steps)
    t, corpus = config.train, prepare_corpus(config)
    shape = model_config(config, corpus)
    engine = make_engine(config, shape)
    engine.ready()
    groups, meta = first_weights(seed, config, shape)
    engine.load(groups.__getitem__, list(groups), meta)
    batches = Batches(corpus.train, batch=t.batch, seq_len=shape.seq_len, seed=seed)
    begin, skipped, losses = time.perf_counter(), 0, []
    for step in range(steps):
        rate = learning_rate(
            step, steps=steps, peak=t.lr, warmup=t.warmup, kind=t.schedule, min_lr=t.min_lr, decay=t.decay
        )
        outcome = engine.step([batches.batch_at(step)], rate)
        skipped += outcome.skipped
        losses.append(outcome.loss)
    valid = list(valid_batches(corpus.valid, t.batch, shape.seq_len))
    in_fp32, _ = engine.evaluate(valid, "fp32")
    under, _ = engine.evaluate(valid)
    return {
        "framework": framework, "policy": policy, "seed": seed, "steps": steps, "val_loss_fp32": in_fp32,
        "val_loss_policy": under, "train_loss_last_50": statistics.fmean(losses[-50:]), "skipped": skipped,
        "seconds": time.perf_counter() - begin, "corpus": corpus.sha256, "commit": commit(),
        "versions": {k: v for k, v in engine.environment({}).items() if k in ("jax", "tensorflow", "keras")},
    }  # fmt: skip


def of_torch(steps: int) -> dict[tuple[str, int], dict[str, Any]]:
    """PyTorch's runs, and the control's, by (arm, seed): those of the machine type that quality.json was made on."""
    data = json.loads((RESULTS / "quality.json").read_text())
    return {(run["arm"], run["seed"]): run for run in data["runs"] if run["steps"] == steps}


def runs(args: argparse.Namespace) -> None:
    steps, until = args.steps, time.monotonic() + 60 * args.minutes
    done: dict[Any, dict[str, Any]] = {}
    if KEPT.exists():
        for line in KEPT.read_text().splitlines():
            run = json.loads(line)
            if run["steps"] == steps:
                done[run["framework"], run["policy"], run["seed"]] = run
    wanted = [(f, p, s, steps) for s in range(args.seeds) for p in args.policies for f in args.frameworks]
    waiting = [job for job in wanted if job[:3] not in done]
    # A fresh process for each run: XLA keeps what it compiled.
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(one_run, *waiting.pop(0)) for _ in range(min(args.workers, len(waiting)))}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                run = future.result()
                done[run["framework"], run["policy"], run["seed"]] = run
                with KEPT.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                print(f"{run['framework']} {run['policy']} seed {run['seed']}: {run['val_loss_fp32']:.4f} "
                      f"({run['seconds']:.0f} s)", file=sys.stderr, flush=True)  # fmt: skip
                if waiting and time.monotonic() < until:
                    running.add(pool.submit(one_run, *waiting.pop(0)))
    theirs = of_torch(steps)
    control = [theirs["control", s]["val_loss_fp32"] / theirs["fp32", s]["val_loss_fp32"] - 1
               for arm, s in theirs if arm == "control" and ("fp32", s) in theirs]  # fmt: skip
    arms = json.loads((RESULTS / "quality.json").read_text())["table"]
    scatter = {name: statistics.stdev(arm["gaps"]) for name, arm in arms.items() if len(arm.get("gaps", [])) > 1}
    scatter["fp32"] = statistics.stdev(control)
    table = []
    for (framework, policy, seed), run in sorted(done.items()):
        torchs = theirs.get((policy, seed))
        gap = run["val_loss_fp32"] / torchs["val_loss_fp32"] - 1 if torchs else None
        table.append({"framework": framework, "policy": policy, "seed": seed, "val_loss_fp32": run["val_loss_fp32"],
                      "torch": torchs and torchs["val_loss_fp32"], "gap": gap, "scatter": scatter.get(policy),
                      "skipped": run["skipped"],
                      "seconds": run["seconds"]})  # fmt: skip
    # What a policy's runs of several seeds differ by, pair by pair of frameworks, beside what a perturbation does.
    about = {"model": "gpt-proof, batch 8, lr 3e-3 cosine", "steps": steps, "routes": "emulated",
             "control_gaps": control, "control_spread": statistics.stdev(control)}  # fmt: skip
    path = write_result("frameworks-runs", {**about, "table": table, "runs": list(done.values())})
    print(f"control ensemble: {min(control):+.3%} … {max(control):+.3%}, deviation {statistics.stdev(control):.3%}")
    for row in table:
        gap = "" if row["gap"] is None else f"  torch {row['torch']:.4f}  gap {row['gap']:+.3%}"
        gap += "" if row["scatter"] is None else f"  (scatter {row['scatter']:.3%})"
        print(f"{row['framework']:11} {row['policy']:6} seed {row['seed']}  {row['val_loss_fp32']:.4f}{gap}")
    print(f"written to {path}")


# --- one step ---


def operands_of(framework: str, policy: str, weights: Any, shape: Any, batch: Any) -> tuple[Any, Any]:
    """(site → rounded operand as an array, parameter → gradient) of one step's forward and backward pass."""
    import numpy as np

    found: dict[str, Any] = {}

    def keep(site: Any, after: Any) -> None:
        if site.role in OPERANDS and str(site) not in found:
            found[str(site)] = np.asarray(after, np.float64)

    x, y = batch
    if framework == "torch":
        import torch

        from mezzo.models.gpt_torch import GPT
        from mezzo.torch import Precision

        model = GPT(shape)
        model.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()})
        precision = Precision(model, torch.optim.SGD(model.parameters(), 0.0), policy)
        with precision.tap(lambda site, before, after: keep(site, after.detach().float().numpy())):
            precision.backward(model(torch.from_numpy(x), torch.from_numpy(y)))
        scale = float(precision.scales.loss.scale)
        return found, {name: p.grad.numpy() / scale for name, p in model.named_parameters()}
    if framework == "jax":
        import jax
        import jax.numpy as jnp

        import mezzo.jax
        from mezzo.models import gpt_jax

        precision = mezzo.jax.Precision(policy)
        params = {name: jnp.asarray(w) for name, w in weights.items()}

        def loss(params: Any) -> Any:
            return precision.run(lambda p, x, y: gpt_jax.loss(p, x, y, shape), 0, (params, x, y), {}, precision.init(),
                                 lambda told, raw, before, after: keep(told.site, after))[0]  # fmt: skip

        grads = jax.block_until_ready(jax.jit(jax.grad(loss))(params))
        jax.effects_barrier()
        return found, {name: np.asarray(g) for name, g in grads.items()}
    import tensorflow as tf

    import mezzo.keras
    from mezzo.models import gpt_keras

    model = gpt_keras.GPT(shape)
    gpt_keras.load_parameters(model, weights)
    precision = mezzo.keras.Precision(model, policy)
    scale = 1.0 if precision.policy.loss_scaling is None else precision.policy.loss_scaling.init
    with precision.tap(lambda site, before, after: keep(site, after)), tf.GradientTape() as tape:
        loss = model.mean_loss(x, y) * scale
        variables = gpt_keras.parameters(model)
        grads = tape.gradient(loss, [v.value for v in variables.values()])
    arrays = {}
    for (name, _), g in zip(variables.items(), grads, strict=True):
        array = tf.convert_to_tensor(g).numpy() / scale
        arrays[name] = array if array.shape == weights[name].shape else array.T
        if name not in ("embed.weight", "pos.weight") and array.ndim == 2:
            arrays[name] = array.T  # a Dense's kernel is (in, out)
    return found, arrays


def half_step(policy: str, site: str) -> float:
    """Half of the distance between two neighbours in a site's format, relative to them."""
    from mezzo.policy import Policy, Site

    path, _, role = site.rpartition(":")
    spec = Policy.parse(policy).spec(Site(path, role))
    fmt = spec.fmt if spec else None
    bits = 23 if fmt is None else getattr(fmt, "element", fmt).mantissa_bits
    return float(2.0 ** -(min(bits, 12) + 2))  # of float32, 2^-14: what a sum in another order may do


def step(args: argparse.Namespace) -> None:
    one_thread()
    import numpy as np

    from mezzo.data.batches import Batches
    from mezzo.train.assemble import model_config, prepare_corpus

    emulate_everything()
    config = config_of("torch", "fp32", 0, 10)
    corpus = prepare_corpus(config)
    shape = model_config(config, corpus)
    weights = first_weights(0, config, shape)[0]["model"]
    batch = Batches(corpus.train, batch=8, seq_len=shape.seq_len, seed=0).batch_at(0)
    table = []
    for policy in [f"{p}{more}" for p in args.policies for more in ("", "; *:fprop.out=float32")]:
        theirs, their_grads = operands_of("torch", policy, weights, shape, batch)
        for framework in args.frameworks:
            ours, grads = operands_of(framework, policy, weights, shape, batch)
            both = [site for site in theirs if site in ours and theirs[site].size == ours[site].size]
            flips, elements, first, worst = 0, 0, 0.0, ("", 0.0)
            for site in both:
                a, b = theirs[site], ours[site]
                # A Dense's kernel is (in, out): of a square one only its values tell.
                ways = [one for one in (a, a.T) if one.shape == b.shape] or [a.reshape(b.shape)]
                step_ = half_step(policy, site)
                differ = min(int((np.abs(o - b) > step_ * np.maximum(np.abs(o), np.abs(b))).sum()) for o in ways)
                first = differ / a.size if site == both[0] else first
                flips, elements = flips + differ, elements + a.size
                if differ / a.size > worst[1]:
                    worst = (site, differ / a.size)
            apart = max(
                float(np.abs(g - their_grads[n]).max() / max(np.abs(their_grads[n]).max(), 1e-30))
                for n, g in grads.items()
            )
            row = {"policy": policy, "framework": framework, "sites": len(both), "operands": elements, "flips": flips,
                   "share": flips / max(elements, 1), "first_product": first, "worst_site": worst[0],
                   "worst_share": worst[1], "gradient_difference": apart}  # fmt: skip
            table.append(row)
            print(
                f"{policy:30} {framework:11} {len(both):3} sites  {flips:9,} of {elements:,} operands flip "
                f"({row['share']:.4%}; first {first:.4%}, worst {worst[0]} {worst[1]:.2%})  gradients {apart:.2e}",
                flush=True,
            )
    about = {"model": "gpt-proof, batch 8, first step", "against": "torch", "routes": "emulated"}
    print(f"written to {write_result('frameworks-step', {**about, 'table': table})}")


# --- the kit ---


def kit(args: argparse.Namespace) -> None:
    one_thread()
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "conformance"))
    import checks  # type: ignore[import-not-found]
    import numpy as np
    from jax_adapter import JaxAdapter  # type: ignore[import-not-found]
    from keras_adapter import KerasAdapter  # type: ignore[import-not-found]
    from numpy_adapter import NumpyAdapter  # type: ignore[import-not-found]
    from torch_adapter import TorchAdapter  # type: ignore[import-not-found]

    table = []
    for adapter in (NumpyAdapter(), TorchAdapter(), JaxAdapter(), KerasAdapter()):
        for family, (name, check) in checks.FAMILIES.items():
            if family in adapter.lacks:
                continue
            cases = checks.load(name)
            agreed, worst = 0, 0.0
            for case in cases:
                try:
                    check(adapter, case)
                    agreed += 1
                except AssertionError as error:
                    print(f"{adapter.name}, {family}: {str(error)[:200]}", file=sys.stderr)
                if family == "products":
                    worst = max(worst, deviation(adapter, case, checks, np))
            row = {"adapter": adapter.name, "family": family, "cases": len(cases), "agreed": agreed}
            if family == "products":
                row["worst_share_of_bound"] = worst
            table.append(row)
            print(row, flush=True)
    total, agreed = sum(r["cases"] for r in table), sum(r["agreed"] for r in table)
    print(f"{agreed} of {total} agreed")
    print(f"written to {write_result('frameworks-kit', {'cases': total, 'agreed': agreed, 'table': table})}")


def deviation(adapter: Any, case: Any, checks: Any, np: Any) -> float:
    """The largest deviation of a product from the exact one, as a multiple of the derived bound."""
    rows, inputs, outputs = case["shape"]
    shapes = {"a": (rows, inputs), "b": (outputs, inputs), "g": (rows, outputs)}
    a, b, g = (checks.unhex(case[n], shape) for n, shape in shapes.items())
    got = adapter.product(a, b, g, case["formats"], "emulated")
    worst = 0.0
    for product, shape in (("fprop", g.shape), ("dgrad", a.shape), ("wgrad", b.shape)):
        off = np.abs(np.asarray(got[product], np.float64) - checks.unhex(case[product]["exact"], shape))
        worst = max(worst, float((off / np.array(case[product]["within"]).reshape(shape)).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("kit", "step", "runs"))
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--frameworks", nargs="*", default=list(OTHERS), choices=OTHERS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many minutes")
    args = parser.parse_args()
    {"kit": kit, "step": step, "runs": runs}[args.part](args)


if __name__ == "__main__":
    main()
