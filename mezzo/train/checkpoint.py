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
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzo.errors import CheckpointError, RunError
from mezzo.storage import from_json, to_json
from mezzo.train.arrays import Named, read_file
from mezzo.train.rundir import RunDir

__all__ = ["Checkpoint", "environment_differences", "newest", "read"]

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

    def load_group(self, name: str) -> Named:
        """Read one group into memory.

        name      one of `groups`
        returns   name → array, each its own copy, none a view of a mapped file
        raises    CheckpointError if there is no such group or its file cannot be read
        """
        if name not in self.groups:
            raise CheckpointError(f"{self.path} has no group {name!r}, only {', '.join(self.groups) or 'none'}")
        try:
            return read_file(self.path / f"{name}.safetensors")
        except (OSError, ValueError) as error:
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


def check_fit(wanted: Mapping[str, str], source: Mapping[str, str], what: str = "model") -> None:
    """Refuse a group of another model, or of another optimizer.

    wanted    name → what is there, such as float32[4, 3]
    source    the same, of the checkpoint's group
    what      how an error names the target
    raises    CheckpointError that names every missing, extra and wrong array
    """
    missing = [f"missing from the checkpoint: {name}" for name in wanted if name not in source]
    extra = [f"not in the {what}: {name}" for name in source if name not in wanted]
    wrong = [
        f"wrong: {name} is {source[name]} in the checkpoint, {shown} in the {what}"
        for name, shown in wanted.items()
        if name in source and source[name] != shown
    ]
    if problems := missing + extra + wrong:
        raise CheckpointError(
            f"the checkpoint does not fit the {what}, nothing was loaded:\n  "
            + "\n  ".join(problems)
            + "\nuse the config that the checkpoint was trained with"
        )


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
