"""Pruning: which weights go and when, that they stay zero through everything, and what is refused."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pruned import OPTIMIZERS, PRUNED, Net, make, share, train, zeros
from torch import nn

from mezzo.errors import ConfigError
from mezzo.torch import Precision, Pruner
from mezzo.torch.prune import EXCLUDE

pytestmark = pytest.mark.usefixtures("slow_16_bits")


def smallest_by_numpy(weight, count):
    """Indices of the `count` smallest magnitudes, of equal ones the first."""
    return set(np.argsort(np.abs(weight.detach().numpy()).ravel(), kind="stable")[:count].tolist())


# --- the schedule ---


def test_the_schedule_is_the_cubic_of_zhu_and_gupta():
    model = Net()
    pruner = Pruner(model, sparsity=0.8, begin=10, end=30, every=5)
    # equation 1 with s_i = 0, s_f = 0.8, t_0 = 10, n = 4, Δt = 5
    cubic = {10 + 5 * k: 0.8 + (0 - 0.8) * (1 - 5 * k / (4 * 5)) ** 3 for k in range(5)}
    for step in range(41):
        want = 0.0 if step < 10 else cubic[min(30, step // 5 * 5)]
        assert pruner.target(step) == pytest.approx(want, abs=1e-12), step
    assert Pruner(model, sparsity=0.8, begin=10, end=30, every=7).target(30) == 0.8, "every does not divide the span"
    assert [Pruner(model, sparsity=0.8, begin=3).target(t) for t in (2, 3, 9)] == [0.0, 0.8, 0.8]
    assert [Pruner(model, "2:4", begin=3, end=9).target(t) for t in (2, 3, 9)] == [0.0, 0.5, 0.5]
    assert [Pruner(model, begin=0).target(t) for t in (0, 1)] == [0.0, 0.5]


def test_weights_go_as_the_schedule_says_and_never_come_back():
    model, _, pruner, precision = make(sparsity=0.75, begin=2, end=8, every=3)
    before = {name: torch.zeros_like(z) for name, z in zeros(model).items()}
    shares = []
    for i in range(10):
        step = train(model, precision, start=i)
        now = zeros(model)
        assert all(not (before[name] & ~now[name]).any() for name in PRUNED)
        before = now
        shares.append(share(model))
        assert float(step.sparsity) == pytest.approx(share(model), abs=1e-7)
    at_5 = round(128 * 0.75 * (1 - 0.5**3)) / 128
    assert shares == [0, 0, 0, 0, at_5, at_5, at_5, 0.75, 0.75, 0.75]
    for name, p in model.named_parameters():
        assert name in PRUNED or not (p == 0).any(), f"{name} was to be left alone"
    assert torch.equal(pruner.masks["up.weight"], zeros(model)["up.weight"])


# --- which weights ---


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_in_a_layer_the_smallest_magnitudes_go(sparsity):
    model = Net()
    want = {name: smallest_by_numpy(model.get_parameter(name), round(sparsity * 128)) for name in PRUNED}
    kept = copy.deepcopy(model)
    Pruner(model, sparsity=sparsity).step()
    for name in PRUNED:
        mask = zeros(model)[name]
        assert set(mask.flatten().nonzero()[:, 0].tolist()) == want[name]
        assert torch.equal(model.get_parameter(name)[~mask], kept.get_parameter(name)[~mask])


def test_globally_the_smallest_of_all_go_and_layers_differ():
    model = Net()
    with torch.no_grad():
        model.up.weight.mul_(10)
    both = torch.cat([model.get_parameter(name).flatten() for name in PRUNED])
    want = smallest_by_numpy(both, 64)
    Pruner(model, sparsity=0.25, scope="global").step()
    mask = torch.cat([z.flatten() for z in zeros(model).values()])
    assert set(mask.nonzero()[:, 0].tolist()) == want
    assert zeros(model)["down.weight"].sum() > 50 > 14 > zeros(model)["up.weight"].sum()


def test_equal_magnitudes_are_not_all_pruned_together():
    model = Net()
    with torch.no_grad():
        model.up.weight.fill_(0.5)
    Pruner(model, sparsity=0.25).step()
    assert zeros(model)["up.weight"].flatten().tolist() == [True] * 32 + [False] * 96


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.Linear(12, 6), 1),
        (nn.Conv2d(8, 4, 3), 1),
        (nn.Conv2d(8, 8, 3, groups=2), 1),
        (nn.ConvTranspose2d(8, 3, 2), 0),
    ],
    ids=["Linear", "Conv2d", "grouped", "ConvTranspose2d"],
)
def test_two_of_every_four_along_the_input_axis_stay(layer, axis):
    old = np.moveaxis(layer.weight.detach().numpy().copy(), axis, -1)
    Pruner(layer, "2:4").step()
    new = np.moveaxis(layer.weight.detach().numpy(), axis, -1)
    groups = zip(old.reshape(-1, 4), new.reshape(-1, 4), strict=True)
    for before, after in groups:
        stay = sorted(range(4), key=lambda i: -abs(before[i]))[:2]
        assert [i for i in range(4) if after[i] != 0] == sorted(stay)
        assert all(after[i] == before[i] for i in stay)


def test_two_of_four_begins_at_its_step_with_the_magnitudes_of_that_step():
    model, _, _, precision = make(kind="2:4", begin=3, every=2)
    twin, _, _, other = make(begin=99, end=99)
    train(model, precision, 2)
    assert share(model) == 0
    train(model, precision, 1, 2)
    train(twin, other, 3)
    for name in PRUNED:
        four = twin.get_parameter(name).detach().abs().numpy().reshape(-1, 4)
        want = np.argsort(np.argsort(four, axis=1), axis=1) < 2
        assert np.array_equal(zeros(model)[name].numpy().reshape(-1, 4), want)
    masks = zeros(model)
    train(model, precision, 3, 3)
    assert all(torch.equal(z, masks[name]) for name, z in zeros(model).items())


def test_include_and_exclude_are_globs_over_names():
    model = nn.ModuleDict({"enc": nn.Linear(4, 4), "dec": nn.Conv1d(4, 4, 3), "lm_head": nn.Linear(4, 4)})
    model["att"] = nn.MultiheadAttention(4, 1)
    model["free"] = nn.ParameterDict({"table": torch.zeros(4, 4)})
    assert Pruner(model).names == ["enc.weight", "dec.weight", "att.in_proj_weight", "att.out_proj.weight"]
    assert Pruner(model, include="enc.*").names == ["enc.weight"]
    assert Pruner(model, include="*", exclude=()).names[-1] == "free.table"
    assert Pruner(model, exclude=("att.*", "dec*")).names == ["enc.weight", "lm_head.weight"]
    assert Pruner(model, exclude="*c*").names == ["lm_head.weight", "att.in_proj_weight", "att.out_proj.weight"]
    assert Pruner(model, exclude=(*EXCLUDE, "att.*")).names == ["enc.weight", "dec.weight"]


def test_a_head_tied_to_the_embedding_is_left_alone():
    model = Net()
    model.other = nn.Linear(8, 11, bias=False)
    model.other.weight = model.tokens.weight
    assert Pruner(model).names == PRUNED


# --- they stay zero ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["fp32", "fp16", "fp64"])
def test_masked_weights_stay_zero_under_weight_decay_and_momentum(policy, optimizer):
    model, _, _, precision = make(policy, optimizer, sparsity=0.5, begin=3)
    train(model, precision, 3)
    masks = zeros(model)
    others = {name: model.get_parameter(name).detach().clone() for name in PRUNED}
    for i in range(3, 8):
        train(model, precision, 1, i)
        for name, z in zeros(model).items():
            assert torch.equal(z, masks[name])
            assert not torch.signbit(model.get_parameter(name)[z]).any(), "a zero is not -0"
            assert not torch.equal(model.get_parameter(name), others[name]), "the rest trains on"


@pytest.mark.parametrize("keep", ["", " stochastic", " kahan", " split"])
def test_low_precision_masters_are_pruned_with_what_is_kept_beside_them(keep):
    model, _, _, precision = make(f"bf16; *:master=bfloat16{keep}", sparsity=0.5, begin=2)
    train(model, precision, 6)
    # bfloat16 has equal magnitudes and may have zeros of its own: at least the masked ones are zero.
    for name, mask in precision.pruner.masks.items():
        p = model.get_parameter(name)
        assert p.dtype is torch.bfloat16
        assert int(mask.sum()) == 64
        assert not p[mask].any()
        remainder = precision.compact.slots[p].remainder
        assert remainder is None or not remainder[mask].any()
        assert torch.isfinite(p).all()
    state = precision.state_dict()
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())


def test_gradients_of_masked_weights_do_not_count():
    model, _, pruner, precision = make(sparsity=0.5, begin=1, optimizer="SGD with momentum")
    train(model, precision, 1)
    seen = {}

    def spoil(i):
        for name, mask in pruner.masks.items():
            model.get_parameter(name).grad[mask] = float("inf") if i == 2 else 1e6
        kept = [
            p.grad[~pruner.masks[name]] if name in pruner.masks else p.grad.flatten()
            for name, p in model.named_parameters()
        ]
        seen[i] = float(torch.cat([k.flatten() for k in kept]).double().norm())

    for i in (1, 2):
        step = train(model, precision, 1, i, spoil)
        assert not step.skipped_now()
        assert float(step.grad_norm) == pytest.approx(seen[i], rel=2**-20)  # float32 sums of some hundred squares


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_moves_no_mask_and_not_the_schedule(policy, optimizer):
    how = {"sparsity": 0.8, "begin": 2, "end": 6, "every": 2}
    straight, _, _, precision = make(policy, optimizer, **how)
    train(straight, precision, 5)
    model, _, pruner, precision = make(policy, optimizer, **how)

    def overflow(_):
        model.head.weight.grad.fill_(float("inf"))

    for i in range(5):
        train(model, precision, 1, i)
        before = copy.deepcopy((model.state_dict(), pruner.state_dict()))
        assert train(model, precision, 1, 50 + i, overflow).skipped_now()
        for old, new in zip(before, (model.state_dict(), pruner.state_dict()), strict=True):
            assert all(torch.equal(new[name], old[name]) for name in old)
    assert pruner.count == 5
    if policy == "fp32":  # under fp16 the loss scale has moved, and with it what is rounded
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), straight.parameters(), strict=True))


def test_where_the_outcome_is_known_late_a_skipped_step_moves_no_mask_either():
    """As on a GPU: `move` is called before anybody knows, `taken` only for steps that were not skipped."""
    model = Net()
    pruner = Pruner(model, begin=1)
    before = copy.deepcopy(model.state_dict())
    pruner.move(torch.tensor(True))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert (float(pruner.sparsity), pruner.count) == (0, 0)
    pruner.move(torch.tensor(False))
    pruner.taken()
    assert (float(pruner.sparsity), pruner.count, pruner.level) == (0.5, 1, 0.5)


def test_a_loop_by_hand_gives_the_same_weights_as_precision():
    how = {"sparsity": 0.7, "begin": 1, "end": 5, "every": 2}
    want, _, _, precision = make("fp32", "plain AdamW", precision={"max_norm": 0.1}, **how)
    train(want, precision, 7)
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS["plain AdamW"](model.parameters())
    pruner = Pruner(model, **how)
    for i in range(7):
        g = torch.Generator().manual_seed(i)
        x, y = torch.randint(0, 11, (4, 3), generator=g), torch.randint(0, 11, (4, 3), generator=g)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        pruner.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        # clip_grad_norm_ adds 1e-6 to a norm of 0.1 or more: 1e-5 of a gradient; Adam moves by lr times a ratio
        assert torch.allclose(p, want.get_parameter(name), rtol=0, atol=7 * 1e-2 * 1e-3), name
    for name, z in zeros(model).items():
        assert torch.equal(z, zeros(want)[name])


# --- saving ---


@pytest.mark.parametrize("kind", ["magnitude", "2:4"])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_loaded_in_the_middle_of_the_schedule_it_goes_on_to_the_bit(kind, at):
    how = {"kind": kind, "begin": 3, "end": 8, "every": 2}
    model, optimizer, _, precision = make("fp16", **how)
    train(model, precision, at)
    state = copy.deepcopy((precision.state_dict(), model.state_dict(), optimizer.state_dict()))
    assert {t.dtype for name, t in state[0].items() if name.startswith("prune.mask.")} == {torch.bool}
    train(model, precision, 11 - at, at)

    other, optimizer, pruner, precision = make("fp16", **how)
    other.load_state_dict(state[1])
    optimizer.load_state_dict(state[2])
    precision.load_state_dict(state[0])
    assert all(torch.equal(mask, state[0][f"prune.mask.{name}"]) for name, mask in pruner.masks.items())
    train(other, precision, 11 - at, at)
    assert share(model) == 0.5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_without_masks_starts_the_schedule_where_training_is():
    dense = Net()
    optimizer = OPTIMIZERS["fused AdamW"](dense.parameters())
    precision = Precision(dense, optimizer, "fp32")
    train(dense, precision, 4)
    model, _, pruner, later = make(begin=6)
    train(model, later, 7)
    later.load_state_dict(precision.state_dict())
    assert (pruner.count, pruner.level, float(pruner.sparsity)) == (4, 0, 0)
    train(model, later, 1)
    assert float(pruner.sparsity) == 0
    train(model, later, 1)
    assert float(pruner.sparsity) == 0.5


def test_masks_of_other_weights_are_refused():
    saved = Pruner(Net(), include="up.*").state_dict()
    model = Net()
    pruner = Pruner(model)
    pruner.step()
    masks = dict(pruner.masks)
    with pytest.raises(
        ConfigError, match=re.escape("the saved masks are of other weights than this pruner's, first down")
    ):
        pruner.load_state_dict(saved)
    saved = Pruner(Net()).state_dict() | {"prune.mask.up.weight": torch.zeros(2, 2, dtype=torch.bool)}
    with pytest.raises(ConfigError, match=re.escape("first up.weight; make it with the same include and exclude")):
        pruner.load_state_dict(saved)
    assert all(pruner.masks[name] is masks[name] for name in masks)


def test_what_is_masked_goes_before_zeros_that_are_not():
    model = Net()
    pruner = Pruner(model, sparsity=0.5, begin=1, end=3)
    for _ in range(2):
        pruner.step()
    old = dict(pruner.masks)
    live = (~old["up.weight"]).flatten().nonzero()[:20, 0]
    assert live[-1] < old["up.weight"].flatten().nonzero()[-1, 0]
    with torch.no_grad():
        model.up.weight.view(-1)[live] = 0
    pruner.step()
    assert all((old[name] <= mask).all() and int(mask.sum()) == 64 for name, mask in pruner.masks.items())


def test_another_kind_of_pruning_opens_no_mask_that_was_loaded():
    model = Net()
    before = Pruner(model, sparsity=0.4)
    before.step()
    pruner = Pruner(model, "2:4", begin=2)
    pruner.load_state_dict(before.state_dict())
    pruner.step()
    for name, mask in pruner.masks.items():
        assert (before.masks[name] <= mask).all()
        assert (mask.view(-1, 4).sum(1) >= 2).all()
        assert (mask.view(-1, 4).sum(1) > 2).any()
