"""The training loop. It knows a model, batches and a `Precision`; who wants to know more listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mezzo.torch import Step
from mezzo.train import memory
from mezzo.train.listeners import Listener, Record


class Trains(Protocol):
    """What the loop needs of a `Precision`."""

    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> Step: ...


@dataclass
class Loop:
    """One run of training, from step `first` on.

    model       x, y → loss, 0-d
    batch_at    (step, micro) → x, y as int64 arrays (B, T); a pure function
    rate_at     step → learning rate
    each_step   called as (step, record) between the record's making and its handing out, at a step boundary:
                evaluation, samples, checkpoints add to the record there
    stop        asked after each step; true ends the run early
    """

    model: Callable[[Tensor, Tensor], Tensor]
    precision: Trains
    optimizer: torch.optim.Optimizer
    batch_at: Callable[[int, int], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
    rate_at: Callable[[int], float]
    listener: Listener
    device: torch.device
    accumulate: int = 1
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    resting: int = 0
    each_step: Callable[[int, Record], None] = lambda step, record: None
    due: Callable[[int], bool] = lambda step: False
    stop: Callable[[], bool] = lambda: False

    def run(self, first: int, steps: int) -> Iterator[Record]:
        """Train steps `first` … `steps` - 1; yields each record after the listeners had it.

        On a GPU a record is read one step late, so that the host never waits for the step it has just queued.
        """
        pending: tuple[int, Tensor, Step, float, int] | None = None
        begin, each = time.perf_counter(), 0.0
        for step in range(first, steps):
            rate = self.rate_at(step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = []
            tokens = 0
            for micro in range(self.accumulate):
                x, y = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in self.batch_at(step, micro))
                loss = self.model(x, y)
                self.precision.backward(loss / self.accumulate)
                losses.append(loss.detach())
                tokens += x.numel()
            outcome = self.precision.step()
            waiting, pending = pending, (step, torch.stack(losses).mean(), outcome, rate, tokens)
            last = step + 1 == steps or self.stop()
            at_once = not self.late or last or self.due(step + 1)
            entries = [entry for entry in (waiting, pending if at_once else None) if entry is not None]
            if entries:
                float(entries[-1][1])  # waits until the device has done these steps
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
        return self.device.type != "cpu"

    def _record(self, step: int, loss: Tensor, outcome: Step, rate: float, tokens: int, seconds: float) -> Record:
        speed = tokens / seconds
        record: Record = {
            "step": step + 1,
            "loss": float(loss),
            "lr": rate,
            "grad_norm": float(outcome.grad_norm),
            "loss_scale": float(outcome.loss_scale),
            "skipped": outcome.skipped_now(),
            "tokens": (step + 1) * tokens,
            "tokens_per_s": speed,
            "mfu": self.flops_per_token * speed / self.peak_flops if self.peak_flops else None,
            "memory": memory.peak(self.device) - self.resting,
        }
        if outcome.sparsity is not None:
            record["sparsity"] = float(outcome.sparsity)
        if record["skipped"]:
            record["site"] = outcome.site
        return record


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterator[tuple[Any, Any]], device: torch.device) -> tuple[float, int]:
    """Mean cross-entropy over all targets, and how many there were."""
    total, count = 0.0, 0
    training = model.training
    model.eval()
    try:
        for x, y in batches:
            loss = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
            total += float(loss) * y.size
            count += y.size
    finally:
        model.train(training)
    return total / count, count
