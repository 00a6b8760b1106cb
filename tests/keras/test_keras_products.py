import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_reference import holds, specs, summed, three, worst

import mezzo.keras
from mezzo.errors import ConfigError
from mezzo.formats import get_format, quantize
from mezzo.policy import Policy

RNG = np.random.RandomState(7)


class Product(keras.layers.Layer):
    """A bare operation of two tensors."""

    def __init__(self, op):
        super().__init__(name="op")
        self.op = op

    def call(self, a, b):
        return self.op(a, b)


def canonical(a, b):
    """As they are: (…, M, K) · (…, K, N)."""
    return a, b, lambda y: y


def rows(a, b):
    """A 3-d tensor by a matrix: all its rows."""
    return a.reshape(-1, a.shape[-1]), b, lambda y: y.reshape(*a.shape[:-1], -1)


def heads(a, b):
    """Queries (B, T, H, E) by keys (B, S, H, E), a product for each head."""
    x, y = a.transpose(0, 2, 1, 3), b.transpose(0, 2, 3, 1)
    return x, y, lambda z: z


def two_axes(a, b):
    """(B, T, H, E) by (H, E, D): both axes are summed."""
    return a.reshape(-1, a.shape[2] * a.shape[3]), b.reshape(-1, b.shape[-1]), lambda y: y.reshape(*a.shape[:2], -1)


# name: (operation, shape of a, shape of b, how NumPy sees it)
CASES = {
    "tf.matmul": (tf.matmul, (4, 20), (20, 5), canonical),
    "the @ operator": (lambda a, b: a @ b, (4, 20), (20, 5), canonical),
    "tf.matmul transposed": (
        lambda a, b: tf.matmul(tf.transpose(a), tf.transpose(b), transpose_a=True, transpose_b=True),
        (4, 20), (20, 5), canonical,
    ),
    "keras.ops.matmul": (keras.ops.matmul, (4, 20), (20, 5), canonical),
    "keras.ops.matmul, rows": (keras.ops.matmul, (3, 4, 20), (20, 5), rows),
    "tf.matmul, rows": (tf.matmul, (3, 4, 20), (20, 5), rows),
    "batched": (tf.matmul, (3, 4, 20), (3, 20, 5), canonical),
    "batched, keras": (keras.ops.matmul, (3, 4, 20), (3, 20, 5), canonical),
    "a matrix by a batch": (tf.matmul, (4, 20), (3, 20, 5), canonical),
    "batches broadcast": (tf.matmul, (2, 1, 4, 20), (3, 20, 5), canonical),
    "tensordot": (lambda a, b: tf.tensordot(a, b, 1), (4, 20), (20, 5), canonical),
    "tensordot, two axes": (lambda a, b: tf.tensordot(a, b, 2), (2, 3, 4, 5), (4, 5, 6), two_axes),
    "einsum, rows": (lambda a, b: tf.einsum("bik,kj->bij", a, b), (3, 4, 20), (20, 5), rows),
    "einsum, any batch": (lambda a, b: tf.einsum("...k,kj->...j", a, b), (3, 4, 20), (20, 5), rows),
    "einsum, heads": (lambda a, b: tf.einsum("bthe,bshe->bhts", a, b), (2, 3, 2, 20), (2, 4, 2, 20), heads),
    "keras einsum, heads": (
        lambda a, b: keras.ops.einsum("abcd,aecd->acbe", a, b), (2, 3, 2, 20), (2, 4, 2, 20), heads,
    ),
    "keras einsum, two axes": (
        lambda a, b: keras.ops.einsum("bthe,hed->btd", a, b), (2, 3, 4, 5), (4, 5, 6), two_axes,
    ),
}  # fmt: skip
POLICIES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "tf32": "tf32",
    "fp8": "fp8",
    "mxfp8": "mxfp8",
    "blocks, transforms, random words": "nvfp4; *:fprop.a=nvfp4 stochastic",
    "another format in each product": "fp32; *:fprop.a=bfloat16; *:fprop.b=e4m3@tensor; *:dgrad.b=bfloat16; "
    "*:dgrad.out=float16; *:wgrad.a=float8_e5m2; *:wgrad.b=mxfp4",
}


def gradients(model, inputs, g, graph=False):
    """(result, gradients of the inputs) for the incoming gradient g, NumPy."""

    def run(*inputs):
        with tf.GradientTape() as tape:
            for x in inputs:
                tape.watch(x)
            y = model(*inputs)
        return y, tape.gradient(y, inputs, output_gradients=g)

    y, grads = (tf.function(run) if graph else run)(*map(tf.constant, inputs))
    return y.numpy(), *(x.numpy() for x in grads)


def operands(case, scale=1.0):
    op, shape_a, shape_b, view = CASES[case]
    a, b = ((RNG.randn(*shape) * scale).astype(np.float32) for shape in (shape_a, shape_b))
    return op, a, b, view, RNG.randn(*op(a, b).shape).astype(np.float32)


def ratios(policy, op, a, b, view, g, **how):
    """Product → error as a multiple of the derived bound."""
    model = Product(op)
    precision = mezzo.keras.Precision(model, policy=policy)
    precision.optimizer(keras.optimizers.SGD())  # fp16 asks for one where gradients are taken
    y, da, db = gradients(model, (a, b), g, **how)
    precision.remove()
    x, w, back = view(a, b)
    want = three(policy, "(model)", x, w, g.reshape(*x.shape[:-1], -1) if view in (rows, two_axes) else g)
    f = {p: specs(policy, "(model)")[f"{p}.out"].fmt.name for p in ("fprop", "dgrad", "wgrad")}
    if view is heads:
        da, db = da.transpose(0, 2, 1, 3), db.transpose(0, 2, 3, 1)
    else:
        da, db = da.reshape(x.shape), db.reshape(w.shape)
    exact = tuple(back(part) if isinstance(part, np.ndarray) else part for part in want["fprop"])
    return {
        "fprop": worst(y, exact, f["fprop"]),
        "dgrad": worst(da, summed(want["dgrad"], x.shape), f["dgrad"]),
        "wgrad": worst(db, summed(want["wgrad"], w.shape), f["wgrad"]),
    }


@pytest.mark.parametrize(("case", "policy"), [*((case, "another format in each product") for case in CASES),
                                              *(("tf.matmul", policy) for policy in POLICIES),
                                              ("einsum, heads", "blocks, transforms, random words"),
                                              ("keras einsum, two axes", "mxfp8"),
                                              ("batches broadcast", "mxfp8")])  # fmt: skip
def test_a_product_and_its_gradients_are_within_the_derived_bound(case, policy):
    found = ratios(POLICIES[policy], *operands(case))
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("case", ["tf.matmul", "batches broadcast", "einsum, heads"])
def test_that_bound_is_missed_where_operands_are_not_rounded(case):
    op, a, b, view, g = operands(case)
    model = Product(op)
    y, _, _ = gradients(model, (a, b), g)
    x, w, back = view(a, b)
    exact, absolute, terms = three("bf16; *:out=float32", "(model)", x, w, g)["fprop"]
    assert worst(y, (back(exact), back(absolute), terms), "float32") > 1


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-9, 2.0**5])
def test_the_bound_holds_where_results_are_subnormal_or_large(scale):
    found = ratios("fp16", *operands("tf.matmul", scale))
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize(("case", "policy"), [("keras.ops.matmul, rows", "bf16"), ("batches broadcast", "bf16"),
                                              ("einsum, heads", "nvfp4; *:fprop.a=nvfp4 stochastic")])  # fmt: skip
def test_a_graph_gives_the_same(case, policy):
    found = ratios(policy, *operands(case), graph=True)
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("role", [f"{p}.{r}" for p in ("fprop", "dgrad", "wgrad") for r in ("a", "b", "out")])
def test_a_rule_for_one_role_changes_exactly_that_role(role):
    op, a, b, view, g = operands("tf.matmul")
    policy = f"fp32; *:{role}=bfloat16"
    found = ratios(policy, op, a, b, view, g)
    assert max(found.values()) <= 1, found
    results = []
    for rules in ("fp32", policy):
        model = Product(op)
        precision = mezzo.keras.Precision(model, policy=rules)
        results.append(gradients(model, (a, b), g))
        precision.remove()
    pairs = zip(("fprop", "dgrad", "wgrad"), *results, strict=True)
    changed = {p for p, x, y in pairs if not np.allclose(x, y, 1e-4, 1e-5)}
    assert changed == ({role.partition(".")[0]} if role != "fprop.out" else {"fprop", "dgrad", "wgrad"})


class Weights(keras.layers.Layer):
    """A weight of its own on the right, on the left, or transposed."""

    def __init__(self, how):
        super().__init__(name="own")
        self.how = how

    def build(self, shape):
        left = self.how in ("left", "left einsum", "transposed")
        self.w = self.add_weight(shape=(5, 20) if left else (20, 5), name="w")

    def call(self, x):
        if self.how == "left":
            return tf.matmul(self.w, x, transpose_b=True)
        if self.how == "left einsum":
            return tf.einsum("ok,bk->ob", self.w, x)
        if self.how == "transposed":
            return keras.ops.matmul(x, keras.ops.transpose(self.w))
        return keras.ops.matmul(x, self.w)


@pytest.mark.parametrize(("how", "graph"), [("right", False), ("transposed", False), ("left", False),
                                            ("left einsum", False), ("right", True), ("left", True)])  # fmt: skip
def test_roles_and_random_words_follow_the_weight_wherever_it_stands(how, graph):
    policy = "fp32; *:input=nvfp4 stochastic; *:weight=mxfp4 stochastic; *:grad_output=bfloat16 stochastic"
    layer = Weights(how)
    x, g = RNG.randn(4, 20).astype("f"), RNG.randn(4, 5).astype("f")
    turned = how.startswith("left")
    layer(x)
    precision = mezzo.keras.Precision(layer, policy=policy, seed=3)
    precision.state.whole["draws"].assign(2)

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return y, tape.gradient(y, [x, layer.w.value], output_gradients=g.T if turned else g)

    y, (dx, dw) = (tf.function(run) if graph else run)(tf.constant(x))
    w = layer.w.numpy()
    want = three(policy, "(model)", x, w.T if how != "right" else w, g, weight=True, seed=3, draws=2)
    assert worst(y.numpy().T if turned else y, want["fprop"], "float32") <= 1
    assert worst(dx, want["dgrad"], "float32") <= 1
    assert worst(dw if how == "right" else dw.numpy().T, want["wgrad"], "float32") <= 1


@pytest.mark.parametrize("policy", ["bf16", "mxfp8", "nvfp4"])
def test_dense_and_einsum_dense_round_their_products_and_add_the_bias_in_float32(policy):
    x = RNG.randn(6, 16).astype("f")
    for layer, view in (
        (keras.layers.Dense(8, bias_initializer="normal"), lambda w: w),
        (keras.layers.EinsumDense("bk,khe->bhe", (2, 4), bias_axes="he", bias_initializer="normal"),
         lambda w: w.reshape(16, 8)),
    ):  # fmt: skip
        layer(x)
        g = RNG.randn(*layer(x).shape).astype("f")
        precision = mezzo.keras.Precision(layer, policy=policy)
        with tf.GradientTape() as tape:
            y = layer(x)
        dw, db = tape.gradient(y, [v.value for v in layer.trainable_variables], output_gradients=g)
        w, bias = (v.numpy() for v in layer.trainable_variables)
        want = three(policy, "(model)", x, view(w), g.reshape(6, 8), weight=True)
        out = specs(policy, "(model)")["fprop.out"].fmt.name
        exact, absolute, _ = want["fprop"]
        product = quantize(exact.astype(np.float32), out).astype(np.float32)
        near = np.abs(y.numpy().reshape(6, 8) - (product + bias.reshape(8)))
        assert (near <= get_format(out).epsilon * np.abs(exact) + 1e-6 * absolute).all()
        assert not holds(y.numpy(), out)  # the bias was added after the rounding
        assert worst(dw.numpy().reshape(16, 8), want["wgrad"], "float32") <= 1
        np.testing.assert_allclose(db, g.sum(0), rtol=1e-6, atol=1e-6)
        precision.remove()


def test_the_gradient_arrives_in_the_sixteen_bits_of_the_result():
    model, seen = Product(tf.matmul), {}
    precision = mezzo.keras.Precision(model, policy="bf16; *:grad_output=float32")
    with precision.tap(lambda site, before, after: seen.update({site.role: (before, after)})):
        gradients(model, (RNG.randn(3, 4).astype("f"), RNG.randn(4, 2).astype("f")), RNG.randn(3, 2).astype("f"))
    assert holds(seen["dgrad.a"][0], "bfloat16")
    assert holds(seen["wgrad.a"][0], "bfloat16")


def test_sixteen_bits_overflow_to_infinity_and_eight_saturate():
    a, b = np.full((1, 1), 1e6, np.float32), np.ones((1, 1), np.float32)
    for policy, expected in (("fp32; *:fprop.a=float16", np.inf), ("fp32; *:fprop.a=e4m3", 448.0)):
        model = Product(tf.matmul)
        mezzo.keras.Precision(model, policy=policy)
        assert model(a, b).numpy() == expected


def test_all_float32_is_the_untouched_operation():
    op, a, b, _, g = operands("einsum, heads")
    plain = gradients(Product(op), (a, b), g)
    model = Product(op)
    mezzo.keras.Precision(model, policy="fp32")
    assert all(np.array_equal(x, y) for x, y in zip(plain, gradients(model, (a, b), g), strict=True))


def test_operations_outside_of_the_model_and_integers_are_not_touched():
    model = Product(tf.matmul)
    mezzo.keras.Precision(model, policy="fp8")
    a, b = RNG.randn(4, 8).astype("f"), RNG.randn(8, 4).astype("f")
    np.testing.assert_array_equal(tf.matmul(a, b), tf.constant(a) @ tf.constant(b))
    assert not holds(tf.matmul(a, b).numpy(), "bfloat16")
    whole = np.arange(4, dtype=np.int32).reshape(2, 2)
    np.testing.assert_array_equal(model(whole, whole), whole @ whole)


def test_elementwise_einsums_and_single_operands_are_no_products():
    a = RNG.randn(3, 3).astype("f")
    for equation, arguments in (("ab,ab->ab", (a, a)), ("ii->i", (a,)), ("ab->ba", (a,))):
        model = keras.layers.Lambda(lambda x, e=equation, same=arguments: tf.einsum(e, *[x for _ in same]))
        mezzo.keras.Precision(model, policy="bf16")
        np.testing.assert_array_equal(model(a), np.einsum(equation, *arguments))


def test_differentiating_twice_is_an_error_but_for_float32():
    a, b = (tf.constant(RNG.randn(3, 3).astype("f")) for _ in range(2))
    model = Product(tf.matmul)
    precision = mezzo.keras.Precision(model, policy="bf16")

    def twice():
        with tf.GradientTape() as outer:
            outer.watch(a)
            with tf.GradientTape() as inner:
                inner.watch(a)
                y = tf.reduce_sum(model(a, b) ** 2)
            g = inner.gradient(y, a)
        return outer.gradient(g, a)

    with pytest.raises(ConfigError, match="differentiated again"):
        twice()
    with precision.using("fp32"):
        assert twice() is not None


CONVOLUTIONS = {
    "Conv1D": (lambda: keras.layers.Conv1D(6, 3, strides=2, use_bias=False), (2, 9, 4)),
    "Conv1D causal, dilated": (
        lambda: keras.layers.Conv1D(6, 3, padding="causal", dilation_rate=2, use_bias=False), (2, 9, 4),
    ),
    "Conv2D": (lambda: keras.layers.Conv2D(4, 3, padding="same", use_bias=False), (2, 5, 6, 3)),
    "Conv2D in groups": (lambda: keras.layers.Conv2D(4, 3, groups=2, use_bias=False), (2, 5, 6, 4)),
    "Conv3D": (lambda: keras.layers.Conv3D(4, 2, use_bias=False), (2, 4, 4, 4, 3)),
    "DepthwiseConv2D": (lambda: keras.layers.DepthwiseConv2D(3, use_bias=False), (2, 5, 6, 3)),
    "Conv2DTranspose": (lambda: keras.layers.Conv2DTranspose(4, 3, strides=2, use_bias=False), (2, 4, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_round_each_operand_of_each_product(case):
    # Each of the three is linear in its operands: in float64 on rounded operands Keras' own layer is the oracle.
    make, shape = CONVOLUTIONS[case]
    policy = "fp32; *:fprop.a=bfloat16; *:fprop.b=e4m3@tensor; *:dgrad.a=e5m2@tensor; *:dgrad.b=float16; *:wgrad.b=e4m3"
    x = RNG.randn(*shape).astype("f")
    layer = make()
    g = RNG.randn(*layer(x).shape).astype("f")
    w = layer.trainable_variables[0].numpy()
    s = specs(policy, "(model)")

    def rounded(role, value):
        overflow = "saturate" if s[role].fmt.name not in ("bfloat16", "float16", "float32") else "cast"
        return quantize(value, s[role].fmt, overflow=overflow).astype(np.float32)

    def plain(x, w, g):
        layer.trainable_variables[0].assign(w)
        with tf.GradientTape() as tape:
            x = tf.constant(x)
            tape.watch(x)
            y = layer(x)
        return y, *tape.gradient(y, [x, layer.trainable_variables[0].value], output_gradients=g)

    y0, _, _ = plain(rounded("fprop.a", x), rounded("fprop.b", w), g)
    _, dx0, _ = plain(x, rounded("dgrad.b", w), rounded("dgrad.a", g))
    _, _, dw0 = plain(rounded("wgrad.b", x), w, rounded("wgrad.a", g))
    precision = mezzo.keras.Precision(layer, policy=policy)
    y, dx, dw = plain(x, w, g)
    # Both sum at most 54 + 2*5*6 products in float32, in orders of their own.
    for got, want in ((y, y0), (dx, dx0), (dw, dw0)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    precision.remove()
    plain_y, _, _ = plain(x, w, g)
    assert np.abs(plain_y - y).max() > 1e-3


def test_blocks_and_transforms_are_refused_in_convolutions():
    class Own(keras.layers.Layer):
        def call(self, x):
            return keras.ops.conv(x, np.ones((3, 3, 3, 4), "f"))

    layer = Own()
    mezzo.keras.Precision(layer, policy="mxfp8")
    with pytest.raises(ConfigError, match=r"^\(model\):fprop.a=mxfp8_e4m3: a convolution sums over several axes"):
        layer(RNG.randn(1, 5, 5, 3).astype("f"))  # without "Exception encountered when calling"
    with pytest.raises(ConfigError, match=r"^\(model\):fprop.a=mxfp8_e4m3: a convolution sums over several axes"):
        tf.function(lambda x: layer(x))(RNG.randn(1, 5, 5, 3).astype("f"))  # nor "in user code"


def test_an_embedding_looks_up_the_master_and_a_tied_head_is_a_product():
    layer = keras.layers.Embedding(10, 8)
    ids = np.array([[1, 2, 3]])
    before = layer(ids).numpy()
    mezzo.keras.Precision(layer, policy="bf16")
    np.testing.assert_array_equal(layer(ids), before)
    assert not holds(before, "bfloat16")


def test_float64_models_run_under_fp64_and_round_as_the_table_says():
    keras.config.set_floatx("float64")
    layer = keras.layers.Dense(3)
    x = RNG.randn(4, 8)
    plain = layer(x).numpy()
    precision = mezzo.keras.Precision(layer, policy="fp64")
    np.testing.assert_array_equal(layer(x), plain)
    precision.switch("fp64; *:fprop.a=bfloat16")
    assert layer(x).dtype == tf.float64
    want = quantize(x, "bfloat16", overflow="cast").astype(np.float64) @ layer.kernel.numpy()
    np.testing.assert_allclose(layer(x), want, rtol=1e-14)


def test_rules_for_one_call_follow_the_call_index():
    class Twice(keras.layers.Layer):
        def call(self, a, b):
            return tf.matmul(a, b), tf.matmul(a, b)

    model = Twice()
    mezzo.keras.Precision(model, policy=Policy.parse("fp32; (model)#1:fprop.out=bfloat16"))
    a, b = RNG.randn(3, 4).astype("f"), RNG.randn(4, 2).astype("f")
    for _ in range(2):
        first, second = model(a, b)
        assert not holds(first.numpy(), "bfloat16")
        assert holds(second.numpy(), "bfloat16")
