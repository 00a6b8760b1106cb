"""Clipping against torch's own functions and a NumPy AGC, under loss scaling, accumulation and fused optimizers."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mezzo.errors import ConfigError
from mezzo.torch import Precision
from mezzo.torch.clip import clip_adaptive_, clip_value_, norms, unit_norms

pytestmark = pytest.mark.usefixtures("slow_16_bits")
LR = 0.5
FUSED = [True, False]
# Powers of two scale without rounding; 1000 is the case that rounds.
SCALED = ["fp32", "fp16; loss_scale=1024", "fp32; loss_scale=1000"]


class Net(nn.Module):
    """A convolution, a matrix, vectors, and a scalar; its gradients are of very different sizes."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3), nn.Linear(24, 5)
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.head(F.gelu(self.conv(x)).flatten(1) * self.gain)


def make(fused=False):
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.SGD(model.parameters(), LR, fused=fused)


def batch(i=0):
    g = torch.Generator().manual_seed(i)
    return torch.randn(4, 1, 4, 4, generator=g), torch.randint(0, 5, (4,), generator=g)


def loss_of(model, i=0):
    x, y = batch(i)
    return F.cross_entropy(model(x), y)


def plain_gradients(policy, batches=(0,)):
    """A model with the unscaled gradients that this policy gives, for torch or NumPy to clip."""
    model, optimizer = make()
    Precision(model, optimizer, policy)
    for i in batches:
        (loss_of(model, i) / len(batches)).backward()
    return model


def stepped(policy, fused, batches=(0,), **how):
    """The gradients that SGD really stepped by: (before - after) / LR."""
    model, optimizer = make(fused)
    before = copy.deepcopy(model)
    precision = Precision(model, optimizer, policy, **how)
    for i in batches:
        precision.backward(loss_of(model, i) / len(batches))
    step = precision.step()
    pairs = zip(before.named_parameters(), model.parameters(), strict=True)
    return {name: (old - new).detach() / LR for (name, old), new in pairs}, step


def assert_close(got, want):
    """fp16's scaled gradients are off by 2^-11 of the largest terms; w - lr·g rounds at 2^-24 of w, twice lr = 1/2."""
    for name, p in want.named_parameters():
        bound = 2**-9 * p.grad.abs().max() + 2**-22 * p.detach().abs().max()
        assert torch.allclose(got[name], p.grad, rtol=0, atol=float(bound)), name


def agc(grad, weight, factor, eps=1e-3):
    """Adaptive gradient clipping in NumPy, float64, as the paper's own code has it."""
    grad, weight = grad.astype(np.float64), weight.astype(np.float64)
    axes = None if np.squeeze(weight).ndim <= 1 else tuple(range(1, weight.ndim))
    w_norm = np.sqrt((weight**2).sum(axes, keepdims=axes is not None))
    g_norm = np.sqrt((grad**2).sum(axes, keepdims=axes is not None))
    limit = np.maximum(w_norm, eps) * factor
    return np.where(g_norm > limit, grad * (limit / np.maximum(g_norm, 1e-6)), grad)


def clip_by_numpy(model, factor):
    moved = 0
    for p in model.parameters():
        clipped = torch.from_numpy(np.asarray(agc(p.grad.numpy(), p.detach().numpy(), factor))).float()
        moved += int((~torch.isclose(clipped, p.grad, rtol=1e-5, atol=0)).any())
        p.grad = clipped
    return moved


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("policy", SCALED)
def test_max_value_clips_as_clip_grad_value_does(policy, fused):
    want = plain_gradients(policy)
    norm = norms([p.grad for p in want.parameters()])[1]
    assert max(float(p.grad.abs().max()) for p in want.parameters()) > 0.1, "nothing was clipped"
    nn.utils.clip_grad_value_(want.parameters(), 0.01)
    got, step = stepped(policy, fused, max_value=0.01)
    assert_close(got, want)
    # The norm is the one before clipping; a sum of 2^-11 errors stays below 2^-9 of it.
    assert float(step.grad_norm) == pytest.approx(float(norm), rel=2**-9)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("policy", SCALED)
def test_adaptive_clips_as_the_paper_does(policy, fused):
    want = plain_gradients(policy)
    assert clip_by_numpy(want, 0.05) >= 3, "too little was clipped"
    got, _ = stepped(policy, fused, adaptive=0.05)
    assert_close(got, want)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("policy", SCALED)
def test_the_order_is_adaptive_value_norm(policy, fused):
    want = plain_gradients(policy)
    clip_by_numpy(want, 0.2)
    nn.utils.clip_grad_value_(want.parameters(), 0.02)
    assert float(nn.utils.clip_grad_norm_(want.parameters(), 0.03)) > 0.035, "the norm clips nothing"
    got, _ = stepped(policy, fused, adaptive=0.2, max_value=0.02, max_norm=0.03)
    assert_close(got, want)
    other = plain_gradients(policy)  # in another order the result is another one
    nn.utils.clip_grad_norm_(other.parameters(), 0.03)
    clip_by_numpy(other, 0.2)
    nn.utils.clip_grad_value_(other.parameters(), 0.02)
    with pytest.raises(AssertionError):
        assert_close(got, other)


@pytest.mark.parametrize("how", [{"max_value": 0.01}, {"adaptive": 0.05}], ids=["value", "adaptive"])
def test_what_is_clipped_is_the_sum_over_micro_batches(how):
    want = plain_gradients("fp32", (0, 1, 2))
    if "adaptive" in how:
        clip_by_numpy(want, 0.05)
    else:
        nn.utils.clip_grad_value_(want.parameters(), 0.01)
    got, _ = stepped("fp32; loss_scale=1024", True, (0, 1, 2), **how)
    assert_close(got, want)


@pytest.mark.parametrize("how", [{"max_value": 1e6}, {"adaptive": 1e6}], ids=["value", "adaptive"])
def test_smaller_gradients_are_left_alone_to_the_bit(how):
    plain, _ = stepped("fp32", True)
    clipped, _ = stepped("fp32", True, **how)
    assert all(torch.equal(plain[name], clipped[name]) for name in plain)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_a_clipped_infinity_still_skips_the_step(policy, fused):
    model, optimizer = make(fused)
    precision = Precision(model, optimizer, policy, max_value=0.01, adaptive=0.01, max_norm=0.01)
    before = copy.deepcopy(model.state_dict())
    precision.backward(loss_of(model))
    model.head.weight.grad[0, 0] = float("inf")
    assert precision.step().skipped_now()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    precision.backward(loss_of(model))
    assert not precision.step().skipped_now()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_units_are_rows_output_channels_whole_vectors_and_numbers():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert torch.equal(unit_norms(x), x.flatten(1).norm(dim=1).view(2, 1, 1, 1))
    assert torch.equal(unit_norms(x.view(4, 6)), x.view(4, 6).norm(dim=1, keepdim=True))
    for whole in (torch.ones(9), torch.ones(9, 1), torch.ones(1, 9)):
        assert unit_norms(whole).item() == 3.0
    assert unit_norms(torch.tensor(-2.0)).item() == 2.0
    assert unit_norms(torch.full((4096,), 3e38, dtype=torch.bfloat16)).dtype is torch.float32


def test_units_of_zero_weights_may_move_by_eps_and_zero_gradients_stay():
    weight, grad = torch.zeros(3, 4), torch.ones(3, 4)
    grad[1] = 0
    clip_adaptive_([grad], [weight], 0.01)
    assert grad[1].tolist() == [0.0] * 4
    assert float(grad[0].norm()) == pytest.approx(0.01 * 1e-3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_functions_work_in_place_on_every_dtype_of_a_master(dtype):
    torch.manual_seed(0)
    weight = torch.randn(5, 7).to(dtype)
    grad = torch.randn(5, 7).to(dtype)
    want = agc(grad.double().numpy(), weight.double().numpy(), 0.1)
    clipped = grad.clone()
    clip_adaptive_([clipped], [weight], 0.1)
    eps = torch.finfo(dtype).eps
    assert clipped.dtype is dtype
    assert np.allclose(clipped.double().numpy(), want, rtol=2 * max(eps, 2**-23) + 35 * 2**-24, atol=0)
    clip_value_([grad], 0.25)
    assert float(grad.abs().max()) == 0.25


@pytest.mark.parametrize("name", ["max_norm", "max_value", "adaptive"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_thresholds_that_are_not_positive_are_refused(name, value):
    model, optimizer = make()
    with pytest.raises(ConfigError, match=re.escape(f"{name} is a positive number or None, got {value!r}")):
        Precision(model, optimizer, "bf16", **{name: value})
