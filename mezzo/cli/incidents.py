"""`mezzo incidents`: what went wrong in a run."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("run", type=click.Path(file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, all that is kept of each.")
def incidents(run: str, as_json: bool) -> None:
    """What went wrong while RUN trained: nonfinite steps, loss spikes, a falling loss scale, exceptions.

    Each says the step, the site where it began if that is known, and a rule that would spare that site. What is needed
    to look at the step again lies in RUN/incidents.

    \b
    Examples:
      mezzo incidents runs/first
      mezzo incidents runs/first --json
    """
    from rich.console import Console

    from mezzo.observe.incidents import read
    from mezzo.storage import to_json
    from mezzo.train.rundir import RunDir

    found, broken = read(RunDir.open(run).path)
    if as_json:
        click.echo(json.dumps(json.loads(to_json({"incidents": found}, what="incidents")), indent=2))
        return
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    if not found and not broken:
        console.print("no incidents")
    for name in broken:
        console.print(f"cannot be read: {name}")
    for one in found:
        until = f" to {one['last']:,}" if "last" in one else ""
        console.print(f"step {one['step']:,}{until}  {one['kind']}  {one.get('what', '')}")
        details = [f"policy {one['policy']}"] if "policy" in one else []
        details += [f"phase {one['phase']}"] if one.get("phase") else []
        details += [f"loss scale {one['loss_scale']:g}"] if "loss_scale" in one else []
        details += [f"at {one['site']}"] if one.get("site") else []
        console.print("    " + ", ".join(details))
        if one.get("rule"):
            console.print(f"    to spare it: --policy {json.dumps(one['policy'] + '; ' + one['rule'])}")
