"""A run directory as plain data for the page. What is missing is None or empty; the page says so.

Nothing here trusts what it reads: a value of the wrong type counts as missing.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mezzo.errors import RunError
from mezzo.report.incidents import read_incidents
from mezzo.report.sites import read_sites
from mezzo.report.thin import SAMPLES, curve, finite, number, smooth, spread
from mezzo.train.rundir import RunDir

Record = dict[str, Any]
CURVES = ("lr", "grad_norm", "loss_scale", "tokens_per_s", "mfu", "memory", "sparsity")
EVALUATED = ("val_loss", "val_loss_fp32", "val_bits_per_byte")
SAMPLE_CHARACTERS = 4000


class Reader:
    """Reads a run again and again, each file only when it has changed.

    run     the run
    name    what the page calls it
    """

    def __init__(self, run: RunDir, name: str) -> None:
        self.run = run
        self.name = name
        self._parts: dict[str, tuple[object, Any]] = {}

    def version(self) -> str:
        """Another text when anything has changed that the page shows."""
        files = ("config.toml", "policy.toml", "corpus.json", "steps.jsonl", "sites.jsonl", "incidents")
        return repr([*(_stamp(self.run.path / file) for file in files), is_running(self.run.path)])

    def read(self) -> Record:
        """All that the page shows of the run."""
        path = self.run.path
        config, problems = read_config(self.run)
        steps = self._part("steps.jsonl", lambda: read_steps(self.run.records()))
        incidents = self._part("incidents", lambda: read_incidents(path))
        planned = _table(config["values"].get("train")).get("steps")
        running = is_running(path)
        last = steps["last"]
        ended = last is not None and isinstance(planned, int) and last >= planned
        status = "finished" if ended else "running" if running else "empty" if last is None else "stopped"
        if status == "stopped" and running is None:
            status = "unknown"
        summary = {
            **steps["summary"],
            "policy": _policy_name(config["values"].get("policy")),
            "model": _text(_table(config["values"].get("model")).get("preset")),
            "incidents": incidents["count"],
        }
        return {
            "name": self.name,
            "path": str(path),
            "status": status,
            "live": running is not False and not ended,
            "planned": planned if isinstance(planned, int) else None,
            **{key: value for key, value in steps.items() if key != "summary"},
            "summary": summary,
            "sites": self._part("sites.jsonl", lambda: read_sites(path / "sites.jsonl")),
            "incidents": incidents,
            "config": config["text"],
            "policy": config["policy"],
            "keys": {key: json.dumps(value) for key, value in flat(config["values"])},
            "reproduce": reproduce(path),
            "problems": problems,
        }

    def _part(self, name: str, read: Callable[[], Any]) -> Any:
        stamp = _stamp(self.run.path / name)
        if name not in self._parts or self._parts[name][0] != stamp:
            self._parts[name] = (stamp, read())
        return self._parts[name][1]


def readers(paths: Sequence[str | os.PathLike[str]]) -> list[Reader]:
    """One for each run; runs whose folders share a name are called by their paths.

    raises    RunError if a path is not a run, or is given twice
    """
    runs = [RunDir.open(path) for path in paths]
    folders = [run.path.resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise RunError(f"{run.path} is given more than once; give each run once")
    names = [folder.name for folder in folders]
    return [
        Reader(run, name if names.count(name) == 1 else str(run.path)) for run, name in zip(runs, names, strict=True)
    ]


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Record]:
    """The data of the page.

    raises    RunError as `readers`
    """
    return [reader.read() for reader in readers(paths)]


def read_steps(records: Sequence[Record]) -> Record:
    """Curves, marks and samples out of the records of steps.jsonl."""
    steps = [record["step"] for record in records]
    loss = [finite(record.get("loss")) for record in records]
    sound = [value if record.get("skipped") is not True else None for value, record in zip(loss, records, strict=True)]
    smoothed = smooth(sound)
    curves = {"loss": curve(steps, loss), "smoothed": curve(steps, smoothed)}
    curves |= {key: curve(steps, [finite(record.get(key)) for record in records]) for key in CURVES}
    evaluated = {
        key: {"x": [r["step"] for r in records if finite(r.get(key)) is not None],
              "y": [number(r[key]) for r in records if finite(r.get(key)) is not None]}
        for key in EVALUATED
    }  # fmt: skip
    written = [record for record in records if isinstance(record.get("sample"), str)]
    skipped = [record for record in records if record.get("skipped") is True]
    bad = [r["step"] for r, value in zip(records, loss, strict=True) if value is None and "loss" in r]
    latest = next((value for value in reversed(smoothed) if value is not None), None)
    return {
        "last": steps[-1] if steps else None,
        "records": len(records),
        "thinned": len(curves["loss"]["x"]) < sum(value is not None for value in loss),
        "curves": curves,
        "evaluated": evaluated,
        "skipped": [[r["step"], number(r.get("loss_scale")), _text(r.get("site"))] for r in skipped],
        "nonfinite": bad,
        "phases": phases(records),
        "samples": [
            {"step": written[i]["step"], "text": written[i]["sample"][:SAMPLE_CHARACTERS]}
            for i in spread(len(written), SAMPLES)
        ],
        "samples_of": len(written),
        "summary": {
            "loss": number(latest),
            **{key: evaluated[key]["y"][-1] if evaluated[key]["y"] else None for key in EVALUATED},
            "tokens": number(records[-1].get("tokens")) if records else None,
            "seconds": _seconds(records),
            "tokens_per_s": _median(records, "tokens_per_s"),
            "mfu": _median(records, "mfu"),
            "memory": number(max((v for r in records if (v := finite(r.get("memory"))) is not None), default=None)),
            "skipped": len(skipped),
        },
    }


def phases(records: Sequence[Record]) -> list[Record]:
    """Stretches of steps with one phase: its number, first and last step, and what ended it."""
    found: list[Record] = []
    for record in records:
        phase = record.get("phase")
        if not isinstance(phase, int):
            continue
        if not found or found[-1]["phase"] != phase:
            found.append({"phase": phase, "begin": record["step"], "end": record["step"], "ended_by": None})
        found[-1]["end"] = record["step"]
        if "entered" in record:
            found[-1]["ended_by"] = _text(record.get("ended_by"))
    return found


def read_config(run: RunDir) -> tuple[Record, list[str]]:
    """Texts of config.toml and policy.toml, the config's values, and what could not be read."""
    problems = []
    found: Record = {"text": None, "policy": None, "values": {}}
    for key, text in (("text", run.config_toml), ("policy", run.policy_toml)):
        try:
            found[key] = text()
        except RunError as error:
            problems.append(str(error))
    try:
        found["values"] = tomllib.loads(found["text"] or "")
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{run.config_path}: {error}")
    return found, problems


def flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and their values."""
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [pair for key, value in values.items() for pair in flat(value, f"{prefix}.{key}" if prefix else key)]


def reproduce(path: Path) -> Record:
    """The commands that train the same run again and go on with it, and what its text was."""
    again = path.with_name(path.resolve().name + "-again") if path.name in ("", ".", "..") else path.with_name(
        path.name + "-again"
    )  # fmt: skip
    commands = [
        ["mezzo", "train", str(path / "config.toml"), "--out", str(again)],
        ["mezzo", "train", "--resume", str(path)],
        ["mezzo", "report", str(path), str(again)],
    ]
    try:
        corpus = json.loads((path / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        corpus = {}
    return {
        "commands": [shlex.join(command) for command in commands],
        "sha256": _text(_table(corpus).get("sha256")),
        "source": _text(_table(corpus).get("source")),
    }


def is_running(path: Path) -> bool | None:
    """Whether a process holds the run's lock; None where that cannot be seen without taking it.

    A shared lock that is let go at once: readers do not disturb one another, and a trainer that starts in that very
    moment is the only one that could meet it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        with open(path / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


def _stamp(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    inside: list[tuple[str, object]] = []
    if path.is_dir():
        inside = sorted((entry.parent.name, _stamp(entry)) for entry in path.glob("*/incident.json"))
    return found.st_mtime_ns, found.st_size, inside


def _policy_name(policy: Any) -> str | None:
    if isinstance(policy, dict):
        return _text(policy.get("recipe")) or _text(policy.get("name"))
    return _text(policy)


def _seconds(records: Sequence[Record]) -> float | int | str | None:
    """Time that the steps took, by their tokens and tokens/s; pauses between are not in it."""
    before, total = 0.0, 0.0
    for record in records:
        tokens, speed = finite(record.get("tokens")), finite(record.get("tokens_per_s"))
        if tokens is not None and speed:
            total += max(0.0, tokens - before) / speed
            before = tokens
    return number(total) if total else None


def _median(records: Sequence[Record], key: str) -> float | int | str | None:
    values = [value for record in records if (value := finite(record.get(key))) is not None]
    return number(statistics.median(values)) if values else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _table(value: Any) -> Record:
    return value if isinstance(value, dict) else {}
