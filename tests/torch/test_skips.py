"""Steps that are skipped: what stays, what is said, and when it ends."""

import copy
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mezzo.errors import NonfiniteError
from mezzo.torch import Precision

pytestmark = pytest.mark.usefixtures("slow_16_bits")
OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "plain AdamW": lambda p: torch.optim.AdamW(p, 1e-2, fused=False),
    "fused SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
}


class Factor(torch.autograd.Function):
    """x times `forward`; its gradient times `backward`."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None, None


class Net(nn.Module):
    """Three layers and a BatchNorm; a fault can be planted between the second and the third."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.third = (
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4),
        )  # fmt: skip
        self.fault = (1.0, 1.0)

    def forward(self, x):
        return self.third(Factor.apply(self.second(self.norm(self.first(x))), *self.fault))


def make(policy, optimizer="fused AdamW", **how):
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return model, optimizer, Precision(model, optimizer, policy, **how)


def one(model, precision, x=None):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)) if x is None else x
    precision.backward(model(x).square().mean())
    return precision.step()


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["fp16", "bf16"])
def test_a_skipped_step_leaves_weights_moments_and_buffers_as_they_were_to_the_bit(name, policy):
    model, optimizer, precision = make(policy, name)
    for _ in range(3):
        assert not one(model, precision).skipped_now()
    before = snapshot(model, optimizer)
    model.fault = (1.0, float("inf"))
    step = one(model, precision)
    assert step.skipped_now()
    assert equal(snapshot(model, optimizer), before)
    assert all(p.grad is None for p in model.parameters())
    assert float(precision.scales.loss.scale) == (2.0**15 if policy == "fp16" else 1.0)
    model.fault = (1.0, 1.0)
    assert not one(model, precision).skipped_now()
    after, _ = snapshot(model, optimizer)
    assert not equal(after["third.weight"], before[0]["third.weight"])
    assert not equal(after["norm.running_mean"], before[0]["norm.running_mean"])
    assert (precision.steps, precision.skipped) == (5, 1)


def test_buffers_that_the_module_replaces_are_rolled_back_too():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
            return self.layer(x)

    model = Average()
    precision = Precision(model, torch.optim.SGD(model.parameters(), 0.1), "bf16")
    one(model, precision)
    before = model.seen.clone()
    assert one(model, precision, torch.full((8, 4), float("nan"))).skipped_now()
    assert torch.equal(model.seen, before)


def test_a_first_skipped_step_does_not_undo_a_loaded_checkpoint():
    trained, _, precision = make("bf16")
    one(trained, precision)
    model, _, precision = make("bf16")
    model.load_state_dict(trained.state_dict())
    model.fault = (1.0, float("inf"))
    assert one(model, precision).skipped_now()
    assert equal(dict(model.state_dict()), dict(trained.state_dict()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_scheduler_waits_on_a_skipped_step(name):
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    precision = Precision(model, optimizer, "fp16", scheduler=scheduler)
    rates = []
    for fault in (1.0, float("nan"), 1.0):
        model.fault = (1.0, fault)
        one(model, precision)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [5e-3, 5e-3, 2.5e-3]


def test_accumulated_gradients_of_a_skipped_step_are_dropped():
    model, _, precision = make("bf16")
    x = torch.randn(8, 4)
    model.fault = (1.0, float("inf"))
    precision.backward(model(x).square().mean())
    model.fault = (1.0, 1.0)
    precision.backward(model(x).square().mean())
    assert precision.step().skipped_now()
    step = one(model, precision)
    assert not step.skipped_now()


FAULTS = {
    # A result that no float16 holds: 65504 is the largest. The factor itself is applied to float16.
    "forward overflow": ((6e4, 1.0), None, "third:fprop.out"),
    "backward overflow": ((1.0, 1e6), None, "second:dgrad.out"),
    "a NaN in a weight": ((1.0, 1.0), "second", "second:fprop.out"),
    "a NaN in the data": ((1.0, 1.0), "data", "first:fprop.out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_site_where_a_fault_was_planted_is_named(fault):
    factors, where, site = FAULTS[fault]
    model, _, precision = make("fp16")
    assert one(model, precision).site is None
    model.fault = factors
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    if where == "data":
        x[2, 1] = float("nan")
    elif where:
        with torch.no_grad():
            model.get_submodule(where).weight[1, 1] = float("nan")
    step = one(model, precision, x)
    assert step.site == site
    assert step.rule == f"'{site.partition(':')[0]}:*=float32'"


def test_under_bf16_the_parameters_are_named_at_once_and_the_site_from_the_next_step_on():
    model, _, precision = make("bf16")
    with torch.no_grad():
        model.second.weight[1, 1] = float("nan")
    first, second = one(model, precision), one(model, precision)
    assert first.site.startswith("the gradient of ")
    assert "third.weight" in first.site
    assert second.site == "second:fprop.out"


def test_the_rule_that_is_offered_spares_the_site():
    model, _, precision = make("fp16")
    model.fault = (6e4, 1.0)
    rule = one(model, precision).rule.strip("'")
    precision.remove()
    precision = Precision(model, torch.optim.SGD(model.parameters(), 1e-3), f"fp16; {rule}; second:fprop.out=float32")
    model(torch.randn(8, 4))
    assert model(torch.randn(8, 4)).isfinite().all()
    bare = nn.Linear(2, 2)  # a model without a path of its own
    precision = Precision(bare, torch.optim.SGD(bare.parameters(), 0.1), "fp16")
    step = one(bare, precision, torch.full((2, 2), float("inf")))
    assert (step.site, step.rule) == ("(model):fprop.out", "'(model):*=float32'")


@pytest.mark.parametrize(
    ("policy", "steps", "message"),
    [
        ("fp16; loss_scale.init=4; loss_scale.patience=3", 5,
         "3 steps in a row had nonfinite gradients at the loss scale's floor of 1; first nonfinite at first:fprop.out"),
        ("fp16; loss_scale=8", 10, "10 steps in a row had nonfinite gradients at the constant loss scale of 8; first"),
        ("bf16", 10, "10 steps in a row had nonfinite gradients under bf16; first nonfinite at first:fprop.out. The w"),
    ],
)  # fmt: skip
def test_steps_that_stay_nonfinite_end_in_an_error_that_names_the_site_and_keeps_the_weights(policy, steps, message):
    model, optimizer, precision = make(policy)
    one(model, precision)
    before = snapshot(model, optimizer)
    x = torch.full((8, 4), float("nan"))
    for _ in range(steps - 1):
        one(model, precision, x)
    with pytest.raises(NonfiniteError, match=re.escape(message)) as caught:
        one(model, precision, x)
    assert "for instance with the rule 'first:*=float32'" in str(caught.value)
    assert equal(snapshot(model, optimizer), before)
    assert not precision.hooks.nonfinite


def test_a_good_step_in_between_resets_the_patience():
    model, _, precision = make("bf16")
    nan = torch.full((8, 4), float("nan"))
    for _ in range(4):
        for _ in range(9):
            assert one(model, precision, nan).skipped_now()
        assert not one(model, precision).skipped_now()
    assert precision.skipped == 36


def test_evaluation_leaves_nothing_to_be_blamed_later():
    model, _, precision = make("fp16")
    nan = torch.full((8, 4), float("nan"))
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(nan)
    assert precision.hooks.nonfinite == []
    model.train()
    model.fault = (1.0, 1e6)
    assert one(model, precision).site == "second:dgrad.out"
    serving = Net()
    precision = Precision(serving, None, "fp16")
    serving(torch.randn(8, 4))
    assert precision.hooks.nonfinite == []


def test_fp16_finds_its_scale_by_itself_when_it_starts_too_high():
    model, _, precision = make("fp16; loss_scale=dynamic; loss_scale.init=16777216")
    skipped = [one(model, precision).skipped_now() for _ in range(20)]
    assert skipped[0]
    assert not any(skipped[-5:])
    assert skipped == sorted(skipped, reverse=True)  # once it has come down it stays
    assert float(precision.scales.loss.scale) == 2.0 ** (24 - sum(skipped))


def test_loss_scaling_saves_gradients_from_underflow():
    def lost(policy):
        torch.manual_seed(0)
        model = nn.Sequential(OrderedDict(body=nn.Linear(16, 16), head=nn.Linear(16, 16)))
        precision = Precision(model, torch.optim.SGD(model.parameters(), 0.1), policy)
        counts = [0, 0]

        def count(site, before, after):
            # The head's own result is float32, so its gradient arrives whole. The body's arrives in the dtype of its
            # result: autograd has rounded it to float16 before any site sees it.
            if str(site) == "head:dgrad.a":
                counts[0] += int(((before != 0) & (after == 0)).sum())
                counts[1] += int((before != 0).sum())

        with precision.tap(count):
            # a mean over a million tokens: gradients near 1e-8, where float16 has nothing (its smallest is 6e-8)
            precision.backward(F.mse_loss(model(torch.randn(8, 16)), torch.zeros(8, 16)) * 1e-6)
        return counts[0] / counts[1], float(model.body.weight.grad.abs().max())

    assert lost("fp16; loss_scale=none") == (1.0, 0.0)
    share, largest = lost("fp16")
    assert share == 0
    assert largest > 0
    assert lost("bf16")[0] == 0


def test_a_step_on_the_device_is_finished_one_step_later_and_before_a_checkpoint():
    """What a GPU does: step() waits for nothing. Acted out on the CPU by taking the waiting away."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    precision = Precision(model, optimizer, "bf16", scheduler=scheduler)
    finish = precision._finish_last
    precision._finish_last = lambda: None
    one(model, precision)
    assert optimizer.param_groups[0]["lr"] == 0.1
    precision._finish_last = finish
    precision.state_dict()
    assert optimizer.param_groups[0]["lr"] == 0.05
    precision.state_dict()
    assert optimizer.param_groups[0]["lr"] == 0.05
