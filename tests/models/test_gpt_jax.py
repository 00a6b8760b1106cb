from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from torch_twin import CHUNK_ROWS, SMALL, VARIANTS, assert_same, assert_same_gradients, twin, variants

from mezzo.errors import ConfigError
from mezzo.models import gpt_jax
from mezzo.models.initial import initial_parameters
from mezzo.models.sampling_arrays import generate
from mezzo.models.shapes import GPTConfig, parameter_shapes

FAST: Any = {"xla_backend_optimization_level": 0}  # halves the time of a compilation


def loss_and_gradients(config: GPTConfig, params: Any, idx_BT: Any, targets_BT: Any, **options: Any) -> Any:
    function = jax.jit(
        jax.value_and_grad(partial(gpt_jax.loss, config=config, **options)),
        compiler_options=FAST,
    )
    return function(params, idx_BT, targets_BT)


def arrays(config: GPTConfig) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in initial_parameters(config).items()}


def tokens(config: GPTConfig, length: int | None = None) -> jax.Array:
    return jnp.zeros((2, length or config.seq_len), jnp.int32)


@variants
def test_loss_and_gradients_equal_torchs(config: GPTConfig) -> None:
    known = twin(config)
    loss, gradients = loss_and_gradients(config, known.weights, known.idx, known.targets, loss_chunk_rows=CHUNK_ROWS)
    assert_same(loss, known.loss, sums=40)
    assert_same_gradients(gradients, known.gradients)
    assert {name: array.shape for name, array in gradients.items()} == parameter_shapes(config)


@variants
def test_logits_equal_torchs(config: GPTConfig) -> None:
    known = twin(config)
    forward = jax.jit(gpt_jax.forward, static_argnames="config")  # as a user would, with all optimisations
    assert_same(forward(known.weights, known.idx, config), known.logits, sums=40)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    config = VARIANTS["grouped"]
    known = twin(config)
    loss, gradients = loss_and_gradients(config, known.weights, known.idx, known.targets, checkpoint_activations=True)
    assert_same(loss, known.loss, sums=40)
    assert_same_gradients(gradients, known.gradients)


def test_checkpointed_activations_save_less() -> None:
    config = replace(SMALL, layers=4)
    params, idx_BT = arrays(config), tokens(config)

    def saved_bytes(checkpoint_activations: bool) -> int:
        """What the backward function of the hidden states holds, the parameters aside."""

        def residuals(params: Any) -> Any:
            hidden = partial(gpt_jax.hidden_states, checkpoint_activations=checkpoint_activations)
            return jax.vjp(lambda p: hidden(p, idx_BT, config), params)[1]

        held = jax.tree.leaves(jax.eval_shape(residuals, params))
        return sum(x.size * x.dtype.itemsize for x in held) - sum(p.nbytes for p in params.values())

    assert 0 < saved_bytes(True) < 0.5 * saved_bytes(False)


def test_the_loss_does_not_depend_on_the_chunks() -> None:
    known = twin(SMALL)
    for rows in (None, 1000):
        loss = jax.jit(partial(gpt_jax.loss, config=SMALL, loss_chunk_rows=rows))
        assert_same(loss(known.weights, known.idx, known.targets), known.loss, sums=40)


def test_a_loss_in_chunks_takes_less_memory() -> None:
    config = GPTConfig(vocab_size=2048, layers=1, d_model=16, heads=1, seq_len=64, hidden=16)
    weights, idx_BT = arrays(config), jnp.zeros((8, 64), jnp.int32)

    def temporaries(rows: int | None) -> int:
        step = jax.jit(jax.grad(partial(gpt_jax.loss, config=config, loss_chunk_rows=rows)))
        return int(step.lower(weights, idx_BT, idx_BT).compile(FAST).memory_analysis().temp_size_in_bytes)

    assert temporaries(64) < 0.5 * temporaries(None)  # an eighth of the 512 rows at one time


def products(jaxpr: Any, outer: str = "") -> Iterator[str]:
    """The scopes of all matrix products, those of inner functions too."""
    for equation in jaxpr.eqns:
        scope = "/".join(filter(None, (outer, str(equation.source_info.name_stack))))
        if equation.primitive.name == "dot_general":
            yield scope
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner, scope)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_each_product_lies_in_a_scope_that_is_its_whole_path(checkpoint_activations: bool) -> None:
    forward = partial(gpt_jax.forward, config=SMALL, checkpoint_activations=checkpoint_activations)
    jaxpr = jax.make_jaxpr(forward)(arrays(SMALL), tokens(SMALL))
    expected = [
        f"blocks.{i}.{path}"
        for i in range(2)
        for path in ("attn.qkv", "attn", "attn", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
    ]
    # JAX's own functions open scopes within: attention names its einsums.
    found = [scope.removeprefix("checkpoint/").split("/")[0] for scope in products(jaxpr.jaxpr)]
    assert found == [*expected, "head"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_in_the_model_fixes_a_dtype(dtype: Any) -> None:
    params = {name: array.astype(dtype) for name, array in arrays(SMALL).items()}
    idx_BT = tokens(SMALL)
    assert jax.eval_shape(partial(gpt_jax.forward, config=SMALL), params, idx_BT).dtype == dtype
    loss = jax.eval_shape(partial(gpt_jax.loss, config=SMALL), params, idx_BT, idx_BT)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


def test_the_residual_stream_stays_wide_where_branches_are_narrow() -> None:
    narrow = ("out.weight", "down.weight")
    params = {
        name: array.astype(jnp.bfloat16) if name.endswith(narrow) else array for name, array in arrays(SMALL).items()
    }
    assert jax.eval_shape(partial(gpt_jax.hidden_states, config=SMALL), params, tokens(SMALL)).dtype == jnp.float32


def test_context_beyond_seq_len_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        gpt_jax.forward(arrays(SMALL), tokens(SMALL, 25), SMALL)
    assert str(caught.value) == (
        "a context of 25 positions is longer than the model's seq_len = 24; "
        "give at most 24 tokens here, or build the model with a longer seq_len"
    )


def test_loss_chunk_rows_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^loss_chunk_rows must be at least 1, or None for all at once, not 0$"):
        gpt_jax.loss(arrays(SMALL), tokens(SMALL), tokens(SMALL), SMALL, loss_chunk_rows=0)


def test_a_padded_context_gives_the_greedy_text_of_torch_with_one_compilation() -> None:
    import torch

    from mezzo.models import sampling
    from mezzo.models.gpt_torch import GPT

    config = replace(SMALL, layers=1, seq_len=8)
    weights = twin(config).weights
    model = GPT(config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})

    @jax.jit
    def logits_of(idx_BT: Any, last: Any) -> jax.Array:
        return gpt_jax.head(weights, gpt_jax.hidden_states(weights, idx_BT, config)[0, last], config)

    found = list(generate(logits_of, [1, 2], config, max_new_tokens=12, temperature=0))
    assert found == list(sampling.generate(model, [1, 2], max_new_tokens=12, temperature=0))
    assert logits_of._cache_size() == 1
    assert np.unique(found).size > 2
