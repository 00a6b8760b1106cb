"""A run directory: everything a run needs to be repeated, resumed and read.

    runs/NAME/
      config.toml        everything needed to run it again; its presence is what makes a folder a run
      policy.toml        the site table's rules, as used
      steps.jsonl        one JSON object a line, one line a record
      sites.jsonl        the same, one line a sampled step: what every site lost (see mezzo.observe)
      incidents/         what went wrong (see mezzo.observe.incidents)
      checkpoints/       see mezzo.train.checkpoint
      .lock              held by the process that trains; the operating system lets go of it when that process dies

Who trains holds the lock; who only reads needs none.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from mezzo.errors import RunError
from mezzo.storage import JsonLines, fsync_folder, write_atomically

STEPS, SITES = "steps.jsonl", "sites.jsonl"
SITES_LIMIT = 64 << 20  # bytes: beyond, every second sample is dropped
_OWN_NAMES = {
    "policy.toml",
    "tokenizer.json",
    "corpus.json",
    STEPS,
    SITES,
    "checkpoints",
    "incidents",
    ".lock",
    ".lock-owner",
}


class RunDir:
    """One run's folder. Make it with `RunDir.create` or `RunDir.open`; close it, or use it in a `with` block."""

    def __init__(self, path: Path, lock: FileLock | None) -> None:
        self.path = path
        self.config_path = path / "config.toml"
        self.policy_path = path / "policy.toml"
        self.checkpoints = path / "checkpoints"
        self.saving = threading.Lock()  # held during a save, so that two threads of one process take turns
        self._lock = lock
        self.logs = {STEPS: JsonLines(path / STEPS), SITES: JsonLines(path / SITES, SITES_LIMIT)}

    @classmethod
    def create(cls, path: str | os.PathLike[str], config_toml: str, policy_toml: str) -> RunDir:
        """Start a new run in the folder `path`, and lock it.

        path          does not exist, is empty, or was left half made by a process that died in here
        config_toml   text of config.toml
        policy_toml   text of policy.toml
        returns       RunDir, locked
        raises        RunError if there is a run already, if the folder holds something else, if another process
                      holds the lock, or if nothing can be written there
        """
        path = Path(path)
        config = path / "config.toml"
        try:
            if path.exists() and not path.is_dir():
                raise RunError(f"{path} is a file; a run needs a folder: choose another --out")
            _refuse_existing(config)
            foreign = sorted(e.name for e in path.iterdir() if not _is_own(e.name)) if path.exists() else []
            if foreign:
                raise RunError(
                    f"{path} is not empty and is not a run (it holds {', '.join(foreign[:3])}"
                    f"{', …' if len(foreign) > 3 else ''}): choose another --out"
                )
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _acquire(path))
            try:
                _refuse_existing(config)  # another process may have made it since
                run.checkpoints.mkdir(exist_ok=True)
                write_atomically(run.policy_path, policy_toml.encode())
                write_atomically(run.config_path, config_toml.encode())
                fsync_folder(path.parent)
            except BaseException:
                run.close()
                raise
        except OSError as error:
            raise RunError(f"cannot make a run in {path}: {error.strerror or error}") from error
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, lock: bool = False) -> RunDir:
        """Open an existing run.

        path      the run's folder
        lock      True to train in it, False to read
        returns   RunDir
        raises    RunError if there is no run, or if `lock` is asked for and another process holds it
        """
        path = Path(path)
        if not (path / "config.toml").is_file():
            raise RunError(f"{path} is not a run: it has no config.toml; give a folder that `mezzo train` made")
        try:
            return cls(path, _acquire(path) if lock else None)
        except OSError as error:
            raise RunError(f"cannot lock the run {path}: {error.strerror or error}") from error

    @property
    def locked(self) -> bool:
        """Whether this object may write to the run."""
        return self._lock is not None

    def config_toml(self) -> str:
        """Text of config.toml; RunError if it cannot be read."""
        return _read(self.config_path)

    def policy_toml(self) -> str:
        """Text of policy.toml; RunError if it cannot be read."""
        return _read(self.policy_path)

    def keep(self, name: str, text: str) -> None:
        """Write one of the run's own text files, such as tokenizer.json, atomically.

        raises    RunError if it cannot be written, or the run is not locked
        """
        self.require_lock(f"write {name}")
        try:
            write_atomically(self.path / name, text.encode())
        except OSError as error:
            raise RunError(f"cannot write {self.path / name}: {error.strerror or error}") from error

    def discard(self) -> None:
        """Undo `create` of a run in which nothing was trained yet, so that the folder can be used again."""
        self.require_lock("discard the run")
        for name in sorted(_OWN_NAMES - {"checkpoints", "incidents", ".lock", ".lock-owner"}):
            (self.path / name).unlink(missing_ok=True)
        self.config_path.unlink(missing_ok=True)
        self.close()

    def append(self, record: Mapping[str, Any], log: str = STEPS) -> None:
        """Append one record to a log of the run, steps.jsonl unless another is named (see `JsonLines.append`).

        raises    RunError if the record cannot be written (then nothing of it is), or the run is not locked
        """
        self.require_lock(f"append to {log}")
        self.logs[log].append(record)

    def records(self, log: str = STEPS) -> list[dict[str, Any]]:
        """The records of a log in order. Lines that cannot be read (such as a torn last one) are left out."""
        return self.logs[log].records()

    def cut_back(self, step: int) -> int:
        """Remove what the logs hold of the steps after `step`; atomic for each.

        step      the step of the checkpoint that training goes on from
        returns   how many lines of steps.jsonl were removed
        raises    RunError if a log cannot be written, or the run is not locked
        """
        self.require_lock("cut the logs back")
        return {name: log.cut_back(step) for name, log in self.logs.items()}[STEPS]

    def sync(self) -> None:
        """Make the records so far durable. A checkpoint is committed only after the records that lead to it."""
        for log in self.logs.values():
            log.sync()

    def require_lock(self, deed: str) -> None:
        """Raise RunError unless this object holds the lock that `deed` needs."""
        if not self.locked:
            raise RunError(f"cannot {deed}: {self.path} was opened to read; open it with lock=True")

    def close(self) -> None:
        """Let go of the lock and the log. May be called twice."""
        for log in self.logs.values():
            log.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_own(name: str) -> bool:
    return name in _OWN_NAMES or (name.startswith(".") and name.endswith(".toml.tmp"))


def _refuse_existing(config: Path) -> None:
    if config.exists():
        raise RunError(
            f"{config.parent} holds a run already: go on with it (mezzo train --resume {config.parent}), "
            "or choose another --out"
        )


def _acquire(path: Path) -> FileLock:
    lock = FileLock(path / ".lock", timeout=0, thread_local=False)
    owner = path / ".lock-owner"
    try:
        lock.acquire()
    except Timeout:
        try:
            who = f" ({owner.read_text().strip()})"
        except OSError:
            who = ""
        raise RunError(
            f"{path} is in use: another process{who} is training in it; wait for it or stop it, or choose another --out"
        ) from None
    try:
        owner.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n")
    except BaseException:
        lock.release()
        raise
    return lock


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
