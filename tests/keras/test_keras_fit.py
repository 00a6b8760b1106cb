import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import mezzo.keras
from mezzo.errors import ConfigError

# Keras' own conversion of its variables to NumPy, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
RNG = np.random.RandomState(0)
X, Y = RNG.randn(50, 16).astype("f"), RNG.randn(50, 4).astype("f")


def sequential(dropout=0.1):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(24, activation="gelu", name="hidden"),
         keras.layers.BatchNormalization(), keras.layers.Dropout(dropout, seed=1), keras.layers.Dense(4, name="head")]
    )  # fmt: skip


class Subclassed(keras.Model):
    """Layers that are there from the start, layers made on the way, and a block inside."""

    def __init__(self):
        super().__init__()
        self.blocks = [keras.Sequential([keras.layers.Dense(16, name="up")], name=f"blocks.{i}") for i in range(2)]
        self.attn = keras.layers.MultiHeadAttention(2, 4, name="attn")
        self.head = keras.layers.Dense(4, name="head")

    def call(self, x):
        for block in self.blocks:
            x = block(x) + x
        x = keras.ops.reshape(x, (-1, 4, 4))
        return self.head(keras.ops.reshape(self.attn(x, x), (-1, 16)))


class OwnStep(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4, name="dense")
        self.scales = True

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self(x, training=True) - y) ** 2)
            scaled = self.optimizer.scale_loss(loss) if self.scales else loss
        grads = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
        return {"own": loss}


def fitted(model, policy, steps=2, precision=None, **compile):
    if policy is not None:
        precision = mezzo.keras.Precision(model, policy=policy, seed=0)
    model.compile(**({"optimizer": "adam", "loss": "mse"} | compile))
    history = model.fit(X, Y, batch_size=16, epochs=steps, verbose=0, shuffle=False)
    return model, precision, history.history.get("own") or history.history["loss"]


def same(one, two):
    return all(np.array_equal(x, y) for x, y in zip(one.get_weights(), two.get_weights(), strict=True))


@pytest.mark.parametrize("policy", ["bf16", "mxfp8"])
def test_fit_learns_in_two_lines_with_metrics_and_a_short_last_batch(policy):
    _, _, reference = fitted(sequential(), None, metrics=["mae"])
    model, precision, losses = fitted(sequential(), policy, metrics=["mae"])
    assert losses[-1] < losses[0]
    assert losses != reference
    np.testing.assert_allclose(losses, reference, rtol=0.1)
    assert precision.state_dict()["steps"] == precision.state_dict()["draws"] == 8
    assert {"loss", "mae"} <= model.evaluate(X, Y, verbose=0, return_dict=True).keys()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fp32_is_plain_keras_to_the_bit(optimizer):
    plain, _, reference = fitted(sequential(), None, optimizer=optimizer)
    model, _, losses = fitted(sequential(), "fp32", optimizer=optimizer)
    assert losses == reference
    assert same(plain, model)


def test_random_words_make_a_run_that_repeats():
    runs = [fitted(sequential(), "bf16; *:grad_output=e5m2@tensor stochastic", steps=1) for _ in range(2)]
    assert same(runs[0][0], runs[1][0])
    assert runs[0][2] == runs[1][2]
    other = sequential()
    precision = mezzo.keras.Precision(other, policy="bf16; *:grad_output=e5m2@tensor stochastic", seed=1)
    assert not same(fitted(other, None, steps=1, precision=precision)[0], runs[0][0])


def test_jit_compiled_fit_rounds_as_the_graph_does():
    # Without dropout, whose random numbers XLA draws in its own way.
    _, _, graph = fitted(sequential(0.0), "fp8", steps=1)
    _, precision, compiled = fitted(sequential(0.0), "fp8", steps=1, jit_compile=True)
    np.testing.assert_allclose(compiled, graph, rtol=1e-4)
    assert precision.state_dict()["steps"] == 4


def test_subclassed_models_are_found_layer_by_layer():
    model = Subclassed()
    precision = mezzo.keras.Precision(model, policy="bf16; blocks.1.up:*=float32; *attn.query:weight=e4m3@tensor")
    model, _, losses = fitted(model, None, precision=precision)
    assert losses[-1] < losses[0]
    rows = {row.site: row for row in precision.sites(X[:3])}
    assert rows["blocks.0.up:fprop.a"].format == "bfloat16"
    assert rows["blocks.1.up:fprop.a"].format == "float32"
    assert rows["attn.query:fprop.b"].format == "float8_e4m3fn@tensor"
    assert rows["attn:fprop.query"].shape == (3, 2, 4, 4)
    assert rows["head:fprop.out"].format == "float32"


def test_a_rule_that_matches_nothing_is_refused_as_soon_as_the_layers_are_known():
    with pytest.raises(ConfigError, match="matches nothing in this model; did you mean hidden"):
        mezzo.keras.Precision(sequential(), policy="bf16; hiden:*=float32")
    model = Subclassed()
    mezzo.keras.Precision(model, policy="bf16; attn.kuery:*=float32")
    with pytest.raises(ConfigError, match="matches nothing in this model"):
        fitted(model, None)


def test_functional_models_inside_of_models_have_paths_of_both():
    inner = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8, name="down")], name="encoder")
    x = keras.Input((16,))
    model = keras.Model(x, keras.ops.matmul(keras.layers.Dense(4, name="head")(inner(x)), np.eye(4, dtype="f")))
    _, precision, losses = fitted(model, "bf16")
    assert losses[-1] < losses[0]
    sites = [row.site for row in precision.sites(X[:2])]
    assert {"encoder.down:fprop.a", "head:fprop.b", "(model):fprop.a"} <= {*sites}


@pytest.mark.parametrize("policy", ["fp8", "fp16"])
def test_a_custom_train_step_trains(policy):
    model, precision, losses = fitted(OwnStep(), policy)
    assert losses[-1] < losses[0]
    assert precision.state_dict()["skipped"] == 0
    assert model.predict(X[:2], verbose=0).shape == (2, 4)


def test_a_train_step_that_forgets_the_loss_scale_is_refused():
    model = OwnStep()
    model.scales = False
    with pytest.raises(ConfigError, match=r"optimizer\.scale_loss"):
        fitted(model, "fp16")
    model = OwnStep()
    model.scales = False
    fitted(model, "bf16")  # nothing to forget


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_loop_of_ones_own_trains(policy, graph):
    model = sequential()
    precision = mezzo.keras.Precision(model, policy=policy, max_norm=1.0)
    optimizer = precision.optimizer(keras.optimizers.SGD(0.1))

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            scaled = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(scaled, variables), variables, strict=True))
        return loss

    run = tf.function(step) if graph else step
    losses = [float(run(X, Y)) for _ in range(5)]
    precision.check()
    assert losses[-1] < losses[0]
    assert precision.state_dict()["steps"] == 5


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("policy", ["fp16", "bf16; loss_scale=8", "fp32; loss_scale=8"])
def test_gradients_of_a_loss_that_nobody_scaled_are_refused(policy, graph):
    model = sequential()
    precision = mezzo.keras.Precision(model, policy=policy)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    run = tf.function(step) if graph else step
    says = f"^{policy} scales the loss, but no optimizer was guarded: optimizer = precision.optimizer"
    with pytest.raises(ConfigError, match=says):
        run(X, Y)
    # Who only looks goes on.
    assert np.isfinite(model(X)).all()
    assert mezzo.keras.measure(precision, X, Y, keras.losses.mean_squared_error).sites
    with precision.tap(lambda *_: None):
        assert step(X, Y)[0] is not None
    with precision.using("fp32"):
        assert step(X, Y)[0] is not None
    precision.optimizer(keras.optimizers.SGD())
    assert run(X, Y)[0] is not None


@pytest.mark.parametrize("policy", ["bf16", "fp16; loss_scale=none", "fp16; loss_scale=1"])
def test_gradients_of_a_loss_that_is_not_scaled_need_no_optimizer(policy):
    model = sequential()
    mezzo.keras.Precision(model, policy=policy)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(X))
    assert tape.gradient(loss, model.trainable_variables)[0] is not None


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_gradients_are_clipped_to_the_total_norm(max_norm):
    layer = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4, use_bias=False), keras.layers.Dense(4)])
    precision = mezzo.keras.Precision(layer, policy="fp32", max_norm=max_norm)
    optimizer = precision.optimizer(keras.optimizers.SGD(1.0))
    before = layer.get_weights()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum((layer(X) - Y) ** 2)
    grads = [g.numpy() for g in tape.gradient(loss, [v.value for v in layer.trainable_variables])]
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads))
    optimizer.apply_gradients(zip(map(tf.constant, grads), layer.trainable_variables, strict=True))
    for old, new, g in zip(before, layer.get_weights(), grads, strict=True):
        np.testing.assert_allclose(old - new, g / max(1, norm / max_norm), rtol=1e-3, atol=1e-5 * np.abs(g).max())


def test_rows_of_an_embedding_that_come_twice_count_once_in_the_norm():
    model = keras.Sequential([keras.layers.Embedding(5, 2, embeddings_initializer="ones")])
    ids = np.array([[1, 1, 1, 2]])
    model(ids)
    precision = mezzo.keras.Precision(model, policy="bf16", max_norm=1.0)
    optimizer = precision.optimizer(keras.optimizers.SGD(1.0))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(ids))
    optimizer.apply_gradients(zip(tape.gradient(loss, [v.value for v in model.trainable_variables]),
                                  model.trainable_variables, strict=True))  # fmt: skip
    gradient = np.zeros((5, 2))
    gradient[1], gradient[2] = 3, 1
    np.testing.assert_allclose(1 - model.get_weights()[0], gradient / np.sqrt((gradient**2).sum()), rtol=1e-6)


def test_callbacks_schedules_and_a_new_learning_rate_reach_the_optimizer_inside():
    model = sequential()
    mezzo.keras.Precision(model, policy="bf16")
    rates = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.01 / (epoch + 1))
    model.compile(optimizer=keras.optimizers.Adam(0.5), loss="mse")
    history = model.fit(X, Y, epochs=2, verbose=0, callbacks=[rates])
    assert model.optimizer.learning_rate.numpy() == np.float32(0.005)
    assert model.optimizer.inner_optimizer.learning_rate.numpy() == np.float32(0.005)
    assert history.history["learning_rate"][-1] == pytest.approx(0.005)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    model.compile(optimizer=keras.optimizers.SGD(schedule), loss="mse")
    model.fit(X, Y, epochs=1, verbose=0)
    assert int(model.optimizer.iterations) == 2
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)


def test_a_model_compiled_before_has_its_optimizer_wrapped_in_place():
    model = sequential()
    model.compile(optimizer="adam", loss="mse")
    model.fit(X, Y, verbose=0)
    inner, before = model.optimizer, int(model.optimizer.iterations)
    precision = mezzo.keras.Precision(model, policy="fp8")
    assert isinstance(model.optimizer, mezzo.keras.Optimizer)
    assert model.optimizer.inner_optimizer is inner
    model.fit(X, Y, verbose=0)
    assert int(inner.iterations) == 2 * before
    assert precision.state_dict()["steps"] == before
    precision.remove()
    assert model.optimizer is inner
    model.fit(X, Y, verbose=0)
    assert precision.state.count("steps") == before


def test_what_is_saved_is_the_models_own_and_loads_without_mezzo(tmp_path):
    model, precision, _ = fitted(sequential(), "fp16")
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    code = (
        "import sys, keras, numpy as np\n"
        f"m = keras.models.load_model({str(tmp_path / 'model.keras')!r})\n"
        "assert type(m.optimizer) is keras.optimizers.Adam\n"
        f"assert int(m.optimizer.iterations) == {int(model.optimizer.iterations)}\n"
        "assert all(np.abs(v.numpy()).max() > 0 for v in m.optimizer.variables)\n"
        "m.fit(np.ones((4, 16)), np.ones((4, 4)), verbose=0)\n"
        "assert not any(name.startswith('mezzo') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert same(model, loaded)
    for one, two in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, two)
    # On from there, both with the state of the Precision.
    again = mezzo.keras.Precision(loaded, policy="fp16")
    again.load_state_dict(precision.state_dict())
    for each in (model, loaded):
        each.layers[2].seed_generator.state.assign([1, 1])
        each.fit(X, Y, batch_size=16, verbose=0, shuffle=False)
    assert same(model, loaded)
    assert again.state_dict() == precision.state_dict()
    clone = keras.models.clone_model(model)
    assert "call" not in clone.layers[0].__dict__


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_h5_file_names_the_optimizer_inside_and_loads_without_mezzo(tmp_path):
    # Keras cannot load its own "mse" from such a file.
    model, precision, _ = fitted(sequential(), "fp16", loss=keras.losses.MeanSquaredError())
    model.save(tmp_path / "model.h5")
    code = (
        "import sys, keras, numpy as np\n"
        f"m = keras.models.load_model({str(tmp_path / 'model.h5')!r})\n"
        "assert type(m.optimizer) is keras.optimizers.Adam\n"
        "m.predict(np.ones((4, 16)), verbose=0)\n"
        "assert not any(name.startswith('mezzo') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    loaded = keras.models.load_model(tmp_path / "model.h5")
    assert same(model, loaded)
    # From this format Keras restores no moments, with mezzo or without; it asks for another compile before fit.
    mezzo.keras.Precision(loaded, policy="fp16").load_state_dict(precision.state_dict())
    loaded.compile("adam", "mse")
    loaded.fit(X, Y, verbose=0)
    saved = keras.optimizers.serialize(model.optimizer)
    assert (saved["module"], saved["class_name"]) == ("keras.optimizers", "Adam")


def test_the_guard_is_its_own_type_and_shows_the_optimizer_inside():
    guard = mezzo.keras.Precision(sequential(), policy="fp16").optimizer(keras.optimizers.Adam())
    assert type(guard) is mezzo.keras.Optimizer
    assert isinstance(guard, mezzo.keras.Optimizer)
    assert isinstance(guard, keras.optimizers.Optimizer)
    assert not isinstance(guard.inner_optimizer, mezzo.keras.Optimizer)
    assert repr(guard) == f"<mezzo.keras.Optimizer around {guard.inner_optimizer!r}>"
    assert "Adam" in repr(guard)


def test_a_checkpoint_of_tensorflow_holds_the_optimizer_inside(tmp_path):
    model, _, _ = fitted(sequential(), "bf16")
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
    plain = sequential()
    plain.compile(optimizer="adam", loss="mse")
    plain.optimizer.build(plain.trainable_variables)
    tf.train.Checkpoint(model=plain, optimizer=plain.optimizer).restore(path)
    assert same(model, plain)
    for one, two in zip(model.optimizer.variables, plain.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, two)


def test_removing_gives_everything_back():
    model, precision, _ = fitted(sequential(), "bf16")
    precision.remove()
    assert not any("call" in layer.__dict__ for layer in [model, *model.layers])
    assert {"compile", "make_train_function"}.isdisjoint(model.__dict__)
    plain = sequential()
    plain.set_weights(model.get_weights())
    np.testing.assert_array_equal(model(X), plain(X))
    with pytest.raises(ConfigError, match="was removed"):
        precision.sites(X)
    mezzo.keras.Precision(model, policy="bf16")


class Own(keras.layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4), name="w")

    def call(self, x):
        return x @ self.w


def test_recomputed_layers_are_rounded_the_same():
    losses = []
    for mode in ("full", None):
        keras.utils.set_random_seed(1)
        with keras.RematScope(mode=mode):
            own = Own(name="own")
        model = keras.Sequential([keras.Input((16,)), own, keras.layers.Dense(4, name="head")])
        losses.append(fitted(model, "mxfp8; *:grad_output=mxfp8 stochastic")[2])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_recurrent_layers_train_and_their_products_are_their_cells():
    model = keras.Sequential([keras.Input((4, 4)), keras.layers.LSTM(8, name="lstm"), keras.layers.Dense(4)])
    precision = mezzo.keras.Precision(model, policy="bf16")
    model.compile(optimizer="adam", loss="mse")
    losses = model.fit(X.reshape(-1, 4, 4), Y, epochs=2, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert "lstm.lstm_cell:fprop.a" in {row.site for row in precision.sites(X[:2].reshape(-1, 4, 4))}
