"""Products: the nine roles, canonical forms, and the same bits as under PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

import mezzo.jax
import mezzo.torch
from mezzo.errors import ConfigError
from mezzo.formats import quantize

U = 2.0**-24


def numbers(shape, seed, size=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


class OneLayer(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.lin = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.lin.weight.data = torch.from_numpy(weight.copy())

    def forward(self, x):
        return self.lin(x)


def under_torch(policy, x, w, g, draws):
    model = OneLayer(w)
    precision = mezzo.torch.Precision(model, policy=policy, seed=7)
    precision.scales.draws += draws
    tx = torch.from_numpy(x).requires_grad_()
    y = model(tx)
    y.backward(torch.from_numpy(g))
    return y.detach().float().numpy(), tx.grad.numpy(), model.lin.weight.grad.numpy()


def under_jax(policy, x, w, g, draws, multiply=lambda p, x: x @ p["lin.weight"].T):
    precision = mezzo.jax.Precision(policy, seed=7)
    state = precision.init()._replace(draws=jnp.int32(draws))
    function = precision(multiply)

    @jax.jit
    def both(p, x, g):
        y, back = jax.vjp(lambda p, x: function(p, x, state=state), p, x)
        return y, *back(g)

    y, dp, dx = both({"lin.weight": jnp.asarray(w)}, jnp.asarray(x), jnp.asarray(g))
    return np.asarray(y), np.asarray(dx), np.asarray(dp["lin.weight"])


# Under these the operands are the same to the bit, so results differ by the order of float32 sums, and by the rounding
# of a result that lies next to a tie.
POLICIES = ["tf32", "bf16", "fp16; loss_scale=none", "fp8", "fp8-row", "fp8-block", "mxfp8", "mxfp4", "nvfp4",
            "nvfp4; lin:fprop.b=nvfp4 stochastic; lin:dgrad.b=e4m3@row"]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_a_linear_layer_gives_the_numbers_of_pytorch(policy):
    x, w, g = numbers((40, 48), 0), numbers((33, 48), 1, 0.1), numbers((40, 33), 2, 0.01)
    rules = "; ".join(f"*:{product}.out=float32" for product in ("fprop", "dgrad", "wgrad"))
    exact = f"{policy}; {rules}"
    sizes = (np.abs(x) @ np.abs(w).T, np.abs(g) @ np.abs(w), np.abs(g).T @ np.abs(x))
    terms = (48, 33, 40)
    for torchs, ours, size, k in zip(
        under_torch(exact, x, w, g, 5), under_jax(exact, x, w, g, 5), sizes, terms, strict=True
    ):
        # Two sums of K products of the same operands, each within gamma(K) · S of the exact one. S is taken of the
        # unrounded operands; a rounded one is at most twice as large (4 bits: a quarter at most, Hadamard: sqrt(16)/…).
        bound = 2 * 4 * (k * U) / (1 - k * U) * np.maximum(size, size.max())
        assert (np.abs(torchs - ours) <= bound).all(), (policy, float(np.abs(torchs - ours).max()))


@pytest.mark.parametrize("policy", ["bf16", "fp8", "nvfp4"])
def test_rounded_results_are_those_of_pytorch_but_for_ties(policy):
    x, w, g = numbers((40, 48), 3), numbers((33, 48), 4, 0.1), numbers((40, 33), 5, 0.01)
    policy = f"{policy}; lin:wgrad.out=bfloat16"
    for torchs, ours in zip(under_torch(policy, x, w, g, 1), under_jax(policy, x, w, g, 1), strict=True):
        assert (torchs != ours).mean() < 0.01  # a sum that falls on the other side of a tie
        np.testing.assert_allclose(ours, torchs, rtol=2**-7, atol=1e-6 * np.abs(torchs).max())


def test_the_native_route_multiplies_16_bit_numbers_with_float32_sums():
    x, w = jnp.asarray(numbers((16, 64), 0)), {"lin": {"kernel": jnp.asarray(numbers((64, 8), 1))}}
    precision = mezzo.jax.Precision("bf16; *:fprop.out=float32")
    emulated = jax.jit(precision(lambda p, x: x @ p["lin"]["kernel"]))(w, x)
    precision.native = True  # as on a GPU; a CPU can do it, too
    function = precision(lambda p, x: x @ p["lin"]["kernel"])
    jaxpr = str(jax.make_jaxpr(function)(w, x))
    assert "bf16[64,8]" in jaxpr or "bf16[8,64]" in jaxpr
    np.testing.assert_allclose(jax.jit(function)(w, x), emulated, rtol=1e-5, atol=1e-5)
    rows = {row.site: row.route for row in precision.sites(lambda p, x: x @ p["lin"]["kernel"], w, x)}
    assert rows["lin:fprop.a"] == "native"


def test_stochastic_words_move_with_the_state():
    x, w, g = numbers((16, 16), 0), numbers((16, 16), 1), numbers((16, 16), 2)
    policy = "fp32; lin:dgrad.a=e4m3@tensor stochastic"
    one, again, other = (under_jax(policy, x, w, g, draws)[1] for draws in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


def test_the_weight_is_the_weight_on_either_side():
    x, w, g = numbers((10, 12), 0), numbers((14, 12), 1), numbers((10, 14), 2)
    policy = "fp32; lin:fprop.a=e5m2@tensor; lin:fprop.b=e4m3@1x4+pow2; lin:dgrad.b=bfloat16; lin:wgrad.b=e4m3@row"
    right = under_jax(policy, x, w, g, 0)
    left = under_jax(policy, x, w, g, 0, lambda p, x: (p["lin.weight"] @ x.T).T)
    for one, other in zip(right, left, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    a, b = quantize(x, "e5m2@tensor"), quantize(w, "e4m3@1x4+pow2")
    np.testing.assert_allclose(right[0], a @ b.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(right[1], g @ quantize(w, "bfloat16"), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(right[2], g.T @ quantize(x, "e4m3@row", axis=0), rtol=1e-5, atol=1e-5)


def test_several_summed_axes_are_one_axis_of_blocks():
    """An EinsumDense over two axes is the same product as a Dense over both flattened."""
    x, w = numbers((6, 4, 8), 0), numbers((4, 8, 5), 1)
    precision = mezzo.jax.Precision("mxfp8")
    split = precision(lambda p, x: jnp.einsum("bhd,hde->be", x, p["out"]["kernel"]))
    flat = precision(lambda p, x: x.reshape(6, 32) @ p["out"]["kernel"].reshape(32, 5))
    p = {"out": {"kernel": jnp.asarray(w)}}
    np.testing.assert_array_equal(split(p, jnp.asarray(x)), flat(p, jnp.asarray(x)))


def test_batched_products_round_each_batch_and_give_its_gradients():
    a, b = numbers((3, 4, 8), 0), numbers((3, 8, 5), 1)
    precision = mezzo.jax.Precision("fp32; *:fprop.a=e4m3@row; *:fprop.b=mxfp4; *:dgrad.b=bfloat16; *:wgrad.b=tf32")
    y, back = jax.vjp(jax.jit(precision(lambda a, b: a @ b)), jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(y, quantize(a, "e4m3@row") @ quantize(b, "mxfp4", axis=-2), rtol=1e-5, atol=1e-5)
    g = numbers((3, 4, 5), 2)
    da, db = back(jnp.asarray(g))
    np.testing.assert_allclose(da, g @ quantize(b, "bfloat16").swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(db, quantize(a, "tf32").swapaxes(1, 2) @ g, rtol=1e-5, atol=1e-5)


def test_an_operand_that_the_weight_gradient_wants_in_another_format_is_rounded_from_the_original():
    x, w, g = numbers((8, 16), 0), numbers((4, 16), 1), numbers((8, 4), 2)
    dw = under_jax("fp32; lin:fprop.a=e4m3@tensor; lin:wgrad.b=bfloat16", x, w, g, 0)[2]
    np.testing.assert_allclose(dw, g.T @ quantize(x, "bfloat16"), rtol=1e-5, atol=1e-5)


def test_random_words_of_a_second_operand_that_is_no_weight_follow_its_own_order():
    a, b = numbers((4, 8), 0), numbers((8, 5), 1)
    y = mezzo.jax.Precision("fp32; *:fprop.b=e4m3@tensor stochastic", seed=3)
    state = y.init()._replace(draws=jnp.int32(2))
    got = y(lambda a, b: a @ b)(jnp.asarray(a), jnp.asarray(b), state=state)
    rounded = quantize(b, "e4m3@tensor", axis=-2, rounding="stochastic", key=(3, 2, "(model):fprop.b"))
    np.testing.assert_allclose(got, a @ rounded, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_16_bit_result_has_16_bits():
    x, w, g = numbers((8, 8), 0), numbers((8, 8), 1), numbers((8, 8), 2)
    dx = under_jax("fp32; lin:fprop.out=bfloat16", x, w, g, 0)[1]
    np.testing.assert_allclose(dx, quantize(g, "bfloat16") @ w, rtol=1e-5, atol=1e-5)


def test_a_convolution_rounds_each_of_its_six_operands():
    x, w = numbers((2, 3, 8, 8), 0), numbers((4, 3, 3, 3), 1)
    rules = {"fprop.a": "bfloat16", "fprop.b": "e4m3@tensor", "dgrad.a": "e5m2@tensor", "dgrad.b": "float16",
             "wgrad.a": "tf32", "wgrad.b": "e4m3"}  # fmt: skip
    policy = "fp32; " + "; ".join(f"conv:{role}={fmt}" for role, fmt in rules.items())
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME")  # noqa: E731
    y, back = jax.vjp(
        lambda p, x: mezzo.jax.Precision(policy)(lambda p, x: conv(x, p["conv"]["kernel"]))(p, x),
        {"conv": {"kernel": jnp.asarray(w)}}, jnp.asarray(x),
    )  # fmt: skip
    g = numbers(y.shape, 2)
    dp, dx = back(jnp.asarray(g))

    def rounded(role, t):
        wide = rules[role] in ("bfloat16", "float16", "tf32")
        return quantize(t, rules[role], overflow="cast" if wide else "saturate")

    np.testing.assert_allclose(y, conv(rounded("fprop.a", x), rounded("fprop.b", w)), rtol=1e-4, atol=1e-4)
    back_x = jax.vjp(lambda x: conv(x, rounded("dgrad.b", w)), x)[1]
    back_w = jax.vjp(lambda w: conv(rounded("wgrad.b", x), w), w)[1]
    np.testing.assert_allclose(dx, back_x(rounded("dgrad.a", g))[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dp["conv"]["kernel"], back_w(rounded("wgrad.a", g))[0], rtol=1e-4, atol=1e-4)


def test_blocks_in_a_convolution_are_refused_with_the_remedy():
    function = mezzo.jax.Precision("mxfp8")(
        lambda p, x: lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "SAME")
    )
    with pytest.raises(ConfigError, match=r"conv:fprop.a=mxfp8_e4m3: a convolution sums over several axes.*conv:input"):
        function({"conv": {"kernel": jnp.ones((4, 3, 3, 3))}}, jnp.ones((2, 3, 8, 8)))


def test_fp32_is_the_function_itself_to_the_bit():
    x, w, g = numbers((40, 48), 0), numbers((33, 48), 1), numbers((40, 33), 2)
    plain = jax.jit(lambda w, x, g: (x @ w.T, g @ w, g.T @ x))(w, x, g)
    for one, other in zip(under_jax("fp32", x, w, g, 0), plain, strict=True):
        np.testing.assert_array_equal(one, other)
    jaxpr = jax.make_jaxpr(mezzo.jax.Precision("fp32")(lambda p, x: x @ p["w"]))({"w": w.T}, x)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["dot_general"]


def test_float64_sites_need_64_bits_and_say_so():
    with pytest.raises(ConfigError, match="jax_enable_x64"):
        mezzo.jax.Precision("fp64")
    with jax.enable_x64(True):
        w = jnp.asarray(numbers((4, 4), 0), jnp.float64) / 3
        y = mezzo.jax.Precision("fp64")(lambda p, x: x @ p["w"])({"w": w}, w)
        assert y.dtype == jnp.float64
        np.testing.assert_array_equal(y, w @ w)


def test_attention_has_its_own_roles():
    q, k, v, g = (jnp.asarray(numbers((2, 6, 2, 8), i)) for i in range(4))
    attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    rules = "; ".join(f"*:{r}=bfloat16" for r in ("fprop.query", "fprop.key", "fprop.value", "fprop.out", "dgrad.dout",
                                                  "dgrad.query", "dgrad.key", "dgrad.value"))  # fmt: skip
    precision = mezzo.jax.Precision(f"fp32; {rules}; *:fprop.a=mxfp4; *:fprop.b=mxfp4")
    out, back = jax.vjp(precision(attend), q, k, v)

    def half(x):
        return quantize(np.asarray(x), "bfloat16", overflow="cast")

    want, plain = jax.vjp(attend, *(jnp.asarray(half(x)) for x in (q, k, v)))
    ulp = 2**-8
    np.testing.assert_allclose(out, half(want), rtol=2 * ulp, atol=1e-6)
    assert (np.asarray(out) == half(out)).all()
    for ours, theirs in zip(back(g), plain(jnp.asarray(half(g))), strict=True):
        assert (np.asarray(ours) == half(ours)).all()
        np.testing.assert_allclose(ours, half(theirs), rtol=2 * ulp, atol=1e-5)


def test_probabilities_with_a_format_of_their_own():
    q, k, v = (jnp.asarray(numbers((1, 6, 2, 8), i)) for i in range(3))
    function = mezzo.jax.Precision("fp32; *:fprop.probs=e4m3")(jax.nn.dot_product_attention)
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs = quantize((probs / probs.sum(-1, keepdims=True)).astype(np.float32), "e4m3")
    out = jax.jit(function)(q, k, v)
    # A probability next to a tie may fall on its other side, which would show in all 8 numbers of a row.
    apart = np.abs(out - np.einsum("bnts,bsnh->btnh", probs, v)) > 1e-5
    assert apart.any(-1).mean() <= 0.1
    assert (np.abs(out - jax.nn.dot_product_attention(q, k, v)) > 1e-5).any(-1).mean() > 0.9
