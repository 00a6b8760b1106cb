"""`mezzo generate`: the same seed, the same text; whole characters as they come; any policy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from in_process import Mezzo

from mezzo.train.stored import load_run


def test_the_same_seed_gives_the_same_text_and_another_seed_another(mezzo: Mezzo, trained: Path) -> None:
    """The run's text file is gone: a model does not need it."""
    command = ("generate", str(trained), "--prompt", "the cat", "--tokens", "30")
    first, again, other = mezzo(*command), mezzo(*command, "--seed", "0"), mezzo(*command, "--seed", "1")
    assert (first.code, first.err) == (0, "")
    assert first == again != other
    assert first.out.startswith("the cat")
    assert first.out.endswith("\n")
    assert len(first.out) > len("the cat\n") + 10


def test_greedy_text_is_the_argmax_of_the_model(mezzo: Mezzo, trained: Path) -> None:
    import torch

    done = mezzo("generate", str(trained), "--prompt", "the ", "--tokens", "5", "--temperature", "0")
    model, tokenizer, _, _ = load_run(trained)
    ids = tokenizer.encode("the ").tolist()
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax()))
    assert done.out == tokenizer.decode(ids) + "\n"


def test_top_k_of_one_is_greedy_and_top_p_narrows(mezzo: Mezzo, trained: Path) -> None:
    command = ("generate", str(trained), "--prompt", "the", "--tokens", "8")
    greedy = mezzo(*command, "--temperature", "0").out
    assert mezzo(*command, "--top-k", "1").out == greedy
    assert mezzo(*command, "--top-p", "0.000001").out == greedy


def test_another_policy_may_be_used_also_one_with_other_masters(mezzo: Mezzo, trained: Path) -> None:
    command = ("generate", str(trained), "--prompt", "the cat", "--tokens", "10", "--temperature", "0")
    for policy in ("fp32", "fp16", "fp64", "bf16; head:*=float32"):
        done = mezzo(*command, "--policy", policy)
        assert (done.code, done.err) == (0, ""), policy
        assert done.out.startswith("the cat"), policy


def test_a_run_trained_with_float64_masters_generates_under_any_policy(mezzo: Mezzo, config: str) -> None:
    assert mezzo("train", config, "--policy", "fp64", "--out", "run").code == 0
    for policy in ("fp64", "bf16"):
        done = mezzo("generate", "run", "--tokens", "3", "--policy", policy)
        assert (done.code, done.err) == (0, "")


def test_text_is_printed_as_it_comes(mezzo: Mezzo, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []
    echo = click.echo
    monkeypatch.setattr(click, "echo", lambda text="", **options: (parts.append(text), echo(text, **options)))
    done = mezzo("generate", str(trained), "--prompt", "the cat", "--tokens", "12")
    assert "".join(parts) + "\n" == done.out
    assert len([part for part in parts if part]) > 5


def test_an_empty_prompt_begins_a_document(mezzo: Mezzo, trained: Path) -> None:
    done = mezzo("generate", str(trained), "--tokens", "5")
    assert (done.code, done.err) == (0, "")
    assert done.out.strip()


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "temperature": (("--temperature", "-1"), "temperature must be 0 (greedy) or a finite number above it, not -1.0"),
    "top-k": (("--top-k", "0"), "top_k must be at least 1"),
    "top-p": (("--top-p", "2"), "top_p must be above 0 and at most 1"),
    "tokens": (("--tokens", "-2"), "max_new_tokens must be at least 0"),
    "policy": (("--policy", "fp17"), "unknown recipe 'fp17'"),
    "rule": (("--policy", "bf16; nowhere:*=float32"), "matches nothing in this model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_out_of_range_is_one_clear_error_before_anything_is_printed(
    mezzo: Mezzo, trained: Path, case: str
) -> None:
    given, message = REFUSED[case]
    done = mezzo("generate", str(trained), "--prompt", "the", *given)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("mezzo: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_what_is_no_run_or_has_no_checkpoint_is_refused(mezzo: Mezzo, trained: Path, tmp_path: Path) -> None:
    assert mezzo("generate", "none").err == (
        "mezzo: error: none is not a run: it has no config.toml; give a folder that `mezzo train` made\n"
    )
    shutil.copytree(trained, "run")
    shutil.rmtree("run/checkpoints/step-000030")
    assert mezzo("generate", "run").err == "mezzo: error: run has no usable checkpoint: nothing was saved there yet\n"


def test_a_run_whose_config_is_of_another_model_is_refused_with_the_tensors_named(
    mezzo: Mezzo, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, "run")
    path = tmp_path / "run/config.toml"
    path.write_text(path.read_text().replace("d_model = 32", "d_model = 64"))
    done: Any = mezzo("generate", "run")
    assert (done.code, done.out) == (1, "")
    assert "wrong: embed.weight is float32[320, 32] in the checkpoint, float32[320, 64] in the model" in done.err
    assert done.err.endswith("use the config that the checkpoint was trained with\n")
    assert "Traceback" not in done.err
