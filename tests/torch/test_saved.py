"""`saved` rules: what operations other than products keep for the backward pass is rounded, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzo.errors import ConfigError
from mezzo.models.gpt_torch import GPT
from mezzo.models.shapes import preset
from mezzo.policy import Policy, Site
from mezzo.torch import Precision, quantize
from mezzo.torch.saved import kept_bytes


class Chain(nn.Module):
    """Elementwise operations whose intermediate results die one after the other, so that memory is used again."""

    def __init__(self, op: Any = F.silu) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = self.op(x) * 1.5
        return (x * self.scale).sum()


class SiluOfRounded(torch.autograd.Function):
    """silu forward on x, backward on x rounded: written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: str) -> Tensor:
        ctx.save_for_backward(quantize(x, fmt, overflow="saturate"))
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.silu(x), x, grads[0])[0], None


def gpt(policy: str, **options: Any) -> tuple[GPT, Precision]:
    model = GPT(preset("gpt-tiny"), generator=torch.Generator().manual_seed(0), **options)
    return model, Precision(model, None, policy)


def gradients(policy: str, **options: Any) -> list[Tensor]:
    model, precision = gpt(policy, **options)
    x = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(1))
    precision.backward(model(x, x))
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("fmt", ["bfloat16", "float16", "e4m3@tensor", "mxfp8", "nvfp4", "int8@1x32+pow2", "e4m3"])
def test_the_backward_pass_sees_what_was_kept_rounded_and_the_forward_pass_does_not(fmt: str) -> None:
    x = 3 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    model = Chain()
    plain = model(x)
    precision = Precision(model, None, f"fp32; *:saved={fmt}")
    mine, by_hand = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = model(mine)
    assert out.equal(plain)
    out.backward()
    precision.remove()
    Chain(lambda v: SiluOfRounded.apply(v, fmt))(by_hand).backward()
    assert mine.grad is not None
    assert by_hand.grad is not None
    assert mine.grad.equal(by_hand.grad)
    exact = x.clone().requires_grad_()
    Chain()(exact).backward()
    assert not mine.grad.equal(exact.grad)  # type: ignore[arg-type]


def test_products_and_parameters_are_kept_as_their_own_roles_say() -> None:
    def linear(policy: str) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        precision = Precision(model, None, policy)
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(9))
        precision.backward(model(x).sum())
        return [p.grad for p in model.parameters() if p.grad is not None]

    for recipe in ("fp32", "bf16", "fp8"):
        with_rule, without = linear(f"{recipe}; *:saved=nvfp4"), linear(recipe)
        assert all(map(torch.equal, with_rule, without))


def test_a_gradient_stays_within_what_eight_bits_allow() -> None:
    found, exact = (torch.cat([g.flatten() for g in gradients(p)]) for p in ("fp32; blocks.*:saved=mxfp8", "fp32"))
    # e4m3 has 4 significant bits: each kept value is within 2**-4 of itself, each product of two within 2**-3.
    assert 0 < (found - exact).norm() < exact.norm() / 8


def test_the_memory_falls_and_shared_tensors_are_kept_once() -> None:
    x = torch.randint(0, 512, (2, 64))

    def held(policy: str) -> int:
        model, precision = gpt(policy)
        return kept_bytes(precision, lambda: model(x, x))

    whole, rounded = held("fp32"), held("fp32; *:saved=bfloat16")
    product_only = held("fp32; *:saved=float32")
    assert product_only == whole
    assert rounded < 0.7 * whole
    assert held("fp8; *:saved=mxfp8; (model):saved=bfloat16") < 0.45 * whole
    chain = Chain(lambda v: v * v.sigmoid())  # both operations keep v
    precision = Precision(chain, None, "fp32; *:saved=bfloat16")
    given = torch.randn(8, 64, requires_grad=True)
    # 6 times v and sigmoid(v), which sigmoid's own backward shares, and x before the scale
    assert kept_bytes(precision, lambda: chain(given)) == 13 * 8 * 64 * 2


def test_checkpointed_blocks_are_computed_again_from_what_they_were_given() -> None:
    found, exact = (gradients(p, checkpoint_activations=True) for p in ("bf16; blocks.*:saved=nvfp4", "bf16"))
    assert all(map(torch.equal, found, exact))


def test_the_sites_and_the_taps_tell_of_it() -> None:
    model, precision = gpt("bf16; blocks.0.*:saved=mxfp8")
    x = torch.randint(0, 512, (2, 64))
    told: list[tuple[Site, Tensor, Tensor]] = []
    with precision.tap(lambda site, before, after: told.append((site, before, after))):
        precision.backward(model(x, x))
    saved = [(site, before, after) for site, before, after in told if site.role == "saved"]
    assert {site.path for site, _, _ in saved} >= {"blocks.0.norm1", "blocks.0.mlp"}
    assert all(after.equal(quantize(before, "mxfp8", overflow="saturate")) for _, before, after in saved)
    rows = {row.site: row for row in precision.sites(x, x)}
    assert rows["blocks.0.norm1:saved"].format == "mxfp8_e4m3" or rows["blocks.0.norm1:saved"].format == "mxfp8"
    assert rows["blocks.0.norm1:saved"].route == "stored"
    assert "blocks.1.norm1:saved" not in rows


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_is_refused_with_the_remedy() -> None:
    model, precision = gpt("bf16; *:saved=bfloat16")
    x = torch.randint(0, 512, (2, 64))
    with pytest.raises(ConfigError, match=r"drop those rules or torch\.compile"):
        precision.backward(torch.compile(model)(x, x))


@pytest.mark.parametrize("fmt", ["tf32", "e8m0"])
def test_a_format_that_saves_nothing_is_refused(fmt: str) -> None:
    with pytest.raises(ConfigError, match=r":saved="):
        gpt(f"bf16; *:saved={fmt}")


def test_globs_leave_saved_out() -> None:
    assert Policy.parse("bf16; head:*=float16").spec(Site("head", "saved")) is None
    with pytest.raises(ConfigError, match="another rounding is for"):
        Policy.parse("bf16; *:saved=bfloat16 stochastic")


def test_an_expanded_tensor_is_not_made_larger() -> None:
    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x.expand(512, 64)).sum()

    def held(policy: str) -> int:
        model, x = Spread(), torch.randn(1, 64, requires_grad=True)
        precision = Precision(model, None, policy)
        return kept_bytes(precision, lambda: model(x))

    assert held("fp32; *:saved=bfloat16") == held("fp32")
