"""`mezzo demo`: bfloat16 beside float32 on real text, on this machine, in four minutes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from mezzo.train.config import Config
    from mezzo.train.session import Session

FORMATS = ("bfloat16", "e4m3@tensor", "mxfp8", "nvfp4", "mxfp4")  # what the trained model is also evaluated in
WHATIF = "nvfp4"  # what the sites of the bf16 run would lose under it
RECIPES = ("bf16", "fp8", "mxfp8", "nvfp4", "mxfp4")  # whose gradients are compared with float32's
SECONDS = 85.0  # for the two arms trained side by side


@click.command()
@click.option("--seconds", default=SECONDS, show_default=True, help="How long the two trainings take together.")
def demo(seconds: float) -> None:
    """Train a small GPT under plain float32 and under mezzo bf16, side by side, on the Python library's sources."""
    from rich.console import Console

    from mezzo import hardware
    from mezzo.cli.demo_frameworks import show as show_frameworks
    from mezzo.train.assemble import choose_device, prepare_corpus
    from mezzo.train.config import load

    console = Console(soft_wrap=True, highlight=False)
    begin = time.perf_counter()
    kind, why = hardware.gpu_status()
    console.print(f"machine   {hardware.processor()}, " + (f"GPU {why}" if kind == "cuda" else f"no GPU used: {why}"))
    base = load(None, ['policy="bf16"', 'data.corpus="stdlib"'])
    console.print("text      the sources of this Python's standard library, tokenised once …")
    corpus = prepare_corpus(base)
    console.print(f"          {corpus.manifest['documents']:,} files; SHA-256 {corpus.sha256}")
    steps = _steps_for(seconds, base, choose_device(base.train.device))
    config = load(
        None,
        [f"train.steps={steps}", f"train.warmup={max(1, steps // 10)}", f"train.eval_every={max(1, steps // 4)}",
         f"train.checkpoint_every={steps}"],
        base.model_dump(exclude_none=True),
    )  # fmt: skip
    session, rows = _train_both(config, corpus, console)
    path = session.run.path
    rows |= _alone(session.config, console, steps)
    console.print(_table(rows, steps, config.train.batch * session.shape.seq_len))
    console.print(_footnotes(rows, steps))
    sample = session.sample("def ", tokens=80)
    _formats(session, console)
    _loss_scaling(session, console)
    _recipes(session, console)
    _sites(session, console)
    show_frameworks(path, console)
    _parity(console)
    console.print("\na sample of what the model writes after this little training:")
    console.print(sample, markup=False)
    console.print(f"\nthe run is {path}; {time.perf_counter() - begin:.0f} s in all. Worth typing next:")
    console.print(f'  .venv/bin/mezzo generate {path} --prompt "class Point"')
    console.print(f"  .venv/bin/mezzo sites {path}")
    console.print(f"  .venv/bin/mezzo whatif {path} --policy mxfp8")
    console.print("  .venv/bin/mezzo recipes nvfp4")
    console.print("  .venv/bin/mezzo parity --policy fp8 --set train.steps=300 --seeds 4")
    console.print("  .venv/bin/mezzo probe")
    console.print('  .venv/bin/mezzo train --data YOUR_TEXTS --policy "bf16; head:*=float32"', markup=False)
    console.print(f"the whole run as a page for your browser, offline: {_page(path)}")


def _steps_for(seconds: float, base: Config, device: Any) -> int:
    """How many steps of two arms fit into that time, from a few steps measured now."""
    from mezzo.models.shapes import flops_per_token
    from mezzo.train.auto import measured_flops

    shape = base.model.resolve()
    rate = measured_flops(shape, base.train.batch, base.resolved_policy(), device)
    step = flops_per_token(shape) * base.train.batch * shape.seq_len / rate
    return max(40, min(1000, int(seconds / (2.2 * step))))


def _train_both(config: Config, corpus: Any, console: Console) -> tuple[Session, dict[str, Any]]:
    """Plain float32 and mezzo bf16, one step of each in turn, so that other load on the machine hits both."""
    import torch

    from mezzo.cli.console import Progress
    from mezzo.cli.demo_arms import plain_loop
    from mezzo.models.gpt_torch import GPT
    from mezzo.observe.listener import RunObserver
    from mezzo.train.listeners import Listeners
    from mezzo.train.session import Session
    from mezzo.train.torch_steps import evaluate

    listener = Listeners([Progress(console, "bf16"), RunObserver(whatif=(WHATIF,))])
    session = Session.start(config, time.strftime("runs/demo-%Y%m%d-%H%M%S"), listener, corpus)
    model = GPT(session.shape, generator=torch.Generator().manual_seed(config.train.seed)).to(session.device)
    plain = plain_loop(config, session.batches.batch_at, model, session.device)
    plain_losses, plain_seconds, losses, seconds = [], [], [], []
    record = {}
    tokens = config.train.batch * session.shape.seq_len
    for record in session.train():
        losses.append(record["loss"])
        seconds.append(tokens / record["tokens_per_s"])
        loss, took = next(plain)
        plain_losses.append(loss)
        plain_seconds.append(took)
        if "val_loss" in record:
            console.print(
                f"fp32  step {record['step']}/{config.train.steps}  loss {statistics.fmean(plain_losses[-20:]):.4f}"
            )
    if session.interrupted:
        raise SystemExit(75)
    val, _ = evaluate(model, session.valid(), session.device)
    rows = {
        "plain": {
            "seconds": statistics.median(plain_seconds),
            "loss": statistics.fmean(plain_losses[-20:]),
            "val": val,
        },
        "mezzo": {
            "seconds": statistics.median(seconds),
            "loss": statistics.fmean(losses[-20:]),
            "val": record["val_loss_fp32"],
        },
    }
    return session, rows


def _alone(config: Config, console: Console, steps: int) -> dict[str, Any]:
    """Each arm alone in a process, for its peak memory; the slow ones also for their speed."""
    found: dict[str, Any] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(config.to_toml())
        file.flush()
        for arm, count in (("plain", 12), ("mezzo", 12), ("autocast", 2), ("fast_cpu", 12)):
            console.print(f"measuring {arm} alone for {count} steps …")
            command = [sys.executable, "-m", "mezzo.cli.demo_arms", file.name, arm, str(count)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise click.ClickException(f"the arm {arm} failed:\n{done.stderr[-2000:]}")
            found[f"{arm} alone"] = json.loads(done.stdout.splitlines()[-1])
    return found


def _table(rows: dict[str, Any], steps: int, tokens: int) -> Any:
    from rich.table import Table

    from mezzo.cli.console import size

    table = Table(
        "", "tok/s", "step time", "peak memory", "train loss", "val loss", box=None, header_style="bold",
        title=f"\n{steps} steps each; one seed: not evidence of equality", title_justify="left",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, arm in (("PyTorch float32", "plain"), ("mezzo bf16", "mezzo")):
        row, ratio = rows[arm], rows[arm]["seconds"] / rows["plain"]["seconds"]
        losses = f"{row['loss']:.4f}", f"{row['val']:.4f}"
        memory = size(rows[f"{arm} alone"]["memory"])
        table.add_row(name, f"{tokens / row['seconds']:,.0f}", f"{ratio:.2f} ×", memory, *losses)
    for name, arm in (("autocast bf16, stock", "autocast alone"), ("… after fast_cpu()", "fast_cpu alone")):
        row, ratio = rows[arm], rows[arm]["seconds"] / rows["plain alone"]["seconds"]
        table.add_row(name, f"{tokens / row['seconds']:,.0f}", f"{ratio:.2f} ×", size(row["memory"]), "–", "–")
    return table


def _footnotes(rows: dict[str, Any], steps: int) -> str:
    from mezzo.cli.console import clock

    stock = rows["autocast alone"]["seconds"]
    return (
        f"step time: over PyTorch float32's, medians of steps run in turn; autocast: 2 and 12 steps alone, projected\n"
        f"(stock: {clock(stock * steps)} for all {steps} steps); peak memory: above resting, each arm alone;\n"
        f"train loss: mean of the last 20 steps; val loss: held-out files, evaluated in float32"
    )


def _formats(session: Session, console: Console) -> None:
    """What the trained model loses when only its forward products' operands are rounded further."""
    import itertools

    from mezzo.torch import helper
    from mezzo.train.torch_steps import evaluate

    losses = {}
    console.print(f"\nrounding {helper.status()}")  # builds the helper, if that was not done on this machine
    for name in ("float32", *FORMATS):
        with session.precision.using(f"fp32; *:input={name}; *:weight={name}"):
            losses[name], _ = evaluate(session.model, itertools.islice(session.valid(), 4), session.device)
    gaps = "  ".join(f"{name} {losses[name] / losses['float32'] - 1:+.2%}" for name in FORMATS)
    console.print(
        f"the same weights with operands in other formats, held-out loss over float32's (4 batches):\n  {gaps}"
    )


def _loss_scaling(session: Session, console: Console) -> None:
    """What share of the gradients float16 loses with and without loss scaling, on the model just trained."""
    import torch

    from mezzo.torch import Precision

    zeros = {}
    session.precision.remove()
    for policy in ("fp32", "fp16", "fp16; loss_scale=none"):
        precision = Precision(session.model, session.optimizer, policy)
        zero = total = 0

        def count(site: Any, before: torch.Tensor, after: torch.Tensor) -> None:
            nonlocal zero, total
            if site.role == "dgrad.a":  # the gradient that reaches each product
                total += after.numel()
                zero += int((after == 0).sum())

        with precision.tap(count):
            for step in range(3):
                x, y = (torch.from_numpy(a).to(session.device) for a in session.batches.batch_at(step))
                precision.backward(session.model(x, y))
                session.optimizer.zero_grad()
        zeros[policy] = zero / total
        precision.remove()
    there = 1 - zeros["fp32"]
    unscaled, scaled = ((zeros[p] - zeros["fp32"]) / there for p in ("fp16; loss_scale=none", "fp16"))
    console.print(
        f"\nfloat16: of the gradient values that float32 has, {unscaled:.2%} become zero without loss scaling, "
        f"{scaled:.2%} with it\n         (what reaches each product, 3 batches at the trained weights)"
    )


def _recipes(session: Session, console: Console) -> None:
    """How far each recipe turns the gradient of one batch, on the model just trained."""
    import torch

    from mezzo.torch import Precision

    x, y = (torch.from_numpy(a).to(session.device) for a in session.batches.batch_at(0))
    gradients = {}
    for policy in ("fp32", *RECIPES):
        precision = Precision(session.model, None, policy)
        precision.backward(session.model(x, y))
        found = [p.grad.flatten() for p in session.model.parameters() if p.grad is not None]
        gradients[policy] = torch.cat(found).double()
        session.model.zero_grad()
        precision.remove()
    cosines = "  ".join(
        f"{policy} {torch.nn.functional.cosine_similarity(gradients['fp32'], gradients[policy], dim=0):.4f}"
        for policy in RECIPES
    )
    console.print(f"recipes: cosine of a batch's whole gradient with float32's, at the trained weights\n  {cosines}")


def _sites(session: Session, console: Console) -> None:
    """What the sites of the run lost, and what they would have lost in another format at the same tensors."""
    from mezzo.observe.incidents import read

    samples = session.run.records("sites.jsonl")
    last = samples[-1]

    def worst(sites: dict[str, Any]) -> str:
        known = {site: one["sqnr"] for site, one in sites.items() if one["sqnr"] is not None}
        site = min(known, key=lambda site: known[site])
        return f"{known[site]:.1f} dB at {site}"

    incidents, _ = read(session.run.path)
    console.print(
        f"sites: {len(last['sites'])} measured in {len(samples)} steps. Least signal-to-noise in step {last['step']}: "
        f"{worst(last['sites'])} in bf16; under {WHATIF} it would be {worst(last['whatif'][WHATIF])}; "
        f"incidents: {len(incidents)}"
    )


def _page(run: Path) -> str:
    """Write the run's page; where it is, or why there is none."""
    from mezzo.errors import MissingExtraError
    from mezzo.report.data import read_runs
    from mezzo.report.page import render, write

    try:
        write(render(read_runs([run])), run / "report.html")
    except MissingExtraError as error:
        return str(error)
    return str(run / "report.html")


def _parity(console: Console) -> None:
    """Pairs of a tiny model in three phases and in float32, and what they allow to say."""
    from pathlib import Path

    from mezzo.proof.parity import Parity
    from mezzo.proof.statistics import Plan
    from mezzo.train.config import load
    from mezzo.train.rundir import RunDir

    steps, pairs = 40, 2
    tiny = ["model.preset=gpt-tiny", f"train.steps={steps}", "train.warmup=6", f"train.checkpoint_every={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        config = load(None, [*tiny, "policy=fp8", "phase=dmp"])
        proof = Parity(config, None, "fp32", Plan.of(pairs, 0.0025), Path(folder) / "proof", jobs=1)
        *_, found = proof.train(lambda result, so_far: None)
        records = RunDir.open(proof.out / "runs" / "candidate-000").records()
    cosine = next(record["calibration"]["gradient_cosine"] for record in records if "calibration" in record)
    console.print(
        f"parity: fp8 in three phases (dmp) against fp32, {pairs} pairs of a tiny model, {steps} steps: gap "
        f"{found.gap:+.3%} ({found.low:+.3%} … {found.high:+.3%}), {found.verdict} at 0.25%\n"
        f"        (fp8; calibration in fp32, where the cosine of both policies' gradients was {cosine:.4f}; fp8 with "
        "wide forward operands)"
    )
