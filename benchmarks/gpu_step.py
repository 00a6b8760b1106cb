"""Tokens/s, MFU and peak memory of a training step on one GPU: mezzo, a torch.amp loop, Hugging Face Trainer.

    python benchmarks/gpu_step.py [--preset gpt2-124m] [--batch 16] [--steps 20] [--compile] [--device cuda]
                                  [--policies bf16 fp8 mxfp8 nvfp4]

mezzo and the amp loop train the same module of mezzo's; the Trainer trains transformers' GPT-2 of the same size (left
out, and said so, where transformers is not installed). Arms run one after the other in processes of their own, three
rounds; figures are medians over the rounds' medians. MFU is against the machine's measured dense bf16 peak.
`--device cpu --preset gpt-tiny` only shows that the script works: it is no figure.
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

OTHERS = ("amp-bf16", "hf-trainer-bf16")


def torch_arm(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """mezzo or a plain torch.amp loop on mezzo's GPT."""
    import torch

    from mezzo.models.gpt_torch import GPT
    from mezzo.models.shapes import padded_vocab, preset
    from mezzo.torch import Precision
    from mezzo.train import memory

    device = torch.device(args.device)
    base = preset(args.preset)
    shape = preset(args.preset, vocab_size=padded_vocab(base.vocab_size))
    memory.reset_peak(device)
    model = GPT(shape, checkpoint_activations=args.checkpoint_activations).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    precision = Precision(model, optimizer, arm[6:], max_norm=1.0) if arm.startswith("mezzo-") else None
    run = torch.compile(model) if args.compile else model
    idx = torch.randint(shape.vocab_size, (args.batch, shape.seq_len + 1), device=device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()

    def step() -> None:
        if precision is not None:
            precision.backward(run(x, y))
            precision.step()
            return
        with torch.autocast(args.device, torch.bfloat16):
            loss = run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(5):
        step()
    wait()
    begin = time.perf_counter()
    for _ in range(args.steps):
        step()
    wait()
    return {"seconds": (time.perf_counter() - begin) / args.steps, "peak": memory.peak(device)}


def trainer_arm(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' Trainer on its own GPT-2 of the same size."""
    import tempfile

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from mezzo.models.shapes import padded_vocab, preset
    from mezzo.train import memory

    device = torch.device(args.device)
    shape = preset(args.preset)
    vocab = padded_vocab(shape.vocab_size)
    memory.reset_peak(device)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab, n_positions=shape.seq_len, n_embd=shape.d_model, n_layer=shape.layers, n_head=shape.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip
    row = torch.randint(vocab, (shape.seq_len,))
    rows = [{"input_ids": row, "labels": row}] * (args.batch * (args.steps + 5))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=args.batch, max_steps=args.steps + 5, bf16=True,
                optim="adamw_torch_fused", max_grad_norm=1.0, logging_strategy="no", save_strategy="no",
                report_to=[], torch_compile=args.compile, gradient_checkpointing=args.checkpoint_activations,
                use_cpu=args.device == "cpu", disable_tqdm=True,
            ),
            train_dataset=rows,
            callbacks=[Clock()],
        ).train()  # fmt: skip
    return {"seconds": (times[-1] - times[4]) / args.steps, "peak": memory.peak(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--policies", nargs="*", default=["bf16"], help="mezzo's arms")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        found = trainer_arm(args) if args.arm.startswith("hf") else torch_arm(args.arm, args)
        print(json.dumps(found))
        return

    from mezzo import hardware
    from mezzo.models.shapes import flops_per_token, padded_vocab, preset

    kind, why = hardware.gpu_status()
    if args.device == "cuda" and kind != "cuda":
        raise SystemExit(f"no GPU: {why}; --device cpu --preset gpt-tiny shows that the script works")
    shape = preset(args.preset, vocab_size=padded_vocab(preset(args.preset).vocab_size))
    peak = hardware.measure(args.device).peak * 1e9
    arms = [*(f"mezzo-{policy}" for policy in args.policies), *OTHERS]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    absent: dict[str, str] = {}
    for _ in range(3):
        for arm in arms:
            if arm in absent:
                continue
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--arm", arm], capture_output=True, text=True
            )
            if done.returncode:
                absent[arm] = done.stderr.strip().splitlines()[-1]
                print(f"{arm}: left out: {absent[arm]}", file=sys.stderr)
                continue
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
    rows = {}
    for arm, runs in results.items():
        if runs:
            seconds = statistics.median(r["seconds"] for r in runs)
            speed = args.batch * shape.seq_len / seconds
            mfu = flops_per_token(shape) * speed / peak
            rows[arm] = {"tokens_per_s": speed, "mfu": mfu, "peak_bytes": max(r["peak"] for r in runs), "runs": runs}
            print(f"{arm:16} {speed:10,.0f} tok/s  mfu {mfu:.1%}  {rows[arm]['peak_bytes'] / 2**30:.1f} GiB")
    data = {"preset": args.preset, "batch": args.batch, "compile": args.compile, "arms": rows, "left_out": absent}
    print(f"written to {write_result(f'gpu_step-{args.preset}', data)}")


if __name__ == "__main__":
    main()
