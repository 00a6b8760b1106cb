"""The same GPT in plain Keras 3: layers of `keras.layers` and operations of `keras.ops`. Read it from top to bottom.

It knows nothing of precision: nothing here fixes a dtype, and a branch may come back in 16 bits: the residual sum
promotes it (`ops.add` does; TensorFlow's own `+` refuses two dtypes).

Layers are named so that the nested names joined by "." are torch's module paths: "blocks.0" contains "attn" contains
"qkv". Kernels are (inputs, outputs), Keras' own layout; `load_parameters` and `read_parameters` transpose them, and
nothing else does.

Shape suffixes
    B  batch               D  width of the residual stream     F  hidden width of the feed-forward part
    T  positions           V  vocabulary                       X  any leading axes
    H  query heads         G  key and value heads              K  width of a head; k half of it
    N  positions of the whole batch
"""

# Keras has no types:
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from mezzo.errors import ConfigError
from mezzo.models.initial import initial_parameters
from mezzo.models.shapes import GPTConfig, check_context, check_loss_chunk_rows, parameter_shapes

NO_TARGET = -100  # a target with this value has no loss, as in torch

Tensor = Any  # of whichever backend Keras runs on


def rope_table(count: int | Tensor, config: GPTConfig, dtype: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which RoPE turns the first `count` positions.

    dtype     used if it is wider than float32: bfloat16 does not hold every position above 256
    returns   two tensors (T, 1, k), float32 or wider
    source    Su et al. 2021, arXiv 2104.09864, equation 34; the pairs are (i, i + K/2), as in GPT-NeoX and Llama
    """
    dtype = keras.backend.result_type(dtype, "float32")
    pair_k = ops.arange(0, config.head_dim, 2, dtype=dtype)
    position_T = ops.arange(count, dtype=dtype)
    angle_T1k = position_T[:, None, None] * ops.power(config.rope_theta, -pair_k / config.head_dim)
    return ops.cos(angle_T1k), ops.sin(angle_T1k)


def rotate(x_BTHK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of x by its position's angle: (a, b) → (a cos - b sin, b cos + a sin); in the table's dtype."""
    cos_T1k, sin_T1k = rope
    a_BTHk, b_BTHk = ops.split(ops.cast(x_BTHK, cos_T1k.dtype), 2, axis=-1)
    return ops.concatenate((a_BTHk * cos_T1k - b_BTHk * sin_T1k, b_BTHk * cos_T1k + a_BTHk * sin_T1k), axis=-1)


def linear(config: GPTConfig, name: str, outputs: int) -> layers.Dense:
    return layers.Dense(outputs, use_bias=config.bias, name=name)


def make_norm(config: GPTConfig, name: str) -> layers.RMSNormalization | layers.LayerNormalization:
    if config.norm == "rmsnorm":
        return layers.RMSNormalization(epsilon=config.norm_eps, name=name)
    return layers.LayerNormalization(epsilon=config.norm_eps, center=config.bias, name=name)


class Attention(layers.Layer):
    """Causal attention: grouped queries, one fused projection in, one out."""

    def __init__(self, config: GPTConfig, **options: Any) -> None:
        super().__init__(**options)
        self.config = config
        self.qkv = linear(config, "qkv", config.qkv_width)
        self.q_norm = make_norm(config, "q_norm") if config.qk_norm else None
        self.k_norm = make_norm(config, "k_norm") if config.qk_norm else None
        self.out = linear(config, "out", config.d_model)

    def call(self, x_BTD: Tensor) -> Tensor:
        c = self.config
        B, T = ops.shape(x_BTD)[:2]
        qkv_BTXK = ops.reshape(self.qkv(x_BTD), (B, T, c.heads + 2 * c.key_heads, c.head_dim))
        q_BTHK, k_BTGK, v_BTGK = ops.split(qkv_BTXK, (c.heads, c.heads + c.key_heads), axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if c.positions == "rope":
            rope = rope_table(T, c, keras.backend.standardize_dtype(x_BTD.dtype))
            q_BTHK, k_BTGK = rotate(q_BTHK, rope), rotate(k_BTGK, rope)
        # Normalised and turned in float32; attention takes the three in the one format that the projection gave them.
        q_BTHK, k_BTGK = ops.cast(q_BTHK, v_BTGK.dtype), ops.cast(k_BTGK, v_BTGK.dtype)
        if c.key_heads < c.heads:
            k_BTGK = ops.repeat(k_BTGK, c.heads // c.key_heads, axis=2)
            v_BTGK = ops.repeat(v_BTGK, c.heads // c.key_heads, axis=2)
        y_BTHK = ops.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True)
        return self.out(ops.reshape(y_BTHK, (B, T, c.d_model)))


class MLP(layers.Layer):
    """The feed-forward part: SwiGLU or GELU."""

    def __init__(self, config: GPTConfig, **options: Any) -> None:
        super().__init__(**options)
        self.gate = linear(config, "gate", config.mlp_hidden) if config.mlp == "swiglu" else None
        self.up = linear(config, "up", config.mlp_hidden)
        self.down = linear(config, "down", config.d_model)

    def call(self, x_BTD: Tensor) -> Tensor:
        if self.gate is not None:
            h_BTF = ops.multiply(ops.silu(self.gate(x_BTD)), self.up(x_BTD))
        else:
            h_BTF = ops.gelu(self.up(x_BTD), approximate=True)
        return self.down(h_BTF)


class Block(layers.Layer):
    def __init__(self, config: GPTConfig, **options: Any) -> None:
        super().__init__(**options)
        self.norm1 = make_norm(config, "norm1")
        self.attn = Attention(config, name="attn")
        self.norm2 = make_norm(config, "norm2")
        self.mlp = MLP(config, name="mlp")

    def call(self, x_BTD: Tensor) -> Tensor:
        x_BTD = ops.add(x_BTD, self.attn(self.norm1(x_BTD)))
        return ops.add(x_BTD, self.mlp(self.norm2(x_BTD)))


class TiedHead(layers.Layer):
    """The head that multiplies by the embedding's weight; a layer, so that this product has the path `head`."""

    def call(self, h_XD: Tensor, weight_VD: Tensor) -> Tensor:
        return ops.matmul(h_XD, ops.transpose(weight_VD))


@keras.saving.register_keras_serializable(package="mezzo")
class GPT(keras.Model):
    """A decoder-only transformer.

    config                   its sizes
    seed                     of mezzo.models.initial.initial_parameters, from which it starts
    loss_chunk_rows          positions whose logits are made at one time for the loss; None: all of them
    checkpoint_activations   keep only the input of each block and compute the rest again in the backward pass
    raises                   ConfigError if loss_chunk_rows is below 1
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        seed: int = 0,
        loss_chunk_rows: int | None = 1024,
        checkpoint_activations: bool = False,
        name: str = "gpt",
    ) -> None:
        super().__init__(name=name)
        check_loss_chunk_rows(loss_chunk_rows)
        self.config = config
        self.loss_chunk_rows = loss_chunk_rows
        self.checkpoint_activations = checkpoint_activations
        self.embed = layers.Embedding(config.vocab_size, config.d_model, name="embed")
        self.pos = None
        if config.positions == "learned":
            self.pos = layers.Embedding(config.seq_len, config.d_model, name="pos")
        self.blocks = [Block(config, name=f"blocks.{i}") for i in range(config.layers)]
        self.norm = make_norm(config, "norm")
        if config.tied:
            self.head = TiedHead(name="head")
        else:
            self.head = layers.Dense(config.vocab_size, use_bias=False, name="head")
        self(ops.zeros((1, 1), dtype="int32"))  # builds every layer: the weights exist from here on
        load_parameters(self, initial_parameters(config, seed))

    def call(self, idx_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits of the next token at each position, (B, T, V); or, with targets, what `mean_loss` says.

        idx_BT    (B, T) token ids; T at most seq_len
        raises    ConfigError if the context is longer than seq_len; not in a graph that leaves T open
        """
        count = ops.shape(idx_BT)[1]
        if isinstance(count, int):
            check_context(self.config, count)
        x_BTD = self.embed(idx_BT)
        if self.pos is not None:
            x_BTD = ops.add(x_BTD, self.pos(ops.arange(count)))
        for block in self.blocks:
            x_BTD = (keras.remat(block) if self.checkpoint_activations else block)(x_BTD)
        h_BTD = self.norm(x_BTD)
        return self.logits(h_BTD) if targets_BT is None else self._mean_loss(h_BTD, targets_BT)

    def logits(self, h_XD: Tensor) -> Tensor:
        """The head's product, for hidden states of any leading shape."""
        return self.head(h_XD, self.embed.embeddings) if self.config.tied else self.head(h_XD)

    def mean_loss(self, idx_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy of the positions that have a target, computed a chunk of rows at a time.

        targets_BT   (B, T) token ids, -100 where there is no target
        returns      a scalar; NaN if no position has a target, as in torch
        raises       ConfigError as `call`, or if B or T is open in a graph and loss_chunk_rows is not None
        """
        return self(idx_BT, targets_BT)

    def _mean_loss(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        h_ND, target_N = ops.reshape(h_BTD, (-1, self.config.d_model)), ops.reshape(targets_BT, (-1,))
        count = h_ND.shape[0]
        rows = self.loss_chunk_rows or count
        if rows is None:
            losses = [self._loss_sum(h_ND, target_N)]
        elif count is None:
            raise ConfigError(
                "the loss in chunks of rows needs a known number of positions; give tf.function fixed shapes "
                "(and batches without a short last one), or build the model with loss_chunk_rows=None"
            )
        else:
            losses = [self._loss_sum(h_ND[i : i + rows], target_N[i : i + rows]) for i in range(0, count, rows)]
        total = ops.sum(ops.stack(losses))
        return total / ops.cast(ops.sum(ops.not_equal(target_N, NO_TARGET)), total.dtype)

    def _loss_sum(self, h_XD: Tensor, target_X: Tensor) -> Tensor:
        """Sum of -log softmax(logits)[target] over the rows that have a target; in float32 or wider."""
        logits_XV = self.logits(h_XD)
        logits_XV = ops.cast(logits_XV, keras.backend.result_type(logits_XV.dtype, "float32"))
        has_target_X = ops.not_equal(target_X, NO_TARGET)
        column_X = ops.where(has_target_X, target_X, 0)
        losses_X = ops.sparse_categorical_crossentropy(column_X, logits_XV, from_logits=True)
        return ops.sum(ops.where(has_target_X, losses_X, 0.0))

    def get_config(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "name": self.name,
            "loss_chunk_rows": self.loss_chunk_rows,
            "checkpoint_activations": self.checkpoint_activations,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GPT:
        return cls(**config | {"config": GPTConfig(**config["config"])})


def parameters(model: GPT) -> dict[str, keras.Variable]:
    """The model's trainable variables by torch's names, in the order of mezzo.models.shapes.parameter_shapes."""
    names = {"kernel": "weight", "embeddings": "weight", "scale": "weight", "gamma": "weight", "beta": "bias"}
    found = {}
    for variable in model.trainable_variables:
        *path, last = variable.path.partition(f"{model.name}/")[2].split("/")
        found[".".join((*path, names.get(last, last)))] = variable
    return {name: found[name] for name in parameter_shapes(model.config)}


def load_parameters(model: GPT, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Set every parameter.

    arrays   by torch's names and in torch's layouts
    raises   ConfigError, before anything is set, if names or shapes are not those of the model
    """
    shapes = parameter_shapes(model.config)
    wrong = [f"{name} is missing" for name in shapes if name not in arrays]
    wrong += [f"{name} is not a parameter of the model" for name in arrays if name not in shapes]
    wrong += [
        f"{name} is {tuple(np.shape(arrays[name]))}, the model's {shape}"
        for name, shape in shapes.items()
        if name in arrays and np.shape(arrays[name]) != shape
    ]
    if wrong:
        raise ConfigError(f"these arrays do not fit the model: {'; '.join(wrong)}")
    for name, variable in parameters(model).items():
        variable.assign(arrays[name].T if _is_kernel(variable) else arrays[name])


def read_parameters(model: GPT) -> dict[str, NDArray[Any]]:
    """Every parameter by torch's name and in torch's layout; copies."""
    return {
        name: np.array(array.T if _is_kernel(variable) else array, order="C")
        for name, variable in parameters(model).items()
        for array in (ops.convert_to_numpy(variable),)
    }


def _is_kernel(variable: keras.Variable) -> bool:
    """Dense's (inputs, outputs); torch has (outputs, inputs)."""
    return bool(variable.name == "kernel")
