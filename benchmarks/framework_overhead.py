"""What a policy costs beside each framework's own mixed precision, on a CPU.

    python benchmarks/framework_overhead.py [--rounds 12] [--groups keras jax flax torch]

keras  gpt-proof's network in Keras (batch 8), fit's own step: float32, mixed_bfloat16, mixed_float16; mezzo's policies
jax    the same network in plain JAX: float32, parameters cast to bfloat16; mezzo's policies
flax   a Flax MLP 512-2048-2048-512, 1,024 rows: float32, Qwix training in float8 (pip install qwix); mezzo's fp8
torch  the same GPT in PyTorch: float32, torch.autocast in bfloat16 under mezzo.torch.fast_cpu(), mezzo's bf16

Every arm lives in its own process with one thread; one step of each arm of a group in turn, so that load hits all;
figures are ratios of medians. mezzo's formats below 32 bits are emulated under JAX and TensorFlow (operands rounded,
float32 products), which is another route than the frameworks' own 16-bit products: the ratios say what the emulation
costs on this CPU and nothing of a GPU. fp32 is the same route, and shows what the interception itself costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from common import write_result

GROUPS = {
    "keras": ["plain", "mixed_bfloat16", "mixed_float16", "mezzo-fp32", "mezzo-bf16", "mezzo-fp16", "mezzo-fp8"],
    "jax": ["plain", "cast-bfloat16", "mezzo-fp32", "mezzo-bf16", "mezzo-fp16", "mezzo-fp8", "mezzo-nvfp4"],
    "flax": ["plain", "qwix-fp8", "mezzo-fp8"],
    "torch": ["plain", "autocast-bf16", "mezzo-fp32", "mezzo-bf16"],
}
VOCAB, BATCH = 4096, 8


def batch() -> tuple[Any, Any]:
    import numpy as np

    idx = np.random.default_rng(0).integers(0, VOCAB, (BATCH, 129))
    return idx[:, :-1].copy(), idx[:, 1:].copy()


def shape() -> Any:
    from mezzo.models.shapes import preset

    return preset("gpt-proof", vocab_size=VOCAB)


def keras_step(arm: str) -> Callable[[], float]:
    import keras

    if arm.startswith("mixed"):
        keras.config.set_dtype_policy(arm)
    import numpy as np

    import mezzo.keras
    from mezzo.models.gpt_keras import GPT

    model = GPT(shape())
    x, y = batch()
    if arm.startswith("mezzo"):
        mezzo.keras.Precision(model, policy=arm.partition("-")[2])
    model.compile(
        optimizer=keras.optimizers.Adam(3e-4), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    x, y = x.astype(np.int32), y.astype(np.int32)
    return lambda: float(model.train_on_batch(x, y))


def jax_step(arm: str) -> Callable[[], float]:
    import jax.numpy as jnp
    import optax

    import mezzo.jax
    from mezzo.models import gpt_jax
    from mezzo.models.initial import initial_parameters

    config = shape()
    params = {name: jnp.asarray(p) for name, p in initial_parameters(config, 0).items()}
    x, y = (jnp.asarray(a, jnp.int32) for a in batch())

    def plain(params: Any, x: Any, y: Any) -> Any:
        if arm == "cast-bfloat16":
            params = {name: p.astype(jnp.bfloat16) for name, p in params.items()}
        return gpt_jax.loss(params, x, y, config)

    return _optax_step(arm, plain, params, optax.adam(3e-4), mezzo.jax, (x, y))


def flax_step(arm: str) -> Callable[[], float]:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    import mezzo.jax

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for width in (2048, 2048):
                x = nn.relu(nn.Dense(width, use_bias=False)(x))
            return nn.Dense(512, use_bias=False)(x)

    model: Any = MLP()
    if arm == "qwix-fp8":
        import qwix  # type: ignore[import-not-found]

        rule = qwix.QtRule(weight_qtype="float8_e4m3fn", act_qtype="float8_e4m3fn", bwd_qtype="float8_e5m2")
        model = qwix.quantize_model(model, qwix.QtProvider([rule]))
    x = jax.random.normal(jax.random.key(0), (1024, 512))
    y = jnp.roll(x, 1, axis=1)
    params = model.init(jax.random.key(1), x)
    loss = lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)  # noqa: E731
    return _optax_step(arm, loss, params, optax.adam(3e-4), mezzo.jax, (x, y))


def _optax_step(arm: str, loss: Any, params: Any, inner: Any, mezzo_jax: Any, data: Any) -> Callable[[], float]:
    import jax
    import optax

    optimizer, state_of = inner, lambda state: {}
    if arm.startswith("mezzo"):
        precision = mezzo_jax.Precision(arm.partition("-")[2])
        loss, optimizer = precision(loss), precision.optimizer(inner)
        state_of = lambda state: {"state": state}  # noqa: E731

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x, y, **state_of(state))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    held = [params, optimizer.init(params)]

    def once() -> float:
        held[0], held[1], value = step(*held, *data)
        return float(value)

    return once


def torch_step(arm: str) -> Callable[[], float]:
    import contextlib

    import torch

    from mezzo.models.gpt_torch import GPT
    from mezzo.torch import Precision, fast_cpu

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arm == "autocast-bf16":
        print(fast_cpu(), file=sys.stderr)
    x, y = (torch.from_numpy(a) for a in batch())
    model = GPT(shape())
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, fused=True)
    precision = Precision(model, optimizer, arm.partition("-")[2]) if arm.startswith("mezzo") else None

    def once() -> float:
        with torch.autocast("cpu", torch.bfloat16) if arm == "autocast-bf16" else contextlib.nullcontext():
            loss = model(x, y)
        if precision is not None:
            precision.backward(loss)
            precision.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return once


STEPS = {"keras": keras_step, "jax": jax_step, "flax": flax_step, "torch": torch_step}


def worker(group: str, arm: str) -> None:
    """Answer each line on standard input with one training step."""
    once = STEPS[group](arm)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = once()
        print(json.dumps({"seconds": time.perf_counter() - begin, "loss": loss}), flush=True)


class Arm:
    """A worker process of one arm."""

    def __init__(self, group: str, name: str) -> None:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1",
               "TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow", "XLA_FLAGS": flags}  # fmt: skip
        command = [sys.executable, __file__, "--worker", group, name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.group, self.name, self.seconds, self.loss = group, name, [], float("nan")

    def step(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        answer = json.loads(line)
        self.seconds.append(answer["seconds"])
        self.loss = answer["loss"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--groups", nargs="*", default=[*GROUPS], choices=[*GROUPS])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    table = []
    for group in args.groups:
        names = [name for name in GROUPS[group] if not name.startswith("qwix") or find_spec("qwix")]
        arms = [Arm(group, name) for name in names]
        for arm in arms:
            arm.step()  # compiles
            arm.seconds.clear()
        for _ in range(args.rounds):
            for arm in arms:
                arm.step()
        medians = {arm.name: statistics.median(arm.seconds) for arm in arms}
        for arm in arms:
            row = {"group": group, "arm": arm.name, "ms": 1e3 * medians[arm.name], "loss": arm.loss,
                   "over_plain": medians[arm.name] / medians["plain"]}  # fmt: skip
            table.append(row)
            print(f"{group:6} {arm.name:15} {row['ms']:8.1f} ms  {row['over_plain']:.2f} × plain  loss {arm.loss:.4f}")
            arm.close()
    print(f"written to {write_result('framework_overhead', {'rounds': args.rounds, 'table': table})}")


if __name__ == "__main__":
    main()
