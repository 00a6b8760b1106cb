"""Where a model's parameters lie, and the dtype that they rest in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mezzo.errors import ConfigError
from mezzo.policy.site import ROOT
from mezzo.torch.compact import Compact
from mezzo.torch.rounding import carrier
from mezzo.torch.table import Table


def device_of(model: nn.Module) -> torch.device:
    """raises    ConfigError if the parameters lie on several devices, or on one that mezzo does not run on"""
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ConfigError(
            f"the model's parameters lie on several devices ({', '.join(map(str, devices))}); move them to one"
        )
    device = devices.pop() if devices else torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"mezzo runs on cpu and cuda, the model is on {device}; call model.to('cpu') first")
    return device


def make_masters(model: nn.Module, table: Table, optimizers: list[Optimizer], compact: Compact) -> None:
    """Store each floating parameter in its master's dtype; float64 masters take the buffers along."""
    found: list[tuple[str, Tensor, torch.dtype]] = []
    for path, module in model.named_modules():
        master, compute = carrier(table.master(path or ROOT).fmt), table.compute(path or ROOT)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype is not master:
                found.append((f"{path}.{name}" if path else name, parameter, master))
        for _, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.element_size() < compute.itemsize:
                found.append(("", buffer, compute))
    changed = [name for name, _, _ in found if name]
    if changed and any(optimizer.state for optimizer in optimizers):
        raise ConfigError(
            f"the policy stores {changed[0]} in another dtype, but the optimizer already has moments for it; make the "
            "Precision before the first step"
        )
    compact.begin()  # only now: a refused Precision leaves the model as it was
    for _, tensor, dtype in found:
        tensor.data = tensor.data.to(dtype)
