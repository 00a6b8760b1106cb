"""A config's model without its weights: what every site would be, before anything is trained."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mezzo import hardware
from mezzo.errors import ConfigError
from mezzo.models.gpt_torch import GPT
from mezzo.policy import Policy
from mezzo.torch import Precision
from mezzo.train.config import Config


def preview(config: Config, device: torch.device, policy: str | Policy | None = None) -> Precision:
    """A Precision that has seen one forward pass of a batch, made of tensors without data: ask it for sites and advice.

    policy    another policy than the config's
    raises    ConfigError if the policy cannot be carried out on this model
    """
    shape = config.model.resolve()
    hardware.measure(device.type)  # with real tensors: nothing can be timed below
    with FakeTensorMode(), device:  # tensors that have a shape and a device but no data: any model fits
        precision = Precision(GPT(shape), None, policy or config.resolved_policy())
        idx = torch.zeros(config.train.batch, shape.seq_len, dtype=torch.int64)
        precision.sites(idx, idx)
    return precision


def policies(config: Config) -> list[Policy]:
    """Those of the config's phases in order, or its one policy."""
    schedule = config.schedule()
    return [config.resolved_policy()] if schedule is None else [phase.policy for phase in schedule.phases]


def advice(config: Config, device: torch.device) -> list[str]:
    """What to know before training, of every phase; what cannot train is an error here."""
    found: dict[str, list[int]] = {}
    of = policies(config)
    for number, policy in enumerate(of, 1):
        try:
            texts = preview(config, device, policy).advice()
        except ConfigError as error:
            raise (ConfigError(f"phase {number}: {error}") if len(of) > 1 else error) from None
        for text in texts:
            found.setdefault(text, []).append(number)
    if len(of) == 1:
        return list(found)
    return [f"phase {', '.join(map(str, numbers))}: {text}" for text, numbers in found.items()]
