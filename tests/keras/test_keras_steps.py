import keras
import numpy as np
import pytest
import tensorflow as tf

import mezzo.keras
from mezzo.errors import ConfigError, NonfiniteError
from mezzo.policy import LossScaling
from mezzo.policy.scale import initial, update

# Keras' own conversion of its variables to NumPy, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
RNG = np.random.RandomState(0)
X, Y = RNG.randn(8, 6).astype("f"), RNG.randn(8, 3).astype("f")
BAD = X.copy()
BAD[0, 0] = np.nan


def network():
    keras.utils.set_random_seed(2)
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, name="hidden"), keras.layers.BatchNormalization(name="norm"),
         keras.layers.Dense(3, name="head")]
    )  # fmt: skip


def compiled(policy, optimizer="adam", **how):
    model = network()
    precision = mezzo.keras.Precision(model, policy=policy, **how)
    model.compile(optimizer=optimizer, loss="mse")
    return model, precision


def snapshot(model):
    return [np.array(v.numpy()) for v in (*model.weights, *model.optimizer.variables)]


def equal(one, two):
    return all(np.array_equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_skipped_step_leaves_everything_as_it_was_to_the_bit(policy, jit_compile):
    model = network()
    precision = mezzo.keras.Precision(model, policy=policy)
    model.compile(optimizer="adam", loss="mse", jit_compile=jit_compile)
    model.train_on_batch(X, Y)
    before = snapshot(model)
    model.train_on_batch(BAD, Y)
    assert equal(before, snapshot(model))
    state = precision.state_dict()
    assert (state["steps"], state["skipped"], state["bad_run"], state["draws"]) == (2, 1, 1, 2)
    assert state["scale"] == (2.0**15 if policy == "fp16" else 1.0)
    model.train_on_batch(X, Y)
    assert not equal(before, snapshot(model))
    assert precision.state_dict()["bad_run"] == 0


def test_moving_statistics_go_back_to_the_last_good_step_and_not_to_before_a_load():
    model, _ = compiled("bf16")
    model.train_on_batch(X, Y)
    model.train_on_batch(X, Y)
    norm = model.get_layer("norm")
    kept = norm.moving_mean.numpy().copy()
    model.train_on_batch(BAD, Y)
    np.testing.assert_array_equal(norm.moving_mean.numpy(), kept)
    norm.moving_mean.assign(np.full(5, 7.0))
    model.train_on_batch(BAD, Y)
    np.testing.assert_array_equal(norm.moving_mean.numpy(), np.full(5, 7.0))


SCALING = "fp16; loss_scale.init=16; loss_scale.growth_interval=3; loss_scale.floor=2; loss_scale.hysteresis=2"


@pytest.mark.parametrize("graph", [False, True])
def test_the_loss_scale_moves_step_by_step_as_the_pure_state_machine_says(graph):
    layer = keras.layers.Dense(1)
    layer(X)
    precision = mezzo.keras.Precision(layer, policy=SCALING)
    optimizer = precision.optimizer(keras.optimizers.SGD(0.0))
    scaling = precision.policy.loss_scaling

    def step(gradient):
        optimizer.scale_loss(1.0)
        optimizer.apply([gradient, tf.zeros(1)], layer.trainable_variables)

    run = tf.function(step) if graph else step
    state = initial(scaling)
    for bad in np.random.RandomState(1).rand(40) < 0.45:
        run(tf.fill((6, 1), np.float32(np.inf if bad else 1.0)))
        state = update(scaling, state, bool(bad), lambda c, a, b: a if c else b)
        found = precision.state_dict()
        assert [found[k] for k in ("scale", "good", "bad", "at_floor")] == [
            state.scale, state.good, state.bad, state.at_floor,
        ]  # fmt: skip


def test_the_loss_is_multiplied_and_gradients_are_divided():
    layer = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, use_bias=False)])
    precision = mezzo.keras.Precision(layer, policy="fp32; loss_scale=1024")
    optimizer = precision.optimizer(keras.optimizers.SGD(1.0))
    assert float(optimizer.scale_loss(tf.constant(0.5))) == 512
    before = layer.get_weights()[0]
    optimizer.apply([tf.fill((6, 1), 1024.0)], layer.trainable_variables)
    np.testing.assert_allclose(before - layer.get_weights()[0], 1, rtol=1e-6)


@pytest.mark.parametrize(("policy", "where"), [
    ("bf16", "10 steps in a row had nonfinite gradients under bf16; not finite is the gradient of"),
    ("fp16; loss_scale.init=2; loss_scale.patience=3", "3 steps in a row .* at the loss scale's floor of 1"),
    ("bf16; loss_scale=8", "at the constant loss scale of 8; .*take a smaller loss_scale"),
])  # fmt: skip
def test_steps_that_stay_nonfinite_stop_the_training_and_name_the_variables(policy, where):
    model, precision = compiled(policy)
    before = model.get_weights()
    with pytest.raises(NonfiniteError, match=where) as found:
        model.fit(BAD, Y, batch_size=8, epochs=30, verbose=0)
    assert "head/bias" in str(found.value)
    assert str(found.value).endswith("or give that layer a wider format with the rule 'head:*=float32'")
    assert equal(before, model.get_weights())
    assert precision.state_dict()["steps"] < 30


def test_a_loop_of_ones_own_learns_of_it_from_check():
    layer = keras.layers.Dense(1)
    layer(X)
    precision = mezzo.keras.Precision(layer, policy="bf16")
    optimizer = precision.optimizer(keras.optimizers.SGD(0.1))
    for _ in range(9):
        optimizer.apply([tf.ones((6, 1)), tf.fill(1, np.float32(np.inf))], layer.trainable_variables)
        precision.check()
    optimizer.apply([tf.ones((6, 1)), tf.fill(1, np.float32(np.inf))], layer.trainable_variables)
    with pytest.raises(NonfiniteError, match=r"the gradient of dense/bias\. The weights"):
        precision.check()


def test_switching_hands_everything_over_and_fit_follows():
    model, precision = compiled(SCALING)
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    kept, weights = precision.state_dict(), snapshot(model)
    precision.switch("bf16")
    assert equal(weights, snapshot(model))
    assert precision.state_dict()["scale"] == 1
    model.fit(X, Y, batch_size=4, verbose=0)
    assert {row.site: row.format for row in precision.sites(X)}["hidden:fprop.a"] == "bfloat16"
    precision.switch(SCALING)
    state = precision.state_dict()
    assert [state[k] for k in ("scale", "good")] == [kept["scale"], kept["good"]]
    assert state["steps"] == state["draws"] == kept["steps"] + 2
    precision.switch("fp16", loss_scale=64.0)
    assert precision.state_dict()["scale"] == 64
    with pytest.raises(ConfigError, match="loss_scale=2 is for a policy with dynamic loss scaling"):
        precision.switch("bf16", loss_scale=2.0)


class Switch(keras.callbacks.Callback):
    def __init__(self, precision, policy):
        super().__init__()
        self.precision, self.policy = precision, policy

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.precision.switch(self.policy)


def test_a_callback_may_switch_inside_of_fit():
    first, _ = compiled("bf16")
    first.fit(X, Y, batch_size=4, epochs=1, verbose=0, shuffle=False)
    second, precision = compiled("bf16")
    second.fit(X, Y, batch_size=4, epochs=2, verbose=0, shuffle=False, callbacks=[Switch(precision, "fp32")])
    plain = network()
    plain.compile(optimizer="adam", loss="mse")
    plain.optimizer.build(plain.trainable_variables)
    for variable, value in zip((*plain.weights, *plain.optimizer.variables), snapshot(first), strict=True):
        variable.assign(value)
    plain.fit(X, Y, batch_size=4, epochs=1, verbose=0, shuffle=False)
    assert equal(plain.get_weights(), second.get_weights())


def test_evaluating_under_another_table_leaves_training_alone():
    model, precision = compiled("fp32; *:input=e4m3@tensor")
    plain = network()
    plain.compile(loss="mse")
    low = model.evaluate(X, Y, verbose=0)
    with precision.using("fp32"):
        np.testing.assert_array_equal(model(X), plain(X))
        assert model.evaluate(X, Y, verbose=0) == plain.evaluate(X, Y, verbose=0) != low
        np.testing.assert_array_equal(model.predict(X, verbose=0), plain.predict(X, verbose=0))
        with pytest.raises(ConfigError, match=r"switch\(\) inside of using\(\)"):
            precision.switch("bf16")
    assert model.evaluate(X, Y, verbose=0) == low
    model.train_on_batch(X, Y)
    traced = model.train_function
    with precision.using("fp32"):
        assert model.train_function is not traced
    assert model.train_function is traced


def test_a_function_traced_before_a_switch_is_found_out():
    layer = keras.layers.Dense(1)
    layer(X)
    precision = mezzo.keras.Precision(layer, policy="bf16")
    optimizer = precision.optimizer(keras.optimizers.SGD(0.1))

    @tf.function
    def step():
        optimizer.apply([tf.ones((6, 1)), tf.ones(1)], layer.trainable_variables)

    step()
    precision.check()
    precision.switch("fp8")
    precision.check()
    step()
    with pytest.raises(ConfigError, match=r"make the tf\.function anew"):
        precision.check()


def test_the_state_has_the_names_of_torch_and_comes_back():
    model, precision = compiled("fp16")
    model.fit(X, Y, batch_size=2, verbose=0)
    state = precision.state_dict()
    assert state.keys() == {"steps", "skipped", "bad_run", "draws", "scale", "good", "bad", "at_floor"}
    assert {name: value.dtype.name for name, value in state.items()} == {
        "steps": "int64", "skipped": "int64", "bad_run": "int64", "draws": "int64",
        "scale": "float32", "good": "int32", "bad": "int32", "at_floor": "int32",
    }  # fmt: skip
    _, other = compiled("fp16")
    other.load_state_dict(state)
    assert other.state_dict() == state
    with pytest.raises(ConfigError, match="the state lacks draws"):
        other.load_state_dict({name: value for name, value in state.items() if name != "draws"})


def test_scales_that_wait_are_part_of_the_state():
    _, precision = compiled(SCALING)
    precision.state.scale.assign(4.0)
    precision.switch("bf16")
    _, other = compiled("bf16")
    other.load_state_dict(precision.state_dict())
    other.switch(SCALING)
    assert other.state_dict()["scale"] == 4
    assert LossScaling().init == 2.0**16


def test_the_layer_that_is_to_be_wider_is_listed_and_can_be():
    model, precision = compiled("bf16; head:*=float32")
    with pytest.raises(NonfiniteError, match=r"hidden/bias, .* with the rule 'hidden:\*=float32'$") as found:
        model.fit(BAD, Y, batch_size=8, epochs=30, verbose=0)
    rule = str(found.value).rpartition("the rule ")[2].strip("'")
    precision.switch(f"{precision.policy}; {rule}")


def test_where_no_format_can_be_wider_no_rule_is_named():
    model, _ = compiled("fp32")
    with pytest.raises(NonfiniteError, match=r"lower the learning rate$"):
        model.fit(BAD, Y, batch_size=8, epochs=30, verbose=0)
