"""Reading checkpoints: only what verifies, nothing half loaded, optimizers restored to the bit."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mezzo.errors import CheckpointError
from mezzo.storage import from_json
from mezzo.train.checkpoint import (
    body_hash,
    copy_into,
    environment,
    environment_differences,
    load_optimizer,
    newest,
    optimizer_tensors,
    read,
)
from mezzo.train.rundir import RunDir
from mezzo.train.saver import save

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
]


@pytest.fixture
def run(tmp_path):
    with RunDir.create(tmp_path / "a", "", "") as run:
        yield run


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def state(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(64, 32, generator=generator), "b": torch.randn(32, generator=generator).bfloat16()},
        "optimizer": {"state.0.exp_avg": torch.randn(64, 32, generator=generator)},
    }


def save_steps(run, *steps, keep=10):
    return [save(run, step, state(step), {"step": step, "scale": 65536.0}, keep=keep) for step in steps]


# What comes back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_stride_comes_back_to_the_bit(run, dtype):
    raw = torch.randint(0, 256, (24 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x = (raw % 2 if dtype is torch.bool else raw).view(dtype).reshape(4, 6)  # NaNs with payloads too
    tensors = {"x": x, "t": x.t(), "row": x[1:2], "every other": x[:, ::2], "0d": x[2, 3], "none": x[:0], "same": x}
    tensors["wide"] = x[0, 0].expand(3, 2)
    path = save(run, 1, {"model": tensors, "empty": {}}, {}, keep=1)
    checkpoint, problems = newest(run)
    assert problems == []
    assert checkpoint.groups == ("model", "empty")
    loaded = checkpoint.load_group("model")
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert checkpoint.load_group("empty") == {}
    foreign = load_file(path / "model.safetensors")  # any reader of safetensors can open it
    assert all(same(foreign[name], tensors[name]) for name in tensors)


def test_every_tensor_of_a_file_is_aligned_for_readers_that_map_it(run):
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(1).bfloat16(), "c": torch.zeros(1).double()}
    data = (save(run, 1, {"model": tensors}, {}, keep=1) / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    assert all(header[name]["data_offsets"][0] % tensors[name].element_size() == 0 for name in tensors)


def test_what_is_loaded_is_a_copy_that_outlives_the_file(run):
    save_steps(run, 1)
    loaded = newest(run)[0].load_group("model")
    for file in (run.checkpoints / "step-000001").iterdir():
        os.truncate(file, 0)  # a mapped tensor would now crash the process with SIGBUS
    assert same(loaded["w"], state(1)["model"]["w"])
    loaded["w"].zero_()


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


# Into place


def test_copying_into_place_keeps_the_target_tensors_and_their_bits(run):
    model = torch.nn.Linear(4, 3).double()
    weight, source = (
        model.weight,
        {"weight": torch.randn(3, 4).double(), "bias": torch.tensor([math.nan, -0.0, 1e-320])},
    )
    source["bias"] = source["bias"].double()
    copy_into(model.state_dict(), source)
    assert model.weight is weight
    assert same(model.weight, source["weight"])
    assert same(model.bias, source["bias"])
    copy_into(dict(model.named_parameters()), source)  # leaves that require gradients too


def test_a_tensor_that_is_missing_extra_or_wrong_is_named_and_nothing_is_changed():
    target = {"a": torch.zeros(2), "b": torch.zeros(3, 4), "c": torch.zeros(2), "d": torch.zeros(1)}
    source = {
        "b": torch.ones(4, 3),
        "c": torch.ones(2).bfloat16(),
        "d": torch.ones(1),
        "e": torch.ones(5),
        "f": target["a"],
    }
    with pytest.raises(CheckpointError) as caught:
        copy_into(target, source, "EMA")
    assert str(caught.value).splitlines() == [
        "the checkpoint does not fit the EMA, nothing was loaded:",
        "  missing from the checkpoint: a",
        "  not in the EMA: e",
        "  not in the EMA: f",
        "  wrong: b is float32[4, 3] in the checkpoint, float32[3, 4] in the EMA",
        "  wrong: c is bfloat16[2] in the checkpoint, float32[2] in the EMA",
        "use the config that the checkpoint was trained with",
    ]
    assert not any(tensor.any() for tensor in target.values())


# The environment


def test_the_environment_of_the_same_process_has_no_differences_after_a_save(run):
    here = environment(device="cpu", route={"default": "exact", "sites": ("a", "b")}, contract="1", world_size=1)
    save(run, 1, {}, {"environment": here}, keep=1)
    again = environment(device="cpu", route={"default": "exact", "sites": ("a", "b")}, contract="1", world_size=1)
    assert environment_differences(newest(run)[0].meta["environment"], again) == []


def test_each_difference_of_the_environment_is_one_line():
    saved = environment(device="cpu", route={"a": "exact", "b": "exact"}, contract="1")
    now = {**saved, "torch": "9.9", "threads": 64, "route": {"a": "exact", "b": "native"}, "world_size": 8}
    assert environment_differences(saved, now) == [
        f"torch: {torch.__version__} when saved, 9.9 now",
        f"threads: {torch.get_num_threads()} when saved, 64 now",
        "route.b: exact when saved, native now",
        "world_size: not recorded when saved, 8 now",
    ]


# Optimizers


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def train(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def two_groups(model, named=False):
    named_ = list(model.named_parameters())
    decayed, rest = [(n, p) for n, p in named_ if p.ndim > 1], [(n, p) for n, p in named_ if p.ndim == 1]
    if not named:
        decayed, rest = [p for _, p in decayed], [p for _, p in rest]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}]


OPTIMIZERS = {
    "AdamW": lambda m: torch.optim.AdamW(two_groups(m), lr=1e-2, betas=(0.9, 0.95)),
    "AdamW fused": lambda m: torch.optim.AdamW(two_groups(m), lr=1e-2, fused=True),
    "AdamW foreach, amsgrad": lambda m: torch.optim.AdamW(two_groups(m), lr=1e-2, foreach=True, amsgrad=True),
    "AdamW named": lambda m: torch.optim.AdamW(two_groups(m, named=True), lr=1e-2),
    "AdamW, lr a tensor": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-2, dtype=torch.float64)),
    "SGD": lambda m: torch.optim.SGD(two_groups(m), lr=1e-2),
    "SGD momentum": lambda m: torch.optim.SGD(two_groups(m), lr=1e-2, momentum=0.9, nesterov=True),
    "Adafactor": lambda m: torch.optim.Adafactor(two_groups(m), lr=1e-2),
    "NAdam": lambda m: torch.optim.NAdam(two_groups(m), lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_to_the_bit_with_a_fresh_optimizer(run, name):
    model = network()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 0, 5)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.7  # as a schedule does
    tensors, meta = optimizer_tensors(optimizer)
    save(run, 5, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": meta}, keep=1)
    train(model, optimizer, 5, 9)

    again = network()
    fresh = OPTIMIZERS[name](again)
    checkpoint = newest(run)[0]
    copy_into(again.state_dict(), checkpoint.load_group("model"))
    load_optimizer(fresh, checkpoint.load_group("optimizer"), checkpoint.meta["optimizer"])
    train(again, fresh, 5, 9)
    assert all(same(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    _same_state(optimizer, fresh)


def _same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert repr(a["param_groups"]) == repr(b["param_groups"])
    assert a["state"].keys() == b["state"].keys()
    for index, values in a["state"].items():
        assert list(values) == list(b["state"][index])
        for key, value in values.items():
            other = b["state"][index][key]
            assert same(value, other) if isinstance(value, torch.Tensor) else value == other


def test_moments_keep_their_own_dtype_and_the_step_its_own():
    parameter = torch.nn.Parameter(torch.randn(3, 2).bfloat16())
    optimizer = torch.optim.AdamW([parameter])
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.randn(3, 2), "exp_avg_sq": torch.rand(3, 2).double()}
    optimizer.state[parameter] = moments
    fresh = torch.optim.AdamW([parameter])
    load_optimizer(fresh, *optimizer_tensors(optimizer))
    assert all(same(fresh.state[parameter][key], value) for key, value in moments.items())
    assert all(fresh.state[parameter][key] is not value for key, value in moments.items())


def test_moments_take_the_strides_of_their_parameter():
    parameter = torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors, meta = optimizer_tensors(optimizer)
    load_optimizer(
        optimizer, {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, meta
    )
    assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
    assert same(optimizer.state[parameter]["exp_avg"], tensors["state.0.exp_avg"])


def test_the_state_before_the_first_step_is_empty_and_can_be_put_back():
    optimizer, other = OPTIMIZERS["AdamW"](network()), OPTIMIZERS["AdamW"](network())
    tensors, meta = optimizer_tensors(optimizer)
    assert tensors == {}
    load_optimizer(other, tensors, meta)
    _same_state(optimizer, other)


def test_the_way_a_machine_carries_out_the_update_is_not_restored():
    model = network()
    slow, fast = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters(), fused=True)
    train(model, slow, 0, 1)
    load_optimizer(fast, *optimizer_tensors(slow))
    assert fast.param_groups[0]["fused"] is True


def _other_optimizers():
    wide = torch.nn.Sequential(torch.nn.Linear(8, 17), torch.nn.Tanh(), torch.nn.Linear(17, 4))
    renamed = torch.nn.ModuleDict({"in": torch.nn.Linear(8, 16), "out": torch.nn.Linear(16, 4)})
    deep = torch.nn.Sequential(*network(), torch.nn.Linear(4, 4))
    return {
        "class": (torch.optim.SGD(two_groups(network())), r"is of AdamW, this optimizer is SGD"),
        "groups": (torch.optim.AdamW(network().parameters()), r"has 2 parameter groups, this optimizer has 1"),
        "count": (torch.optim.AdamW(two_groups(deep)), r"group 1: 2 parameters in the checkpoint, 3 in this optimizer"),
        "shape": (torch.optim.AdamW(two_groups(wide)), r"parameter 0 was float32\[16, 8\], is float32\[17, 8\]"),
        "dtype": (torch.optim.AdamW(two_groups(network().double())), r"parameter 0 was float32.*, is float64\[16, 8\]"),
        "names": (
            torch.optim.AdamW(two_groups(renamed, named=True)),
            r"0\.weight / in\.weight, 2\.weight / out\.weight",
        ),
    }


@pytest.mark.parametrize("case", _other_optimizers())
def test_an_optimizer_of_other_parameters_is_refused_and_left_as_it_is(case):
    model = network()
    optimizer = OPTIMIZERS["AdamW named"](model)
    train(model, optimizer, 0, 2)
    other, message = _other_optimizers()[case]
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(other, *optimizer_tensors(optimizer))
    assert repr(other.state_dict()) == repr(before)


def test_a_missing_or_extra_tensor_of_the_optimizer_is_named():
    model = network()
    optimizer = OPTIMIZERS["AdamW"](model)
    train(model, optimizer, 0, 2)
    tensors, meta = optimizer_tensors(optimizer)
    wrong = {**tensors, "state.9.exp_avg": torch.zeros(1)}
    del wrong["state.1.exp_avg_sq"]
    with pytest.raises(CheckpointError) as caught:
        load_optimizer(optimizer, wrong, meta)
    assert "missing from the checkpoint: state.1.exp_avg_sq" in str(caught.value)
    assert "not in the optimizer's state: state.9.exp_avg" in str(caught.value)


def test_state_that_is_neither_tensor_nor_plain_data_is_named():
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[next(model.parameters())] = {"history": {1, 2}}
    with pytest.raises(CheckpointError, match=r"the optimizer's state\.0\.history is of type builtins\.set"):
        optimizer_tensors(optimizer)
