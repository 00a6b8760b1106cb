"""`mezzo sites`: the site table of a run or a config."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("source", type=click.Path(exists=True), metavar="RUN|CONFIG")
@click.option("--policy", metavar="POLICY", help="Show the table under another policy.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sites(source: str, policy: str | None, as_json: bool) -> None:
    """What every tensor of every layer is rounded to, and how it is carried out on this machine.

    Shapes and bytes are those of one call with the config's batch; a site that is met several times says so.

    \b
    Examples:
      mezzo sites runs/first
      mezzo sites config.toml --policy "bf16; head:*=float32" --json
    """
    rows = _rows(source, policy)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from mezzo.cli.console import size

    table = Table("site", "shape", "format", "route", "bytes", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        shape = "×".join(map(str, row.shape)) + (f"  ({row.calls} calls)" if row.calls > 1 else "")
        table.add_row(row.site, shape, row.format, row.route, size(row.bytes) if row.bytes else "")
    width = None if Console().is_terminal else 140
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def _rows(source: str, policy: str | None) -> list[Any]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mezzo.models.gpt_torch import GPT
    from mezzo.torch import Precision
    from mezzo.train.config import load
    from mezzo.train.rundir import RunDir
    from mezzo.train.session import choose_device
    from mezzo.train.stored import read_config

    path = Path(source)
    config = read_config(RunDir.open(path)) if path.is_dir() else load(path)
    shape = config.model.resolve()
    device = choose_device(config.train.device)
    with FakeTensorMode(), device:  # tensors that have a shape and a device but no data: any model fits
        model = GPT(shape)
        precision = Precision(model, None, policy or config.resolved_policy())
        idx = torch.zeros(config.train.batch, shape.seq_len, dtype=torch.int64)
        return precision.sites(idx, idx)
