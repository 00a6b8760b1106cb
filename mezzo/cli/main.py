"""The command line. Each verb is a file of its own; frameworks are imported when a verb runs, not for its help."""

from __future__ import annotations

import sys

import click

from mezzo._version import __version__
from mezzo.cli.demo import demo
from mezzo.cli.formats import formats
from mezzo.cli.generate import generate
from mezzo.cli.incidents import incidents
from mezzo.cli.parity import parity
from mezzo.cli.probe import probe
from mezzo.cli.recipes import recipes
from mezzo.cli.report import report
from mezzo.cli.sites import sites
from mezzo.cli.train import train
from mezzo.cli.whatif import whatif
from mezzo.errors import MezzoError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mezzo")
def cli() -> None:
    """Train networks in the lowest precision that loses nothing, with the proof on the table.

    \b
    Examples:
      mezzo demo                                      bfloat16 beside float32
      mezzo train --data my-texts/                    a model for ten minutes here
      mezzo train config.toml --set train.steps=2000  from a config file
      mezzo train --resume runs/first                 go on where it stopped
      mezzo generate runs/first --prompt "def main("  continue a text
      mezzo sites runs/first                          what is rounded to what
      mezzo whatif runs/first --policy nvfp4          what each site would lose in other formats
      mezzo incidents runs/first                      what went wrong
      mezzo parity config.toml --policy bf16          was anything lost? pairs of runs, a verdict
      mezzo report runs/first                         how it went, as one HTML page
      mezzo recipes                                   what has a name: from fp64 to nvfp4
      mezzo formats nvfp4                             what a number format can hold
      mezzo probe                                     what this machine runs natively, and how fast
    """


for _command in (demo, formats, generate, incidents, parity, probe, recipes, report, sites, train, whatif):
    cli.add_command(_command)


def main() -> None:
    """Entry point: errors that mezzo raises on purpose become one line and exit code 1."""
    try:
        cli(prog_name="mezzo")
    except MezzoError as error:
        click.echo(f"mezzo: error: {error}", err=True)
        sys.exit(1)
