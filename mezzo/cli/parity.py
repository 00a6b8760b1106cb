"""`mezzo parity`: is a model trained under a policy as good as one trained under another?"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from mezzo.proof.parity import Parity
    from mezzo.proof.statistics import Finding

WORSE, UNDECIDED, INTERRUPTED = 3, 4, 75


@click.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option("--policy", metavar="POLICY", help="Whose quality is in question; the config's own by default.")
@click.option("--against", metavar="POLICY", default="fp32", show_default=True, help="What it is compared with.")
@click.option("--seeds", default=8, show_default=True, help="Pairs of runs at most.")
@click.option("--margin", default="0.25%", show_default=True, help="Gap in held-out loss that does not matter.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Replace one key of the config.")
@click.option("--out", metavar="DIR", type=click.Path(file_okay=False), help="The folder of the proof.")
@click.option("--jobs", type=int, help="Runs at a time; on a CPU one for each core by default.")
def parity(
    config: str | None,
    policy: str | None,
    against: str,
    seeds: int,
    margin: str,
    settings: tuple[str, ...],
    out: str | None,
    jobs: int | None,
) -> None:
    """Train pairs of models under two policies on the same data, and decide whether anything was lost.

    The verdict is equivalent, worse, or not enough evidence (then: how many seeds would settle it), by two one-sided
    tests at 5% on the paired gaps of held-out loss. A control arm shows what chaos alone does. It stops early when the
    answer is clear. Interrupted, the same command with the same --out goes on.

    Ends with code 0 for equivalent, 3 for worse, 4 for not enough evidence, 75 if it was stopped.

    \b
    Examples:
      mezzo parity config.toml --policy bf16 --out proofs/bf16
      mezzo parity --policy nvfp4 --set phase=dmp --seeds 16
      mezzo parity config.toml --policy fp8 --against bf16 --margin 0.5%
    """
    import shlex

    from rich.console import Console

    from mezzo.proof.parity import Parity
    from mezzo.proof.statistics import Plan
    from mezzo.train.config import load

    plan = Plan.of(seeds, _share(margin))
    folder = Path(out or time.strftime("runs/parity-%Y%m%d-%H%M%S"))
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    proof = Parity(load(config, settings), policy, against, plan, folder, jobs)
    console.print(_describe(proof))

    def told(result: dict[str, Any], so_far: Finding | None) -> None:
        loss = f"held-out loss {result['val_loss_fp32']:.4f}" if "failed" not in result else "FAILED"
        gap = (
            f"; gap {so_far.gap:+.3%} in {so_far.n} pair{'s' * (so_far.n > 1)}"
            if so_far is not None and so_far.n
            else ""
        )
        left = _left(proof)
        console.print(f"{result['arm']:9} seed {result['seed']}  {loss}{gap}{left}")

    try:
        finding = None
        for finding in proof.train(told):
            console.print(f"look at {finding.n} of {plan.seeds} pairs: {finding.verdict}")
    except KeyboardInterrupt:
        console.print(f"stopped and saved; to go on, give the same command with --out {shlex.quote(str(folder))}")
        sys.exit(INTERRUPTED)
    assert finding is not None
    paths = proof.write()
    _show(proof, finding, console)
    console.print("\nwritten to " + ", ".join(map(str, paths)))
    sys.exit({"equivalent": 0, "worse": WORSE}.get(finding.verdict, UNDECIDED))


def _share(text: str) -> float:
    from mezzo.errors import ConfigError

    number, percent, rest = text.partition("%")
    try:
        if rest.strip():
            raise ValueError(text)
        share = float(number) / (100 if percent else 1)
    except ValueError:
        raise ConfigError(f"--margin is a share such as 0.25% or 0.0025, got {text!r}") from None
    if share >= 0.05 and not percent:
        raise ConfigError(
            f"--margin {text} would be {share:.0%}; write {text}% for {text} percent, or {share:.0%} if you mean it"
        )
    return share


def _describe(proof: Parity) -> str:
    plan, config = proof.plan, proof.configs["candidate"]
    looks = ", ".join(map(str, plan.looks))
    return (
        f"candidate {proof.candidate}\n"
        f"reference {proof.configs['reference'].resolved_policy()}; control: the same, gradients perturbed by 1e-7\n"
        f"plan      {plan.seeds} pairs of {config.train.steps:,} steps, margin ±{plan.margin:.3%}, "
        f"tests at {plan.alpha:.0%}, looks after {looks} pairs\n"
        f"machine   {proof.jobs} run{'s' * (proof.jobs > 1)} at a time, {proof.threads} "
        f"thread{'s' * (proof.threads > 1)} each\n"
        f"proof     {proof.out}"
    )


def _left(proof: Parity) -> str:
    """Training time to the end of the plan, by that of the runs so far."""
    from mezzo.cli.console import clock

    done = proof.results().values()
    seconds = [result["seconds"] for result in done if "seconds" in result]
    missing = len(proof.configs) * proof.plan.seeds - len(done)
    mean = sum(seconds) / max(1, len(seconds))
    return f"; at most {clock(missing * mean / proof.jobs)} of training left" if seconds and missing else ""


def _show(proof: Parity, finding: Finding, console: Console) -> None:
    from rich.table import Table

    from mezzo.cli.formats import table_console

    summary = proof.summary()
    table = Table("", "seeds", "held-out loss", "bits/byte", "gap", "interval", "time", *(["parsed"] * proof.code),
                  box=None, header_style="bold", title="\nheld-out loss evaluated in float32, on all held-out text",
                  title_justify="left")  # fmt: skip
    base = summary["arms"]["reference"]
    for arm, row in summary["arms"].items():
        if not row["seeds"]:
            continue
        found = row.get("finding")
        gap = [f"{found['gap']:+.3%}", f"{found['low']:+.3%} … {found['high']:+.3%}"] if found else ["", ""]
        parsed = [f"{row['parsed']}/{row['samples']}"] if proof.code else []
        table.add_row(arm, str(row["seeds"]), f"{row['val_loss_fp32']:.4f}", f"{row['val_bits_per_byte']:.4f}", *gap,
                      f"{row['seconds'] / base['seconds']:.2f} ×", *parsed)  # fmt: skip
    table_console().print(table)
    if proof.code:
        console.print("parsed: samples whose whole lines ast.parse accepts", style="dim")
    _show_samples(proof, console)
    console.print(f"\nverdict: {finding.verdict} at a margin of {proof.plan.margin:.3%}, after {finding.n} pairs")
    if finding.note:
        console.print(finding.note)
    if finding.verdict == "not enough evidence" and not finding.note and finding.gap <= -proof.plan.margin:
        console.print(
            f"the candidate looks better than the reference, but the interval reaches {finding.high:+.3%}; more pairs, "
            "planned from the start, would show whether a loss can be excluded"
        )
    elif finding.verdict == "not enough evidence" and not finding.note:
        console.print(
            f"with a gap and a spread as seen here, some {finding.more:,} seeds would settle it (power 80%); plan them "
            "from the start, in a proof of their own" if finding.more is not None else
            "no number of seeds that anybody would run settles it: the gap is as large as the margin. Decide whether "
            "another margin would do, or change the recipe"
        )  # fmt: skip


def _show_samples(proof: Parity, console: Console) -> None:
    """What both models wrote, side by side: the first seed's."""
    from rich.table import Table

    done = proof.results()
    if not all((arm, 0) in done and "samples" in done[arm, 0] for arm in ("reference", "candidate")):
        return
    one, other = done["reference", 0]["samples"], done["candidate", 0]["samples"]
    table = Table(f"reference: {done['reference', 0]['policy']}", f"candidate: {proof.candidate}",
                  title="\nsamples of seed 0, the same prompts and draws", title_justify="left", show_lines=True,
                  expand=True, header_style="bold")  # fmt: skip
    for a, b in list(zip(one, other, strict=False))[::2]:
        table.add_row(_plain(a["text"]), _plain(b["text"]))
    console.print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text("\n".join(text.splitlines()[:8]))
