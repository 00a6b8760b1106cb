"""Torch's side of a checkpoint: its tensors as arrays and back, a model's and an optimizer's state, the environment."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mezzo._version import __version__
from mezzo.errors import CheckpointError
from mezzo.train.arrays import DTYPES, Named
from mezzo.train.checkpoint import check_fit, check_meta

# Dtypes that torch and NumPy do not hand each other, and integers of their width, which they do.
_FOREIGN = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
}
_TORCH = {dtype: (kind, np.dtype(str(plain).removeprefix("torch."))) for kind, (plain, dtype) in _FOREIGN.items()}


class Held:
    """A tensor that becomes an array when somebody asks for it: one on a GPU is copied then, and not kept."""

    def __init__(self, tensor: Tensor, dtype: np.dtype[Any]) -> None:
        self.tensor, self.dtype = tensor, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        host = self.tensor.detach().to("cpu")
        plain = _FOREIGN.get(host.dtype)
        array = host.numpy() if plain is None else host.view(plain[0]).numpy().view(self.dtype)
        return np.array(array, dtype) if copy or dtype not in (None, self.dtype) else array


def as_arrays(tensors: Mapping[str, Tensor], group: str = "model") -> dict[str, Held]:
    """Tensors as what a checkpoint takes; on the CPU they share their memory.

    group     how an error names them
    raises    CheckpointError that names a tensor which cannot be kept
    """
    found = {}
    for name, tensor in tensors.items():
        what = f"{group}: {name}"
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{what} is a {type(tensor).__name__}, not a tensor: plain data goes into meta")
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            raise CheckpointError(f"{what} is not a dense tensor with data ({tensor.layout}, {tensor.device})")
        word = str(tensor.dtype).removeprefix("torch.")
        dtype = next((known for known in DTYPES if known.name == word), None)
        if dtype is None:
            possible = ", ".join(known.name for known in DTYPES)
            raise CheckpointError(f"{what} is {tensor.dtype}, which cannot be kept; possible: {possible}")
        found[name] = Held(tensor, dtype)
    return found


def as_tensors(arrays: Named) -> dict[str, Tensor]:
    """Arrays as CPU tensors that share their memory."""
    found = {}
    for name, array in arrays.items():
        kind, plain = _TORCH.get(array.dtype, (None, None))
        tensor = torch.from_numpy(array if plain is None else array.view(plain))
        found[name] = tensor if kind is None else tensor.view(kind)
    return found


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str = "model") -> None:
    """Copy tensors into place: every tensor of `target` gets the values of `source`'s of that name, bit for bit.

    target    name → tensor, such as a state_dict; on any device
    source    name → tensor, such as a group of a checkpoint
    what      how an error names the target
    raises    CheckpointError that names every missing, extra and wrong tensor; then nothing was changed
    """
    here, there = ({name: _describe(tensor) for name, tensor in tensors.items()} for tensors in (target, source))
    check_fit(here, there, what)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


# What the machine decides rather than the run: these stay as the optimizer at hand has them.
_MACHINE_OPTIONS = {"foreach", "fused", "capturable", "differentiable"}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimizer's state apart into tensors and plain data, without pickle.

    optimizer  any torch optimizer whose state is flat: tensors and plain values, one dict a parameter
    returns    (name → tensor: the state's own, not copies; meta: options, and what belongs to which parameter)
    raises     CheckpointError that names a value which is neither a tensor nor plain data
    """
    tensors: dict[str, Tensor] = {}
    groups = []
    index = 0
    for g, group in enumerate(optimizer.param_groups):
        names = [str(name) for name in group.get("param_names", [])]
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        parameters = []
        for parameter in group["params"]:
            state = dict(optimizer.state.get(parameter, {}))
            parameters.append({"is": _describe(parameter), **_split(state, f"state.{index}", tensors)})
            index += 1
        groups.append({"names": names, "options": _split(options, f"group.{g}", tensors), "parameters": parameters})
    return tensors, check_meta({"optimizer": type(optimizer).__name__, "groups": groups})


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Put back what `optimizer_tensors` took apart, bit for bit, each tensor in its own dtype.

    Unlike `Optimizer.load_state_dict`, nothing is cast to the parameter's dtype: moments in float32 beside weights in
    bfloat16 stay in float32. Options are restored too (lr, betas, …), but for `foreach`, `fused`, `capturable` and
    `differentiable`, which stay as the optimizer at hand has them.

    optimizer  of the same class over the same parameters in the same groups; its state may be empty
    tensors    name → tensor; copied
    meta       plain data
    raises     CheckpointError that names every difference; then nothing was changed
    """
    problems: list[str] = []
    if type(optimizer).__name__ != meta["optimizer"]:
        problems.append(f"the checkpoint is of {meta['optimizer']}, this optimizer is {type(optimizer).__name__}")
    saved, here = meta["groups"], optimizer.param_groups
    if len(saved) != len(here):
        problems.append(f"the checkpoint has {len(saved)} parameter groups, this optimizer has {len(here)}")
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = list(zip(saved, here, strict=False))
    expected = {f"group.{g}.{key}" for g, (then, _) in enumerate(pairs) for key in then["options"]["tensors"]}
    index = 0
    for g, (then, group) in enumerate(pairs):
        entries_, params = then["parameters"], group["params"]
        names = [str(name) for name in group.get("param_names", [])]
        if len(entries_) != len(params):
            problems.append(f"group {g}: {len(entries_)} parameters in the checkpoint, {len(params)} in this optimizer")
        elif then["names"] and names and then["names"] != names:
            differ = [f"{old} / {new}" for old, new in zip(then["names"], names, strict=True) if old != new]
            problems.append(f"group {g}: other parameters (checkpoint / this optimizer): {', '.join(differ)}")
        for i, (entry, parameter) in enumerate(zip(entries_, params, strict=False)):
            if entry["is"] != _describe(parameter):
                name = names[i] if i < len(names) else f"parameter {i}"
                problems.append(f"group {g}: {name} was {entry['is']}, is {_describe(parameter)}")
        for entry in entries_:
            expected |= {f"state.{index}.{key}" for key in entry["tensors"]}
            index += 1
    problems += [f"missing from the checkpoint: {name}" for name in sorted(expected - set(tensors))]
    if len(saved) == len(here):
        problems += [f"not in the optimizer's state: {name}" for name in sorted(set(tensors) - expected)]
    if problems:
        raise CheckpointError(
            "the checkpoint does not fit the optimizer, nothing was loaded:\n  " + "\n  ".join(problems)
        )

    states: dict[Tensor, dict[str, Any]] = {}
    index = 0
    for then, group in pairs:
        for entry, parameter in zip(then["parameters"], group["params"], strict=True):
            values = dict(entry["values"])
            for key in entry["tensors"]:
                values[key] = _place(tensors[f"state.{index}.{key}"], key, parameter, group)
            if values:
                states[parameter] = {key: values[key] for key in entry["order"]}
            index += 1
    optimizer.state.clear()
    optimizer.state.update(states)
    for g, (then, group) in enumerate(pairs):
        for key, value in then["options"]["values"].items():
            if not (key in _MACHINE_OPTIONS and key in group):
                group[key] = tuple(value) if isinstance(value, list) and isinstance(group.get(key), tuple) else value
        for key in then["options"]["tensors"]:
            now = group.get(key)
            group[key] = tensors[f"group.{g}.{key}"].to(now.device if isinstance(now, Tensor) else "cpu", copy=True)


def _split(values: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the tensors among `values` to `tensors`; returns what is needed to put the two together again."""
    found = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    tensors.update({f"{prefix}.{key}": value for key, value in found.items()})
    rest = {key: value for key, value in values.items() if key not in found}
    return {"order": list(values), "tensors": list(found), "values": check_meta(rest, f"the optimizer's {prefix}")}


def _place(value: Tensor, key: str, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A copy where the optimizer wants it: like its parameter, but a step count stays on the CPU unless fused."""
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return value.to("cpu", copy=True)
    if value.shape == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)  # keeps the parameter's strides
    return value.to(parameter.device, copy=True)


def environment(*, device: torch.device | str, route: Any, contract: Any, **more: Any) -> dict[str, Any]:
    """What a resume must share to be bitwise; goes into `meta` under a key of the trainer's choice.

    device    where training runs
    route     plain data that says how each product is carried out
    contract  version of the numerics contract
    more      more of it, such as world_size; plain data
    returns   dict of plain data
    """
    device = torch.device(device)
    here = {
        "framework": "torch",
        "mezzo": __version__,
        "torch": str(torch.__version__),
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "contract": contract,
        "route": route,
    }
    return check_meta(here | more)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"
