import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_reference import holds

import mezzo.keras
from mezzo.errors import ConfigError
from mezzo.formats.measure import measure
from mezzo.policy import Site

RNG = np.random.RandomState(5)
X, Y = RNG.randn(8, 20).astype("f"), RNG.randn(8, 3).astype("f")


def network():
    return keras.Sequential(
        [keras.Input((20,)), keras.layers.Dense(16, name="hidden"), keras.layers.BatchNormalization(name="norm"),
         keras.layers.Dropout(0.5), keras.layers.Dense(3, name="head")]
    )  # fmt: skip


def test_the_site_table_lists_products_norms_and_masters_with_their_sizes():
    precision = mezzo.keras.Precision(network(), policy="mxfp8")
    rows = {row.site: row for row in precision.sites(X)}
    assert (rows["hidden:fprop.a"].shape, rows["hidden:fprop.a"].format) == ((8, 20), "mxfp8_e4m3")
    assert rows["hidden:wgrad.out"].shape == (20, 16)
    assert rows["head:fprop.out"].format == "float32"
    assert rows["hidden:fprop.out"].bytes == 8 * 16 * 2
    assert rows["norm:compute"].route == "native"
    assert rows["hidden.kernel:master"].bytes == 20 * 16 * 4
    assert {row.route for row in rows.values()} == {"emulated", "native"}
    with pytest.raises(ConfigError, match="needs inputs for one forward pass"):
        precision.sites()


def test_a_tap_sees_every_rounding_forward_and_backward():
    model = network()
    precision = mezzo.keras.Precision(model, policy="bf16")
    seen = {}
    with precision.tap(lambda site, before, after: seen.update({site: (before, after)})), tf.GradientTape() as tape:
        tape.gradient(tf.reduce_sum(model(X) ** 2), [v.value for v in model.trainable_variables])
    roles = [f"{p}.{r}" for p in ("fprop", "dgrad", "wgrad") for r in ("a", "b", "out")]
    assert {*seen} == {Site(path, role) for path in ("hidden", "head") for role in roles}
    before, after = seen[Site("hidden", "fprop.a")]
    np.testing.assert_array_equal(before, X)
    assert holds(after, "bfloat16")
    seen.clear()
    model(X)
    assert not seen


def test_a_tap_in_a_graph_is_refused():
    model = network()
    precision = mezzo.keras.Precision(model, policy="bf16")
    model.compile(optimizer="adam", loss="mse")
    with precision.tap(print), pytest.raises(ConfigError, match="run_eagerly=True"):
        model.fit(X, Y, verbose=0)
    with precision.tap(print), pytest.raises(ConfigError, match="only where the model runs eagerly"):
        tf.function(model, autograph=False)(X)
    seen = []
    model.compile(optimizer="adam", loss="mse", run_eagerly=True)
    with precision.tap(lambda site, *_: seen.append(site.role)):
        model.fit(X, Y, verbose=0)
    assert {"fprop.a", "wgrad.out"} <= {*seen}


@pytest.mark.parametrize("policy", ["bf16", "fp16", "nvfp4", "*:input=mxfp8_e4m3+floor"])
def test_a_sample_measures_what_a_tap_sees_and_trains_nothing(policy):
    policy = policy if "=" not in policy else f"bf16; {policy}"
    model = network()
    precision = mezzo.keras.Precision(model, policy=policy)
    x = X.copy()
    x[:, 0] = 3.9  # under a scale of 2^(1 - 8) it is 499, and float8_e4m3fn ends at 448
    before = model.get_weights()
    sample = mezzo.keras.measure(precision, x, Y, keras.losses.mean_squared_error)
    assert all(np.array_equal(x, y) for x, y in zip(before, model.get_weights(), strict=True))
    assert precision.state_dict()["steps"] == 0
    assert (sample.step, sample.policy) == (1, policy)
    one = sample.sites[Site("hidden", "fprop.a")]
    assert one.measure.count >= X.size
    events = []
    with precision.events(events.append):
        model(x)
    event = next(e for e in events if e.site == Site("hidden", "fprop.a"))
    again = measure(event.before, event.after, event.spec.fmt, axis=event.axis)
    assert one.measure.sqnr == again.sqnr
    if "floor" in policy:
        assert one.measure.overflowed == len(x)
    assert all(m.measure.nonfinite == 0 for m in sample.sites.values())
    assert sample.worst(1)


def test_what_overflows_is_found():
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(1, name="d", kernel_initializer="ones")])
    precision = mezzo.keras.Precision(model, policy="fp16")
    sample = mezzo.keras.measure(precision, X * 1e6, Y[:, :1], keras.losses.mean_squared_error)
    assert sample.findings[0].site == "d:fprop.a"
    assert sample.findings[0].kind == "overflow"
