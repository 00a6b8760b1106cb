"""`mezzo whatif`: what every site of a trained model would lose under another policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from mezzo.models.gpt_torch import GPT
    from mezzo.observe.whatif import Answer
    from mezzo.policy import Policy
    from mezzo.train.checkpoint import Checkpoint
    from mezzo.train.config import Config

ROWS = 20


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False), metavar="RUN|CHECKPOINT")
@click.option("--policy", required=True, metavar="POLICY", help="The policy to ask about.")
@click.option("--batches", default=2, show_default=True, type=click.IntRange(min=1), help="Batches that are measured.")
@click.option(
    "--batch",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help=".npy of token ids (rows, tokens + 1) instead of the run's text.",
)
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="The model's config, for a CHECKPOINT outside of its run.",
)
@click.option("--spare", default=5, show_default=True, type=click.IntRange(min=0), help="Worst products to spare.")
@click.option("--all", "everything", is_flag=True, help=f"Every site, not only the {ROWS} worst.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def whatif(
    source: str, policy: str, batches: int, batch: str | None, config: str | None, spare: int, everything: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """What every site would lose under another policy, worst first, without training again.

    The newest checkpoint runs forward and backward in float32, and each tensor that a site of POLICY rounds is
    rounded so, by itself. Any format can be asked for on any machine. Below the table: POLICY with the rules that
    spare the worst products.

    \b
    Examples:
      mezzo whatif runs/first --policy nvfp4
      mezzo whatif runs/first --policy "mxfp8; head:*=bfloat16" --spare 3 --json
      mezzo whatif runs/first/checkpoints/step-000500 --policy fp8 --batch ids.npy
    """
    from mezzo.cli.console import shown_as_torch
    from mezzo.observe.whatif import answer
    from mezzo.policy import Policy
    from mezzo.torch import what_if
    from mezzo.train.stored import framework_of, load_checkpoint

    asked = Policy.of(policy)
    checkpoint, settings = _opened(Path(source), config)
    model, precision = load_checkpoint(checkpoint, settings, "fp32")
    losses = _of_file(Path(batch), model) if batch is not None else _of_run(checkpoint, settings, model, batches)
    model.train()
    scale = _loss_scale(checkpoint, asked)
    found = answer(what_if(precision, [asked], losses, scale), asked, spare)
    under = framework_of(checkpoint.meta)
    if (said := shown_as_torch(f"this run was last trained under {under}", under)) is not None:
        click.echo(said, err=as_json)
    if as_json:
        click.echo(json.dumps(_plain(found, checkpoint, scale), indent=2))
    else:
        _print(found, checkpoint, scale, len(losses), None if everything else ROWS)


def _opened(source: Path, config: str | None) -> tuple[Checkpoint, Config]:
    """The checkpoint, and the config of its model."""
    from mezzo.errors import ConfigError, RunError
    from mezzo.train.checkpoint import newest, read
    from mezzo.train.config import load
    from mezzo.train.rundir import RunDir
    from mezzo.train.stored import read_config

    is_checkpoint = (source / "manifest.json").is_file()
    if not is_checkpoint:
        if config is not None:
            raise ConfigError(f"--config is for a CHECKPOINT; {source} is a run, which has its own: drop it")
        run = RunDir.open(source)
        checkpoint, problems = newest(run)
        if checkpoint is None:
            raise RunError(f"{source} has no usable checkpoint: {'; '.join(problems) or 'nothing was saved there yet'}")
        return checkpoint, read_config(run)
    if config is not None:
        return read(source), load(config)
    around = source.resolve().parent.parent
    if not (around / "config.toml").is_file():
        raise ConfigError(f"{source} lies in no run, so its model's shape is not known: give --config FILE")
    return read(source), read_config(RunDir.open(around))


def _loss_scale(checkpoint: Checkpoint, asked: Policy) -> float | None:
    """The run's own at that step if the policy scales its loss in the same way, else the one that it begins with."""
    from mezzo.policy import Policy
    from mezzo.policy.scale import initial

    if asked.loss_scaling is None:
        return None
    if Policy.of(checkpoint.meta["policy"]).loss_scaling != asked.loss_scaling:
        return float(initial(asked.loss_scaling).scale)
    return float(checkpoint.load_group("precision")["scale"])


def _of_file(path: Path, model: GPT) -> list[Callable[[], Tensor]]:
    import numpy as np
    import torch

    from mezzo.errors import DataError

    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no .npy array of token ids: {error}") from error
    vocabulary, longest = model.config.vocab_size, model.config.seq_len
    good = ids.ndim == 2 and ids.dtype.kind in "iu" and ids.size and 2 <= ids.shape[1] <= longest + 1
    if not good or ids.min() < 0 or ids.max() >= vocabulary:
        raise DataError(
            f"{path} has the shape {ids.shape} and dtype {ids.dtype}; a batch is integers of shape (rows, tokens + 1), "
            f"2 to {longest + 1} columns, from 0 to {vocabulary - 1}"
        )
    device = next(model.parameters()).device
    whole = torch.from_numpy(ids.astype(np.int64)).to(device)
    return [lambda: model(whole[:, :-1], whole[:, 1:])]


def _of_run(checkpoint: Checkpoint, config: Config, model: GPT, count: int) -> list[Callable[[], Tensor]]:
    """The batches that training would take next."""
    import functools

    import torch

    from mezzo.data.batches import Batches
    from mezzo.errors import DataError
    from mezzo.train.corpus import prepare_corpus

    try:
        corpus = prepare_corpus(config)
    except DataError as error:
        raise DataError(f"{error}; the run's text is not needed with --batch FILE") from error
    t, device = config.train, next(model.parameters()).device
    batches = Batches(
        corpus.train, batch=t.batch, seq_len=model.config.seq_len, seed=t.seed,
        vocab_size=corpus.tokenizer.vocab_size,
    )  # fmt: skip

    def loss(number: int) -> Tensor:
        arrays = batches.batch_at(checkpoint.step + number, 0, t.accumulate)
        x, y = (torch.from_numpy(a).to(device) for a in arrays)
        return model(x, y)  # type: ignore[no-any-return]

    return [functools.partial(loss, number) for number in range(count)]


def _plain(found: Answer, checkpoint: Checkpoint, scale: float | None) -> dict[str, Any]:
    from mezzo.storage import to_json

    body = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "policy": str(found.policy),
        "loss_scale": scale,
        "spared": found.spared,
        "sites": {str(site): one.to_dict() for site, one in found.sites},
    }
    return json.loads(to_json(body, what="whatif"))  # type: ignore[no-any-return]


def _print(found: Answer, checkpoint: Checkpoint, scale: float | None, batches: int, rows: int | None) -> None:
    from rich.table import Table

    from mezzo.cli.formats import table_console
    from mezzo.observe.whatif import lossy

    console = table_console()
    console.print(
        f"{checkpoint.path}, {batches} batch{'es' if batches > 1 else ''} in float32; every site as {found.policy} "
        f"would round it{'' if scale is None else f', at a loss scale of {scale:g}'}:\n",
        soft_wrap=True,
    )
    table = Table("site", "format", "SQNR dB", "underflow", "overflow", "worst block dB", box=None, pad_edge=False,
                  header_style="bold")  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for site, one in found.sites[:rows]:
        m = one.measure
        worst = f"{m.blocks.sqnr[0]:.1f}" if m.blocks else ""
        table.add_row(str(site), str(one.spec), f"{m.sqnr:.1f}", f"{m.underflow:.2%}", f"{m.overflow:.2%}", worst)
    console.print(table)
    if rows is not None and len(found.sites) > rows:
        console.print(f"and {len(found.sites) - rows} more that lose less (--all)", style="dim")
    if scale is None and any(one.spec.fmt.name == "float16" and one.measure.underflow > 0.01 for _, one in found.sites):
        console.print("\nvalues underflow float16: give the policy a loss scale, such as ; loss_scale=dynamic")
    if found.rules:
        console.print(f"\nto spare the worst:\n  --policy {json.dumps(found.spared)}", soft_wrap=True)
    elif not any(lossy(one) for _, one in found.sites):
        console.print("\nno site overflows or has a format below 16 bits under it: nothing to spare")
