"""Checkpoints: written whole or not at all, verified before use, free of pickle.

    checkpoints/step-000500/
      model.safetensors, optimizer.safetensors, …     one file a group of tensors
      manifest.json                                   the step, size and SHA-256 of each file, meta, its own SHA-256

Written by mezzo.train.saver. To commit one: unique temporary folder → write the files, fsync each → write the
manifest, fsync it → fsync the folder → rename → fsync checkpoints/ → only then delete old ones. A process may be killed
between any two of these.

Folders in checkpoints/ that are no checkpoint: `.tmp-…` is being written or deleted (a leftover is removed by the next
save); `step-….abandoned` lay ahead when training went on from an earlier step. `step-….replaced` stands in for a
checkpoint of the same step while it is being replaced.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mezzo._version import __version__
from mezzo.errors import CheckpointError, RunError
from mezzo.storage import from_json, to_json
from mezzo.train.rundir import RunDir

__all__ = [
    "Checkpoint",
    "copy_into",
    "environment",
    "environment_differences",
    "load_optimizer",
    "newest",
    "optimizer_tensors",
    "read",
]

MANIFEST_VERSION = 1
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
_FOLDER = re.compile(r"step-(\d{6,})(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest verified when `read` or `newest` returned it.

    path      its folder
    step      optimizer steps taken
    meta      what `save` was given
    files     file name → (bytes, SHA-256)
    """

    path: Path
    step: int
    meta: dict[str, Any]
    files: dict[str, tuple[int, str]]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of tensors."""
        return tuple(name.removesuffix(".safetensors") for name in self.files)

    def load_group(self, name: str) -> dict[str, Tensor]:
        """Read one group into memory.

        name      one of `groups`
        returns   name → CPU tensor, each its own copy, none a view of a mapped file
        raises    CheckpointError if there is no such group or its file cannot be read
        """
        if name not in self.groups:
            raise CheckpointError(f"{self.path} has no group {name!r}, only {', '.join(self.groups) or 'none'}")
        try:
            with safe_open(self.path / f"{name}.safetensors", framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {name}.safetensors of {self.path}: {error}") from error


def check_meta(meta: Mapping[str, Any], what: str = "meta") -> dict[str, Any]:
    """Return `meta` as it will be read back, or raise CheckpointError that names what JSON cannot hold."""
    try:
        copy: dict[str, Any] = from_json(to_json(dict(meta), what=what))
    except RunError as error:
        raise CheckpointError(str(error)) from None
    return copy


def newest(run: RunDir | str | os.PathLike[str]) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to go on from: the highest step whose manifest verifies, whatever the files' times say.

    run       RunDir, locked or not, or a run's path
    returns   (checkpoint or None, one line for each later checkpoint that did not verify, with the reason)
    raises    RunError if checkpoints/ cannot be listed
    """
    parent = run.checkpoints if isinstance(run, RunDir) else Path(run) / "checkpoints"
    for _ in range(20):  # a reader may meet a trainer that deletes old checkpoints: look again
        problems: list[str] = []
        for _, path in entries(parent):
            try:
                return read(path), problems
            except CheckpointError as error:
                if not path.is_dir():
                    break
                problems.append(str(error))
        else:
            return None, problems
    raise RunError(f"{parent} changes faster than it can be read: wait for the trainer, or stop it")


def read(path: Path) -> Checkpoint:
    """Open one checkpoint and verify it: the manifest against its own hash, every file against the manifest.

    path      the checkpoint's folder
    returns   Checkpoint
    raises    CheckpointError that says what is missing, truncated or corrupt
    """
    checkpoint = read_manifest(path)
    for name, (_, expected) in checkpoint.files.items():
        try:
            with open(path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error.strerror or error}") from error
        if found != expected:
            raise CheckpointError(f"{path}: {name} is corrupt: its SHA-256 is not the manifest's")
    return checkpoint


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str = "model") -> None:
    """Copy tensors into place: every tensor of `target` gets the values of `source`'s of that name, bit for bit.

    target    name → tensor, such as a state_dict; on any device
    source    name → tensor, such as a group of a checkpoint
    what      how an error names the target
    raises    CheckpointError that names every missing, extra and wrong tensor; then nothing was changed
    """
    missing = [f"missing from the checkpoint: {name}" for name in target if name not in source]
    extra = [f"not in the {what}: {name}" for name in source if name not in target]
    wrong = [
        f"wrong: {name} is {_describe(source[name])} in the checkpoint, {_describe(tensor)} in the {what}"
        for name, tensor in target.items()
        if name in source and _describe(source[name]) != _describe(tensor)
    ]
    if problems := missing + extra + wrong:
        raise CheckpointError(
            f"the checkpoint does not fit the {what}, nothing was loaded:\n  "
            + "\n  ".join(problems)
            + "\nuse the config that the checkpoint was trained with"
        )
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


def environment_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say why a resume will not be bitwise: one line a difference, none if it will be.

    saved     `environment(...)` of the checkpoint
    now       `environment(...)` of this process
    returns   lines such as "threads: 2 when saved, 4 now"
    """
    then, here = dict(_flatten(saved)), dict(_flatten(now))
    absent = "not recorded"
    return [
        f"{key}: {then.get(key, absent)} when saved, {here.get(key, absent)} now"
        for key in dict.fromkeys([*then, *here])
        if then.get(key, absent) != here.get(key, absent)
    ]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flatten(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(entry) if isinstance(entry, tuple) else entry


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"


def entries(parent: Path) -> list[tuple[int, Path]]:
    """Folders that claim to be checkpoints, the highest step first, a replaced one after the one in its place."""
    try:
        found = [
            (match, path) for path in parent.iterdir() if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot list {parent}: {error.strerror or error}") from error
    found.sort(key=lambda entry: (-int(entry[0][1]), entry[0][2] is not None))
    return [(int(match[1]), path) for match, path in found]


def read_manifest(path: Path) -> Checkpoint:
    """The manifest, verified against its own hash, the folder's name and the sizes of the files."""
    try:
        body = from_json((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: manifest.json is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: manifest.json is not JSON: {error}") from error
    if not isinstance(body, dict) or body.pop("sha256", None) != body_hash(body):
        raise CheckpointError(f"{path}: manifest.json is corrupt: its content does not match its own SHA-256")
    try:
        return _verify_body(path, body)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: manifest.json is not one that mezzo writes: {error!r}") from error


def _verify_body(path: Path, body: dict[str, Any]) -> Checkpoint:
    if body["version"] != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path}: manifest.json is of version {body['version']}, this mezzo reads {MANIFEST_VERSION}: "
            "use the mezzo that wrote it"
        )
    folder = _FOLDER.fullmatch(path.name)
    if folder and int(folder[1]) != body["step"]:
        raise CheckpointError(f"{path}: manifest.json says step {body['step']}, not what the folder's name says")
    files = {}
    for name, entry in body["files"].items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{path}: manifest.json names {name!r}, which is no plain *.safetensors file name")
        file, size = path / name, entry["bytes"]
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if (found := file.stat().st_size) != size:
            state = "truncated" if found < size else "too long"
            raise CheckpointError(f"{path}: {name} is {state}: {found} bytes instead of {size}")
        files[name] = (size, entry["sha256"])
    return Checkpoint(path, body["step"], body["meta"], files)


def body_hash(body: Any) -> str:
    """SHA-256 of a manifest's content, itself left out; the order of the keys counts."""
    return hashlib.sha256(to_json(body, what="manifest").encode()).hexdigest()
