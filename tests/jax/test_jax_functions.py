"""Any function, unchanged: transformations of JAX, libraries of layers, paths, rules that match nothing."""

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mezzo.jax
from mezzo.errors import ConfigError

W = jax.random.normal(jax.random.key(0), (4, 16, 16)) * 0.3
X = jax.random.normal(jax.random.key(1), (10, 16))
FP8 = mezzo.jax.Precision("fp8")


def unrolled(p, x):
    for w in p["layers"]["w"]:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def scanned(p, x):
    return jnp.sum(jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["layers"]["w"])[0] ** 2)


def fori(p, x):
    return jnp.sum(jax.lax.fori_loop(0, 4, lambda i, c: jnp.tanh(c @ p["layers"]["w"][i]), x) ** 2)


def whiled(p, x):
    go = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["layers"]["w"][s[0]]))  # noqa: E731
    return jnp.sum(jax.lax.while_loop(lambda s: s[0] < 4, go, (0, x))[1] ** 2)


def branched(p, x):
    for i in range(4):
        x = jax.lax.cond(i >= 0, lambda x, w: jnp.tanh(x @ w), lambda x, w: x, x, p["layers"]["w"][i])
    return jnp.sum(x**2)


def checkpointed(p, x):
    body = jax.checkpoint(lambda c, w: jnp.tanh(c @ w))
    for w in p["layers"]["w"]:
        x = body(x, w)
    return jnp.sum(x**2)


def jitted(p, x):
    body = jax.jit(lambda c, w: jnp.tanh(c @ w))
    for w in p["layers"]["w"]:
        x = body(x, w)
    return jnp.sum(x**2)


P = {"layers": {"w": W}}


@pytest.mark.parametrize("function", [scanned, fori, checkpointed, jitted, branched])
def test_loops_branches_and_checkpoints_round_as_the_unrolled_function_does(function):
    loss, grad = jax.jit(jax.value_and_grad(FP8(unrolled)))(P, X)
    plain = jax.grad(unrolled)(P, X)["layers"]["w"]
    other_loss, other = jax.jit(jax.value_and_grad(FP8(function)))(P, X)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    # A sum in another order may put a later operand on the other side of a tie; what rounds nothing is far away.
    apart = np.abs(other["layers"]["w"] - grad["layers"]["w"]).max()
    assert apart < 0.05 * np.abs(plain - grad["layers"]["w"]).max()


def test_a_while_loop_rounds_in_the_forward_pass():
    np.testing.assert_allclose(jax.jit(FP8(whiled))(P, X), jax.jit(FP8(unrolled))(P, X), rtol=1e-5)


def test_eager_and_jit_give_the_same():
    np.testing.assert_allclose(FP8(unrolled)(P, X), jax.jit(FP8(unrolled))(P, X), rtol=1e-6)


def test_vmap_rounds_each_example_by_itself():
    one = lambda p, x: jnp.tanh(x @ p["w"]).sum()  # noqa: E731
    each = jax.jit(jax.vmap(FP8(one), in_axes=(None, 0)))({"w": W[0]}, X)
    np.testing.assert_allclose(each, [jax.jit(FP8(one))({"w": W[0]}, x) for x in X], rtol=1e-5)


def test_a_rule_for_one_layer_of_a_scan_is_an_error_and_one_for_all_is_not():
    with pytest.raises(ConfigError, match="speaks of single layers, but layers runs through all 4"):
        mezzo.jax.Precision("bf16; layers.2:*=float32")(scanned)(P, X)
    with pytest.raises(ConfigError, match=r"layers.last-25%"):
        mezzo.jax.Precision("bf16; layers.last-25%.*:*.[ab]=float32")(scanned)(P, X)
    with pytest.raises(ConfigError, match=r"\*layers.last-13%"):  # the recipe's own
        mezzo.jax.Precision("nvfp4")(scanned)(P, X, state=mezzo.jax.Precision("nvfp4").init())
    mezzo.jax.Precision("bf16; layers:*=float32")(scanned)(P, X)
    mezzo.jax.Precision("bf16; *:input=float32")(scanned)(P, X)


def paths(function, *args, policy="bf16"):
    return list(dict.fromkeys(r.site.rpartition(":")[0] for r in mezzo.jax.Precision(policy).sites(function, *args)))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Dense(8)(x)))
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(2)(x, x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 8, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        for layer in self.rest:
            x = layer(x)
        return x


def test_flax_linen_runs_unchanged_and_names_its_layers():
    model = Linen()
    x = X.reshape(2, 5, 16)
    variables = model.init(jax.random.key(0), x)
    loss = lambda v, x: jnp.mean(model.apply(v, x) ** 2)  # noqa: E731
    attention = "MultiHeadDotProductAttention_0"
    assert paths(loss, variables, x) == [
        "Dense_0", f"{attention}.query", f"{attention}.key", f"{attention}.value", attention, f"{attention}.out",
        "Dense_1",
    ]  # fmt: skip
    rounded, plain = jax.jit(jax.grad(FP8(loss)))(variables, x), jax.jit(jax.grad(loss))(variables, x)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    for one, other in zip(jax.tree.leaves(rounded), jax.tree.leaves(plain), strict=True):
        assert np.abs(one - other).max() < 0.3 * np.abs(other).max() + 0.01 * largest
    roles = {row.site for row in FP8.sites(loss, variables, x)}
    assert {f"{attention}:fprop.query", f"{attention}:dgrad.dout", "Dense_1:wgrad.out"} <= roles


def test_flax_nnx_runs_unchanged_and_names_its_layers():
    model = Nnx(nnx.Rngs(0))
    loss = lambda m, x: jnp.mean(m(x) ** 2)  # noqa: E731
    assert paths(loss, model, X) == ["first", "rest.0", "rest.1"]
    rounded, plain = nnx.jit(nnx.grad(FP8(loss)))(model, X), nnx.jit(nnx.grad(loss))(model, X)
    pairs = list(zip(jax.tree.leaves(rounded), jax.tree.leaves(plain), strict=True))
    assert all(np.abs(one - other).max() < 0.3 * np.abs(other).max() + 1e-6 for one, other in pairs)
    assert any((one != other).any() for one, other in pairs)


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def test_what_an_nnx_module_writes_down_reaches_the_module():
    """Running statistics move, dropout draws anew; under fp32 all is as without mezzo."""
    loss = lambda m, x: jnp.mean(m(x) ** 2)  # noqa: E731
    plain, ours = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(0))
    under = mezzo.jax.Precision("fp32")(loss)
    for _ in range(2):
        one, other = nnx.jit(nnx.value_and_grad(loss))(plain, X)[0], nnx.jit(nnx.value_and_grad(under))(ours, X)[0]
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(plain.norm.mean[...], ours.norm.mean[...])
    assert (ours.norm.mean[...] != 0).any()
    before = np.asarray(ours.norm.mean[...])
    assert paths(loss, ours, X) == ["linear"]
    mezzo.jax.measure(FP8, loss, ours, X)
    np.testing.assert_array_equal(before, ours.norm.mean[...])  # looking changes nothing


def test_equinox_runs_unchanged_and_names_its_layers():
    model = equinox.nn.MLP(16, 3, 8, 2, key=jax.random.key(0))
    loss = lambda m, x: jnp.mean(jax.vmap(m)(x) ** 2)  # noqa: E731
    assert paths(loss, model, X) == ["layers.0", "layers.1", "layers.2"]
    value, grads = equinox.filter_jit(equinox.filter_value_and_grad(FP8(loss)))(model, X)
    assert value != loss(model, X)
    assert np.isfinite(grads.layers[0].weight).all()


def test_plain_parameters_have_the_names_they_have():
    params = [(W[0], jnp.zeros(16)), (W[1], jnp.zeros(16))]
    pairs = lambda p, x: ((x @ p[0][0] + p[0][1]) @ p[1][0] + p[1][1]).sum()  # noqa: E731
    assert paths(pairs, params, X) == ["0", "1"]
    assert paths(lambda p, x: (x @ p["w1"] @ p["w2"]).sum(), {"w1": W[0], "w2": W[1]}, X) == ["w1", "w2"]
    flat = {"a.b.weight": W[0], "a.c.weight": W[1]}
    assert paths(lambda p, x: (x @ p["a.b.weight"].T @ p["a.c.weight"].T).sum(), flat, X) == ["a.b", "a.c"]
    assert paths(lambda p, x: (x @ x.T).sum(), flat, X) == ["(model)"]


def test_a_tied_head_has_the_path_of_its_scope():
    def loss(p, ids):
        h = p["embed"]["embedding"][ids]
        with jax.named_scope("head"):
            return (h @ p["embed"]["embedding"].T).sum()

    p, ids = {"embed": {"embedding": W[0]}}, jnp.arange(5)
    assert paths(loss, p, ids) == ["head"]
    formats = {row.site: row.format for row in mezzo.jax.Precision("fp8").sites(loss, p, ids)}
    assert formats["head:fprop.a"] == "bfloat16"


def test_calls_of_one_path_are_told_apart_where_a_rule_asks():
    twice = lambda p, x: (x @ p["d"]["w"] @ p["d"]["w"]).sum()  # noqa: E731
    rows = mezzo.jax.Precision("fp32; d#1:fprop.a=e4m3").sites(twice, {"d": {"w": W[0]}}, X)
    formats = {row.site: row.format for row in rows}
    assert (formats["d:fprop.a"], formats["d#1:fprop.a"]) == ("float32", "float8_e4m3fn")


def test_each_branch_counts_its_calls_from_the_start():
    def branches(p, x):
        return jax.lax.cond(x.sum() > 0, lambda x: (x @ p["d"]["w"]).sum(), lambda x: (x @ p["d"]["w"]).max(), x)

    rows = mezzo.jax.Precision("fp32; d#0:fprop.a=e4m3").sites(branches, {"d": {"w": W[0]}}, X)
    assert not [row.site for row in rows if "#" in row.site]


def test_what_is_not_covered_is_listed():
    function = lambda p, x: jax.lax.linalg.triangular_solve(p["w"], x, left_side=False, lower=True).sum()  # noqa: E731
    assert [row.route for row in mezzo.jax.Precision("bf16").sites(function, {"w": W[0]}, X)] == ["not covered"]


def test_a_custom_derivative_around_a_product_is_left_as_it_is_and_listed():
    @jax.custom_vjp
    def mine(x, w):
        return x @ w

    mine.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (2 * (g @ kept[1].T), kept[0].T @ g))
    loss = lambda p, x: mine(x, p["w"]).sum()  # noqa: E731
    rows = FP8.sites(loss, {"w": W[0]}, X)
    assert [row.route for row in rows] == ["not covered"]
    np.testing.assert_array_equal(
        jax.grad(FP8(loss), argnums=1)({"w": W[0]}, X), jax.grad(loss, argnums=1)({"w": W[0]}, X)
    )


def test_rules_that_match_nothing_and_policies_that_jax_cannot_have_are_errors():
    with pytest.raises(ConfigError, match="matches nothing in this model; did you mean layers"):
        mezzo.jax.Precision("bf16; layer:*=float32")(unrolled)(P, X)
    for policy, what in [
        ("fp8; *:fprop.a=e4m3@tensor delayed", "drop the word delayed"),
        ("bf16; *:saved=mxfp8", "checkpoint activations"),
        ("bf16-pure", "keep float32 masters"),
        ("bf16; *:state=bfloat16", "keep float32 moments"),
        ("bf16; *:compute=bfloat16", "they run in the model's own dtype"),
    ]:
        with pytest.raises(ConfigError, match=what):
            mezzo.jax.Precision(policy)


def test_static_arguments_and_outputs_that_are_no_arrays_pass_through():
    def function(p, x, n, *, name):
        return (x @ p["w"]).sum() * n, {"name": name, "shape": x.shape}

    value, aux = FP8(function)({"w": W[0]}, X, 3, name="a")
    assert aux == {"name": "a", "shape": (10, 16)}
    assert jax.grad(FP8(function), has_aux=True)({"w": W[0]}, X, 3, name="a")[0]["w"].shape == (16, 16)
    assert np.isfinite(value)


def test_a_state_keyword_of_the_function_s_own_is_not_taken_away():
    def function(p, x, state):
        return x @ p["w"] * state

    with pytest.raises(ConfigError, match="keyword='opt_state'"):
        FP8(function)
    again = FP8(function, keyword="opt_state")
    assert again({"w": W[0]}, X, 2.0).shape == (10, 16)


# --- what a maintainer's read and a user's trial found ---


def test_a_learned_start_of_a_loop_does_not_take_the_cell_s_name():
    p = {"h0": jnp.zeros(16), "cell": {"w": W[0]}}
    rnn = lambda p, x: jax.lax.scan(lambda h, row: (jnp.tanh(h @ p["cell"]["w"] + row), None), p["h0"], x)[0].sum()  # noqa: E731
    assert paths(rnn, p, X) == ["cell"]


def test_learned_queries_are_attention_s_not_a_layer_s():
    p = {"latents": jax.random.normal(jax.random.key(0), (1, 4, 2, 8))}
    kv = X[:8].reshape(1, 8, 2, 8)
    attend = lambda p, kv: jax.nn.dot_product_attention(p["latents"], kv, kv).sum()  # noqa: E731
    roles = {row.site.partition(":")[2] for row in FP8.sites(attend, p, kv)}
    assert "fprop.query" in roles
    assert "fprop.a" not in roles


def test_a_function_of_ones_own_is_no_attention_by_its_name():
    def train_dot_product_attention_model(p, x):
        return (x @ x.T).sum()

    assert "(model):fprop.a" in {row.site for row in FP8.sites(train_dot_product_attention_model, P, X)}


def test_attention_without_a_scope_has_the_path_that_its_layers_lie_in():
    class Blocks(equinox.Module):
        blocks: list

        def __call__(self, x):
            for block in self.blocks:
                x = block(x, x, x)
            return x

    keys = jax.random.split(jax.random.key(0), 2)
    model = Blocks([equinox.nn.MultiheadAttention(2, 16, key=key) for key in keys])
    loss = lambda m, x: (m(x) ** 2).mean()  # noqa: E731
    rows = mezzo.jax.Precision("bf16; blocks.1:fprop.query=float32").sites(loss, model, X)
    formats = {row.site: row.format for row in rows}
    assert (formats["blocks.0:fprop.query"], formats["blocks.1:fprop.query"]) == ("bfloat16", "float32")
    with pytest.raises(ConfigError, match=r"speaks of fprop.query, which no product of blocks.0.query_proj has"):
        mezzo.jax.Precision("bf16; blocks.0.query_proj:fprop.query=float32").sites(loss, model, X)


def test_layers_that_a_loop_takes_by_their_number_cannot_be_told_apart_either():
    policy = mezzo.jax.Precision("bf16; layers.last-25%.*:*.[ab]=float32")
    with pytest.raises(ConfigError, match="cannot be told apart"):
        policy(fori)(P, X)
    inner = {"layers": {"dense": {"kernel": W}}}
    loss = lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["layers"]["dense"]["kernel"])[0].sum()  # noqa: E731
    with pytest.raises(ConfigError, match="cannot be told apart"):
        mezzo.jax.Precision("bf16; layers.3.dense:*=float32")(loss)(inner, X)


def test_float64_sites_of_float32_numbers_are_refused():
    with jax.enable_x64(True), pytest.raises(ConfigError, match="make parameters and inputs float64"):
        mezzo.jax.Precision("fp64")(lambda p, x: x @ p["d"]["w"])({"d": {"w": W[0]}}, X)


def test_wrapping_the_gradient_or_wrapping_twice_is_refused():
    with pytest.raises(ConfigError, match=r"gives back a tree like its parameters.*jax.grad\(precision\(loss_fn\)\)"):
        FP8(jax.grad(unrolled))(P, X)
    with pytest.raises(ConfigError, match="gives back a tree like its parameters"):
        FP8(jax.value_and_grad(unrolled))(P, X)
    with pytest.raises(ConfigError, match="under a policy already"):
        FP8(FP8(unrolled))
    assert FP8.sites(FP8(unrolled), P, X) == FP8.sites(unrolled, P, X)


def test_several_arguments_can_hold_parameters():
    loss = lambda trained, frozen, x: (x @ frozen["a"]["w"] @ trained["b"]["w"]).sum()  # noqa: E731
    rows = FP8.sites(loss, {"b": {"w": W[0]}}, {"a": {"w": W[1]}}, X, argnums=(0, 1))
    assert {row.site.partition(":")[0] for row in rows} == {"a", "b"}


def test_nnx_hands_the_state_through():
    loss = lambda m, x: jnp.mean(m(x) ** 2)  # noqa: E731
    precision, model = mezzo.jax.Precision("fp16"), Nnx(nnx.Rngs(0))
    _, grads = nnx.value_and_grad(precision(loss))(model, X, state=precision.init())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_scopes_stay_in_the_program():
    def loss(p, x):
        with jax.named_scope("myscope"):
            return (x @ p["d"]["w"]).sum()

    text = jax.jit(FP8(loss)).lower({"d": {"w": W[0]}}, X).as_text(debug_info=True)
    assert "myscope" in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mezzo.jax.Precision(None), "a policy is text such as 'bf16', or a Policy; got None"),
        (lambda: mezzo.jax.Precision("BF16"), "did you mean bf16"),
        (lambda: mezzo.jax.Precision("bf16", seed="0"), "seed is a whole number from 0 to 2\\*\\*64 - 1, got '0'"),
        (lambda: mezzo.jax.Precision("bf16", seed=-1), "got -1"),
        (lambda: FP8(P), r"wrap a function, precision\(loss_fn\); got dict"),
        (lambda: FP8.optimizer("adam"), "an optax transformation is needed"),
        (lambda: mezzo.jax.Precision("bf16; nowhere:*=float32")(unrolled)(P, X), "it has layers"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
