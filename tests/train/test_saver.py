"""Writing checkpoints: killed at any moment, on a full disk, in the background, nothing that was safe is lost."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mezzo.errors import CheckpointError, ConfigError, RunError
from mezzo.train import saver
from mezzo.train.checkpoint import newest, read
from mezzo.train.rundir import RunDir
from mezzo.train.saver import BackgroundSaver, save

# Imports mezzo once, then forks, for every line "KEEP" on its input, a trainer that saves one checkpoint after another,
# the state and the records a function of the step, until it is killed. Every third step is saved twice.
TRAINERS = """
import os, sys, numpy as np
from mezzo.train.checkpoint import newest
from mezzo.train.rundir import RunDir
from mezzo.train.saver import BackgroundSaver, save

def train(path, keep):
    run = RunDir.open(path, lock=True)
    last, problems = newest(run)
    assert not problems, problems
    step = last.step if last else 0
    run.cut_back(step)
    print("ready", os.getpid(), flush=True)
    background = BackgroundSaver(run, keep=keep)
    w, m = (np.empty(50_000, np.float32) for _ in range(2))
    state = {"model": {"w": w, "n": np.array(0)}, "optimizer": {"m": m}}
    while True:
        step += 1
        run.append({"step": step})
        for arrays in state.values():
            for array in arrays.values():
                array.fill(step)
        if step % 3:
            background.submit(step, state, {"double": 2 * step})
        else:
            background.wait()
            save(run, step, state, {"double": step}, keep=keep)
            save(run, step, state, {"double": 2 * step}, keep=keep)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        train(sys.argv[1], int(line))
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.fixture
def run(tmp_path):
    with RunDir.create(tmp_path / "a", "", "") as run:
        yield run


def state(value, n=1000):
    w, m = np.full(n, value, np.float32), np.full(n, -value, np.float32)
    return {"model": {"w": w}, "optimizer": {"m": m}}


def value(run):
    checkpoint, problems = newest(run)
    assert problems == []
    return checkpoint.load_group("model")["w"][0].item()


def names(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


# Killed


def test_a_trainer_killed_at_random_while_saving_never_loses_its_newest_checkpoint(run):
    run.close()
    chance = random.Random(1)
    before = 0
    command = [sys.executable, "-c", TRAINERS, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainers:
        assert trainers.stdin is not None
        assert trainers.stdout is not None
        for keep in [1, 3] * 8:
            trainers.stdin.write(f"{keep}\n")
            trainers.stdin.flush()
            ready, pid = trainers.stdout.readline().split()
            assert ready == "ready"
            time.sleep(chance.uniform(0.0, 0.15))
            os.kill(int(pid), signal.SIGKILL)
            assert trainers.stdout.readline() == "dead\n"
            checkpoint, problems = newest(run.path)
            assert problems == []
            if checkpoint is None:  # killed before the first was whole
                assert before == 0
                continue
            step = checkpoint.step
            assert step >= before  # what was committed stays
            groups = {**checkpoint.load_group("model"), **checkpoint.load_group("optimizer")}
            assert all((array == step).all() for array in groups.values())
            assert checkpoint.meta["double"] in (step, 2 * step)
            assert [record["step"] for record in RunDir.open(run.path).records()][:step] == list(range(1, step + 1))
            before = step
        trainers.stdin.close()
    assert before > 16


class Killed(BaseException):
    """Stands for a kill: nothing may run after it but what a new process does."""


@pytest.mark.parametrize("same_step", [False, True], ids=["next step", "same step"])
def test_a_kill_between_any_two_calls_to_the_system_leaves_a_checkpoint_that_verifies(tmp_path, monkeypatch, same_step):
    step, done = (1 if same_step else 2), False
    for moment in range(100):
        with RunDir.create(tmp_path / str(moment), "", "") as run:
            save(run, 1, state(1), {"n": 1}, keep=1)
            with monkeypatch.context() as patch:
                _die_at(patch, moment)
                try:
                    save(run, step, state(2), {"n": 2}, keep=1)
                    done = True
                except Killed:
                    pass
            assert value(run) in (1.0, 2.0)  # newest() verified it and found no problem
            save(run, 3, state(3), {"n": 3}, keep=1)
            assert names(run) == ["step-000003"]
            if done:
                assert moment >= 10  # two files, eight calls to fsync, rename and rmtree
                return
    raise AssertionError("save makes more calls than this test expects")


def _die_at(patch, moment):
    """Let `moment` calls through, die at the next one, and let none through after it."""
    calls = 0

    def guard(real, cleanup=False):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > moment + 1:
                return None  # a dead process does nothing; only reached from clean-up
            if calls == moment + 1:
                raise Killed
            return real(*args, **kwargs)

        return call

    patch.setattr(saver.os, "fsync", guard(os.fsync))
    patch.setattr(saver.os, "rename", guard(os.rename))
    patch.setattr(saver.shutil, "rmtree", guard(saver.shutil.rmtree))
    patch.setattr(saver, "write_file", guard(saver.write_file))


def test_files_are_durable_before_the_rename_and_old_ones_go_after_it(run, monkeypatch):
    save(run, 1, state(1), {}, keep=1)
    run.append({"step": 1})
    events = []
    real_fsync, real_rename, real_rmtree = os.fsync, os.rename, saver.shutil.rmtree

    def fsync(descriptor):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    def rename(old, new):
        events.append(("rename", Path(new).name))
        real_rename(old, new)

    def rmtree(path, **kwargs):
        events.append(("delete", Path(path).name))
        real_rmtree(path, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(saver.shutil, "rmtree", rmtree)
    save(run, 2, state(2), {}, keep=1)
    assert [(verb, name[:9]) for verb, name in events] == [
        ("fsync", "model.saf"),
        ("fsync", "optimizer"),
        ("fsync", "manifest."),
        ("fsync", ".tmp-step"),
        ("fsync", "steps.jso"),
        ("rename", "step-0000"),
        ("fsync", "checkpoin"),
        ("rename", ".tmp-tras"),
        ("delete", ".tmp-tras"),
    ]


def test_the_temporary_folder_of_a_dead_writer_is_removed_by_the_next_save(run):
    leftover = run.checkpoints / ".tmp-step-000009-4242-abcd"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    save(run, 1, state(1), {}, keep=1)
    assert names(run) == ["step-000001"]


# Which ones are kept


def test_the_newest_few_are_kept(run):
    for step in (5, 10, 15, 20):
        save(run, step, state(step), {}, keep=2)
    assert names(run) == ["step-000015", "step-000020"]
    save(run, 25, state(25), {}, keep=1)
    assert names(run) == ["step-000025"]


def test_a_visibly_broken_checkpoint_does_not_count_as_kept(run):
    for step in (1, 2, 3):
        save(run, step, state(step), {}, keep=3)
    os.truncate(run.checkpoints / "step-000003" / "model.safetensors", 7)
    save(run, 4, state(4), {}, keep=2)
    assert names(run) == ["step-000002", "step-000004"]


def test_what_lies_ahead_when_training_went_on_from_an_earlier_step_is_set_aside_not_deleted(run, caplog):
    for step in (1, 2, 3):
        save(run, step, state(step), {}, keep=3)
    os.truncate(run.checkpoints / "step-000003" / "model.safetensors", 7)
    assert newest(run)[0].step == 2
    save(run, 2, state(22), {}, keep=1)
    assert names(run) == ["step-000002", "step-000003.abandoned"]
    assert value(run) == 22
    assert "training went on from before step 3: step-000003 is kept as step-000003.abandoned" in caplog.text


def test_a_step_saved_again_replaces_its_checkpoint_also_a_corrupt_one(run):
    save(run, 1, state(1), {"n": 1}, keep=1)
    path = save(run, 1, state(2), {"n": 2}, keep=1)
    assert (value(run), newest(run)[0].meta, names(run)) == (2.0, {"n": 2}, ["step-000001"])
    os.truncate(path / "manifest.json", 4)
    save(run, 1, state(3), {"n": 3}, keep=1)
    assert (value(run), names(run)) == (3.0, ["step-000001"])


def test_old_ones_that_cannot_be_deleted_are_logged_and_the_new_one_is_safe(run, monkeypatch, caplog):
    save(run, 1, state(1), {}, keep=1)
    monkeypatch.setattr(saver.shutil, "rmtree", _raise(errno.EACCES))
    save(run, 2, state(2), {}, keep=1)
    assert value(run) == 2.0
    assert "old checkpoints in" in caplog.text
    assert "Permission denied" in caplog.text


# Refused


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"../model": {}}, "'../model' cannot name a group"),
        ({"": {}}, "'' cannot name a group"),
        ({"model": {"w": 1.5}}, "model: w is a float, not an array: plain data goes into meta"),
        ({"model": {"w": [1.5]}}, "model: w is a list, not an array"),
        (
            {"model": {"w": np.zeros(2, np.complex64)}},
            "model: w is complex64, which cannot be kept; possible: float64, .*, bfloat16, .*, bool",
        ),
        ({"model": {"__metadata__": np.zeros(1)}}, "the safetensors format reserves this name"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name_before_anything_is_written(run, groups, message):
    with pytest.raises(CheckpointError, match=message):
        save(run, 1, groups, {}, keep=1)
    with BackgroundSaver(run, keep=1) as background, pytest.raises(CheckpointError, match=message):
        background.submit(1, groups, {})
    assert names(run) == []


def test_bad_arguments_and_a_run_that_is_not_locked_are_refused(run):
    with pytest.raises(ConfigError, match="keep is 0: it is the number of checkpoints to keep, 1 or more"):
        save(run, 1, {}, {}, keep=0)
    with pytest.raises(ConfigError, match="step is -1"):
        save(run, -1, {}, {}, keep=1)
    with pytest.raises(CheckpointError, match=r"meta\.rng is of type numpy\.ndarray"):
        save(run, 1, {}, {"rng": np.zeros(1)}, keep=1)
    with pytest.raises(RunError, match=r"cannot save a checkpoint: .* was opened to read"):
        save(RunDir.open(run.path), 1, {}, {}, keep=1)
    assert names(run) == []


# Failures


def _raise(number):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("where", ["fsync", "rename"])
def test_a_disk_that_is_full_while_saving_is_named_and_the_older_checkpoints_are_untouched(run, monkeypatch, where):
    save(run, 1, state(1), {}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(saver.os, where, _raise(errno.ENOSPC))
        with pytest.raises(
            CheckpointError, match=r"of step 2 was not saved in .*: No space left on device; .* untouched"
        ):
            save(run, 2, state(2), {}, keep=1)
    assert names(run) == ["step-000001"]
    assert value(run) == 1.0
    save(run, 3, state(3), {}, keep=1)
    assert value(run) == 3.0


def test_a_real_write_that_does_not_fit_leaves_no_partial_folder_and_training_goes_on(run):
    save(run, 1, state(1), {}, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # a write past it fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        failures = []
        with BackgroundSaver(run, keep=1, on_failure=lambda *failure: failures.append(failure)) as background:
            background.submit(2, state(2), {})
            error = background.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert "of step 2 was not saved" in str(error)
            assert "File too large" in str(error)
            assert failures == [(2, error)]
            assert names(run) == ["step-000001"]
            background.submit(3, state(3), {})
        assert background.close() is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert value(run) == 3.0


def test_a_full_file_system_leaves_the_checkpoint_that_is_there(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        with RunDir.create(small / "a", "", "") as run:
            save(run, 1, state(1, n=10_000), {}, keep=1)
            with pytest.raises(CheckpointError, match="No space left on device"):
                save(run, 2, state(2, n=40_000), {}, keep=1)
            assert names(run) == ["step-000001"]
            assert value(run) == 1.0
    finally:
        subprocess.run(["umount", str(small)], check=True)


# In the background


def test_the_snapshot_is_taken_at_submit_and_its_buffers_are_used_again(run):
    groups = state(1)
    with BackgroundSaver(run, keep=5) as background:
        background.submit(1, groups, {"n": [1]})
        first = background._buffers["model"]["w"].ctypes.data
        groups["model"]["w"].fill(99)
        background.submit(2, groups, {"n": [2]})
        assert background._buffers["model"]["w"].ctypes.data == first
        groups["model"] = {"w": np.zeros(7, ml_dtypes.bfloat16)}  # and replaced when they no longer fit
        background.submit(3, groups, {})
    assert (read(run.checkpoints / "step-000001").load_group("model")["w"] == 1).all()
    assert (read(run.checkpoints / "step-000002").load_group("model")["w"] == 99).all()
    assert read(run.checkpoints / "step-000003").load_group("model")["w"].dtype == ml_dtypes.bfloat16


def test_a_save_that_is_still_running_delays_the_next(run, monkeypatch):
    real, running, most = saver.save, 0, 0
    gate = threading.Event()

    def slow(*args, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        gate.wait(10)
        path = real(*args, **kwargs)
        running -= 1
        return path

    monkeypatch.setattr(saver, "save", slow)
    saved = []
    background = BackgroundSaver(run, keep=5, on_saved=lambda step, path: saved.append((step, path.name)))
    background.submit(1, state(1), {})
    assert background.saving  # submit came back while it is being written
    threading.Timer(0.2, gate.set).start()
    start = time.monotonic()
    background.submit(2, state(2), {})
    assert time.monotonic() - start > 0.1
    assert background.close() is None
    assert not background.saving
    assert most == 1
    assert saved == [(1, "step-000001"), (2, "step-000002")]
    assert value(run) == 2.0


def test_a_failure_in_the_background_is_logged_when_nobody_listens_and_told_at_close(run, monkeypatch, caplog):
    save(run, 1, state(1), {}, keep=1)
    background = BackgroundSaver(run, keep=1)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(saver.os, "fsync", _raise(errno.EACCES))
        background.submit(2, state(2), {})
        error = background.close()
    assert "of step 2 was not saved" in caplog.text
    assert "Permission denied" in caplog.text
    assert isinstance(error, CheckpointError)
    assert isinstance(error.__cause__, OSError)
    assert value(run) == 1.0
    save(run, 3, state(3), {}, keep=1)  # as the trainer does on SIGTERM
    assert value(run) == 3.0


def test_an_unforeseen_error_in_the_background_is_reported_too(run, monkeypatch):
    failures = []
    with BackgroundSaver(run, keep=1, on_failure=lambda *failure: failures.append(failure)) as background:
        monkeypatch.setattr(saver, "write_file", lambda *_: 1 / 0)
        background.submit(1, state(1), {})
    assert "ZeroDivisionError: division by zero" in str(failures[0][1])
    assert names(run) == []


def test_nothing_is_submitted_after_close(run):
    background = BackgroundSaver(run, keep=1)
    assert background.close() is None
    assert background.close() is None
    with pytest.raises(RunError, match="this BackgroundSaver is closed"):
        background.submit(1, state(1), {})
