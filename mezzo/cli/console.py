"""What a person sees while a run goes on: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from mezzo.train.listeners import Listener, Record


def clock(seconds: float) -> str:
    """3725 → 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def shown_as_torch(why: str, framework: str) -> str | None:
    """The line above what torch shows of a run that is another framework's; None for one of its own."""
    return None if framework == "torch" else f"shown as PyTorch would run it; {why}"


def describe(info: Record) -> str:
    """The lines before the first step."""
    routes = ", ".join(f"{name} {route}" for name, route in info["routes"].items())
    epochs = info["tokens"] / info["train_tokens"]
    corpus = info["corpus"][:16]
    text = f"{info['train_tokens']:,} tokens to train on, {info['valid_tokens']:,} held out; SHA-256 {corpus}…"
    if info["invalid_utf8"]:
        text += f"\n          {info['invalid_utf8']:,} invalid UTF-8 sequences replaced by U+FFFD"
    if info["skipped_files"]:
        more = len(info["skipped_files"]) - 1
        text += f"\n          not read: {info['skipped_files'][0]}" + (f", and {more:,} more" if more else "")
    return (
        f"model     {info['parameters']:,} parameters\n"
        f"training  {info['steps']:,} steps, {info['tokens']:,} tokens: {epochs:.1f} times the text, "
        f"{info['tokens'] / info['parameters']:.1f} for each parameter\n"
        f"policy    {info['policy']}   ({routes} on {info['device']})\n"
        + "".join(f"phases    {line}\n" for line in info["phases"])
        + f"text      {text}\n"
        f"run       {info['run']}" + "".join(f"\nadvice    {advice}" for advice in info["advice"])
    )


class Progress(Listener):
    """Shows step, loss, validation loss, tokens/s, memory and time left.

    Speed and time left only from the second step on where the first one compiles: under JAX and TensorFlow.

    every     seconds between two lines where the output is no terminal
    """

    def __init__(self, console: Console, label: str = "", every: float = 10.0) -> None:
        self.console, self.label, self.every = console, label, every
        self.live: Live | None = None
        self.steps = self.first = self.since = 0
        self.compiling = False
        self.begin = self.last_line = 0.0
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.phase, self.phases = 1, 0

    def started(self, info: Record) -> None:
        self.steps, self.first = info["steps"], info["first_step"]
        self.since, self.compiling = self.first, info["framework"] != "torch"
        self.phases = len(info["phases"])
        self.message(describe(info))
        if self.first:
            self.message(f"resumed   after step {self.first:,}")
        self.begin = self.last_line = time.perf_counter()
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def record(self, record: Record) -> None:
        if math.isfinite(record["loss"]) and self.loss is not None and math.isfinite(self.loss):
            self.loss = 0.9 * self.loss + 0.1 * record["loss"]
        elif self.loss is None or math.isfinite(record["loss"]):
            self.loss = record["loss"]
        self.val_loss = record.get("val_loss", self.val_loss)
        self.phase = record.get("phase", 1)
        line = self.line(record)
        if record["skipped"]:
            self.message(f"step {record['step']:,} skipped: nonfinite at {record['site']}, loss scale was "
                         f"{record['loss_scale']:g}")  # fmt: skip
        if self.live is not None:
            self.live.update(self._bar(record["step"], line))
        now = time.perf_counter()
        evaluated = "val_loss" in record
        if evaluated or (self.live is None and now - self.last_line >= self.every):
            self.last_line = now
            self.message(line)
        if "sample" in record:
            self.message(f"    {record['sample']!r}")
        if self.compiling:
            self.since, self.begin, self.compiling = record["step"], now, False

    def line(self, record: Record) -> str:
        """One record as a line of text."""
        done, step = record["step"] - self.since, record["step"]
        left = (time.perf_counter() - self.begin) / max(1, done) * (self.steps - step)
        mfu = f"  mfu {record['mfu']:.0%}" if record["mfu"] is not None else ""
        val = "" if self.val_loss is None else f"  val {self.val_loss:.4f}"
        label = f"{self.label}  " if self.label else ""
        phase = f"phase {self.phase}/{self.phases}  " if self.phases else ""
        speed = "" if self.compiling else f"{record['tokens_per_s']:,.0f} tok/s{mfu}  "
        return (
            f"{label}{phase}step {step:>{len(str(self.steps))}}/{self.steps}  loss {self.loss:.4f}{val}  "
            f"{speed}{size(record['memory'])}" + ("" if self.compiling else f"  {clock(left)} left")
        )

    def _bar(self, step: int, line: str) -> RichTable:
        table = RichTable.grid(padding=(0, 1))
        table.add_row(ProgressBar(total=self.steps, completed=step, width=24), Text(line, no_wrap=True))
        return table

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def ended(self, outcome: str) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
