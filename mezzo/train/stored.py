"""What a run directory holds, read back: its config, its model, and whether another config still means the same run."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzo.data.shards import Corpus
from mezzo.data.tokenizer import Tokenizer
from mezzo.errors import CheckpointError, ConfigError, MezzoError, RunError
from mezzo.train.checkpoint import Checkpoint, entries, newest, read_manifest
from mezzo.train.config import Config, parse
from mezzo.train.rundir import RunDir

if TYPE_CHECKING:
    from mezzo.models.gpt_torch import GPT
    from mezzo.torch import Precision

TOKENIZER = "tokenizer.json"
CORPUS = "corpus.json"


def read_config(run: RunDir) -> Config:
    """The config a run was started with.

    raises    MezzoError if config.toml was edited into something that is not a config
    """
    try:
        return parse(tomllib.loads(run.config_toml()))
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise MezzoError(f"{run.config_path}: {error}") from error


def trained_under(run: RunDir) -> str | None:
    """The framework that the newest checkpoint's steps were taken in; None before the first checkpoint."""
    for _, path in entries(run.checkpoints):
        try:
            return framework_of(read_manifest(path).meta)
        except CheckpointError:
            continue
    return None


def framework_of(meta: Mapping[str, Any]) -> str:
    """The framework that wrote a checkpoint; once there was no other than torch, and no such key."""
    return str(meta.get("environment", {}).get("framework", "torch"))


def anchored(config: Config) -> Config:
    """The config with absolute paths and its policy spelled out, so that the run can be resumed from any folder."""
    data = config.data
    paths: dict[str, str | None] = {"tokenizer": data.tokenizer, "cache": data.cache}
    if data.corpus != "stdlib":
        paths["corpus"] = data.corpus
    update = {key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items() if path is not None}
    phases = config.phase
    if isinstance(phases, tuple):
        phases = tuple(one.model_copy(update={"when": _anchored_run(one.when)}) for one in phases)
    more = {"data": data.model_copy(update=update), "phase": phases}
    return config.model_copy(update=more).self_contained()


def _anchored_run(when: dict[str, Any] | None) -> dict[str, Any] | None:
    """A trigger's table with the absolute path of the run that it compares with."""
    if when is None or "run" not in when:
        return when
    return {**when, "run": os.path.abspath(os.path.expanduser(when["run"]))}


def keep_corpus(run: RunDir, corpus: Corpus) -> None:
    """Write down in the run what its text and tokenizer are."""
    run.keep(TOKENIZER, corpus.tokenizer.to_json())
    run.keep(CORPUS, (corpus.folder / "manifest.json").read_text(encoding="utf-8"))


def check_same_settings(run: RunDir, before: Config, now: Config) -> None:
    """Model and batches make the run; changing them is another run.

    raises    RunError that names every key that changed, its old and its new value
    """
    groups = (
        ("model", sorted(type(now.model).model_fields)),
        ("data", ["text_key", "valid_fraction", "vocab_size"]),
        ("train", ["accumulate", "batch", "seed"]),
    )
    changed = [
        f"{group}.{key} (was {_shown(old)}, now {_shown(new)})"
        for group, keys in groups
        for key in keys
        if (old := getattr(getattr(before, group), key)) != (new := getattr(getattr(now, group), key))
    ]
    if changed:
        raise RunError(f"--resume cannot change {', '.join(changed)} of {run.path}; start a new run with --out")


def text_of(run: RunDir) -> str:
    """SHA-256 of the text that a run was trained on.

    raises    RunError if the run does not say
    """
    try:
        return str(json.loads((run.path / CORPUS).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{run.path / CORPUS} cannot be read ({error!r}): nobody knows what the run trained on"
        ) from error


def check_same_text(run: RunDir, corpus: Corpus) -> None:
    """raises    RunError if the run was trained on other text, or with another tokenizer"""
    then = text_of(run)
    if then != corpus.sha256:
        raise RunError(
            f"{run.path} was trained on other text (SHA-256 {then[:12]}…, now {corpus.sha256[:12]}…): the text changed "
            "since, or --data names another; give the text it was trained on with --data, or start a new run with --out"
        )
    if Tokenizer.load(run.path / TOKENIZER).to_json() != corpus.tokenizer.to_json():
        raise RunError(
            f"{run.path} was trained with another tokenizer: data.tokenizer changed since; to use the run's own, "
            f"--set data.tokenizer={run.path / TOKENIZER}"
        )


def load_run(path: str | Path, policy: str | None = None) -> tuple[GPT, Tokenizer, Precision, Checkpoint]:
    """The model of a run at its newest good checkpoint, for reading; the text it was trained on is not needed.

    policy    another policy than the run's own; of a run with phases that is the one it was saved in
    raises    RunError if there is no usable checkpoint; CheckpointError if it does not fit the config
    """
    run = RunDir.open(path)
    config = read_config(run)
    checkpoint, problems = newest(run)
    if checkpoint is None:
        why = "".join(f"\n  {problem}" for problem in problems) or ": nothing was saved there yet"
        raise RunError(f"{path} has no usable checkpoint{why}")
    model, precision = load_checkpoint(checkpoint, config, policy)
    return model, Tokenizer.load(run.path / TOKENIZER), precision, checkpoint


def load_checkpoint(checkpoint: Checkpoint, config: Config, policy: str | None = None) -> tuple[GPT, Precision]:
    """The model of a checkpoint, for reading; arguments and errors as of `load_run`."""
    from mezzo import hardware
    from mezzo.models.gpt_torch import GPT
    from mezzo.torch import Precision
    from mezzo.train.torch_state import as_tensors, copy_into

    model = GPT(config.model.resolve())
    weights = as_tensors(checkpoint.load_group("model"))
    for name, parameter in model.named_parameters():
        if name in weights and weights[name].is_floating_point():
            parameter.data = parameter.data.to(weights[name].dtype)  # float64 masters are stored as such
    copy_into(model.state_dict(), weights, "model")
    model.to(hardware.gpu_status()[0])
    own = config.resolved_policy() if config.phase is None else checkpoint.meta["policy"]  # of its phase
    precision = Precision(model, None, policy or own)
    model.eval()
    return model, precision


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
