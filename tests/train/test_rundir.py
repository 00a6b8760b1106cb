"""The run directory: one writer, records that survive a crash, nothing overwritten."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mezzo.errors import RunError
from mezzo.storage import JsonLines, from_json, to_json
from mezzo.train import rundir
from mezzo.train.rundir import RunDir

HOLD = """
import sys, time
from mezzo.train.rundir import RunDir
run = RunDir.open(sys.argv[1], lock=True)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    with RunDir.create(tmp_path / "runs" / "a", 'x = "训练"\n', "[rules]\n") as run:
        yield run


def test_a_created_run_holds_its_config_and_policy_and_can_be_read_while_it_is_locked(run):
    assert run.locked
    reader = RunDir.open(run.path)
    assert not reader.locked
    assert (reader.config_toml(), reader.policy_toml()) == ('x = "训练"\n', "[rules]\n")
    assert run.checkpoints.is_dir()
    assert reader.records() == []


def test_creating_a_run_where_one_is_says_how_to_go_on_with_it(run):
    run.close()
    with pytest.raises(RunError, match=r"holds a run already: go on with it \(mezzo train --resume .*a\)"):
        RunDir.create(run.path, "other", "other")
    assert run.config_toml() == 'x = "训练"\n'


def test_a_folder_with_other_things_in_it_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"is not empty and is not a run \(it holds thesis.tex\)"):
        RunDir.create(tmp_path, "", "")
    assert [e.name for e in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_run_is_refused(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(RunError, match="is a file; a run needs a folder"):
        RunDir.create(tmp_path / "a", "", "")


def test_a_run_that_died_while_it_was_made_can_be_made_again(tmp_path, monkeypatch):
    def die(path, data):
        if path.name == "config.toml":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_atomically", die)
        with pytest.raises(RunError, match=r"cannot make a run in .*: No space left on device"):
            RunDir.create(tmp_path / "a", "", "")
    with pytest.raises(RunError, match=r"is not a run: it has no config\.toml"):
        RunDir.open(tmp_path / "a")
    (tmp_path / "a" / ".config.toml.tmp").write_text("half")
    with RunDir.create(tmp_path / "a", "c", "p") as run:
        assert run.config_toml() == "c"


def test_a_second_lock_in_the_same_process_is_refused_and_close_frees_the_lock(run):
    with pytest.raises(RunError, match=rf"is in use: another process \(pid {os.getpid()} on .*\) is training in it"):
        RunDir.open(run.path, lock=True)
    run.close()
    run.close()
    RunDir.open(run.path, lock=True).close()


def test_a_second_process_is_refused_until_the_first_is_killed_with_kill_9(run):
    run.close()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=f"pid {process.pid} on"):
            RunDir.open(run.path, lock=True)
        assert RunDir.open(run.path).config_toml()
        process.send_signal(signal.SIGKILL)
    RunDir.open(run.path, lock=True).close()


def test_records_come_back_bit_for_bit_and_each_line_is_standard_json(run):
    records = [
        {"step": 1, "loss": 0.1 + 0.2, "skipped": False, "text": "一行\n二行\u2028"},
        {"step": 2, "loss": math.inf, "norms": [-math.inf, 1e-320], "text": "\udc80"},
    ]
    for record in records:
        run.append(record)
    assert RunDir.open(run.path).records() == records
    run.append({"step": 3, "loss": math.nan})
    assert math.isnan(run.records()[2]["loss"])

    def refuse(name):
        raise AssertionError(f"{name} is not standard JSON")

    lines = run.logs["steps.jsonl"].path.read_bytes().splitlines()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [1, 2, 3]
    assert "一行" in run.logs["steps.jsonl"].path.read_text()  # readable with tail -f


def test_a_record_is_in_the_file_before_append_returns(run):
    run.append({"step": 1})
    assert run.logs["steps.jsonl"].path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"loss": 1.0}, 'a record of steps.jsonl needs an integer "step", not None'),
        ({"step": True}, 'needs an integer "step", not True'),
        ({"step": 1, "at": {"x": Path("y")}}, r"record\.at\.x is of type pathlib"),
        ({"step": 1, "at": {3: 4}}, r"record\.at has the key 3 \(int\): JSON keys are strings"),
    ],
)
def test_a_record_that_json_cannot_hold_is_refused_by_name_and_nothing_is_written(run, record, message):
    with pytest.raises(RunError, match=message):
        run.append(record)
    assert not run.logs["steps.jsonl"].path.exists()


def test_a_reader_may_not_write(run):
    reader = RunDir.open(run.path)
    with pytest.raises(RunError, match="was opened to read; open it with lock=True"):
        reader.append({"step": 1})
    with pytest.raises(RunError, match=r"cannot cut the logs back"):
        reader.cut_back(0)


def test_cut_back_removes_what_lies_after_the_checkpoint_and_appending_goes_on(run):
    for step in range(1, 7):
        run.append({"step": step})
    run.append({"step": 4, "val_loss": 1.0})
    assert run.cut_back(4) == 2
    run.append({"step": 5, "again": True})
    assert [r["step"] for r in run.records()] == [1, 2, 3, 4, 4, 5]
    assert run.cut_back(100) == 0
    assert sorted(p.name for p in run.path.iterdir() if "tmp" in p.name) == []


def test_cut_back_without_a_log_has_nothing_to_do(run):
    assert run.cut_back(3) == 0
    assert not run.logs["steps.jsonl"].path.exists()


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\x00\x00\x00", b'{"step": 3, "text": "\xe8', b"7", b"{}"])
def test_a_torn_last_line_is_tolerated_by_reading_cutting_and_appending(run, torn):
    run.logs["steps.jsonl"].path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [r["step"] for r in run.records()] == [1, 2]
    run.append({"step": 3})
    assert run.logs["steps.jsonl"].path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    run.logs["steps.jsonl"].path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert run.cut_back(1) == 2
    assert run.logs["steps.jsonl"].path.read_bytes() == b'{"step": 1}\n'


def test_a_last_record_that_only_lacks_its_newline_is_kept(run):
    run.logs["steps.jsonl"].path.write_bytes(b'{"step": 1}\n{"step": 2}')
    run.append({"step": 3})
    assert [r["step"] for r in run.records()] == [1, 2, 3]


def test_a_crash_while_cutting_back_leaves_the_old_log_whole(run, monkeypatch):
    for step in range(1, 4):
        run.append({"step": step})
    monkeypatch.setattr(rundir.os, "replace", _no_space)
    with pytest.raises(RunError, match=r"cannot cut .*steps\.jsonl back: No space left on device"):
        run.cut_back(1)
    assert [r["step"] for r in run.records()] == [1, 2, 3]


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_half_line(run, monkeypatch):
    run.append({"step": 1})
    real = os.write

    def half(descriptor, data):
        if len(data) > 8:
            return real(descriptor, data[:8])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rundir.os, "write", half)
        with pytest.raises(RunError, match=r"cannot append to .*steps\.jsonl: No space left on device"):
            run.append({"step": 2, "loss": 1.25})
    run.append({"step": 3})
    assert run.logs["steps.jsonl"].path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_plain_data_survives_a_round_trip_through_json():
    value = {"a": [1, -0.0, 1e300, None, True], "b": {"c": (2**80, "NaNs")}, "d": -math.inf}
    back = from_json(to_json(value, what="value"))
    assert back == {**value, "b": {"c": [2**80, "NaNs"]}}
    assert math.copysign(1, back["a"][1]) == -1


def test_rundir_imports_no_framework():
    code = "import sys, mezzo.train.rundir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_log_with_a_limit_loses_every_second_record_when_it_has_grown_beyond(tmp_path):
    log = JsonLines(tmp_path / "sites.jsonl", limit=1000)
    for step in range(1, 400):
        log.append({"step": step, "text": "x" * 20})
        assert log.path.stat().st_size <= 1000
    steps = [record["step"] for record in log.records()]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 399)
    assert 8 < len(steps) < 30
    log.close()
