"""A training session's torch side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mezzo import hardware
from mezzo.models.gpt_torch import GPT
from mezzo.models.sampling import generate
from mezzo.models.shapes import GPTConfig
from mezzo.policy import Policy, Schedule
from mezzo.policy.site import ROOT
from mezzo.torch import CONTRACT, Phases
from mezzo.train import memory
from mezzo.train.arrays import Groups, Named
from mezzo.train.assemble import choose_device, make_optimizer, make_precision, restore
from mezzo.train.config import Config
from mezzo.train.engine import Pair
from mezzo.train.preview import advice
from mezzo.train.torch_state import (
    as_arrays,
    as_tensors,
    copy_into,
    environment,
    load_optimizer,
    optimizer_tensors,
)
from mezzo.train.torch_steps import TorchOutcome, TorchSteps, evaluate


class TorchEngine:
    """`mezzo.train.engine.Engine` for PyTorch; what it promises stands there.

    steps   what the loop steps with
    """

    def __init__(self, config: Config, shape: GPTConfig) -> None:
        t = config.train
        self.config = config
        self.device = choose_device(t.device)
        self.advice = advice(config, self.device)  # what cannot train is an error before anything is made
        self.peak_flops = hardware.measure_peak(self.device.type)
        memory.reset_peak(self.device)
        resting = memory.in_use(self.device)
        generator = torch.Generator().manual_seed(t.seed)
        self.model = GPT(shape, generator=generator, checkpoint_activations=t.checkpoint_activations)
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.precision = make_precision(self.model, self.optimizer, config)
        for asked in config.observe.whatif:  # a rule that matches nothing is an error now
            Policy.of(asked).check_paths([path or ROOT for path, _ in self.model.named_modules()])
        self.steps = TorchSteps(self._run_model, self.precision, self.optimizer, self.device, t.accumulate, resting)
        self._running: Any = self.model
        self._phases: Phases | None = None
        self._outer_determinism: bool | None = None

    @property
    def policy(self) -> Policy:
        return self.precision.policy

    @property
    def late(self) -> bool:
        return self.steps.late

    def phases(self, schedule: Schedule, probe: Callable[[], Pair], held_out: Callable[[], Iterable[Pair]]) -> Phases:
        self._phases = Phases(
            self.precision,
            schedule.phases,
            schedule.steps,
            loss=lambda: self._running(*self._placed(probe())),
            evaluate=lambda: self.evaluate(held_out())[0],
        )
        return self._phases

    def ready(self) -> None:
        t = self.config.train
        self._outer_determinism = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(
            t.deterministic if t.deterministic is not None else self.device.type == "cpu"
        )
        torch.manual_seed(t.seed)

    def close(self) -> None:
        if self._outer_determinism is not None:
            torch.use_deterministic_algorithms(self._outer_determinism)

    # --- training ---

    def warm(self) -> None:
        if self.config.train.compile:
            self._running = torch.compile(self.model)
            if self._phases is not None:
                self._phases.warm()  # every phase is compiled before the first step

    def step(self, batches: Iterable[Pair], rate: float) -> TorchOutcome:
        return self.steps.step(batches, rate)

    def memory(self) -> int:
        return self.steps.memory()

    def _run_model(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss; uncompiled while a phase calibrates, since compiled code tells of no rounding."""
        calibrates = self._phases is not None and self._phases.phase.calibrate
        return (self.model if calibrates else self._running)(x, y)  # type: ignore[no-any-return]

    def _placed(self, batch: Pair) -> list[Tensor]:
        return [torch.from_numpy(a).to(self.device) for a in batch]

    # --- looking ---

    def loss(self, batch: Pair) -> Tensor:
        return self.model(*self._placed(batch))  # type: ignore[no-any-return]

    def evaluate(self, batches: Iterable[Pair], policy: str | None = None) -> tuple[float, int]:
        if policy is None:
            return evaluate(self.model, batches, self.device)
        with self.precision.using(policy):
            return evaluate(self.model, batches, self.device)

    def sample(self, prompt: Sequence[int], *, tokens: int, seed: int, eot: int, vocab_size: int) -> Iterator[int]:
        self.model.eval()
        try:
            yield from generate(
                self.model, prompt, max_new_tokens=tokens, temperature=0.8, top_k=50, seed=seed,
                eot=eot, vocab_size=vocab_size,
            )  # fmt: skip
        finally:
            self.model.train()

    def damaged(self) -> str | None:
        return next((name for name, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())), None)

    # --- state ---

    def routes(self, policies: Iterable[Policy]) -> dict[str, str]:
        found: dict[str, str] = {}
        for policy in policies:
            found |= self.precision.routes_of(policy)
        return dict(sorted(found.items()))

    def environment(self, routes: dict[str, str]) -> dict[str, Any]:
        return environment(device=self.device, route=routes, contract=CONTRACT, compile=self.config.train.compile)

    def state(self) -> tuple[Groups, dict[str, Any]]:
        optimizer, meta = optimizer_tensors(self.optimizer)
        groups = {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "precision": self.precision.state_dict(),
            "rng": {"torch": torch.get_rng_state()},
        }
        return {group: as_arrays(tensors, group) for group, tensors in groups.items()}, {"optimizer": meta}

    def load(self, group: Callable[[str], Named], groups: Sequence[str], meta: dict[str, Any]) -> list[str]:
        copy_into(self.model.state_dict(), as_tensors(group("model")), "model")
        load_optimizer(self.optimizer, as_tensors(group("optimizer")), meta["optimizer"])
        messages = restore(self.precision, as_tensors(group("precision")), meta["policy"])
        if "rng" in groups:  # other frameworks have no such state; nothing of a GPT's training draws from it
            torch.set_rng_state(as_tensors(group("rng"))["torch"])
        return messages
