"""Reading checkpoints: only what verifies, and to the bit; no framework takes part."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from mezzo.errors import CheckpointError
from mezzo.storage import from_json
from mezzo.train.arrays import DTYPES, bytes_of, read_file
from mezzo.train.checkpoint import body_hash, environment_differences, newest, read
from mezzo.train.rundir import RunDir
from mezzo.train.saver import save


@pytest.fixture
def run(tmp_path):
    with RunDir.create(tmp_path / "a", "", "") as run:
        yield run


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bytes_of(a), bytes_of(b))


def state(step):
    rng = np.random.default_rng(step)
    small = rng.standard_normal(32).astype(ml_dtypes.bfloat16)
    return {
        "model": {"w": rng.standard_normal((64, 32), np.float32), "b": small},
        "optimizer": {"state.0.exp_avg": rng.standard_normal((64, 32), np.float32)},
    }


def save_steps(run, *steps, keep=10):
    return [save(run, step, state(step), {"step": step, "scale": 65536.0}, keep=keep) for step in steps]


# What comes back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_stride_comes_back_to_the_bit(run, dtype):
    raw = np.random.default_rng(1).integers(256, size=24 * dtype.itemsize, dtype=np.uint8)
    x = (raw % 2 if dtype == np.bool_ else raw).view(dtype).reshape(4, 6)  # NaNs with payloads too
    arrays = {"x": x, "t": x.T, "row": x[1:2], "every other": x[:, ::2], "0d": x[2, 3, None].reshape(()), "none": x[:0]}
    arrays["same"], arrays["back"], arrays["wide"] = x, x[::-1], np.broadcast_to(x[0, 0], (3, 2))
    path = save(run, 1, {"model": arrays, "empty": {}}, {}, keep=1)
    checkpoint, problems = newest(run)
    assert problems == []
    assert checkpoint.groups == ("model", "empty")
    loaded = checkpoint.load_group("model")
    assert loaded.keys() == arrays.keys()
    assert all(same(loaded[name], arrays[name]) for name in arrays)
    assert all(array.flags.owndata or array.base.flags.owndata for array in loaded.values())
    assert checkpoint.load_group("empty") == {}
    with safe_open(path / "model.safetensors", framework="numpy") as foreign:  # any reader of safetensors can open it
        assert set(foreign.keys()) == arrays.keys()
        assert all(foreign.get_slice(name).get_dtype() == DTYPES[dtype] for name in arrays)


def test_every_array_of_a_file_is_aligned_for_readers_that_map_it(run):
    arrays = {"a": np.zeros(3, np.uint8), "b": np.zeros(1, ml_dtypes.bfloat16), "c": np.zeros(1)}
    data = (save(run, 1, {"model": arrays}, {}, keep=1) / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    assert all(header[name]["data_offsets"][0] % arrays[name].itemsize == 0 for name in arrays)


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff" * 8, "its header is longer than the file"),
        (b"\x02" + b"\0" * 7 + b"[]", "its header is no table of tensors"),
        (header(w={**GOOD, "dtype": "F6_E3M2"}), "its header says of w"),
        (header(w={"dtype": "F32"}), "its header says of w"),
        (header(w={**GOOD, "data_offsets": [0, 4]}), r"w is float32\[2\] of 8 bytes, and has 4"),
        (header(w=GOOD) + b"1234", "it ends before w does"),
    ],
)
def test_a_file_that_is_not_of_the_format_is_refused(tmp_path, data, message):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / "a.safetensors")


def test_what_another_program_wrote_is_read_and_its_metadata_left_out(tmp_path):
    from safetensors.numpy import save_file

    arrays = {"w": np.arange(6.0).reshape(2, 3), "n": np.array(7)}
    save_file(arrays, tmp_path / "a.safetensors", {"format": "np"})
    found = read_file(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    assert all(same(found[name], arrays[name]) for name in arrays)


FREE = ("session", "saver", "checkpoint", "loop", "config", "stored", "phased", "listeners", "frameworks", "corpus")
LOOK = f"""
import sys
import {", ".join(f"mezzo.train.{name}" for name in FREE)}, mezzo.observe.records, mezzo.cli.console
{{}}
print(sorted({{{{"torch", "jax", "keras", "tensorflow"}}}} & set(sys.modules)))
"""


@pytest.mark.parametrize(("more", "loaded"), [("", "[]"), ("import mezzo.train.torch_engine", "['torch']")])
def test_sessions_configs_and_checkpoints_import_no_framework(more, loaded):
    code = [sys.executable, "-c", LOOK.format(more)]
    assert subprocess.run(code, capture_output=True, text=True, check=True).stdout.strip() == loaded


def test_what_is_loaded_is_a_copy_that_outlives_the_file(run):
    save_steps(run, 1)
    loaded = newest(run)[0].load_group("model")
    for file in (run.checkpoints / "step-000001").iterdir():
        os.truncate(file, 0)  # a mapped tensor would now crash the process with SIGBUS
    assert same(loaded["w"], state(1)["model"]["w"])
    loaded["w"].fill(0)


def test_meta_comes_back_to_the_bit_with_nonfinite_numbers(run):
    meta = {
        "seed": 2**63,
        "best": math.inf,
        "scale": 0.1,
        "rng": "00ff",
        "phase": None,
        "data": {"epoch": 2, "at": [1]},
    }
    save(run, 3, {}, meta, keep=1)
    assert newest(run.path)[0].meta == meta
    assert newest(run.path)[0].step == 3


def test_no_file_of_a_checkpoint_is_a_pickle(run):
    (path,) = save_steps(run, 1)
    assert {file.name for file in path.iterdir()} == {"model.safetensors", "optimizer.safetensors", "manifest.json"}


def test_a_group_that_is_not_there_is_an_error_that_lists_those_that_are(run):
    save_steps(run, 1)
    with pytest.raises(CheckpointError, match="has no group 'ema', only model, optimizer"):
        newest(run)[0].load_group("ema")


# Which one is used


def test_the_newest_checkpoint_is_the_highest_step_whatever_the_times_say(run):
    paths = save_steps(run, 9, 10, 1_000_000)
    os.utime(paths[0], (2e9, 2e9))
    assert newest(run)[0].path == paths[2]


def test_a_run_without_checkpoints_has_no_newest(run):
    assert newest(run) == (None, [])
    run.checkpoints.rmdir()
    assert newest(run.path) == (None, [])


def flip(file, offset):
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def forge(path, **changes):
    """Rewrite the manifest with a right hash of its own, as someone hostile would."""
    body = from_json((path / "manifest.json").read_bytes())
    del body["sha256"]
    body |= changes
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": body_hash(body)}))


ENTRY = {"bytes": 3, "sha256": "0" * 64}
DAMAGE = {
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 100), r"model\.safetensors is truncated: 100 bytes i"),
    "emptied": (lambda p: os.truncate(p / "optimizer.safetensors", 0), r"optimizer\.safetensors is truncated: 0 bytes"),
    "grown": (lambda p: os.truncate(p / "model.safetensors", 10**5), r"model\.safetensors is too long"),
    "one bit": (lambda p: flip(p / "model.safetensors", -5), r"model\.safetensors is corrupt: its SHA-256"),
    "one bit of the header": (lambda p: flip(p / "model.safetensors", 20), r"model\.safetensors is corrupt"),
    "file gone": (lambda p: (p / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest empty": (lambda p: os.truncate(p / "manifest.json", 0), r"manifest\.json is not JSON"),
    "manifest binary": (lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"), r"manifest\.json is not JSON"),
    "manifest nested": (lambda p: (p / "manifest.json").write_text("[" * 10**5), r"manifest\.json is not JSON"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[1]"), r"manifest\.json is corrupt"),
    "manifest edited": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace("65536", "65537")),
        r"manifest\.json is corrupt: its content does not match",
    ),
    "manifest a folder": (
        lambda p: ((p / "manifest.json").unlink(), (p / "manifest.json").mkdir()),
        r"manifest\.json cannot be read",
    ),
    "other step": (lambda p: forge(p, step=7), r"manifest\.json says step 7, not what the folder's name says"),
    "other version": (lambda p: forge(p, version=99), r"is of version 99, this mezzo reads 1"),
    "no files": (lambda p: forge(p, files=[1]), r"manifest\.json is not one that mezzo writes"),
    "no size": (lambda p: forge(p, files={"model.safetensors": {}}), r"manifest\.json is not one that mezzo writes"),
    "path out": (lambda p: forge(p, files={"../../config.safetensors": ENTRY}), r"names '\.\./\.\./config\.safet"),
    "absolute path": (lambda p: forge(p, files={"/etc/passwd": ENTRY}), r"names '/etc/passwd', which is no plain"),
    "hidden path": (lambda p: forge(p, files={"a/../b.safetensors": ENTRY}), "which is no plain"),
    "link out": (
        lambda p: (shutil.move(p / "model.safetensors", p.parent / "x"), (p / "model.safetensors").symlink_to("../x")),
        r"model\.safetensors is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_with_the_reason_and_the_one_before_it_is_used(run, damage):
    before, last = save_steps(run, 500, 600)
    hurt, reason = DAMAGE[damage]
    hurt(last)
    with pytest.raises(CheckpointError, match=f"step-000600: .*{reason}"):
        read(last)
    checkpoint, problems = newest(run)
    assert checkpoint.path == before
    assert same(checkpoint.load_group("model")["w"], state(500)["model"]["w"])
    assert len(problems) == 1
    assert "step-000600" in problems[0]


def test_no_flipped_bit_of_a_manifest_goes_unseen(run):
    (path,) = save_steps(run, 5)
    before, manifest = newest(run)[0], path / "manifest.json"
    whole = manifest.read_bytes()
    seen = 0
    for offset in range(0, len(whole), 3):
        flip(manifest, offset)
        after, problems = newest(run)
        # The blanks between the tokens carry nothing: such a flip may pass, if all the rest reads the same.
        assert (after is None and len(problems) == 1) or (after == before and whole[offset] in b" \n")
        seen += after is None
        manifest.write_bytes(whole)
    assert seen > 100


def test_when_all_are_damaged_each_is_named(run):
    for path in save_steps(run, 1, 2, 3):
        os.truncate(path / "model.safetensors", 9)
    checkpoint, problems = newest(run)
    assert checkpoint is None
    assert [problem.split(":")[0][-6:] for problem in problems] == ["000003", "000002", "000001"]


def test_files_and_other_folders_among_the_checkpoints_are_not_taken_for_one(run):
    save_steps(run, 2)
    (run.checkpoints / "step-000009").write_text("")
    for name in (".tmp-step-000008-1-x", "step-000007.abandoned", "step-7", "notes"):
        (run.checkpoints / name).mkdir()
    checkpoint, problems = newest(run)
    assert (checkpoint.step, problems) == (2, [])


# The environment


def test_each_difference_of_the_environment_is_one_line():
    saved = {"torch": "2.10", "threads": 2, "route": {"a": "exact", "b": "exact"}, "sites": ("a", "b")}
    now = {**saved, "torch": "9.9", "threads": 64, "route": {"a": "exact", "b": "native"}, "world_size": 8}
    assert environment_differences({**saved, "sites": ["a", "b"]}, saved) == []
    assert environment_differences(saved, now) == [
        "torch: 2.10 when saved, 9.9 now",
        "threads: 2 when saved, 64 now",
        "route.b: exact when saved, native now",
        "world_size: not recorded when saved, 8 now",
    ]
