"""Plain files that survive a crash: standard JSON with nonfinite numbers, atomic writes, logs of one record a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzo.errors import RunError

# JSON has no nonfinite numbers. protobuf's JSON mapping writes them as these strings, and so do we.
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


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


class JsonLines:
    """A log of records, one JSON object a line, each with an integer "step"; whoever appends is the only one.

    limit   bytes: a file that has grown beyond loses every second record; the first and the last stay
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path, self.limit = path, limit
        self._file: int | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is with the operating system when this returns.

        record    plain data with an integer "step"; nonfinite floats are kept (see `to_json`)
        raises    RunError if the record cannot be written (then nothing of it is)
        """
        if type(record.get("step")) is not int:
            raise RunError(f'a record of {self.path.name} needs an integer "step", not {record.get("step")!r}')
        line = (to_json(record, what="record") + "\n").encode()
        try:
            if self._file is None:
                self._mend()
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            end = os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
            except BaseException:
                os.ftruncate(self._file, end)
                raise
            if self.limit is not None and end + len(line) > self.limit:
                self._thin()
        except OSError as error:
            raise RunError(f"cannot append to {self.path}: {error.strerror or error}") from error

    def records(self) -> list[dict[str, Any]]:
        """The records in order. Lines that cannot be read (such as a torn last one) are left out."""
        try:
            with open(self.path, "rb") as file:
                return [record for line in file if (record := parse_line(line)) is not None]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"cannot read {self.path}: {error.strerror or error}") from error

    def cut_back(self, step: int) -> int:
        """Remove the records after `step`, and lines that cannot be read; atomic.

        returns   how many lines were removed
        raises    RunError if the file cannot be written
        """
        self.close()
        kept: list[bytes] = []
        removed = 0
        try:
            with open(self.path, "rb") as file:
                for line in file:
                    record = parse_line(line)
                    if record is not None and record["step"] <= step:
                        kept.append(line.rstrip(b"\n") + b"\n")
                    else:
                        removed += 1
            if removed:
                write_atomically(self.path, b"".join(kept))
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise RunError(f"cannot cut {self.path} back: {error.strerror or error}") from error
        return removed

    def sync(self) -> None:
        """Make the records so far durable."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """May be called twice; appending opens the log again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _thin(self) -> None:
        self.close()
        with open(self.path, "rb") as file:
            lines = file.readlines()
        last = len(lines) - 1
        kept = [line for at, line in enumerate(lines) if at == 0 or (last - at) % 2 == 0]
        write_atomically(self.path, b"".join(kept))

    def _mend(self) -> None:
        """Cut a last line that a crash tore off, so that the next record does not grow onto it."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            head, _, tail = data.rpartition(b"\n")
            kept = data if parse_line(tail) is not None else head
            write_atomically(self.path, kept + b"\n" if kept else b"")


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line of `JsonLines`; None if it is none, such as a torn last line."""
    try:
        record = from_json(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
