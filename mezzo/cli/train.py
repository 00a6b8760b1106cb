"""`mezzo train`: train a model, or go on with one."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, try again with --resume


@click.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Replace one key of the config.")
@click.option("--policy", metavar="POLICY", help="A recipe (fp64, fp32, tf32, bf16, fp16), or one with rules on top.")
@click.option("--data", metavar="PATH", help="File, folder or glob of text or JSON lines (.gz too), or stdlib.")
@click.option("--out", metavar="DIR", type=click.Path(file_okay=False), help="The run directory to make.")
@click.option("--resume", metavar="DIR", type=click.Path(file_okay=False), help="Go on with this run.")
def train(
    config: str | None,
    settings: tuple[str, ...],
    policy: str | None,
    data: str | None,
    out: str | None,
    resume: str | None,
) -> None:
    """Train a model on text. Without CONFIG, one that fits ten minutes on this machine.

    Ends with code 75 if SIGTERM or Ctrl-C stopped it: it is saved then, go on with --resume.

    \b
    Examples:
      mezzo train
      mezzo train --data book.txt --policy "bf16; head:*=float32" --out runs/book
      mezzo train config.toml --set train.steps=2000 --set model.layers=4
      mezzo train --resume runs/book --set train.steps=4000
    """
    from rich.console import Console

    from mezzo.cli.console import Progress
    from mezzo.errors import ConfigError
    from mezzo.train.rundir import RunDir
    from mezzo.train.session import Session, choose_device, prepare_corpus, read_config

    given = [*settings]
    for option, key, value in (("--policy", "policy", policy), ("--data", "data.corpus", data)):
        if value is not None:
            if any(s.partition("=")[0].strip() == key for s in settings):
                raise ConfigError(f"{option} and --set {key} say the same thing; drop one of them")
            given.append(f"{key}={_toml_string(value)}")
    console = Console(soft_wrap=True)
    listener = Progress(console)

    if resume is not None:
        if config is not None or out is not None:
            raise ConfigError("--resume goes on with a run's own config; drop CONFIG and --out, change keys with --set")
        before = read_config(RunDir.open(resume))
        now = _load(None, given, before.model_dump(exclude_none=True))
        _check_resume(before, now)
        session = Session.resume(resume, now, listener)
        if session.first >= now.train.steps:
            session.close()
            console.print(f"nothing to do: {resume} has its {session.first:,} steps; add some with --set train.steps=…")
            return
    else:
        chosen = _load(config, given)
        corpus = prepare_corpus(chosen, _stages(console))
        if config is None and not any(s.startswith(("model.", "train.steps")) for s in settings):
            from mezzo.train.auto import choose

            choice = choose(chosen, choose_device(chosen.train.device))
            chosen = _load(None, given, choice.config.model_dump(exclude_none=True))
            console.print(f"no config: {choice.reason}", highlight=False)
        out = out or time.strftime("runs/train-%Y%m%d-%H%M%S")
        session = Session.start(chosen, out, listener, corpus)
    for _ in session.train():
        pass
    if session.interrupted:
        console.print(
            f"stopped and saved at step {session.first:,}; go on with: mezzo train --resume {session.run.path}"
        )
        sys.exit(INTERRUPTED)
    console.print(f'done: {session.run.path}; try: mezzo generate {session.run.path} --prompt "def "', highlight=False)


def _load(path: str | None, settings: list[str], base: dict[str, Any] | None = None) -> Any:
    from mezzo.train.config import load

    return load(path, settings, base)


def _toml_string(value: str) -> str:
    import json

    return json.dumps(value)  # a JSON string is a TOML basic string


def _check_resume(before: Any, now: Any) -> None:
    """Model, text and batches make the run; changing them is another run."""
    from mezzo.errors import RunError

    same: list[tuple[str, Any, Any]] = [("model", before.model, now.model)]
    same += [
        (f"data.{k}", getattr(before.data, k), getattr(now.data, k))
        for k in ("vocab_size", "valid_fraction", "text_key")
    ]
    same += [(f"train.{k}", getattr(before.train, k), getattr(now.train, k)) for k in ("seed", "batch", "accumulate")]
    for key, old, new in same:
        if old != new:
            raise RunError(f"--resume cannot change {key} (was {old}, now {new}); start a new run with --out")


def _stages(console: Any) -> Any:
    """Says what the preparation of text is doing, once a stage."""
    seen: set[str] = set()

    def report(stage: str, share: float) -> None:
        if stage not in seen:
            seen.add(stage)
            console.print(f"text      {stage} …", highlight=False)

    return report
