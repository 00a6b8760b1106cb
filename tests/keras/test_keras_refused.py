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


def test_an_optimizer_of_another_precision_is_refused():
    optimizer = mezzo.keras.Precision(dense(), policy="fp16").optimizer(keras.optimizers.SGD())
    with pytest.raises(ConfigError, match="guarded by another Precision; give its inner_optimizer"):
        mezzo.keras.Precision(dense(), policy="fp16").optimizer(optimizer)


class TorchModule:
    __module__ = "torch.nn.modules.linear"


@pytest.mark.parametrize(("make", "message"), [
    (lambda m: mezzo.keras.Precision("bf16", m),
     r"the model comes first: mezzo.keras.Precision\(model, policy='bf16'\)"),
    (lambda m: mezzo.keras.Precision(None), "the model comes first: .*; got NoneType, which is no Keras model"),
    (lambda m: mezzo.keras.Precision(model=3), "the model comes first: .*; got int"),
    (lambda m: mezzo.keras.Precision(TorchModule()), "is a torch module; under PyTorch it is mezzo.torch.Precision"),
    (lambda m: mezzo.keras.Precision(m, keras.optimizers.SGD(), policy="bf16"),
     r"under Keras the optimizer is guarded by compile, or by precision.optimizer\(optimizer\)"),
    (lambda m: mezzo.keras.Precision(m, keras.optimizers.SGD(), "bf16"), "the optimizer is guarded by compile"),
    (lambda m: mezzo.keras.Precision(m, "adam", policy="bf16"), "the optimizer is guarded by compile"),
    (lambda m: mezzo.keras.Precision(m, optimizer="adam"), "the optimizer is guarded by compile"),
    (lambda m: mezzo.keras.Precision(m, policy=None), "policy is text such as 'bf16' or a Policy, got None"),
    (lambda m: mezzo.keras.Precision(m, 16), "policy is text such as 'bf16' or a Policy, got 16"),
    (lambda m: mezzo.keras.Precision(m).switch(None), "policy is text such as 'bf16' or a Policy, got None"),
])  # fmt: skip
def test_arguments_that_are_mixed_up_are_told_apart(make, message):
    with pytest.raises(ConfigError, match=message):
        make(dense())


@pytest.mark.parametrize("seed", [True, "0", 1.0, None, -1, 1 << 64])
def test_a_seed_that_is_no_word_of_64_bits_is_refused(seed):
    with pytest.raises(ConfigError, match=r"seed is a whole number from 0 to 2\*\*64 - 1, got"):
        mezzo.keras.Precision(dense(), seed=seed)


def test_the_largest_seed_rounds():
    model = dense()
    mezzo.keras.Precision(model, policy="bf16; *:input=bfloat16 stochastic", seed=(1 << 64) - 1)
    assert np.isfinite(model(np.ones((2, 4), "f"))).all()


def cnn():
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((12, 12, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Conv2D(4, 3),
         layers.DepthwiseConv2D(3), layers.Conv2DTranspose(2, 3), layers.SeparableConv2D(4, 3),
         layers.GlobalAveragePooling2D(), layers.Dense(4, name="head")]
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["mxfp8", "nvfp4", "bf16; *:weight=mxfp4"])
def test_blocks_in_convolutions_are_refused_at_once_with_rules_that_help(policy):
    model = cnn()
    with pytest.raises(ConfigError) as found:
        mezzo.keras.Precision(model, policy=policy)
    message = str(found.value)
    assert message.startswith("conv2d, conv2d_1, depthwise_conv2d, conv2d_transpose, separable_conv2d: a convolution")
    rules = message.partition("with the rules ")[2]
    sites = [f"{glob}:{name}" for glob in ("conv2d*", "depthwise_conv2d", "separable_conv2d")
             for name in ("input", "weight", "grad_output")]  # fmt: skip
    assert rules == "; ".join(f"{site}=bfloat16" for site in sites)
    precision = mezzo.keras.Precision(model, policy=f"{policy}; {rules}")
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 12, 12, 3)), np.ones((2, 4)), verbose=0)
    for refused in (precision.switch, lambda other: precision.using(other).__enter__()):
        with pytest.raises(ConfigError, match=r"^conv2d, conv2d_1, depthwise_conv2d"):
            refused(policy)
    assert str(precision.policy).endswith("bfloat16")


@pytest.mark.parametrize(("names", "rules"), [
    (("conv_a", "conv_b"), "conv_*:input=bfloat16; conv_*:weight=bfloat16; conv_*:grad_output=bfloat16"),
    (("hello", "here"),  # h* would be the head too
     "hello:input=bfloat16; hello:weight=bfloat16; hello:grad_output=bfloat16; "
     "here:input=bfloat16; here:weight=bfloat16; here:grad_output=bfloat16"),
    (("conv",), "conv:input=bfloat16; conv:weight=bfloat16; conv:grad_output=bfloat16"),
])  # fmt: skip
def test_the_rules_that_help_a_convolution_speak_of_no_other_layer(names, rules):
    convolutions = [keras.layers.Conv1D(3, 2, name=name) for name in names]
    head = keras.layers.Dense(4, name="header")
    model = keras.Sequential([keras.Input((8, 3)), *convolutions, head])
    with pytest.raises(ConfigError) as found:
        mezzo.keras.Precision(model, policy="mxfp8")
    assert str(found.value).endswith(f"with the rules {rules}")
    mezzo.keras.Precision(model, policy=f"mxfp8; {rules}")


@pytest.mark.parametrize("mode", ["full", "activations", None])
def test_a_rule_for_one_call_of_a_recomputed_layer_is_refused(mode):
    with keras.RematScope(mode=mode):
        inner = keras.layers.Dense(3, name="d")
    model = keras.Sequential([keras.Input((4,)), inner])
    if mode == "full":
        with pytest.raises(ConfigError, match=r"d is computed again in the backward pass .*one format for all calls"):
            mezzo.keras.Precision(model, policy="bf16; d#1:input=float32")
    else:
        mezzo.keras.Precision(model, policy="bf16; d#1:input=float32")


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
