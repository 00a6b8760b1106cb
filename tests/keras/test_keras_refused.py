import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import mezzo.keras
from mezzo.errors import ConfigError


def dense(**how):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="d", **how)])


@pytest.mark.parametrize(("policy", "message"), [
    ("bf16; *:input=e4m3@tensor delayed", "is not there under tensorflow; drop the word delayed"),
    ("bf16; *:saved=bfloat16", "is not there under tensorflow"),
    ("bf16-pure", "keep float32 masters"),
    ("bf16; *:state=bfloat16", "keep float32 moments"),
    ("bf16; *:compute=bfloat16", "they run in the model's own dtype"),
    ("fp64", r"\(model\) computes in float32.*keras.config.set_floatx\('float64'\)"),
    ("bf16; d:fprop.out=mxfp8", "results of products are kept in"),
    ("bf16; d:wgrad.a=bfloat16 hadamard", "a Hadamard transform of one operand is undone"),
    ("bf16; head:input=float32", "matches nothing in this model"),
    ("bf15", "unknown recipe"),
])  # fmt: skip
def test_a_policy_that_cannot_be_carried_out_is_refused_at_once(policy, message):
    model = dense()
    with pytest.raises(ConfigError, match=message):
        mezzo.keras.Precision(model, policy=policy)
    # Nothing is left behind.
    assert "call" not in model.__dict__
    mezzo.keras.Precision(model, policy="bf16")


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_a_model_under_keras_own_mixed_precision_is_refused(name):
    with pytest.raises(ConfigError, match=r"keras.config.set_dtype_policy\('float32'\)"):
        mezzo.keras.Precision(dense(dtype=name), policy="bf16")


def test_a_model_takes_one_precision():
    model = dense()
    mezzo.keras.Precision(model, policy="bf16")
    with pytest.raises(ConfigError, match="already under a Precision"):
        mezzo.keras.Precision(model, policy="bf16")
    other = keras.Sequential([keras.Input((4,)), dense()])
    mezzo.keras.Precision(other, policy="bf16")


def test_a_model_that_calls_a_model_of_another_precision_is_refused():
    inner = dense()
    mezzo.keras.Precision(inner, policy="bf16")

    class Outer(keras.layers.Layer):
        def call(self, x):
            return hidden[0](x)

    hidden, outer = [inner], Outer()
    mezzo.keras.Precision(outer, policy="fp8")
    with pytest.raises(ConfigError, match="under one Precision calls a model under another"):
        outer(np.ones((1, 4), "f"))


@pytest.mark.parametrize(("optimizer", "message"), [
    (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "scales the loss itself"),
    (lambda: keras.optimizers.SGD(loss_scale_factor=4.0), "scales the loss itself"),
    (lambda: "adam", "is a keras.optimizers.Optimizer, got str"),
])  # fmt: skip
def test_optimizers_that_do_not_fit_are_refused(optimizer, message):
    precision = mezzo.keras.Precision(dense(), policy="fp16")
    with pytest.raises(ConfigError, match=message):
        precision.optimizer(optimizer())


def test_max_norm_is_positive_and_several_devices_are_refused():
    with pytest.raises(ConfigError, match="max_norm is a positive number, got -1"):
        mezzo.keras.Precision(dense(), policy="bf16", max_norm=-1)
    precision = mezzo.keras.Precision(dense(), policy="bf16")

    class Two:
        num_replicas_in_sync = 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.distribute, "get_strategy", Two)
        with pytest.raises(ConfigError, match="trains on one device"):
            precision.optimizer(keras.optimizers.SGD())


def test_another_backend_is_an_error_that_says_what_to_set():
    code = "import mezzo.keras"
    found = subprocess.run(
        [sys.executable, "-c", code], env={"KERAS_BACKEND": "numpy", "PATH": ""}, capture_output=True, text=True
    )
    assert "Keras runs on numpy; set KERAS_BACKEND=tensorflow before keras is imported" in found.stderr


def test_the_public_names_are_these():
    assert {*mezzo.keras.__all__} == {
        "CONTRACT", "Optimizer", "Precision", "SiteRow", "bits", "hadamard", "measure", "quantize",
    }  # fmt: skip
    assert all(hasattr(mezzo.keras, name) for name in mezzo.keras.__all__)
