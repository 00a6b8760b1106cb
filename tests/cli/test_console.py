"""What a person sees while a run goes on, on a terminal and in a file."""

from __future__ import annotations

import io
import math
import time
from typing import Any

import pytest
from rich.console import Console

from mezzo.cli.console import Progress, clock, describe, size

INFO: dict[str, Any] = {
    "run": "runs/a", "framework": "torch", "steps": 1000, "first_step": 0, "parameters": 1234567, "tokens": 8_000_000,
    "policy": "bf16",
    "device": "cpu", "routes": {"bfloat16": "emulated", "float32": "native"}, "corpus": "ab" * 32,
    "train_tokens": 2_000_000, "valid_tokens": 100_000, "invalid_utf8": 0, "skipped_files": [], "phases": [],
    "advice": ["head:fprop.a: one", "two"],
}  # fmt: skip


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "loss_scale": 1.0, "skipped": False, "tokens": step,
        "tokens_per_s": 12345.6, "mfu": 0.42, "memory": 300 << 20,
    } | more  # fmt: skip


def shown(terminal: bool, *records: dict[str, Any], every: float = 10.0, label: str = "") -> str:
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=terminal, width=110), label, every)
    progress.started(INFO)
    for one in records:
        progress.record(one)
    progress.message("saved runs/a/checkpoints/step-000003")
    progress.ended("finished")
    return out.getvalue()


def test_times_and_sizes_are_written_for_people() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3725, 86400)] == ["0:00", "1:00", "1:01", "1:02:05", "24:00:00"]
    assert [size(n) for n in (0, 999, 2048, 5 << 20, 3 << 30, -3 << 20)] == [
        "0 B", "999 B", "2 KiB", "5 MiB", "3.00 GiB", "-3 MiB",
    ]  # fmt: skip


def test_the_lines_before_the_first_step_say_model_training_policy_text_run_and_advice() -> None:
    assert describe(INFO).splitlines() == [
        "model     1,234,567 parameters",
        "training  1,000 steps, 8,000,000 tokens: 4.0 times the text, 6.5 for each parameter",
        "policy    bf16   (bfloat16 emulated, float32 native on cpu)",
        "text      2,000,000 tokens to train on, 100,000 held out; SHA-256 abababababababab…",
        "run       runs/a",
        "advice    head:fprop.a: one",
        "advice    two",
    ]


def test_in_a_file_each_evaluation_is_a_line_and_nothing_moves_the_cursor() -> None:
    text = shown(False, record(1), record(2, val_loss=3.25), record(3))
    assert "\x1b" not in text
    assert text.splitlines()[7:] == [
        "step    2/1000  loss 2.5000  val 3.2500  12,346 tok/s  mfu 42%  300 MiB  0:00 left",
        "saved runs/a/checkpoints/step-000003",
    ]


def test_in_a_file_a_line_comes_every_so_many_seconds() -> None:
    text = shown(False, record(1), record(2), record(3), every=0.0, label="bf16")
    assert sum(line.startswith("bf16  step") for line in text.splitlines()) == 3


def test_on_a_terminal_a_bar_shows_each_step_and_lines_stay_above_it() -> None:
    records = []
    for step in (1, 2, 3):
        records.append(record(step * 300, **({"val_loss": 3.25, "sample": "[bold]x[/nothing]"} if step == 2 else {})))
    text = shown(True, *records)
    assert "\x1b[" in text
    assert "step  600/1000  loss 2.5000  val 3.2500" in text
    assert "'[bold]x[/nothing]'" in text, "a sample is not taken for markup"
    assert "saved runs/a/checkpoints/step-000003" in text


def test_a_skipped_step_is_told_with_its_site_and_scale() -> None:
    text = shown(False, record(7, skipped=True, site="blocks.3.mlp.down:fprop.out", loss_scale=65536.0))
    assert "step 7 skipped: nonfinite at blocks.3.mlp.down:fprop.out, loss scale was 65536\n" in text


def test_one_loss_that_is_not_finite_does_not_stay_in_the_average() -> None:
    console = Console(file=io.StringIO())
    progress = Progress(console)
    progress.started(INFO)
    progress.record(record(1, loss=math.nan))
    assert progress.loss is not None
    assert math.isnan(progress.loss)
    progress.record(record(2, loss=3.0))
    assert progress.loss == 3.0
    progress.record(record(3, loss=math.inf))
    progress.record(record(4, loss=4.0))
    assert progress.loss == pytest.approx(0.9 * 3 + 0.1 * 4)


def test_time_left_counts_from_the_step_that_was_resumed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = Progress(Console(file=io.StringIO()))
    progress.started(INFO | {"first_step": 900})
    now[0] += 30
    progress.record(record(930))
    assert progress.line(record(930)).endswith("1:10 left"), "30 steps in 30 s, 70 are left"


def test_a_first_step_that_compiles_says_nothing_of_the_steps_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    out = io.StringIO()
    progress = Progress(Console(file=out), every=0.0)
    progress.started(INFO | {"first_step": 900, "framework": "jax"})
    for step in (901, 902):
        now[0] += 30 if step == 901 else 1
        progress.record(record(step))
    assert out.getvalue().splitlines()[-2:] == [
        "step  901/1000  loss 2.5000  300 MiB",
        "step  902/1000  loss 2.5000  12,346 tok/s  mfu 42%  300 MiB  1:38 left",
    ]


def test_brackets_in_policies_and_paths_are_printed_as_they_are() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out))
    progress.started(INFO | {"policy": "bf16; block[s]:*=float32", "run": "runs/[red]:cat:"})
    assert "bf16; block[s]:*=float32" in out.getvalue()
    assert "runs/[red]:cat:" in out.getvalue()
    progress.ended("finished")
