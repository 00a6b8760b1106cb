"""`mezzo train`: train a model, or go on with one."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from mezzo.train.auto import Choice
    from mezzo.train.config import Config
    from mezzo.train.listeners import Listener, Record
    from mezzo.train.session import Session

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, try again with --resume


@click.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Replace one key of the config.")
@click.option("--policy", metavar="POLICY", help="A recipe (see mezzo recipes) or a .toml file, rules on top.")
@click.option("--data", metavar="PATH", help="File, folder or glob of text or JSON lines (.gz too), or stdlib.")
@click.option("--framework", metavar="NAME", help="torch, jax or tensorflow; --resume may change it.")
@click.option("--out", metavar="DIR", type=click.Path(file_okay=False), help="The run directory to make.")
@click.option("--resume", metavar="DIR", type=click.Path(file_okay=False), help="Go on with this run.")
def train(
    config: str | None,
    settings: tuple[str, ...],
    policy: str | None,
    data: str | None,
    framework: str | None,
    out: str | None,
    resume: str | None,
) -> None:
    """Train a model on text. Without CONFIG, one that fits ten minutes on this machine.

    Ends with code 75 if SIGTERM or Ctrl-C stopped it: it is saved then, go on with --resume; with code 1 if it
    failed, also where the held-out loss is not finite at the end.

    \b
    Examples:
      mezzo train
      mezzo train --data book.txt --policy "bf16; head:*=float32" --out runs/book
      mezzo train config.toml --set train.steps=2000 --set model.layers=4
      mezzo train --resume runs/book --set train.steps=4000
      mezzo train --resume runs/book --framework jax
    """
    from rich.console import Console

    from mezzo.errors import ConfigError
    from mezzo.train.config import load
    from mezzo.train.corpus import prepare_corpus
    from mezzo.train.frameworks import check
    from mezzo.train.rundir import RunDir
    from mezzo.train.session import Session
    from mezzo.train.stored import read_config

    given = [*settings]
    keys = [setting.partition("=")[0].strip() for setting in settings]
    short = (
        ("--policy", "policy", policy),
        ("--data", "data.corpus", data),
        ("--framework", "train.framework", framework),
    )
    for option, key, value in short:
        if value is not None:
            if twice := [k for k in keys if k == key or k.startswith(f"{key}.")]:
                raise ConfigError(f"{option} and --set {twice[0]} say the same thing; drop one of them")
            given.append(f"{key}={json.dumps(value)}")  # a JSON string is a TOML basic string
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)

    if resume is not None:
        if config is not None or out is not None:
            raise ConfigError("--resume goes on with a run's own config; drop CONFIG and --out, change keys with --set")
        now = load(None, given, read_config(RunDir.open(resume)).model_dump(exclude_none=True))
        session = Session.resume(resume, now, _listeners(now, console))
        if session.done:
            session.close()
            has, steps = f"nothing to do: {resume} has", now.train.steps
            more = f"{session.first:,} steps, more than the {steps:,} asked for"
            has += f" its {steps:,} steps" if session.first == steps else f" {more}"
            console.print(f"{has}; add some with --set train.steps=…")
            return
    else:
        chosen = load(config, given)
        check(chosen)  # before text is prepared
        corpus = prepare_corpus(chosen, _stages(console))
        if config is None and not any(s.startswith(("model.", "train.steps")) for s in settings):
            choice = _choice(chosen)
            chosen = choice.config
            console.print(f"chosen    {choice.reason}")
        out = out or time.strftime("runs/train-%Y%m%d-%H%M%S")
        session = Session.start(chosen, out, _listeners(chosen, console), corpus)
    record, skips = {}, []
    for record in session.train():
        skips.append(record["skipped"])
    if (skipped := _skipped(skips)) is not None:
        console.print(f"{skipped}; see mezzo incidents {_path(session)}")
    if session.interrupted:
        console.print(
            f"stopped and saved after step {session.first:,}; to go on: mezzo train --resume {_path(session)}"
        )
        sys.exit(INTERRUPTED)
    _check_held_out(record, _path(session))
    prompt = shlex.quote(session.config.train.sample_prompt)
    console.print(f"done; try: mezzo generate {_path(session)} --prompt {prompt}")
    console.print(f"      or:  mezzo report {_path(session)}")


def _skipped(skips: list[bool]) -> str | None:
    """What to say of a call's steps if more than a tenth were skipped, or the last ones: a loss scale's search skips
    one now and then."""
    count, trailing = sum(skips), len(list(itertools.takewhile(bool, reversed(skips))))
    if count <= len(skips) / 10 and trailing < 2:
        return None
    last = ""
    if trailing >= 2 and count < len(skips):
        last = ", the last ones" if trailing == count else f", the last {trailing:,} among them"
    return f"{count:,} of {len(skips):,} steps were skipped{last}"


def _check_held_out(record: Record, run: str) -> None:
    """raises    NonfiniteError if the run's last evaluation did not end in a number"""
    from mezzo.errors import NonfiniteError

    under, in_fp32 = record.get("val_loss", 0.0), record.get("val_loss_fp32", 0.0)
    if math.isfinite(under):
        return
    if math.isfinite(in_fp32):
        why = f"in float32 it is {in_fp32:.4f}, so a site of the policy overflows: spare it, or take another policy"
    else:
        why = "in float32 too, so the weights are of no use: lower train.lr, or take another policy"
    raise NonfiniteError(f"the held-out loss is {under}: {why}; see mezzo incidents {run}")


def _listeners(config: Config, console: Console) -> Listener:
    """A line for people now and then, and the measures of `observe.*`."""
    from mezzo.cli.console import Progress
    from mezzo.train.listeners import Listeners

    o = config.observe
    if config.train.framework == "torch":
        from mezzo.observe.listener import RunObserver

        return Listeners([Progress(console), RunObserver(o.interval, o.whatif, o.incidents)])
    from mezzo.observe.records import RecordObserver

    return Listeners([Progress(console), RecordObserver(o.incidents)])


def _choice(config: Config) -> Choice:
    from mezzo.train.auto import choose

    if config.train.framework != "torch":
        return choose(config, None)
    from mezzo.train.assemble import choose_device

    return choose(config, choose_device(config.train.device))


def _path(session: Session) -> str:
    return shlex.quote(str(session.run.path))


def _stages(console: Any) -> Any:
    """Says what the preparation of text is doing, once a stage."""
    seen: set[str] = set()

    def report(stage: str, share: float) -> None:
        if stage not in seen:
            seen.add(stage)
            console.print(f"{stage} …")

    return report
