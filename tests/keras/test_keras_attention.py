import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_reference import holds

import mezzo.keras
from mezzo.errors import ConfigError
from mezzo.formats import quantize

RNG = np.random.RandomState(3)


class Attention(keras.layers.Layer):
    def __init__(self, **how):
        super().__init__(name="attn")
        self.how = how

    def call(self, q, k, v):
        return keras.ops.dot_product_attention(q, k, v, **self.how)


def run(layer, inputs, g, graph=False):
    def step(*inputs):
        with tf.GradientTape() as tape:
            for x in inputs:
                tape.watch(x)
            y = layer(*inputs)
        return y, *tape.gradient(y, inputs, output_gradients=g)

    return [x.numpy() for x in (tf.function(step) if graph else step)(*map(tf.constant, inputs))]


def operands(heads=2, keys=2):
    shapes = (2, 5, heads, 8), (2, 6, keys, 8), (2, 6, keys, 8), (2, 5, heads, 8)
    return [RNG.randn(*shape).astype("f") for shape in shapes]


@pytest.mark.parametrize("graph", [False, True])
def test_operands_are_rounded_and_what_runs_between_them_is_keras_own(graph):
    *inputs, g = operands()
    policy = "fp32; attn:fprop.query=bfloat16; attn:fprop.key=mxfp4; attn:fprop.value=mxfp4; attn:dgrad.dout=bfloat16"
    rounded = [
        quantize(inputs[0], "bfloat16", overflow="cast").astype("f"),
        quantize(inputs[1], "mxfp4"),
        quantize(inputs[2], "mxfp4", axis=1),
    ]
    want = run(Attention(is_causal=True), rounded, quantize(g, "bfloat16", overflow="cast").astype("f"))
    layer = Attention(is_causal=True)
    mezzo.keras.Precision(layer, policy=policy.replace("attn:", "*:"))
    for got, expected in zip(run(layer, inputs, g, graph), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_result_and_the_gradients_that_leave_are_rounded_once():
    *inputs, g = operands()
    layer, plain = Attention(), Attention()
    mezzo.keras.Precision(layer, policy="fp32; *:out=bfloat16")
    got, want = run(layer, inputs, g), run(plain, inputs, quantize(g, "bfloat16", overflow="cast").astype("f"))
    for x, y in zip(got, want, strict=True):
        assert holds(x, "bfloat16")
        np.testing.assert_allclose(x, y, rtol=2.0**-8, atol=1e-6)


def test_products_inside_of_attention_do_not_follow_the_roles_of_products():
    *inputs, g = operands()
    layer, plain = Attention(), Attention()
    products = "*:fprop.a=e4m3; *:dgrad.a=e4m3; *:wgrad.b=e4m3; *:fprop.b=e4m3"
    precision = mezzo.keras.Precision(layer, policy=f"fp32; {products}")
    for x, y in zip(run(layer, inputs, g), run(plain, inputs, g), strict=True):
        np.testing.assert_array_equal(x, y)
    precision.switch(f"fp32; {products}; *:fprop.query=bfloat16")
    inputs[0] = quantize(inputs[0], "bfloat16", overflow="cast").astype("f")
    for x, y in zip(run(layer, inputs, g), run(plain, inputs, g), strict=True):
        np.testing.assert_array_equal(x, y)


def test_key_heads_that_queries_share_get_the_sum_of_their_gradients_rounded():
    *inputs, g = operands(heads=4, keys=2)
    layer, plain = Attention(), Attention()
    mezzo.keras.Precision(layer, policy="fp32; *:dgrad.key=bfloat16")
    got, want = run(layer, inputs, g), run(plain, inputs, g)
    np.testing.assert_array_equal(got[2], quantize(want[2], "bfloat16", overflow="cast").astype("f"))


def explicit(q, k, v, g, causal=False):
    """The two products with probabilities and incoming gradients in bfloat16, in float64 between the roundings."""

    def low(x):
        return quantize(x.astype(np.float32), "bfloat16", overflow="cast").astype(np.float64)

    q, k, v, g = (x.transpose(0, 2, 1, 3) for x in (q, k, v, g))
    qr, kr, vr, scale = low(q), low(k), low(v), q.shape[-1] ** -0.5
    s = qr @ kr.swapaxes(-1, -2) * scale
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = low(low(p) @ vr)
    g = low(g)
    dv, dp = low(p).swapaxes(-1, -2) @ g, g @ vr.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dq, dk = low(ds) @ kr, low(ds).swapaxes(-1, -2) @ qr
    return [x.transpose(0, 2, 1, 3) for x in (out, dq, dk, dv)]


def test_a_rule_for_probabilities_makes_attention_explicit():
    *inputs, g = operands()
    layer = Attention()
    precision = mezzo.keras.Precision(layer, policy="bf16; *:fprop.probs=bfloat16")
    seen = []
    with precision.tap(lambda site, before, after: seen.append(site.role)):
        got = run(layer, inputs, g)
    for x, y in zip(got, explicit(*inputs, g), strict=True):
        # One step of bfloat16, where a float32 sum lies beside a tie; and of the gradients' magnitudes.
        np.testing.assert_allclose(x, y, rtol=2.0**-7, atol=2.0**-8 * np.abs(y).max())
    assert seen == ["fprop.query", "fprop.key", "fprop.probs", "fprop.value", "fprop.out", "dgrad.dout", "dgrad.value",
                    "dgrad.query", "dgrad.key"]  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"dropout": 0.2}, {"return_attention_scores": True}])
@pytest.mark.parametrize("probs", ["", "; *:fprop.probs=bfloat16"])
def test_multi_head_attention_is_attention_between_projections(how, probs):
    call = {key: value for key, value in how.items() if key == "return_attention_scores"}
    layer = keras.layers.MultiHeadAttention(2, 4, dropout=how.get("dropout", 0.0), name="mha")
    x = RNG.randn(2, 5, 8).astype("f")
    layer(x, x)
    precision = mezzo.keras.Precision(layer, policy=f"bf16; (model):fprop.key=float16{probs}")
    seen = {}
    with precision.tap(lambda site, before, after: seen.setdefault(str(site), (before, after))):
        out = layer(x, x, **call)
    assert {"query:fprop.a", "key:fprop.b", "value:fprop.out", "attention_output:fprop.out"} <= seen.keys()
    assert seen["(model):fprop.key"][1].shape[-1 if not probs else -2] == 4
    assert holds(seen["(model):fprop.key"][1], "float16")
    assert not holds(seen["(model):fprop.key"][1], "float8_e5m2")
    assert ("(model):fprop.probs" in seen) == bool(probs)
    if call:
        np.testing.assert_allclose(out[1].numpy().sum(-1), 1, rtol=1e-5)
    # The key was projected; what came to attention is the key, not the query, whichever Keras multiplies first.
    precision.remove()
    key = layer._key_dense(x).numpy()
    got = seen["(model):fprop.key"][0]
    got = got if not probs else np.moveaxis(got, -2, -1)
    got = got if got.shape == key.shape else got.reshape(2, 2, 5, 4).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(got, key, rtol=0.05, atol=0.05)


def test_grouped_query_attention_and_a_mask_train_in_a_graph():
    layer = keras.layers.GroupQueryAttention(8, 4, 2)
    x = RNG.randn(2, 5, 8).astype("f")
    layer(x, x)
    precision = mezzo.keras.Precision(layer, policy="fp8")
    mask = np.tril(np.ones((1, 5, 5), bool))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(layer(x, x, attention_mask=mask) ** 2)
        return tape.gradient(y, [v.value for v in layer.trainable_variables])

    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in map(np.array, step(x)[:1]))
    rows = {row.site: row.format for row in precision.sites(x, x)}
    assert rows["(model):fprop.query"] == "bfloat16"
    assert rows["query:fprop.a"] == "float8_e4m3fn@tensor"


def test_attention_over_several_axes_refuses_blocks():
    layer = keras.layers.MultiHeadAttention(2, 4, attention_axes=(1, 2))
    x = RNG.randn(1, 2, 3, 8).astype("f")
    layer(x, x)
    precision = mezzo.keras.Precision(layer, policy="bf16")
    assert np.isfinite(layer(x, x)).all()
    precision.switch("bf16; (model):fprop.key=mxfp8")
    with pytest.raises(ConfigError, match="attention over several axes sums over several axes"):
        layer(x, x)
