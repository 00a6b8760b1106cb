"""Writing checkpoints: `save` commits one, `BackgroundSaver` does it while training goes on.

The form of a checkpoint, and how it is read, stand in mezzo.train.checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mezzo.errors import CheckpointError, ConfigError, RunError
from mezzo.storage import fsync_folder, to_json
from mezzo.train.arrays import DTYPES, Groups, write_file
from mezzo.train.checkpoint import MANIFEST_VERSION, body_hash, check_meta, entries, read, read_manifest
from mezzo.train.rundir import RunDir

__all__ = ["BackgroundSaver", "Groups", "check_groups", "save"]

_log = logging.getLogger(__name__)
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def save(run: RunDir, step: int, groups: Groups, meta: Mapping[str, Any], *, keep: int) -> Path:
    """Commit a checkpoint; when this returns it survives a kill and a loss of power.

    run       RunDir, locked
    step      optimizer steps taken, 0 or more; a checkpoint of the same step is replaced, later ones are set aside
    groups    group → name → array, or what becomes one (see `Array`), of any strides; each group becomes one file
    meta      plain data kept in the manifest (see `to_json`)
    keep      how many checkpoints to keep, this one included; 1 or more
    returns   the checkpoint's folder
    raises    ConfigError for a bad `keep` or `step`; RunError if the run is not locked; CheckpointError if an array
              or meta cannot be kept, or writing failed (then the older checkpoints are as they were)
    """
    check_arguments(run, step, groups, keep)
    meta = check_meta(meta)
    with run.saving:
        try:
            path = _commit(run, step, groups, meta)
        except OSError as error:
            raise CheckpointError(_reason(step, run, error)) from error
        try:
            _prune(run.checkpoints, step, keep)
        except OSError as error:  # the checkpoint itself is safe
            _log.warning("old checkpoints in %s could not be removed: %s", run.checkpoints, error)
    return path


class BackgroundSaver:
    """Saves checkpoints in a thread. One copy of the state is taken at `submit`, into buffers that are reused.

    A save that fails is reported and training goes on; one that is still running when the next is due delays it.
    For a last, synchronous save (on SIGTERM, say): `close()`, then `save(...)` at a step boundary, never from within
    the signal handler.

    run         RunDir, locked
    keep        how many checkpoints to keep
    on_saved    called with (step, path) after a commit, in the writer's thread
    on_failure  called with (step, CheckpointError) after a failure, in the writer's thread; without it the failure is
                logged as an error
    """

    def __init__(
        self,
        run: RunDir,
        *,
        keep: int,
        on_saved: Callable[[int, Path], None] | None = None,
        on_failure: Callable[[int, CheckpointError], None] | None = None,
    ) -> None:
        self._run = run
        self._keep = keep
        self._on_saved = on_saved
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, dict[str, NDArray[Any]]] = {}
        self._error: CheckpointError | None = None
        self._closed = False

    @property
    def saving(self) -> bool:
        """Whether a save is running."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, step: int, groups: Groups, meta: Mapping[str, Any]) -> None:
        """Copy the state and have it written; waits first if a save is still running.

        step, groups, meta   as for `save`; the arrays may change as soon as this returns
        raises               what `save` raises for arguments that cannot be kept; RunError after `close`
        """
        if self._closed:
            raise RunError("this BackgroundSaver is closed: save with mezzo.train.saver.save")
        check_arguments(self._run, step, groups, self._keep)
        plain = check_meta(meta)
        self.wait()
        self._snapshot(groups)
        # Not a daemon: an interpreter that ends by an exception finishes the write.
        self._thread = threading.Thread(target=self._write, args=(step, plain), name=f"mezzo-save-{step}")
        self._thread.start()

    def wait(self) -> CheckpointError | None:
        """Wait until nothing is being saved; returns the error of the last save, None if it succeeded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._error

    def close(self) -> CheckpointError | None:
        """Wait for the save that is running, free the buffers; returns as `wait` does. May be called twice."""
        error = self.wait()
        self._closed = True
        self._buffers = {}
        return error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _snapshot(self, groups: Groups) -> None:
        old, self._buffers = self._buffers, {}
        for group, arrays in groups.items():
            buffers = self._buffers[group] = {}
            for name, array in arrays.items():
                buffer = old.get(group, {}).get(name)
                if buffer is None or buffer.shape != array.shape or buffer.dtype != array.dtype:
                    buffer = np.empty(array.shape, array.dtype)
                np.copyto(buffer, np.asarray(array))
                buffers[name] = buffer

    def _write(self, step: int, meta: dict[str, Any]) -> None:
        try:
            path = save(self._run, step, self._buffers, meta, keep=self._keep)
        except Exception as error:  # whatever it is, training goes on
            failure = error if isinstance(error, CheckpointError) else CheckpointError(_reason(step, self._run, error))
            failure.__cause__ = failure.__cause__ or (error if error is not failure else None)
            self._error = failure
            if self._on_failure is not None:
                self._on_failure(step, failure)
            else:
                _log.error("%s", failure)
        else:
            self._error = None
            if self._on_saved is not None:
                self._on_saved(step, path)


def _reason(step: int, run: RunDir, error: Exception) -> str:
    why = error.strerror or error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return (
        f"the checkpoint of step {step} was not saved in {run.checkpoints}: {why}; "
        "the checkpoints before it are untouched"
    )


def check_arguments(run: RunDir, step: int, groups: Groups, keep: int) -> None:
    """Raise what `save` raises for arguments that cannot be kept, before anything is written."""
    if type(keep) is not int or keep < 1:
        raise ConfigError(f"keep is {keep!r}: it is the number of checkpoints to keep, 1 or more")
    if type(step) is not int or step < 0:
        raise ConfigError(f"step is {step!r}: it is the number of steps taken, 0 or more")
    run.require_lock("save a checkpoint")
    check_groups(groups)


def check_groups(groups: Groups) -> None:
    """Raise CheckpointError unless every group has a usable name and every array can be kept."""
    for group, arrays in groups.items():
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"{group!r} cannot name a group: use letters, digits, '_', '-' and '.'")
        for name, array in arrays.items():
            what = f"{group}: {name}"
            dtype = getattr(array, "dtype", None)
            if not isinstance(dtype, np.dtype):
                raise CheckpointError(f"{what} is a {type(array).__name__}, not an array: plain data goes into meta")
            if name == "__metadata__":
                raise CheckpointError(f"{what}: the safetensors format reserves this name")
            if dtype not in DTYPES:
                possible = ", ".join(known.name for known in DTYPES)
                raise CheckpointError(f"{what} is {dtype}, which cannot be kept; possible: {possible}")


def _commit(run: RunDir, step: int, groups: Groups, meta: dict[str, Any]) -> Path:
    parent = run.checkpoints
    parent.mkdir(exist_ok=True)
    for leftover in parent.glob(".tmp-*"):  # its writer is dead: we hold the run's lock, and `saving`
        shutil.rmtree(leftover, ignore_errors=True)
    final = parent / f"step-{step:06d}"
    temporary = parent / f".tmp-{final.name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        files = {}
        for group, arrays in groups.items():
            size, digest = write_file(temporary / f"{group}.safetensors", arrays)
            files[f"{group}.safetensors"] = {"bytes": size, "sha256": digest}
        body = {"version": MANIFEST_VERSION, "step": step, "files": files, "meta": meta}
        with open(temporary / "manifest.json", "xb") as file:
            file.write(to_json({**body, "sha256": body_hash(body)}, what="manifest", indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(temporary)
        run.sync()
        if final.exists():
            _set_aside(final)
        os.rename(temporary, final)
        fsync_folder(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _set_aside(final: Path) -> None:
    """Make room for a new checkpoint of the same step, so that at no moment there is none that verifies."""
    try:
        read(final)
    except CheckpointError:
        _discard(final)
        return
    aside = final.with_name(f"{final.name}.replaced")
    _discard(aside)
    os.rename(final, aside)


def _discard(path: Path) -> None:
    """Delete a folder; renamed first, so that one which is half deleted looks like no checkpoint."""
    trash = path.with_name(f".tmp-trash-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        os.rename(path, trash)
        shutil.rmtree(trash)


def _prune(parent: Path, step: int, keep: int) -> None:
    """After `step` was committed: set aside what lies ahead of it, delete all but the newest `keep` of the others.

    Those that are visibly broken (manifest, sizes) do not count as kept. What lies ahead is there because training went
    on from an earlier step: had it verified, training would have gone on from it.
    """
    kept: list[int] = []
    for other, path in entries(parent):
        if other > step:
            aside = path.with_name(f"step-{other:06d}.abandoned")
            _discard(aside)
            os.rename(path, aside)
            _log.warning("training went on from before step %d: %s is kept as %s", other, path.name, aside.name)
        elif other not in kept and len(kept) < keep and _looks_whole(path):
            kept.append(other)
        else:
            _discard(path)


def _looks_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True
