"""One step of a torch model, and its evaluation: what the loop asks of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mezzo.torch import Step
from mezzo.train import memory
from mezzo.train.engine import Pair


class Trains(Protocol):
    """What a step needs of a `Precision`."""

    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> Step: ...


@dataclass
class TorchOutcome:
    """A `Step` and the mean of its losses: device tensors until somebody reads them."""

    taken: Step
    mean: Tensor
    tokens: int

    def wait(self) -> None:
        float(self.mean)

    @property
    def loss(self) -> float:
        return float(self.mean)

    @property
    def grad_norm(self) -> float:
        return float(self.taken.grad_norm)

    @property
    def loss_scale(self) -> float:
        return float(self.taken.loss_scale)

    @property
    def skipped(self) -> bool:
        return self.taken.skipped_now()

    @property
    def site(self) -> str | None:
        return self.taken.site

    @property
    def sparsity(self) -> float | None:
        return None if self.taken.sparsity is None else float(self.taken.sparsity)


@dataclass
class TorchSteps:
    """Steps of a model.

    model     x, y → loss, 0-d
    resting   bytes in use before the model was made
    """

    model: Callable[[Tensor, Tensor], Tensor]
    precision: Trains
    optimizer: torch.optim.Optimizer
    device: torch.device
    accumulate: int = 1
    resting: int = 0

    @property
    def late(self) -> bool:
        return self.device.type != "cpu"

    def step(self, batches: Iterable[Pair], rate: float) -> TorchOutcome:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, tokens = [], 0
        for batch in batches:
            x, y = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in batch)
            loss = self.model(x, y)
            self.precision.backward(loss / self.accumulate)
            losses.append(loss.detach())
            tokens += x.numel()
        taken = self.precision.step()
        return TorchOutcome(taken, torch.stack(losses).mean(), tokens)

    def memory(self) -> int:
        return memory.peak(self.device) - self.resting


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Pair], device: torch.device) -> tuple[float, int]:
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
