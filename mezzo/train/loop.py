"""The training loop. It knows batches and what steps on them; who wants to know more listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mezzo.train.engine import Outcome, Pair, Steps
from mezzo.train.listeners import Listener, Record


@dataclass
class Loop:
    """One run of training, from step `first` on.

    engine      takes the steps
    batch_at    (step, micro) → x, y as int64 arrays (B, T); a pure function
    rate_at     step → learning rate
    each_step   called as (step, record) between the record's making and its handing out, at a step boundary:
                evaluation, samples, checkpoints add to the record there
    stop        asked after each step; true ends the run early
    """

    engine: Steps
    batch_at: Callable[[int, int], Pair]
    rate_at: Callable[[int], float]
    listener: Listener
    accumulate: int = 1
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    each_step: Callable[[int, Record], None] = lambda step, record: None
    due: Callable[[int], bool] = lambda step: False
    stop: Callable[[], bool] = lambda: False

    def run(self, first: int, steps: int) -> Iterator[Record]:
        """Train steps `first` … `steps` - 1; yields each record after the listeners had it.

        On a GPU a record is read one step late, so that the host never waits for the step it has just queued.
        """
        pending: tuple[int, Outcome, float] | None = None
        begin, each = time.perf_counter(), 0.0
        for step in range(first, steps):
            rate = self.rate_at(step)
            outcome = self.engine.step((self.batch_at(step, micro) for micro in range(self.accumulate)), rate)
            waiting, pending = pending, (step, outcome, rate)
            last = step + 1 == steps or self.stop()
            at_once = not self.late or last or self.due(step + 1)
            entries = [entry for entry in (waiting, pending if at_once else None) if entry is not None]
            if entries:
                entries[-1][1].wait()
                now = time.perf_counter()
                each, begin = (now - begin) / len(entries), now
            for entry in entries:
                record = self._record(*entry, each)
                self.listener.add(record)
                self.each_step(entry[0] + 1, record)
                self.listener.record(record)
                yield record
            if at_once:
                pending = None
                begin = time.perf_counter()  # the device waited: what listeners took is no part of the next step
            if last:
                return

    @property
    def late(self) -> bool:
        """Whether records are read one step late."""
        return self.engine.late

    def _record(self, step: int, outcome: Outcome, rate: float, seconds: float) -> Record:
        speed = outcome.tokens / seconds
        record: Record = {
            "step": step + 1,
            "loss": outcome.loss,
            "lr": rate,
            "grad_norm": outcome.grad_norm,
            "loss_scale": outcome.loss_scale,
            "skipped": outcome.skipped,
            "tokens": (step + 1) * outcome.tokens,
            "tokens_per_s": speed,
            "mfu": self.flops_per_token * speed / self.peak_flops if self.peak_flops else None,
            "memory": self.engine.memory(),
        }
        if (sparsity := outcome.sparsity) is not None:
            record["sparsity"] = sparsity
        if record["skipped"]:
            record["site"] = outcome.site
        return record
