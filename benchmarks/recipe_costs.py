"""What each recipe costs on this CPU, and what it holds in memory: emulation's time, not a hardware's.

    python benchmarks/recipe_costs.py [--rounds 12] [--recipes …]

gpt-proof (2 layers, d 128, T 128, batch 8) on the stdlib corpus, AdamW. One step of each recipe in turn in each round,
so that other load on the machine hits all; the figure is the ratio of medians to fp32's. Formats below 16 bits, and 16
bits where the CPU has no fast product of its own, are emulated: the operands are rounded, the product is float32's.
Bytes are those of tensors held between steps (weights, moments and what belongs to them) and of what autograd keeps
between a forward pass and its backward pass, parameters left out. Writes benchmarks/results/recipe_costs.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from common import write_result
from torch import Tensor, nn

from mezzo.data.batches import Batches
from mezzo.models.gpt_torch import GPT
from mezzo.policy import RECIPES
from mezzo.torch import Precision
from mezzo.torch.compact import stored_bytes
from mezzo.torch.saved import kept_bytes
from mezzo.train.assemble import make_optimizer, model_config, prepare_corpus
from mezzo.train.config import load

MORE = (
    "bf16; *:saved=bfloat16",  # activations kept in fewer bits
    "fp8; *:saved=mxfp8; (model):saved=bfloat16",
    "nvfp4; *:fprop.a=bfloat16; *:fprop.b=bfloat16",  # the last phase of the schedule dmp
)


@dataclass
class Arm:
    policy: str
    model: nn.Module
    precision: Precision
    seconds: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> None:
        begin = time.perf_counter()
        self.precision.backward(self.model(x, y))
        self.precision.step()
        self.seconds.append(time.perf_counter() - begin)

    def kept(self, x: Tensor, y: Tensor) -> int:
        """Bytes that autograd keeps of one forward pass: each storage once, parameters left out."""
        return kept_bytes(self.precision, lambda: self.model(x, y))


def arms(names: list[str], config: Any, shape: Any) -> Iterator[Arm]:
    for name in names:
        model = GPT(shape, generator=torch.Generator().manual_seed(0))
        yield Arm(name, model, Precision(model, make_optimizer(model, config), name, max_norm=config.train.clip))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--recipes", nargs="*", default=[*RECIPES, *MORE])
    options = parser.parse_args()
    names = list(dict.fromkeys(["fp32", *options.recipes]))
    config = load(None, ["model.preset=gpt-proof", "train.batch=8"])
    corpus = prepare_corpus(config)
    shape = model_config(config, corpus)
    batches = Batches(corpus.train, batch=8, seq_len=shape.seq_len, seed=0)
    found = list(arms(names, config, shape))
    for round_ in range(options.rounds + 2):  # the first two warm up
        x, y = (torch.from_numpy(a) for a in batches.batch_at(round_))
        for arm in found:
            arm.step(x, y)
    base = statistics.median(found[0].seconds[2:])
    rows = []
    for arm in found:
        held = stored_bytes(arm.precision)
        rows.append({
            "recipe": arm.policy,
            "step_seconds": statistics.median(arm.seconds[2:]),
            "step_over_fp32": statistics.median(arm.seconds[2:]) / base,
            "routes": sorted(set(arm.precision.routes.items())),
            **{f"{key}_bytes": size for key, size in held.items()},
            "activation_bytes": arm.kept(x, y),
        })  # fmt: skip
        row = rows[-1]
        sizes = "  ".join(f"{key} {row[key] / 2**20:6.2f} MiB" for key in row if key.endswith("_bytes"))
        print(f"{arm.policy:44} {row['step_over_fp32']:5.2f} × fp32's step  {sizes}")
    path = write_result("recipe_costs", {"model": "gpt-proof, batch 8", "rounds": options.rounds, "rows": rows})
    print(path)


if __name__ == "__main__":
    main()
