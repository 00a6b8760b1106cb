"""Run directories made without training: small, quick, with everything that a report shows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

CONFIG = """policy = "{policy}"

[model]
preset = "gpt-tiny"
vocab_size = 300

[data]
corpus = "/texts/book.txt"

[train]
steps = {steps}
seed = {seed}
lr = 0.003
"""
LINEAR = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
FORMATS = {
    "fprop.a": "float16",
    "fprop.b": "float16",
    "dgrad.a": "float8_e5m2@tensor delayed",
    "wgrad.a": "nvfp4 stochastic",
}


FINDING = {"kind": "all_zero", "site": "blocks.1.mlp.down:fprop.a", "text": "every value is zero"}


def dump(value: Any) -> str:
    """As the trainer writes it: nonfinite floats are strings."""

    def plain(one: Any) -> Any:
        if isinstance(one, float) and not math.isfinite(one):
            return "NaN" if math.isnan(one) else "Infinity" if one > 0 else "-Infinity"
        if isinstance(one, dict):
            return {key: plain(entry) for key, entry in one.items()}
        return [plain(entry) for entry in one] if isinstance(one, list) else one

    return json.dumps(plain(value), allow_nan=False)


def record(step: int, steps: int, rng: random.Random, policy: str = "fp16") -> dict[str, Any]:
    skipped = step in (30, 31, 90)
    scale = 65536.0 / 2 ** sum(step > at for at in (30, 31, 90))
    found: dict[str, Any] = {
        "step": step,
        "loss": math.nan if step == 90 else 2.5 + 6 * math.exp(-step / 60) + rng.gauss(0, 0.08),
        "lr": 0.003 * min(1, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
        "grad_norm": math.inf if skipped else 0.5 + rng.random(),
        "loss_scale": scale if policy != "bf16" else 1.0,
        "skipped": skipped,
        "tokens": 1024 * step,
        "tokens_per_s": 12000 + rng.gauss(0, 400),
        "mfu": 0.31 + rng.gauss(0, 0.01),
        "memory": 160_000_000 + min(step, 10) * 1_000_000,
    }
    if policy == "bf16":
        found["skipped"] = False
    if found["skipped"]:
        found["site"] = "blocks.1.mlp.down:fprop.a"
    if step % 50 == 0:
        loss = 2.6 + 6 * math.exp(-step / 60)
        found |= {"val_loss": loss, "val_loss_fp32": loss - 0.004, "val_bits_per_byte": loss / 2.3}
    if step % 100 == 0:
        found["sample"] = f"the cat sat at step {step}\n  and saw rain"
    return found


def measure(fmt: str, centre: float, rng: random.Random, nonfinite: int = 0) -> dict[str, Any]:
    bins = 24
    first = round(centre) - bins + 3
    counts = [round(1e5 * math.exp(-(((k - bins + 6) / 4) ** 2))) for k in range(bins)]
    found: dict[str, Any] = {
        "format": fmt,
        "count": 131072,
        "zeros": 12,
        "nonfinite": nonfinite,
        "amax": 2.0 ** (first + bins) * 0.9,
        "underflow": max(0.0, 10 ** rng.uniform(-6, -1) - 1e-5),
        "overflow": max(0.0, 10 ** rng.uniform(-7, -2) - 1e-5),
        "sqnr": math.inf if fmt == "float32" else 20 + 30 * rng.random(),
        "histogram": [first, counts],
    }
    if fmt.startswith("nvfp4"):
        found["blocks"] = {
            "count": 8192,
            "zero": 3,
            "lossy": 0.12,
            "sqnr": [12.1, 18.9, 24.0],
            "amax": [first + 12, [1, 50, 900, 6000, 1241]],
        }
    return found


def sample(step: int, rng: random.Random, layers: int = 2) -> dict[str, Any]:
    paths = [f"blocks.{i}.{name}" for i in range(layers) for name in LINEAR] + ["head"]
    names = [(path, role) for role in ("fprop.a", "fprop.b") for path in paths]
    names += [(path, role) for path in reversed(paths) for role in ("dgrad.a", "wgrad.a")]
    sites = {
        f"{path}:{role}": measure(
            "float32" if path == "head" else FORMATS[role],
            (1 if role.startswith("fprop") else -14) + len(path) % 3,
            rng,
        )
        for path, role in names
    }
    return {
        "step": step,
        "policy": "fp16",
        "sites": sites,
        "updates": {
            f"{path}.weight": {
                "ratio": 1e-3 * (0.5 + rng.random()),
                "lost": 0.01 * rng.random(),
                "unseen": 0.3 * rng.random(),
            }
            for path in paths
        },
        "logits": {f"blocks.{i}.attn": 5 + step / 50 + i for i in range(layers)},
        "whatif": {"nvfp4": {name: measure("nvfp4", 0, rng) for name in sites}},
        "findings": [FINDING] if step == 100 else [],
    }


def make_run(
    folder: Path,
    steps: int = 200,
    done: int | None = None,
    policy: str = "fp16",
    seed: int = 0,
    every: int = 20,
    layers: int = 2,
) -> Path:
    """A run of two phases with samples, sampled sites and three incidents; returns its folder."""
    rng = random.Random(seed)
    done = steps if done is None else done
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(policy=policy, steps=steps, seed=seed), encoding="utf-8")
    (folder / "policy.toml").write_text(f'recipe = "{policy}"\n', encoding="utf-8")
    (folder / "corpus.json").write_text(json.dumps({"source": "/texts/book.txt", "sha256": "ada5d711" * 8}))
    lines = []
    for step in range(1, done + 1):
        one = record(step, steps, rng, policy) | {"phase": 1 if step <= steps * 0.8 else 2}
        if step == steps * 0.8:
            one |= {"entered": 2, "ended_by": "until 0.8"}
        lines.append(dump(one) + "\n")
    (folder / "steps.jsonl").write_text("".join(lines), encoding="utf-8")
    sampled = [dump(sample(step, rng, layers)) + "\n" for step in range(every, done + 1, every)]
    (folder / "sites.jsonl").write_text("".join(sampled), encoding="utf-8")
    if policy != "bf16" and done >= 90:
        add_incident(folder, 30, steps=[30, 31], kind="loss_scale", what="the loss scale was halved twice")
        add_incident(folder, 90)
        add_incident(
            folder,
            120,
            kind="exception",
            what="out of memory",
            site=None,
            rule=None,
            traceback="Traceback (most recent call last):\n  …\nMemoryError",
        )
    return folder


def add_incident(run: Path, step: int, **more: Any) -> None:
    rng = random.Random(step)
    sites = {f"blocks.{i}.mlp.down:fprop.a": measure("float16", 14, rng, nonfinite=i) for i in range(3)}
    incident = {
        "step": step,
        "kind": "nonfinite",
        "what": "the gradients were not finite; first at blocks.1.mlp.down:fprop.a",
        "site": "blocks.1.mlp.down:fprop.a",
        "rule": "'blocks.1.mlp.down:*=float32'",
        "steps": [step],
        "time": 1764000000.0,
        "policy": "fp16",
        "phase": 1,
        "loss": math.nan,
        "loss_scale": 65536.0,
        "grad_norm": math.inf,
        "rng": {"seed": 1},
        "batch": {"index": step},
        "scales": {},
        "sites": sites,
        **more,
    }
    kind = incident["kind"]
    folder = run / "incidents" / (f"step-{step:06d}" + ("" if kind == "nonfinite" else f"-{kind}"))
    folder.mkdir(parents=True)
    (folder / "incident.json").write_text(dump(incident), encoding="utf-8")
