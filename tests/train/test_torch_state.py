"""Torch's side of a checkpoint: its tensors come back to the bit, nothing half loaded, optimizers as they were."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from mezzo.errors import CheckpointError
from mezzo.train.arrays import read_file
from mezzo.train.checkpoint import environment_differences, newest
from mezzo.train.rundir import RunDir
from mezzo.train.saver import BackgroundSaver, save
from mezzo.train.torch_state import (
    as_arrays,
    as_tensors,
    copy_into,
    environment,
    load_optimizer,
    optimizer_tensors,
)

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


# As arrays and back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_stride_comes_back_to_the_bit(run, dtype):
    raw = torch.randint(0, 256, (24 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x = (raw % 2 if dtype is torch.bool else raw).view(dtype).reshape(4, 6)  # NaNs with payloads too
    tensors = {"x": x, "t": x.t(), "row": x[1:2], "every other": x[:, ::2], "0d": x[2, 3], "none": x[:0], "same": x}
    tensors["wide"] = x[0, 0].expand(3, 2)
    path = save(run, 1, {"model": as_arrays(tensors)}, {}, keep=1)
    loaded = as_tensors(newest(run)[0].load_group("model"))
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    foreign = load_file(path / "model.safetensors")  # any reader of safetensors can open it
    assert all(same(foreign[name], tensors[name]) for name in tensors)
    save_file({"x": x}, run.path / "theirs.safetensors")
    assert same(as_tensors(read_file(run.path / "theirs.safetensors"))["x"], x)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": 1.5}, "model: w is a float, not a tensor: plain data goes into meta"),
        (
            {"w": torch.zeros(2, dtype=torch.complex64)},
            r"model: w is torch\.complex64, which cannot be kept",
        ),
        ({"w": torch.zeros(2, device="meta")}, "model: w is not a dense tensor with data"),
        ({"w": torch.eye(2).to_sparse()}, "model: w is not a dense tensor with data"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(tensors, message):
    with pytest.raises(CheckpointError, match=message):
        as_arrays(tensors)


def test_the_snapshot_of_tensors_is_taken_at_submit(run):
    weight = torch.ones(5, requires_grad=True)
    with BackgroundSaver(run, keep=1) as background:
        background.submit(1, {"model": as_arrays({"w": weight})}, {})
        weight.data.fill_(99)
    assert newest(run)[0].load_group("model")["w"].tolist() == [1.0] * 5


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
    assert (here["framework"], here["torch"]) == ("torch", torch.__version__)


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
    groups = {"model": as_arrays(model.state_dict()), "optimizer": as_arrays(tensors, "optimizer")}
    save(run, 5, groups, {"optimizer": meta}, keep=1)
    train(model, optimizer, 5, 9)

    again = network()
    fresh = OPTIMIZERS[name](again)
    checkpoint = newest(run)[0]
    copy_into(again.state_dict(), as_tensors(checkpoint.load_group("model")))
    load_optimizer(fresh, as_tensors(checkpoint.load_group("optimizer")), checkpoint.meta["optimizer"])
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
