"""Weights and moments in low precision between steps: what is kept, what is lost, and how much room it takes."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from mezzo.errors import ConfigError
from mezzo.formats import get_format
from mezzo.policy import Spec
from mezzo.torch import Precision, compact, quantize
from mezzo.torch.compact import _load, _store, stored_bytes
from mezzo.torch.moments import at_rest

pytestmark = pytest.mark.usefixtures("slow_16_bits")
OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "plain AdamW": lambda p: torch.optim.AdamW(p, 1e-2, fused=False, amsgrad=True),
    "fused SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
    "plain SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=False),
}
EIGHT = "bf16; *:state=e4m3@1x128 stochastic"
RECIPES = ["bf16-pure", "bf16-pure-kahan", "bf16-pure-split", EIGHT, "bf16-pure-split; *:state=int8@1x256"]


class Net(nn.Module):
    """Two layers of more elements than the helper's threshold, a norm of fewer."""

    def __init__(self, tied=False):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(48, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 48)
        if tied:
            self.head = nn.Linear(48, 64, bias=False)
            self.head.weight = self.up.weight

    def forward(self, x):
        y = self.down(torch.tanh(self.norm(self.up(x))))
        return self.head(y) if hasattr(self, "head") else y


def make(policy, optimizer="fused AdamW", seed=0, tied=False, **how):
    torch.manual_seed(seed)
    model = Net(tied)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return model, optimizer, Precision(model, optimizer, policy, **how)


def backward(model, precision, i=0, factor=1.0):
    x = torch.randn(16, 48, generator=torch.Generator().manual_seed(i))
    precision.backward((model(x) - 0.1 * x.mean()).square().mean() * factor)


def train(model, precision, steps, start=0):
    for i in range(start, start + steps):
        backward(model, precision, i)
        precision.step()


def give(model, i, scale=1.0):
    """The same gradients, values of bfloat16, to whatever dtype the weights have."""
    g = torch.Generator().manual_seed(i)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=g) * scale).bfloat16().to(p.dtype)


def snapshot(model, optimizer, precision):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], precision.compact.state_dict()))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a.dtype is b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def exact(precision):
    """name → the float32 weight that the optimizer would step on."""
    return {slot.name: _load(p, slot) for p, slot in precision.compact.slots.items()}


# --- masters ---


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("chunk", [1 << 24, 3000])
def test_split_weights_are_those_of_float32_masters_to_the_bit(name, chunk, monkeypatch):
    monkeypatch.setattr(compact, "CHUNK", chunk)
    wide, _, plain = make("bf16", name, max_norm=1.0)
    model, optimizer, precision = make("bf16; *:master=bfloat16 split", name, max_norm=1.0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for i in range(8):
        give(wide, i, 0.01 * 4**i)
        give(model, i, 0.01 * 4**i)
        assert float(plain.step().grad_norm) == float(precision.step().grad_norm)
        for n, w in exact(precision).items():
            assert torch.equal(w, wide.get_parameter(n)), (i, n)
    for p, slot in precision.compact.slots.items():
        # the upper half alone is the nearest bfloat16: at most half a unit in the last of 8 digits away
        w = _load(p, slot)
        assert bool(((p.float() - w).abs() <= torch.exp2(torch.frexp(w)[1].float() - 9)).all())
    assert [group["params"] for group in optimizer.param_groups] == [[*model.parameters()]]


@pytest.mark.parametrize("policy", ["bf16-pure-split", EIGHT])
def test_gradients_are_unscaled_and_clipped_alike_by_fused_and_other_optimizers(policy):
    weights = []
    for name in ("fused SGD", "plain SGD"):
        model, _, precision = make(f"{policy}; loss_scale=1024", name, max_norm=0.5)
        for i in range(3):
            before = [_load(p, precision.compact.slots[p]).clone() for p in model.parameters()]
            give(model, i)
            given = [p.grad for p in model.parameters()]
            model.zero_grad()
            precision.backward(sum((p * g).sum() for p, g in zip(model.parameters(), given, strict=True)))
            assert float(precision.step().grad_norm) > 50
            after = [_load(p, precision.compact.slots[p]) for p in model.parameters()]
            if i == 0:  # lr 0.01 times a gradient of norm 0.5; float32 rounds each of 6,000 weights below 1 by 2^-25
                moved = math.sqrt(sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True)))
                assert moved == pytest.approx(0.005, abs=math.sqrt(6500) * 2.0**-24)
        weights.append(after)
    for a, b in zip(*weights, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_both_halves_are_the_float32_number_for_every_upper_half_and_the_lower_ones_at_the_edges():
    high = torch.arange(-(1 << 15), 1 << 15).repeat_interleave(6)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(1 << 16)
    raw = ((high << 16) | low).to(torch.int32)
    data, remainder = _store(raw.view(torch.float32), Spec.parse("bfloat16 split"), None)
    assert (data.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    slot = compact.Slot("w", Spec.parse("bfloat16 split"), {}, remainder)
    assert torch.equal(_load(data, slot).view(torch.int32), raw)
    collide = torch.tensor([0x3F7F8000, 0x3F808000], dtype=torch.int32).view(torch.float32)
    data, remainder = _store(collide, Spec.parse("bfloat16 split"), None)
    assert data.tolist() == [1.0, 1.0078125]
    assert remainder.tolist() == [-0x8000, -0x8000]


def drift(master, steps, seed=0):
    """The mean of 4096 weights of 1.0 after so many updates of 2^-12: an eighth of what bfloat16 rounds away there."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.ones_(model.weight)
    precision = Precision(model, torch.optim.SGD(model.parameters(), 2.0**-12), f"bf16; *:master={master}", seed=seed)
    for _ in range(steps):
        model.weight.grad = -torch.ones_like(model.weight)
        precision.step()
    return model.weight.detach(), precision


def test_updates_that_are_lost_to_nearest_are_kept_by_kahan_split_and_stochastic_rounding():
    steps = 64
    want = 1 + steps * 2.0**-12  # 1.015625 = 1 + 2^-6, a value of bfloat16
    assert drift("bfloat16", steps)[0].unique().tolist() == [1.0]
    assert drift("bfloat16 split", steps)[0].unique().tolist() == [want]
    assert drift("bfloat16 kahan", steps)[0].unique().tolist() == [want]
    weight, _ = drift("bfloat16 stochastic", steps)
    # Each step moves a weight by 2^-7 with the probability 2^-12 / 2^-7 = 1/32: a binomial of 64 * 4096 draws.
    draws = steps * weight.numel()
    deviation = math.sqrt(draws / 32 * (1 - 1 / 32)) * 2.0**-7 / weight.numel()
    assert abs(float(weight.float().mean()) - want) < 3 * deviation
    assert len(weight.unique()) > 3, "the weights have words of their own"


def test_the_words_hang_on_seed_step_and_parameter():
    def after(seed, steps=1):
        return drift("bfloat16 stochastic", steps, seed)[0]

    assert torch.equal(after(0), after(0))
    assert not torch.equal(after(0), after(1))
    model = nn.Linear(64, 64, bias=False)
    nn.init.ones_(model.weight)
    first = quantize(torch.full((64, 64), 1 + 2.0**-12), "bf16", rounding="stochastic", key=(0, 0, "weight:master"))
    second = quantize(first + 2.0**-12, "bf16", rounding="stochastic", key=(0, 1, "weight:master"))
    assert torch.equal(after(0).float(), first)
    assert torch.equal(after(0, 2).float(), second)


def test_each_moment_has_words_of_its_own():
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    precision = Precision(model, optimizer, "bf16; *:state=bfloat16 stochastic", seed=5)
    wide = copy.deepcopy(model)
    plain = torch.optim.AdamW(wide.parameters(), fused=True)
    give(model, 0)
    give(wide, 0)
    precision.step()
    plain.step()
    for key in ("exp_avg", "exp_avg_sq"):
        words = (5, 0, f"weight:state.{key}")
        want = quantize(plain.state[wide.weight][key], "bf16", rounding="stochastic", key=words)
        assert torch.equal(precision.compact.slots[model.weight].moments[key].values(model.weight), want)


def test_kahan_keeps_16_bits_where_bfloat16_keeps_8():
    wide, _, plain = make("bf16", "fused SGD")
    model, _, precision = make("bf16; *:master=bfloat16 kahan", "fused SGD")
    for i in range(20):
        give(wide, i)
        give(model, i)
        plain.step()
        precision.step()
    for n, w in exact(precision).items():
        # Each of 20 steps rounds the compensation, at most 2^-9 of the weight, to 8 digits: 20 * 2^-9 * 2^-9
        bound = 20 * 2.0**-18 * wide.get_parameter(n).abs().clamp(min=1)
        assert bool(((w - wide.get_parameter(n)).abs() <= bound).all())


def test_loaded_weights_have_no_remainder():
    model, _, precision = make("bf16-pure-split")
    train(model, precision, 2)
    assert any(bool(slot.remainder.any()) for slot in precision.compact.slots.values())
    model.load_state_dict(Net().state_dict())
    assert all(torch.equal(w, model.get_parameter(n).float()) for n, w in exact(precision).items())


# --- moments ---


@pytest.mark.parametrize("rounding", ["", " stochastic"])
@pytest.mark.parametrize("name", ["e4m3@1x128", "e5m2@1x128", "int8@1x256", "mxfp8", "mxfp6", "mxfp4", "e4m3@tensor"])
@pytest.mark.parametrize("shape", [(48, 64), (5, 7), (3,)])
def test_moments_at_rest_are_what_quantize_gives_in_the_bits_of_the_format(name, rounding, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) ** 5
    key = (3, 1, "w:state.exp_avg") if rounding else None
    packed = at_rest(x, Spec.parse(name + rounding), "exp_avg", (3, 1, "w:state.exp_avg"))
    want = quantize(x.flatten(), name, rounding=rounding.strip() or "nearest", key=key).view(shape)
    assert torch.equal(packed.values(x), want)
    codes, scales = packed.tensors
    assert codes.dtype is torch.uint8
    fmt = get_format(name)
    block = fmt.group_size or x.numel()
    blocks = -(-x.numel() // block)
    assert codes.numel() == blocks * block // (2 if fmt.element.bits == 4 else 1)
    assert scales.numel() * scales.element_size() == blocks * fmt.scale.item_bytes


@pytest.mark.parametrize("name", ["e4m3@1x128", "int8@1x256", "mxfp8", "mxfp4"])
@pytest.mark.parametrize("rounding", ["", " stochastic"])
def test_second_moments_in_blocks_never_become_zero(name, rounding):
    x = torch.exp2(-(torch.arange(256.0) % 64)).view(16, 16)
    x[0, 5] = 0.0
    spec = Spec.parse(name + rounding)
    plain = at_rest(x, spec, "exp_avg", (0, 0, "w")).values(x)
    kept = at_rest(x, spec, "exp_avg_sq", (0, 0, "w")).values(x)
    assert int((plain == 0).sum()) > 30
    assert torch.equal(kept == 0, x == 0)
    assert torch.equal(kept[plain > 0], plain[plain > 0])
    # The smallest positive element of the block: an update divided by its root is smaller than the true one.
    assert bool((kept >= x)[plain == 0].all())


def test_a_second_moment_that_decays_follows_with_stochastic_rounding_and_stands_still_with_nearest():
    def after(rule, steps=400):
        model = nn.Linear(64, 64, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.999), fused=True)
        precision = Precision(model, optimizer, f"bf16; *:state.exp_avg_sq={rule}", seed=1)
        for i in range(steps + 1):
            model.weight.grad = torch.full_like(model.weight, 0.0 if i else 1.0)
            precision.step()
        (slot,) = precision.compact.slots.values() or [None]
        return slot.moments["exp_avg_sq"].values(model.weight)

    want = 0.001 * 0.999**400
    start = torch.tensor(0.001).bfloat16().float()  # one step loses 0.001 of it, less than half of bfloat16's 2^-8
    assert torch.equal(after("bfloat16").unique(), start.view(1))
    mean = float(after("bfloat16 stochastic").mean())
    # A rounding is off by at most half a unit, 2^-8 of the value, in standard deviation; 400 of them over 4096 elements
    # that draw apart: 3 * 2^-8 * sqrt(400 / 4096), relative, as the value shrinks with its errors. Below it 0.4%.
    assert mean == pytest.approx(want, rel=3 * 2.0**-8 * math.sqrt(400 / 4096))


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.Adam(p, amsgrad=True, foreach=True),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.RAdam(p),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
        lambda p: torch.optim.Rprop(p),
        lambda p: torch.optim.Muon([q for q in p if q.dim() == 2]),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    ],
)
def test_any_optimizer_of_torch_gives_split_weights_of_float32_training(make_optimizer, monkeypatch):
    monkeypatch.setattr(compact, "CHUNK", 3000)
    models = Net(), Net()
    models[1].load_state_dict(models[0].state_dict())
    policies = "bf16", "bf16; *:master=bfloat16 split"
    wide, low = (Precision(m, make_optimizer([*m.parameters()]), p) for m, p in zip(models, policies, strict=True))
    for i in range(4):
        for model, precision in zip(models, (wide, low), strict=True):
            give(model, i)
            precision.step()
    for n, w in exact(low).items():
        assert torch.equal(w, models[0].get_parameter(n)), n
    assert all(
        key == "step" or not torch.is_tensor(v) for s in low.optimizers[0].state.values() for key, v in s.items()
    )


def test_accumulators_that_start_at_once_are_taken_over():
    model = Net()
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    with pytest.raises(ConfigError, match=r"stores up\.weight in another dtype, but the optimizer already has moments"):
        Precision(model, optimizer, "bf16-pure")
    precision = Precision(model, optimizer, "bf16; *:state=bfloat16")
    give(model, 0, 1e-3)
    precision.step()
    slot = precision.compact.slots[model.up.weight]
    assert slot.moments["sum"].tensors[0].dtype is torch.bfloat16
    assert float(slot.moments["sum"].tensors[0].float().min()) == 0.5


# --- skipped steps ---


@pytest.mark.parametrize("name", OPTIMIZERS)
# Rounding mxfp8 anew is not always the same: a block whose largest came down to 448 · 2^e takes a smaller scale.
@pytest.mark.parametrize("policy", [*RECIPES, "bf16; *:state=mxfp8"])
def test_a_skipped_step_leaves_every_bit(policy, name):
    model, optimizer, precision = make(policy, name)
    train(model, precision, 3)
    before = snapshot(model, optimizer, precision)
    assert before[2]
    backward(model, precision, 3, float("inf"))
    assert precision.step().skipped_now()
    assert equal(snapshot(model, optimizer, precision), before)
    train(model, precision, 1)
    after = snapshot(model, optimizer, precision)
    assert not any(equal(a, b) for a, b in zip(after[::2], before[::2], strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", RECIPES)
def test_a_first_step_that_is_skipped_leaves_a_start_from_nothing(policy, name):
    fresh, _, precision = make(policy, name)
    precision.steps = 1  # the step that is skipped has its words too
    train(fresh, precision, 3)
    model, _, precision = make(policy, name)
    before = copy.deepcopy(model.state_dict())
    backward(model, precision, 0, float("nan"))
    assert precision.step().skipped_now()
    assert equal(dict(model.state_dict()), dict(before))
    train(model, precision, 3)
    assert equal(dict(model.state_dict()), dict(fresh.state_dict()))


# --- restarts ---


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", RECIPES)
def test_a_restart_goes_on_to_the_bit(policy, name):
    model, optimizer, precision = make(policy, name)
    train(model, precision, 3)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), precision.state_dict()))
    train(model, precision, 3, start=3)
    again, other, restarted = make(policy, name, seed=7)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    restarted.load_state_dict(kept[2])
    train(again, restarted, 3, start=3)
    assert equal(snapshot(model, optimizer, precision), snapshot(again, other, restarted))


def test_moments_that_were_not_loaded_are_missed_at_the_next_step():
    model, optimizer, precision = make("bf16-pure")
    train(model, precision, 1)
    kept = copy.deepcopy(optimizer.state_dict())
    again, other, restarted = make("bf16-pure")
    other.load_state_dict(kept)
    backward(again, restarted)
    message = "the optimizer's state of up.weight has no 'exp_avg': under this policy moments are part of Precision"
    with pytest.raises(ConfigError, match=re.escape(message)):
        restarted.step()
    assert equal(other.state_dict()["state"], kept["state"])
    assert {p.dtype for group in other.param_groups for p in group["params"]} == {torch.bfloat16}


@pytest.mark.parametrize(("then", "now"), [("bf16", EIGHT), (EIGHT, "bf16"), (EIGHT, "bf16; *:state=bfloat16")])
def test_moments_move_from_one_format_to_another(then, now):
    model, optimizer, precision = make(then)
    train(model, precision, 5)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), precision.state_dict()))
    again, other, restarted = make(now, seed=7)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    restarted.load_state_dict(kept[2])
    steps = [0.0]
    for i in range(5, 7):
        train(again, restarted, 1, start=i)
        train(model, precision, 1, start=i)
        steps.append((model.up.weight - again.up.weight).abs().mean().item())
    # A step moves a weight by about lr = 0.01. What is at rest in 8 bits is the same for both at first. E4M3 moves m
    # and v by 1/8 at most (stochastic: a whole unit), so two updates by about a quarter.
    assert (steps[1] == 0) == (now == "bf16")
    assert 0 < steps[2] < 2 * 0.01 / 4


def test_the_state_of_another_model_is_refused():
    _, _, precision = make(EIGHT)
    with pytest.raises(ConfigError, match=r"speaks of hat\.weight, which is no parameter of this model"):
        precision.load_state_dict(precision.state_dict() | {"compact.hat.weight:exp_avg||0": torch.ones(3)})


def test_remove_gives_the_moments_back_and_another_precision_takes_them():
    model, optimizer, precision = make("bf16-pure-split")
    train(model, precision, 2)
    precision.remove()
    assert {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"} == {torch.bfloat16}
    again = Precision(model, optimizer, "bf16-pure-kahan")
    train(model, again, 1)
    assert all(slot.moments.keys() == {"exp_avg", "exp_avg_sq"} for slot in again.compact.slots.values())


# --- bytes ---


@pytest.mark.parametrize(
    ("policy", "weight", "remainder", "moments"),
    [
        ("fp32", 4, 0, 8),
        ("bf16-pure", 2, 0, 4),
        ("bf16-pure-kahan", 2, 2, 4),
        ("bf16-pure-split", 2, 2, 4),
        ("bf16; *:state=e4m3@1x128", 4, 0, 2 + 2 / 32),
        ("bf16-pure; *:state=mxfp8", 2, 0, 2 + 2 / 32),
        ("bf16; *:state.exp_avg=e4m3@1x128; *:state.exp_avg_sq=bfloat16 stochastic", 4, 0, 3 + 1 / 32),
    ],
)
def test_the_bytes_between_steps_are_those_of_the_formats(policy, weight, remainder, moments):
    model = nn.Linear(128, 64, bias=False)
    n = 128 * 64
    precision = Precision(model, torch.optim.AdamW(model.parameters(), fused=True), policy)
    give(model, 0)
    precision.step()
    step = 4  # the optimizer's own counter
    assert stored_bytes(precision) == {
        "weights": n * weight,
        "remainders": n * remainder,
        "moments": n * moments + step,
    }
    held = [t for s in precision.optimizers[0].state.values() for t in s.values()]
    if policy != "fp32":
        assert sum(t.numel() for t in held) == 1, "float32 moments are still there"


# --- in a training loop ---


@pytest.mark.parametrize("policy", RECIPES)
def test_gradients_accumulate_and_every_recipe_learns(policy):
    model, _, precision = make(policy)
    x = torch.randn(32, 48)

    def loss(rows=slice(None)):
        return (model(x[rows]) - x[rows].roll(1, -1)).square().mean()

    before = loss().item()
    for _ in range(60):
        for rows in (slice(0, 16), slice(16, 32)):
            precision.backward(loss(rows) / 2)
        precision.step()
    assert loss().item() < 0.6 * before
    with precision.using("fp32"):
        assert loss().item() < 0.7 * before


def test_several_optimizers_of_which_one_has_nothing_low():
    torch.manual_seed(0)
    model = Net()
    fast = torch.optim.SGD(model.up.parameters(), 0.1, momentum=0.9)
    slow = torch.optim.AdamW([*model.norm.parameters(), *model.down.parameters()], fused=True)
    outside = nn.Parameter(torch.ones(3))
    slow.add_param_group({"params": [outside], "lr": 0.5})
    precision = Precision(model, [fast, slow], "bf16; up:master=bfloat16 split; down:state=mxfp8")
    names = {slot.name for slot in precision.compact.slots.values()}
    assert names == {"up.weight", "down.weight", "down.bias"}
    outside.grad = torch.ones(3)
    train(model, precision, 1)
    assert outside.tolist() == pytest.approx([0.5] * 3, rel=0.02)
    assert fast.state.get(model.up.weight, {}) == {}
    assert slow.state[model.norm.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert slow.state[model.down.weight].keys() == {"step"}
    assert slow.state[outside].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_parameter_without_a_gradient_is_left_alone():
    model, optimizer, precision = make("bf16-pure")
    model.norm.weight.requires_grad_(False)
    before = model.norm.weight.clone()
    train(model, precision, 2)
    assert torch.equal(model.norm.weight, before)
    assert model.norm.weight not in optimizer.state


def test_tied_weights_are_one_tensor_with_one_remainder():
    model, _, precision = make("bf16-pure-split", tied=True)
    assert [slot.name for slot in precision.compact.slots.values()].count("up.weight") == 1
    assert model.head.weight is model.up.weight
    train(model, precision, 2)
    assert "compact.up.weight:master|split|0" in precision.state_dict()
    assert "compact.head.weight:master|split|0" not in precision.state_dict()
    message = "up:master=bfloat16 stochastic and head:master=float32 are one tensor, up.weight; give both one format"
    with pytest.raises(ConfigError, match=re.escape(message)):
        make("bf16-pure; head:master=float32", tied=True)


def test_an_optimizer_that_looks_at_all_parameters_sees_them_all(monkeypatch):
    monkeypatch.setattr(compact, "CHUNK", 1)
    seen = []

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
            return super().step(closure)

    model = Net()
    precision = Precision(model, Own(model.parameters(), 0.1), "bf16-pure")
    train(model, precision, 1)
    assert seen == [5]


def test_weights_that_lie_in_another_order_keep_it():
    model = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    precision = Precision(model, optimizer, "bf16-pure-split; *:state=mxfp8")
    wide = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    for i in range(2):
        give(model, i)
        precision.step()
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert wide.weight.stride() == model.weight.stride()
    state = precision.state_dict()
    assert state["compact.weight:master|split|0"].stride() == model.weight.stride()


# --- what is refused ---


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("bf16; up:state=tf32", "up:state.exp_avg=tf32: moments are float32, bfloat16 or scaled in blocks; write bf"),
        ("bf16; *:state.exp_avg_sq=float16", "up:state.exp_avg_sq=float16: moments are float32, bfloat16 or scaled in"),
        ("bf16; up:state=e4m3", "moments are float32, bfloat16 or scaled in blocks; write float8_e4m3fn@1x128"),
        ("bf16; up:state.other=e8m0", "up:state.other=float8_e8m0fnu: moments are float32, bfloat16 or scaled in"),
        ("bf16; up:state=e4m3@128x128", "moments are divided into blocks as they lie in memory; write float8_e4m3fn"),
        ("bf16; up:state=e4m3@row", "moments are divided into blocks as they lie in memory; write float8_e4m3fn"),
        ("bf16; up:state=nvfp4", "a moment's scales do not hang on the whole tensor; write mxfp4, or better mxfp8"),
        ("bf16-pure; up:state=float64", "up:state.exp_avg=float64: a bfloat16 weight is updated in float32"),
        ("bf16; up:master=float16", "up:master=float16: masters are float32, float64 or bfloat16"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_before_training_by_its_site(policy, message):
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS["fused AdamW"](model.parameters())
    with pytest.raises(ConfigError, match=re.escape(message)):
        Precision(model, optimizer, policy)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_low_masters_under_an_optimizer_with_moments_are_refused():
    model, optimizer, precision = make("bf16")
    train(model, precision, 1)
    precision.remove()
    with pytest.raises(ConfigError, match=r"stores up\.weight in another dtype, but the optimizer already has moments"):
        Precision(model, optimizer, "bf16-pure")


def test_the_site_table_says_how_weights_are_stored():
    _, _, precision = make("bf16-pure-kahan; down:master=float32; down:state=float32")
    rows = {row.site: (row.format, row.bytes) for row in precision.sites(torch.ones(1, 48))}
    assert rows["up.weight:master"] == ("bfloat16 kahan", 48 * 64 * 2)
    assert rows["down.weight:master"] == ("float32", 48 * 64 * 4)


@pytest.mark.parametrize("kind", ["Adamax", "Adagrad", "RMSprop", "RAdam", "NAdam", "AdamW", "Adadelta"])
def test_no_denominator_of_an_optimizer_becomes_zero(kind):
    """int8 in blocks of 256 has 127 steps: without a remedy the small ones of a denominator become zero, and an update
    by lr 1e-3 is some thousand times too large. With it the updates are at most a few times float32's largest."""

    def largest(policy):
        torch.manual_seed(0)
        model = nn.Linear(64, 64, bias=False)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
        precision = Precision(model, optimizer, policy)
        g = torch.Generator().manual_seed(1)
        spread = torch.exp2(torch.randint(-12, 1, (64, 64), generator=g))  # gradients of very different sizes
        most = 0.0
        for _ in range(20):
            before = model.weight.detach().clone()
            precision.backward((model.weight * spread * torch.randn(64, 64, generator=g)).sum())
            precision.step()
            most = max(most, (model.weight.detach() - before).abs().max().item())
        return most

    if kind == "Adagrad":  # makes its state in its constructor
        assert largest("fp32; *:state=int8@1x256 stochastic") < 10 * largest("fp32")
    else:
        assert largest("fp32; *:state=int8@1x256 stochastic") < 30 * largest("fp32")
