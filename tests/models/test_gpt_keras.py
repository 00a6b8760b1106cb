import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what TensorFlow's C++ part prints when it is imported

import keras
import numpy as np
import pytest
import tensorflow as tf
from torch_twin import CHUNK_ROWS, SMALL, VARIANTS, Twin, assert_same, assert_same_gradients, twin, variants

from mezzo.errors import ConfigError
from mezzo.models import gpt_keras
from mezzo.models.gpt_keras import GPT, load_parameters, parameters, read_parameters
from mezzo.models.initial import initial_parameters
from mezzo.models.sampling_arrays import generate
from mezzo.models.shapes import GPTConfig, parameter_shapes

# TensorFlow's tensors do not know NumPy 2's `copy` argument: np.array(tensor), which Keras calls, warns.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def built(config: GPTConfig, known: Twin, **options: Any) -> GPT:
    model = GPT(config, **{"loss_chunk_rows": CHUNK_ROWS} | options)
    load_parameters(model, known.weights)
    return model


def loss_and_gradients(model: GPT, idx_BT: Any, targets_BT: Any) -> tuple[Any, dict[str, Any]]:
    variables = parameters(model)
    with tf.GradientTape() as tape:
        loss = model.mean_loss(idx_BT, targets_BT)
    gradients = tape.gradient(loss, [variable.value for variable in variables.values()])
    return loss, dict(zip(variables, map(tf.convert_to_tensor, gradients), strict=True))


def in_torchs_layout(model: GPT, gradients: dict[str, Any]) -> dict[str, Any]:
    kernels = [name for name, variable in parameters(model).items() if variable.name == "kernel"]
    return {name: g.numpy().T if name in kernels else g.numpy() for name, g in gradients.items()}


def assert_equals_torch(model: GPT, known: Twin, step: Any = loss_and_gradients) -> None:
    loss, gradients = step(model, known.idx, known.targets)
    assert_same(loss.numpy(), known.loss, sums=40)
    assert_same_gradients(in_torchs_layout(model, gradients), known.gradients)


@variants
def test_parameters_logits_loss_and_gradients_are_those_of_torch(config: GPTConfig) -> None:
    known = twin(config)
    model = built(config, known)
    assert_same(model(known.idx).numpy(), known.logits, sums=40)
    assert_equals_torch(model, known)

    found = read_parameters(model)
    assert [(name, array.shape) for name, array in found.items()] == list(parameter_shapes(config).items())
    assert len(model.variables) == len(found)
    for name, array in found.items():
        np.testing.assert_array_equal(array, known.weights[name])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_compiled_step_equals_torchs(jit_compile: bool) -> None:
    config = replace(VARIANTS["grouped"], layers=1)  # XLA takes its seconds
    known = twin(config)
    step = tf.function(loss_and_gradients, jit_compile=jit_compile)
    assert_equals_torch(built(config, known), known, step)


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_activations_give_the_same_gradients_from_blocks_computed_twice(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain_call = gpt_keras.MLP.call
    monkeypatch.setattr(gpt_keras.MLP, "call", lambda self, x: (calls.append(self), plain_call(self, x))[1])
    known = twin(VARIANTS["gpt2"])
    model = built(VARIANTS["gpt2"], known, checkpoint_activations=True)
    calls.clear()  # building is a forward pass
    assert_equals_torch(model, known, tf.function(loss_and_gradients) if compiled else loss_and_gradients)
    mlps = [block.mlp for block in model.blocks]
    assert calls == [*mlps, *reversed(mlps)]


def test_the_loss_does_not_depend_on_the_chunks() -> None:
    known = twin(SMALL)
    model = built(SMALL, known)
    for rows in (None, 48, 1000):
        model.loss_chunk_rows = rows
        assert_same(model.mean_loss(known.idx, known.targets).numpy(), known.loss, sums=40)


def test_nested_layer_names_are_torchs_module_paths() -> None:
    paths = {name.rpartition(".")[0]: variable.path for name, variable in parameters(GPT(SMALL)).items()}
    for site, path in paths.items():
        assert path.split("/")[0] == "gpt"
        assert ".".join(path.split("/")[1:-1]) == site


def test_names_do_not_depend_on_where_or_under_what_name_the_model_is_built() -> None:
    with keras.name_scope("outer"):
        model = GPT(replace(SMALL, layers=1), name="student")
    assert parameters(model)["blocks.0.attn.qkv.weight"].path == "outer/student/blocks.0/attn/qkv/kernel"


def test_a_model_starts_from_the_initial_parameters_of_its_seed() -> None:
    found = read_parameters(GPT(SMALL, seed=4))
    for name, array in initial_parameters(SMALL, 4).items():
        np.testing.assert_array_equal(found[name], array)


def test_arrays_that_do_not_fit_are_refused_before_anything_is_set() -> None:
    model = GPT(SMALL)
    arrays = dict.fromkeys(parameter_shapes(SMALL), np.zeros(1)) | initial_parameters(SMALL, 1)
    del arrays["norm.weight"]
    arrays["head.weight"] = arrays["blocks.0.attn.out.weight"]
    arrays["blocks.1.attn.qkv.weight"] = arrays["blocks.1.attn.qkv.weight"].T
    with pytest.raises(ConfigError) as caught:
        load_parameters(model, arrays)
    assert str(caught.value) == (
        "these arrays do not fit the model: norm.weight is missing; head.weight is not a parameter of the model; "
        "blocks.1.attn.qkv.weight is (32, 96), the model's (96, 32)"
    )
    before = initial_parameters(SMALL, 0)
    for name, array in read_parameters(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_saved_model_and_saved_weights_come_back(tmp_path: Path) -> None:
    config = VARIANTS["grouped"]
    model = GPT(config, seed=1, loss_chunk_rows=5, checkpoint_activations=True, name="saved")
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    whole = keras.models.load_model(tmp_path / "model.keras")
    other = GPT(config, seed=2)
    other.load_weights(tmp_path / "model.weights.h5")
    expected, found, loaded = (read_parameters(m) for m in (model, whole, other))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(loaded[name], array)
    assert (whole.config, whole.name) == (config, "saved")
    assert (whole.loss_chunk_rows, whole.checkpoint_activations) == (5, True)


def test_context_beyond_seq_len_is_refused() -> None:
    message = (
        "a context of 25 positions is longer than the model's seq_len = 24; "
        "give at most 24 tokens here, or build the model with a longer seq_len"
    )
    with pytest.raises(ConfigError, match=message):  # Keras adds the arguments of `call` to any error
        GPT(SMALL)(np.zeros((1, 25), np.int32))


def test_loss_chunk_rows_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^loss_chunk_rows must be at least 1, or None for all at once, not 0$"):
        GPT(SMALL, loss_chunk_rows=0)


def test_a_graph_may_leave_the_shape_open_but_not_for_a_loss_in_chunks() -> None:
    known = twin(SMALL)
    model = built(SMALL, known)
    open_shape = tf.TensorSpec((None, None), tf.int32)
    logits = tf.function(lambda idx_BT: model(idx_BT), input_signature=[open_shape])
    assert_same(logits(known.idx).numpy(), known.logits, sums=40)

    loss = tf.function(
        lambda idx_BT, targets_BT: model.mean_loss(idx_BT, targets_BT),
        input_signature=[open_shape] * 2,
        autograph=False,  # AutoGraph turns any error into one of its own
    )
    with pytest.raises(ConfigError, match="the loss in chunks of rows needs a known number of positions; give "):
        loss(known.idx, known.targets)
    model.loss_chunk_rows = None
    assert_same(loss(known.idx, known.targets).numpy(), known.loss, sums=40)


def test_a_residual_stream_stays_wide_where_a_branch_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's own + would refuse the two dtypes."""
    model = GPT(replace(SMALL, layers=1))
    plain_call = keras.layers.Dense.call
    monkeypatch.setattr(
        keras.layers.Dense, "call", lambda self, x, training=None: keras.ops.cast(plain_call(self, x), "bfloat16")
    )
    assert model.blocks[0](np.zeros((1, 3, 32), np.float32)).dtype == tf.float32
    assert model.mean_loss(np.zeros((1, 3), np.int32), np.zeros((1, 3), np.int32)).dtype == tf.float32


def test_a_padded_context_gives_the_greedy_text_of_torch_with_one_trace() -> None:
    import torch

    from mezzo.models import gpt_torch, sampling

    config = replace(SMALL, layers=1, seq_len=8)
    known = twin(config)
    reference = gpt_torch.GPT(config)
    reference.load_state_dict({name: torch.from_numpy(array) for name, array in known.weights.items()})
    forward = tf.function(built(config, known))
    found = list(generate(lambda idx, last: forward(idx)[0, last], [1, 2], config, max_new_tokens=12, temperature=0))
    assert found == list(sampling.generate(reference, [1, 2], max_new_tokens=12, temperature=0))
    assert forward.experimental_get_tracing_count() == 1
    assert np.unique(found).size > 2
