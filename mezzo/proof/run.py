"""One run of a parity proof: train an arm with a seed, or go on with it; evaluate; draw samples."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzo.errors import ConfigError, NonfiniteError, RunError
from mezzo.proof.samples import draw
from mezzo.torch import Precision, Step
from mezzo.train.checkpoint import environment_differences
from mezzo.train.config import Config, parse
from mezzo.train.listeners import Listener
from mezzo.train.rundir import RunDir
from mezzo.train.session import Session
from mezzo.train.stored import read_config
from mezzo.train.torch_engine import TorchEngine

WHOLE = 10**9  # held-out batches: all that there are
PERTURBATION = 1e-7  # of the control arm's gradients, relative (numerics.md, "Proof")


@dataclass(frozen=True)
class Job:
    """What a worker process is told.

    arm        "reference", "candidate" or "control"
    config     of the run, as plain data
    path       its run directory
    threads    of torch
    where      text, machine and versions of the proof's first run, which this one must share; None: it is the first
    """

    arm: str
    seed: int
    config: dict[str, Any]
    path: Path
    threads: int
    where: dict[str, Any] | None = None


class Perturbed:
    """A Precision whose gradients are multiplied by 1 + 1e-7·N(0, 1) before each step: what chaos alone does.

    The noise is a function of seed and step, so a resumed run sees the same.
    """

    def __init__(self, precision: Precision, seed: int) -> None:
        self.precision, self.seed = precision, seed

    def backward(self, loss: Tensor) -> None:
        self.precision.backward(loss)

    def step(self) -> Step:
        noise = torch.Generator().manual_seed((self.seed << 32) + self.precision.steps)
        for p in self.precision.model.parameters():
            if p.grad is not None:
                p.grad.mul_(1 + PERTURBATION * torch.randn(p.shape, generator=noise).to(p.device))
        return self.precision.step()


def run(job: Job) -> dict[str, Any]:
    """Train one arm with one seed, from wherever its run directory is.

    returns   the arm's result, plain data, with "failed": why if it could not be trained, and "interrupted" if a signal
              came; {"interrupted": True} alone if that ended it before its last step (what it trained is saved)
    raises    RunError if text, machine or versions are not those of the proof's other runs
    """
    torch.set_num_threads(job.threads)
    if (job.path / "config.toml").exists():
        session = Session.resume(job.path, read_config(RunDir.open(job.path)), Listener())
    else:
        session = Session.start(parse(job.config), job.path, Listener())
    try:
        if job.arm == "control":
            engine = session.engine
            assert isinstance(engine, TorchEngine), "arms() lets no other framework through"
            engine.steps.precision = Perturbed(engine.precision, session.config.train.seed)
        here = _where(session)
        if job.where is not None and (changed := environment_differences(job.where, here)):
            raise RunError(
                f"the other runs of this proof are not of the same kind ({'; '.join(changed)}), so they make no pair; "
                "go on where it was begun, or choose another --out"
            )
        result = {"arm": job.arm, "seed": job.seed, "phases": session.phased.lines, "where": here}
        try:
            if session.first < session.config.train.steps:
                for _ in session.train():
                    pass
            if session.interrupted:
                return {"interrupted": True}
            result |= _measured(session)
        except NonfiniteError as error:
            result["failed"] = str(error)
        return result | ({"interrupted": True} if session.stopping else {})
    finally:
        session.close()


def _where(session: Session) -> dict[str, Any]:
    """What runs must share to be paired."""
    kinds = ("torch", "machine", "threads", "device", "device_name", "cuda", "contract")
    return {key: session.environment[key] for key in kinds} | {"corpus": session.corpus.sha256}


def _measured(session: Session) -> dict[str, Any]:
    t, records = session.config.train, session.run.records()
    tokens = t.batch * t.accumulate * session.shape.seq_len
    losses = session.evaluate(batches=WHOLE)
    if not isfinite(losses["val_loss_fp32"]):
        raise NonfiniteError(f"its held-out loss is {losses['val_loss_fp32']}")
    try:
        samples = draw(session)
    except NonfiniteError:  # under the policy; whether it was trained is not for a sample to say
        samples = []
    return {
        "policy": str(session.precision.policy),
        **losses,
        "skipped": sum(bool(record["skipped"]) for record in records),
        "seconds": sum(tokens / record["tokens_per_s"] for record in records),
        "samples": samples,
    }


def arms(config: Config, policy: str | None, against: str) -> dict[str, Config]:
    """The configs of the three arms.

    policy    of the candidate; None: the config's own, with its phases. A named schedule of the config applies to it
    against   of the reference and of the control
    raises    ConfigError if a policy cannot be parsed, or phases of the config name their own policies beside `policy`,
              or the framework is not torch, under which gradients are perturbed
    """
    if config.train.framework != "torch":
        raise ConfigError(f"a parity proof trains under torch, not {config.train.framework}; leave train.framework out")
    data = config.model_dump(exclude_none=True)
    flat = {key: value for key, value in data.items() if key != "phase"}
    reference = parse(flat | {"policy": against})
    named = (
        [i for i, one in enumerate(config.phase, 1) if one.policy is not None]
        if isinstance(config.phase, tuple)
        else []
    )
    if policy is not None and named:
        raise ConfigError(
            f"--policy {policy} would not reach phase {named[0]} of the config, which has a policy of its own; drop "
            "one of the two"
        )
    candidate = parse(data if policy is None else data | {"policy": policy})
    return {"reference": reference, "candidate": candidate, "control": reference}


def with_seed(config: Config, seed: int) -> Config:
    """The config of the pair with this number."""
    train = config.train.model_copy(update={"seed": config.train.seed + seed, "keep": 1, "sample_every": 0})
    return config.model_copy(update={"train": train})


def paired(configs: dict[str, Config], seeds: int) -> list[tuple[str, int]]:
    """All runs, pair by pair."""
    return list(chain.from_iterable([(arm, seed) for arm in configs] for seed in range(seeds)))
