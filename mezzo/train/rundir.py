"""A run directory: everything a run needs to be repeated, resumed and read.

    runs/NAME/
      config.toml        everything needed to run it again; its presence is what makes a folder a run
      policy.toml        the site table's rules, as used
      steps.jsonl        one JSON object a line, one line a record
      checkpoints/       see mezzo.train.checkpoint
      .lock              held by the process that trains; the operating system lets go of it when that process dies

Who trains holds the lock; who only reads needs none.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from mezzo.errors import RunError

# JSON has no nonfinite numbers. protobuf's JSON mapping writes them as these strings, and so do we.
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_OWN_NAMES = {
    "policy.toml",
    "tokenizer.json",
    "corpus.json",
    "steps.jsonl",
    "checkpoints",
    "incidents",
    ".lock",
    ".lock-owner",
}


def to_json(value: Any, *, what: str, indent: int | None = None) -> str:
    """Write plain data as standard JSON that `from_json` reads back bit for bit.

    value     dicts with string keys, lists, tuples (read back as lists), strings, numbers, booleans, None;
              nonfinite floats become the strings NaN, Infinity and -Infinity
    what      how an error names the value
    raises    RunError that names the first entry that is not plain data
    """
    plain = _encode(value, what)
    text = json.dumps(plain, allow_nan=False, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, as in a path that is not UTF-8
        text = json.dumps(plain, allow_nan=False, indent=indent)
    return text


def from_json(text: str | bytes) -> Any:
    """Read what `to_json` wrote.

    raises    ValueError or RecursionError if `text` is not JSON in UTF-8
    """
    return _decode(json.loads(text))


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise RunError(f"{where} has the key {key!r} ({type(key).__name__}): JSON keys are strings")
        return {key: _encode(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    kind = type(value)
    raise RunError(
        f"{where} is of type {kind.__module__}.{kind.__qualname__}, which JSON cannot hold: "
        "give a dict, list, str, int, float, bool or None (for a tensor of one element: .item())"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable (POSIX; Windows has no such call and needs none)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`: after a crash it holds the old bytes or the new ones, never a mixture.

    Only the holder of the run's lock may call it: the temporary name is fixed, so that a leftover is overwritten.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


class RunDir:
    """One run's folder. Make it with `RunDir.create` or `RunDir.open`; close it, or use it in a `with` block."""

    def __init__(self, path: Path, lock: FileLock | None) -> None:
        self.path = path
        self.config_path = path / "config.toml"
        self.policy_path = path / "policy.toml"
        self.log_path = path / "steps.jsonl"
        self.checkpoints = path / "checkpoints"
        self.saving = threading.Lock()  # held during a save, so that two threads of one process take turns
        self._lock = lock
        self._log: int | None = None

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

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record to steps.jsonl; it is with the operating system when this returns.

        record    plain data with an integer "step"; nonfinite floats are kept (see `to_json`)
        raises    RunError if the record cannot be written (then nothing of it is), or the run is not locked
        """
        if type(record.get("step")) is not int:
            raise RunError(f'a record of steps.jsonl needs an integer "step", not {record.get("step")!r}')
        line = (to_json(record, what="record") + "\n").encode()
        self.require_lock("append to steps.jsonl")
        try:
            if self._log is None:
                self._mend_log()
                self._log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            end = os.fstat(self._log).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._log, line[written:])
            except BaseException:
                os.ftruncate(self._log, end)
                raise
        except OSError as error:
            raise RunError(f"cannot append to {self.log_path}: {error.strerror or error}") from error

    def records(self) -> list[dict[str, Any]]:
        """The records of steps.jsonl in order. Lines that cannot be read (such as a torn last one) are left out."""
        try:
            with open(self.log_path, "rb") as file:
                return [record for line in file if (record := _parse(line)) is not None]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"cannot read {self.log_path}: {error.strerror or error}") from error

    def cut_back(self, step: int) -> int:
        """Remove the records after `step`, and lines that cannot be read, from steps.jsonl; atomic.

        step      the step of the checkpoint that training goes on from
        returns   how many lines were removed
        raises    RunError if the file cannot be written, or the run is not locked
        """
        self.require_lock("cut steps.jsonl back")
        self._close_log()
        kept: list[bytes] = []
        removed = 0
        try:
            with open(self.log_path, "rb") as file:
                for line in file:
                    record = _parse(line)
                    if record is not None and record["step"] <= step:
                        kept.append(line.rstrip(b"\n") + b"\n")
                    else:
                        removed += 1
            if removed:
                write_atomically(self.log_path, b"".join(kept))
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise RunError(f"cannot cut {self.log_path} back: {error.strerror or error}") from error
        return removed

    def sync(self) -> None:
        """Make the records so far durable. A checkpoint is committed only after the records that lead to it."""
        if self.log_path.exists():
            with open(self.log_path, "rb") as file:
                os.fsync(file.fileno())

    def require_lock(self, deed: str) -> None:
        """Raise RunError unless this object holds the lock that `deed` needs."""
        if not self.locked:
            raise RunError(f"cannot {deed}: {self.path} was opened to read; open it with lock=True")

    def close(self) -> None:
        """Let go of the lock and the log. May be called twice."""
        self._close_log()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_log(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def _mend_log(self) -> None:
        """Cut a last line that a crash tore off, so that the next record does not grow onto it."""
        if not self.log_path.exists():
            return
        data = self.log_path.read_bytes()
        if data and not data.endswith(b"\n"):
            head, _, tail = data.rpartition(b"\n")
            kept = data if _parse(tail) is not None else head
            write_atomically(self.log_path, kept + b"\n" if kept else b"")


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


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = from_json(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
