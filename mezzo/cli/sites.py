"""`mezzo sites`: the site table of a run or a config."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mezzo.torch import Precision
    from mezzo.train.config import Config


@click.command()
@click.argument("source", type=click.Path(exists=True), metavar="RUN|CONFIG")
@click.option("--policy", metavar="POLICY", help="Show the table under another policy.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sites(source: str, policy: str | None, as_json: bool) -> None:
    """What every tensor of every layer is rounded to, and how it is carried out on this machine.

    Shapes and bytes are those of one call with the config's batch; a site that is met several times says so. Below the
    table: what to know before training. A run with phases has a table for each: the sites that change there.

    \b
    Examples:
      mezzo sites runs/first
      mezzo sites config.toml --policy "bf16; head:*=float32" --json
    """
    config, said = _opened(Path(source))
    phases = _previews(config, policy)
    if said is not None:
        click.echo(said, err=as_json)
    if as_json:
        tables = [[asdict(row) for row in one.sites()] for one in phases]
        several = [
            {"phase": number, "policy": str(one.policy), "sites": table}
            for number, (one, table) in enumerate(zip(phases, tables, strict=True), 1)
        ]
        click.echo(json.dumps(tables[0] if len(tables) == 1 else several, indent=2))
        return
    from rich.table import Table

    from mezzo.cli.console import size
    from mezzo.cli.formats import table_console

    console = table_console()
    for number, precision in enumerate(phases, 1):
        title = f"phase {number} of {len(phases)}: {precision.policy}" if len(phases) > 1 else None
        table = Table("site", "shape", "format", "route", "bytes in format", box=None, pad_edge=False,
                      header_style="bold", title=title, title_justify="left")  # fmt: skip
        before = {row.site: row for row in phases[number - 2].sites()} if number > 1 else {}
        for row in precision.sites():
            if before.get(row.site) != row:
                shape = "×".join(map(str, row.shape)) + (f"  ({row.calls} calls)" if row.calls > 1 else "")
                table.add_row(row.site, shape, row.format, row.route, size(row.bytes) if row.bytes else "")
        console.print(table)
        if number > 1:
            console.print("all other sites are as in the phase before", style="dim")
        for text in precision.advice():
            console.print(f"\n{text}", soft_wrap=True)


def _opened(path: Path) -> tuple[Config, str | None]:
    """A run's config or a file's, and what to say if it is another framework's."""
    from mezzo.cli.console import shown_as_torch
    from mezzo.train.config import load
    from mezzo.train.rundir import RunDir
    from mezzo.train.stored import read_config, trained_under

    if not path.is_dir():
        config = load(path)
        return config, shown_as_torch(f"this config trains under {config.train.framework}", config.train.framework)
    run = RunDir.open(path)
    config = read_config(run)
    if (last := trained_under(run)) is not None:
        return config, shown_as_torch(f"this run was last trained under {last}", last)
    return config, shown_as_torch(f"this run is to train under {config.train.framework}", config.train.framework)


def _previews(config: Config, policy: str | None) -> list[Precision]:
    """One for each phase."""
    from mezzo.train.assemble import choose_device
    from mezzo.train.preview import policies, preview

    device = choose_device(config.train.device)
    return [preview(config, device, one) for one in ([policy] if policy is not None else policies(config))]
