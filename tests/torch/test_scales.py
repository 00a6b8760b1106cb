"""Delayed scales beside everything else that a Precision does: other policies, loss scaling, calls, resumes."""

import pytest
import torch
from torch import nn

from mezzo.errors import ConfigError
from mezzo.torch import Precision

DELAYED = "fp32; *:input=e4m3@tensor delayed=4; *:grad_output=e5m2@tensor delayed=4"


def layer_under(policy, seed=0, **more):
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(48, 32, bias=False), nn.Linear(32, 16, bias=False))
    return layer, Precision(layer, torch.optim.SGD(layer.parameters(), lr=0.01), policy, **more)


def step(layer, precision, number, factor=1.0):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(number)) * factor
    loss = layer(x).square().mean()
    precision.backward(loss)
    precision.step()
    return loss.item()


def test_evaluating_under_another_delayed_policy_changes_no_bit_of_the_training():
    def run(look):
        layer, precision = layer_under(DELAYED)
        losses = []
        for number in range(6):
            losses.append(step(layer, precision, number, factor=1 + number))
            if look:
                for other in ("fp32; *:input=e5m2@tensor delayed=2", "fp8; *:fprop.b=e4m3@tensor delayed=64", "fp32"):
                    with precision.using(other), torch.no_grad():
                        layer(torch.randn(8, 48))
        return losses, [p.detach().clone() for p in layer.parameters()]

    (one, weights), (other, same) = run(False), run(True)
    assert one == other
    assert all(map(torch.equal, weights, same))


def test_what_is_seen_between_two_backward_passes_counts_whatever_was_looked_at_in_between():
    layer, precision = layer_under(DELAYED)
    x = torch.randn(64, 48) * 8
    precision.backward(layer(x).square().mean())
    with precision.using("fp32; *:weight=e4m3@tensor delayed"), torch.no_grad():
        layer(x)
    precision.backward(layer(x / 8).square().mean())
    precision.step()
    row = precision.scales.rows["0:fprop.a float8_e4m3fn@tensor delayed=4"]
    assert precision.scales.history[row, 0] == x.abs().max()


def test_a_grown_loss_scale_takes_the_gradients_history_along():
    """Three steps at 2**4, then 2**5: the gradients double, and nothing of them may be clipped."""
    layer, precision = layer_under(f"{DELAYED}; loss_scale.init=16; loss_scale.growth_interval=3", seed=1)
    for group in precision.optimizers[0].param_groups:
        group["lr"] = 0.0  # the same gradients at each step, but for the scale
    clipped = []
    with precision.tap(lambda site, before, after: clipped.append(after.abs().max() / before.abs().max())):
        for _ in range(7):
            step(layer, precision, 0)
    assert precision.scales.loss.scale == 64
    # A largest value is rounded by at most half a gap of its format: 2 fraction bits, an eighth.
    assert min(clipped) >= 1 - 2.0**-3


def test_a_skipped_step_halves_what_is_remembered_of_gradients_and_leaves_the_rest():
    layer, precision = layer_under(f"{DELAYED}; loss_scale=dynamic")
    step(layer, precision, 0)
    before = precision.scales.history.clone()
    layer[0].weight.grad = None
    precision.backward(layer(torch.full((64, 48), torch.inf)).square().mean())
    assert precision.step().skipped_now()
    for name, row in precision.scales.rows.items():
        gradient = ":dgrad" in name or ":wgrad.a" in name
        gradient = gradient and "dgrad.b" not in name
        assert torch.equal(precision.scales.history[row], before[row] * (0.5 if gradient else 1.0)), name


def test_calls_that_no_rule_names_have_delayed_scales_too():
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(16, 16)

        def forward(self, x):
            return self.f(self.f(self.f(x)))

    torch.manual_seed(0)
    model = Thrice()
    precision = Precision(
        model, torch.optim.SGD(model.parameters(), lr=0.01), "fp32; *:input=e4m3@tensor delayed; f#1:weight=bf16"
    )
    for _ in range(2):
        precision.backward(model(torch.randn(8, 16)).square().mean())
        precision.step()
    assert sum("fprop.a" in name and name.startswith("f") for name in precision.scales.rows) == 3


def test_attention_in_two_products_refuses_delayed_scales():
    layer = nn.MultiheadAttention(16, 2)
    with pytest.raises(ConfigError, match=r"delayed scales are not for attention whose fprop.probs have a rule; drop"):
        Precision(layer, None, "fp32; *:fprop.probs=bf16; *:fprop.key=e4m3@tensor delayed")


def test_the_two_products_of_attention_draw_different_words():
    from mezzo.torch.attention import _explicit_specs

    layer = nn.Linear(4, 4)
    precision = Precision(layer, None, "fp32; *:fprop.probs=bf16; *:dgrad.dout=e5m2@tensor stochastic")
    scores, result = _explicit_specs(precision.mode.table.attention("(model)", 0))
    assert scores._site("wgrad.a") != result._site("wgrad.a")


def test_another_policy_goes_on_with_counters_words_and_what_it_shares():
    layer, precision = layer_under(f"{DELAYED}; loss_scale=dynamic")
    for number in range(3):
        step(layer, precision, number)
    state = {name: tensor.clone() for name, tensor in precision.state_dict().items()}
    layer, precision = layer_under("bf16; *:input=e4m3@tensor delayed=4; *:grad_output=e5m2@tensor delayed=8")
    precision.load_lasting(state)
    assert (precision.steps, precision.skipped, precision.bad_run, int(precision.scales.draws)) == (3, 0, 0, 3)
    scales = precision.scales
    row = scales.rows["0:fprop.a float8_e4m3fn@tensor delayed=4"]
    assert torch.equal(scales.history[row, :4], state["amax.0:fprop.a float8_e4m3fn@tensor delayed=4"])
    assert not scales.history[scales.rows["0:dgrad.a float8_e5m2@tensor delayed=8"]].any()
    assert scales.loss.scale == 1


def test_rows_that_only_another_policy_asks_for_are_kept_through_a_resume():
    layer, precision = layer_under("fp32")
    with precision.using(DELAYED):
        precision.backward(layer(torch.randn(8, 48)).square().mean())
    precision.step()
    state = {name: tensor.clone() for name, tensor in precision.state_dict().items()}
    assert any(tensor.any() for name, tensor in state.items() if name.startswith("amax."))
    layer, precision = layer_under("fp32")
    precision.load_state_dict(state)
    again = precision.state_dict()
    with precision.using(DELAYED):
        named = precision.state_dict()
    for name in state:
        assert torch.equal(again[name], state[name])
        assert torch.equal(named[name], state[name])


def test_buffers_are_kept_when_only_the_lasting_state_is_loaded():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    precision = Precision(model, torch.optim.SGD(model.parameters(), lr=0.1), "fp16")
    state = precision.state_dict()
    with torch.no_grad():
        model[1].running_mean.fill_(3.0)  # copied into place, past the hook on load_state_dict
    precision.load_lasting(state)
    precision.backward(model(torch.full((8, 4), torch.inf)).sum())
    assert precision.step().skipped_now()
    assert (model[1].running_mean == 3).all()
