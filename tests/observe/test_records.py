"""Incidents from records alone, as of a framework that measures no sites."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mezzo.observe.incidents import read
from mezzo.observe.records import RecordObserver


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 5.0, "loss_scale": 64.0, "grad_norm": 1.0, "skipped": False} | changes


def attached(path: Path, observer: RecordObserver, told: list[str], records: Any = ()) -> RecordObserver:
    run = SimpleNamespace(path=path, records=lambda: list(records))
    observer.attached(
        SimpleNamespace(precision=None, run=run, policy=lambda: "fp16", message=told.append, losses=lambda step: [0, 0])
    )
    return observer


def hear(observer: RecordObserver, *records: dict[str, Any]) -> list[dict[str, Any]]:
    for one in records:
        observer.add(one)
        observer.record(one)
    return list(records)


def test_a_run_of_skipped_steps_is_one_incident_with_the_site_of_the_record(tmp_path: Path) -> None:
    observer = attached(tmp_path, RecordObserver(), [])
    bad = {"skipped": True, "site": "head:dgrad.out", "phase": 2}
    records = hear(observer, record(1), record(2, **bad), record(3, **bad), record(4), record(5, **bad))
    assert [one.get("incident") for one in records] == [None, "nonfinite", None, None, "nonfinite"]
    (first, second), broken = read(tmp_path)
    assert not broken
    assert (first["steps"], first["last"], first["site"], first["phase"]) == ([2, 3], 3, "head:dgrad.out", 2)
    assert first["what"] == "a gradient was not finite; the step was skipped; first at head:dgrad.out"
    assert (first["policy"], first["scales"], first["batch"]) == (
        "fp16", {"loss_scale": 64.0}, {"step": 2, "accumulate": 2},
    )  # fmt: skip
    assert second["step"] == 5


def test_a_spike_is_told_from_the_records_before_a_resume_too(tmp_path: Path) -> None:
    observer = attached(tmp_path, RecordObserver(), [], [record(step) for step in range(1, 25)])
    assert hear(observer, record(25, loss=9.0))[0]["incident"] == "loss_spike"


def test_an_exception_is_kept_with_its_traceback_and_an_interrupt_is_not(tmp_path: Path) -> None:
    observer = attached(tmp_path, RecordObserver(), [], [record(1)])
    observer.failed(KeyboardInterrupt())
    assert read(tmp_path) == ([], [])
    observer.failed(ValueError("no such token\nmore"))
    ((kept,), _) = read(tmp_path)
    assert (kept["step"], kept["kind"], kept["what"]) == (2, "exception", "ValueError: no such token")
    assert "no such token" in kept["traceback"]


def test_none_are_kept_if_none_are_wanted_and_what_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = attached(tmp_path, RecordObserver(0), [])
    assert "incident" not in hear(observer, record(1, skipped=True))[0]
    observer.failed(ValueError())
    assert read(tmp_path) == ([], [])
    told: list[str] = []
    (tmp_path / "incidents").write_text("a file in its place")
    hear(attached(tmp_path, RecordObserver(), told), record(1, skipped=True))
    assert told
    assert told[0].startswith("NOT WRITTEN: cannot write the incident")
