import math

import pytest
import torch
import torch.nn.functional as F
from reference import U, rounded
from torch import nn

from mezzo.formats import get_format
from mezzo.torch import Precision

pytestmark = pytest.mark.usefixtures("slow_16_bits")
B, H, T, S, E = 2, 4, 6, 9, 8


class Attention(nn.Module):
    def forward(self, q, k, v, **how):
        return F.scaled_dot_product_attention(q, k, v, **how)


def reference(q, k, v, g, probs=None, **how):
    """float64 attention on the given operands, step by step: (out, dq, dk, dv)."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    groups = q.shape[-3] // k.shape[-3]
    keys, values = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
    scores = q @ keys.mT * how.get("scale", 1 / math.sqrt(q.shape[-1]))
    if how.get("is_causal"):
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    mask = how.get("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    p = torch.softmax(scores, -1)
    if probs:
        p = p + (rounded(p, probs) - p).detach()
    out = p @ values
    return (out, *torch.autograd.grad(out, (q, k, v), g))


def tolerance(exact, q, k, v, g, out, extra=0.0):
    """How far float32 attention between exact operands may be from float64's, and then rounded to `out`.

    Scores err by (E + 1) u |q||k| scale, the exponential and the sum of S terms by about (S + 4) u relatively, the
    second product by S u; a gradient is three such products in a row with a softmax between. With |x| standing for
    the largest absolute value, score = E |q||k| scale bounds a score, and every result is a sum of at most max(T, S)
    terms bounded by |v|, or E S |g||v||k| scale. All these are multiplied out, generously: groups of heads included.
    """
    fmt = get_format(out)
    big = {n: float(x.abs().max()) for n, x in {"q": q, "k": k, "v": v, "g": g}.items()}
    scale = 1 / math.sqrt(E)
    score = E * big["q"] * big["k"] * scale
    relative = 2 * (E + 1) * U * score + (2 * S + 6) * U + extra
    size = max(big["v"], H * T * big["g"], 2 * H * T * E * big["g"] * big["v"] * max(big["q"], big["k"]) * scale)
    last = fmt.epsilon / 2 if fmt.mantissa_bits < 23 else 0.0
    return 4 * relative * size + last * exact.abs() + fmt.min_subnormal


def tensors(kv_heads=H, queries=T):
    q, k, v = torch.randn(B, H, queries, E), torch.randn(B, kv_heads, S, E), torch.randn(B, kv_heads, S, E)
    return q, k, v, torch.randn(B, H, queries, E)


def run(policy, q, k, v, g, **how):
    model = Attention()
    precision = Precision(model, policy=policy)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = model(q, k, v, **how)
    out.backward(g)
    routes = {row.route for row in precision.sites() if row.site.endswith((".query", ".out"))}
    assert len(routes) == 1
    return (out, q.grad, k.grad, v.grad), routes.pop()


MASK = torch.rand(T, S, generator=torch.Generator().manual_seed(1)) > 0.4
MASK[:, 0] = True  # a row with nothing to attend to has no softmax
HOW = {
    "plain": ({}, H),
    "causal": ({"is_causal": True}, H),
    "scaled": ({"scale": 0.3}, H),
    "bool mask": ({"attn_mask": MASK}, H),
    "float mask": ({"attn_mask": torch.randn(T, S, generator=torch.Generator().manual_seed(2))}, H),
    "grouped queries": ({"enable_gqa": True}, 2),
    "grouped queries, causal": ({"enable_gqa": True, "is_causal": True}, 1),
    "grouped queries, bool mask": ({"enable_gqa": True, "attn_mask": MASK}, 2),
}


@pytest.mark.parametrize("policy", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("how", HOW)
def test_attention_is_float32_attention_between_rounded_operands_and_its_results_are_rounded_once(how, policy):
    kwargs, kv_heads = HOW[how]
    q, k, v, g = tensors(kv_heads)
    fmt = {"bf16": "bfloat16", "fp16": "float16", "tf32": "tf32"}[policy]
    out_fmt = "float32" if policy == "tf32" else fmt
    got, route = run(policy, q, k, v, g, **kwargs)
    assert route == "flash"
    for result in got:
        assert torch.equal(result, rounded(result, out_fmt).float())
    q, k, v, g = (rounded(x, fmt) for x in (q, k, v, g))
    for name, mine, exact in zip(("out", "dq", "dk", "dv"), got, reference(q, k, v, g, **kwargs), strict=True):
        # backward uses the result as kept, rounded: its part in a gradient is the sum of g * out over E
        extra = get_format(out_fmt).epsilon / 2 if name in ("dq", "dk") and out_fmt != "float32" else 0.0
        limit = tolerance(exact, q, k, v, g, out_fmt, extra)
        assert bool(((mine.double() - exact).abs() <= limit).all()), name


@pytest.mark.parametrize("how", HOW)
def test_a_rule_for_the_probabilities_rounds_them(how):
    kwargs, kv_heads = HOW[how]
    q, k, v, g = tensors(kv_heads)
    wide = "fp32; *:fprop.probs=bfloat16"
    got, route = run(wide, q, k, v, g, **kwargs)
    assert route == "explicit"
    q64, k64, v64, g64 = (x.double() for x in (q, k, v, g))
    exact = reference(q64, k64, v64, g64, probs="bfloat16", **kwargs)
    plain = reference(q64, k64, v64, g64, **kwargs)
    # Only float32's own error is left, unless a probability lies so near a tie that float32 takes it the other way. Its
    # error is some 2^-15 of a bfloat16 step, so of these 432 one flips in one seed of 75; this seed flips none.
    q, k, v, g = (float(x.abs().max()) for x in (q, k, v, g))
    for mine, want, before, size in zip(
        got, exact, plain, (v, H * T * g * v * k, H * T * g * v * q, H * T * g), strict=True
    ):
        assert float((mine.detach().double() - want.detach()).abs().max()) <= 64 * U * size
        if mine is got[0] or mine is got[3]:  # the scores' gradients see the probabilities as they were
            assert float((before - want).detach().abs().max()) > 64 * U * size, "this could not see the rounding"


def test_explicit_attention_without_narrow_formats_is_attention():
    q, k, v, g = tensors()
    for policy, limit in {"fp32; *:fprop.probs=float32": 1e-5, "fp64; *:fprop.probs=float64": 1e-6}.items():
        got, _ = run(policy, q, k, v, g, is_causal=True)
        exact = reference(q.double(), k.double(), v.double(), g.double(), is_causal=True)
        for mine, want in zip(got, exact, strict=True):
            assert torch.allclose(mine.double(), want, rtol=limit, atol=limit)  # float32 gradients leave in float32


def test_the_flash_kernel_is_right_for_rows_that_are_not_dense():
    q, k, v, g = tensors()
    dense, _ = run("bf16; *:dgrad.dout=float32", q, k, v, g)
    views = [x.mT.contiguous().mT for x in (q, k, v, g)]
    got, route = run("bf16; *:dgrad.dout=float32", *views)
    assert route == "flash"
    assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))
    model = Attention()
    Precision(model, policy="bf16; *:dgrad.dout=float32; *:fprop.out=float32")
    q = q.requires_grad_()
    model(q, k, v).sum().backward()  # an expanded gradient of ones
    dq, q.grad = q.grad, None
    model(q, k, v).backward(torch.ones(q.shape))
    assert torch.equal(dq, q.grad)


@pytest.mark.parametrize("role", ["fprop.query", "fprop.key", "fprop.value", "dgrad.dout", "dgrad.query", "dgrad.key",
                                  "dgrad.value"])  # fmt: skip
def test_a_rule_for_one_operand_changes_what_it_must_and_nothing_else(role):
    q, k, v, g = tensors()
    plain = reference(*(x.double() for x in (q, k, v, g)))
    got, _ = run(f"fp32; *:{role}=bfloat16", q, k, v, g)
    changed = {
        name
        for name, mine, exact in zip(("out", "query", "key", "value"), got, plain, strict=True)
        if not torch.allclose(mine.double(), exact, rtol=1e-4, atol=1e-4)
    }
    everything = {"out", "query", "key", "value"}
    assert changed == {
        "fprop.query": everything,
        "fprop.key": everything,
        "fprop.value": everything - {"value"},  # dv = pT g knows nothing of v
        "dgrad.dout": everything - {"out"},
    }.get(role, {role.removeprefix("dgrad.")})


def test_attention_in_three_dimensions_with_dropout_and_with_empty_sequences_runs():
    model = Attention()
    Precision(model, policy="bf16")
    x = torch.randn(B, T, E)
    assert model(x, x, x).shape == x.shape
    y = torch.randn(B, H, T, E)
    assert model(y, y, y, dropout_p=0.5).shape == y.shape
    assert model(y[:, :, :0], y, y).shape == (B, H, 0, E)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, **how):
        return self.self_attn(x, x, x, **how)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_is_covered_and_its_output_projection_has_its_own_path(need_weights):
    model = Block()
    precision = Precision(model, policy="fp32")
    x = torch.randn(2, 5, 8)
    plain, _ = model(x, need_weights=need_weights)
    precision.remove()
    precision = Precision(model, policy="fp32; self_attn.out_proj:fprop.*=bfloat16")
    out, weights = model(x, need_weights=need_weights)
    sites = {row.site: row for row in precision.sites()}
    assert sites["self_attn:fprop.a"].format == "float32"
    assert sites["self_attn.out_proj:fprop.a"].format == "bfloat16"
    assert torch.equal(out, rounded(out, "bfloat16").float())
    assert torch.allclose(out, plain, atol=0.05)
    assert not torch.equal(out, plain)
    assert (weights is not None) == need_weights
    assert any(site.startswith("self_attn:fprop.query" if not need_weights else "self_attn:compute") for site in sites)


def test_a_transformer_encoder_layer_gives_the_same_in_training_and_in_evaluation_mode():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    precision = Precision(layer, policy="bf16")
    x = torch.randn(2, 5, 8)
    train = layer(x)
    layer.eval()
    with torch.no_grad():  # torch's fused fast path would bypass the sites
        assert torch.equal(layer(x), train)
    names = {row.site for row in precision.sites()}
    assert {"self_attn:fprop.a", "self_attn.out_proj:fprop.b", "linear1:fprop.out", "norm1:compute"} <= names
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[:, 3:] = True
    assert layer(x, src_key_padding_mask=pad).isfinite().all()
