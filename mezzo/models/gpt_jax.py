"""The same GPT in plain JAX: pure functions of a dictionary of parameters. Read it from top to bottom.

The dictionary's keys and its arrays' layouts are those of mezzo.models.shapes.parameter_shapes, hence torch's: a
Linear's weight is (outputs, inputs), and a checkpoint crosses without a transposition.

It knows nothing of precision: nothing here fixes a dtype, and a branch may come back in 16 bits: the residual sum
promotes it. The work of each layer lies in a `jax.named_scope` that is its whole module path. These scopes are not
nested in one another: the first name in an operation's scope is its site's path.

Shape suffixes
    B  batch               D  width of the residual stream     F  hidden width of the feed-forward part
    T  positions           V  vocabulary                       X  any leading axes
    H  query heads         G  key and value heads              K  width of a head; k half of it
    N  positions of the whole batch                            R  rows of a chunk of them
    C  chunks
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from mezzo.models.shapes import GPTConfig, check_context, check_loss_chunk_rows

NO_TARGET = -100  # a target with this value has no loss, as in torch

Params = Mapping[str, Array]
Rope = tuple[Array, Array]


def linear(params: Params, path: str, x_XD: Array) -> Array:
    """x W^T + b; the bias where there is one."""
    with jax.named_scope(path):
        y_XF = x_XD @ params[f"{path}.weight"].T
        bias_F = params.get(f"{path}.bias")
        return y_XF if bias_F is None else y_XF + bias_F


def norm(params: Params, path: str, x_XD: Array, config: GPTConfig) -> Array:
    """RMSNorm or LayerNorm over the last axis; the statistics in float32 or wider."""
    with jax.named_scope(path):
        weight_D, bias_D = params[f"{path}.weight"], params.get(f"{path}.bias")
        wide_XD = x_XD.astype(jnp.promote_types(x_XD.dtype, jnp.float32))
        if config.norm == "layernorm":
            wide_XD = wide_XD - wide_XD.mean(-1, keepdims=True)
        wide_XD = wide_XD * jax.lax.rsqrt(jnp.square(wide_XD).mean(-1, keepdims=True) + config.norm_eps)
        y_XD = wide_XD * weight_D if bias_D is None else wide_XD * weight_D + bias_D
        return y_XD.astype(jnp.promote_types(x_XD.dtype, weight_D.dtype))


def rope_table(count: int, config: GPTConfig, dtype: jnp.dtype) -> Rope:
    """Cosine and sine of the angles by which RoPE turns the first `count` positions.

    dtype     used if it is wider than float32: bfloat16 does not hold every position above 256
    returns   two arrays (T, 1, k), float32 or wider
    source    Su et al. 2021, arXiv 2104.09864, equation 34; the pairs are (i, i + K/2), as in GPT-NeoX and Llama
    """
    dtype = jnp.promote_types(dtype, jnp.float32)
    pair_k = jnp.arange(0, config.head_dim, 2, dtype=dtype)
    position_T = jnp.arange(count, dtype=dtype)
    angle_T1k = position_T[:, None, None] * config.rope_theta ** (-pair_k / config.head_dim)
    return jnp.cos(angle_T1k), jnp.sin(angle_T1k)


def rotate(x_BTHK: Array, rope: Rope) -> Array:
    """Turn each pair of x by its position's angle: (a, b) → (a cos - b sin, b cos + a sin); in the table's dtype."""
    cos_T1k, sin_T1k = rope
    a_BTHk, b_BTHk = jnp.split(x_BTHK.astype(cos_T1k.dtype), 2, axis=-1)
    return jnp.concatenate((a_BTHk * cos_T1k - b_BTHk * sin_T1k, b_BTHk * cos_T1k + a_BTHk * sin_T1k), axis=-1)


def attention(params: Params, path: str, x_BTD: Array, rope: Rope | None, config: GPTConfig) -> Array:
    """Causal attention: grouped queries, one fused projection in, one out."""
    qkv_BTD = linear(params, f"{path}.qkv", x_BTD)
    qkv_BTXK = qkv_BTD.reshape(*x_BTD.shape[:2], -1, config.head_dim)
    q_BTHK, k_BTGK, v_BTGK = jnp.split(qkv_BTXK, (config.heads, config.heads + config.key_heads), axis=2)
    if config.qk_norm:
        q_BTHK = norm(params, f"{path}.q_norm", q_BTHK, config)
        k_BTGK = norm(params, f"{path}.k_norm", k_BTGK, config)
    with jax.named_scope(path):
        if rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rope), rotate(k_BTGK, rope)
        # Normalised and turned in float32; attention takes the three in the one format that the projection gave them.
        q_BTHK, k_BTGK = q_BTHK.astype(v_BTGK.dtype), k_BTGK.astype(v_BTGK.dtype)
        y_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True)
    return linear(params, f"{path}.out", y_BTHK.reshape(x_BTD.shape))


def mlp(params: Params, path: str, x_BTD: Array, config: GPTConfig) -> Array:
    """The feed-forward part: SwiGLU or GELU."""
    if config.mlp == "swiglu":
        gate_BTF, up_BTF = linear(params, f"{path}.gate", x_BTD), linear(params, f"{path}.up", x_BTD)
        with jax.named_scope(path):
            h_BTF = jax.nn.silu(gate_BTF) * up_BTF
    else:
        up_BTF = linear(params, f"{path}.up", x_BTD)
        with jax.named_scope(path):
            h_BTF = jax.nn.gelu(up_BTF, approximate=True)
    return linear(params, f"{path}.down", h_BTF)


def block(params: Params, x_BTD: Array, rope: Rope | None, *, path: str, config: GPTConfig) -> Array:
    x_BTD = x_BTD + attention(params, f"{path}.attn", norm(params, f"{path}.norm1", x_BTD, config), rope, config)
    return x_BTD + mlp(params, f"{path}.mlp", norm(params, f"{path}.norm2", x_BTD, config), config)


def hidden_states(params: Params, idx_BT: Array, config: GPTConfig, *, checkpoint_activations: bool = False) -> Array:
    """What the head reads at each position, (B, T, D); arguments and errors as those of `forward`."""
    count = idx_BT.shape[1]
    check_context(config, count)
    with jax.named_scope("embed"):
        x_BTD = jnp.take(params["embed.weight"], idx_BT, axis=0)  # NaN for an id beyond the vocabulary
    rope = None
    if config.positions == "learned":
        with jax.named_scope("pos"):
            x_BTD = x_BTD + params["pos.weight"][:count]
    else:
        rope = rope_table(count, config, x_BTD.dtype)
    for i in range(config.layers):  # unrolled, not scanned: each layer has sites of its own
        layer = partial(block, path=f"blocks.{i}", config=config)
        x_BTD = (jax.checkpoint(layer) if checkpoint_activations else layer)(params, x_BTD, rope)
    return norm(params, "norm", x_BTD, config)


def head(params: Params, h_XD: Array, config: GPTConfig) -> Array:
    """Logits of hidden states of any leading shape; a tied head multiplies by the embedding's weight."""
    with jax.named_scope("head"):
        return h_XD @ params["embed.weight" if config.tied else "head.weight"].T


def forward(params: Params, idx_BT: Array, config: GPTConfig, *, checkpoint_activations: bool = False) -> Array:
    """Logits of the next token at each position.

    params                   arrays by the names of mezzo.models.shapes.parameter_shapes
    idx_BT                   (B, T) token ids; T at most seq_len
    config                   static under jax.jit; it can be hashed
    checkpoint_activations   keep only the input of each block and compute the rest again in the backward pass
    returns                  (B, T, V)
    raises                   ConfigError if the context is longer than seq_len
    """
    return head(params, hidden_states(params, idx_BT, config, checkpoint_activations=checkpoint_activations), config)


def loss(
    params: Params,
    idx_BT: Array,
    targets_BT: Array,
    config: GPTConfig,
    *,
    loss_chunk_rows: int | None = 1024,
    checkpoint_activations: bool = False,
) -> Array:
    """Mean cross-entropy of the positions that have a target, computed a chunk of rows at a time.

    A loop, whose logits are computed again in the backward pass: XLA keeps the logits of chunks that are unrolled, in
    whatever order they are written. Temporaries of forward and backward, 4096 rows, vocabulary 8192, on the CPU:
    159 MiB in chunks of 1024 rows, 348 MiB in one piece, 348 MiB unrolled.

    targets_BT        (B, T) token ids, -100 where there is no target
    loss_chunk_rows   positions in a chunk; None: all in one
    returns           a scalar; NaN if no position has a target, as in torch
    raises            ConfigError as `forward`, or if loss_chunk_rows is below 1
    """
    check_loss_chunk_rows(loss_chunk_rows)
    h_BTD = hidden_states(params, idx_BT, config, checkpoint_activations=checkpoint_activations)
    h_ND, target_N = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1)

    def loss_sum(chunk: tuple[Array, Array]) -> Array:
        h_RD, target_R = chunk
        return cross_entropy_sum(head(params, h_RD, config), target_R)

    count, rows = len(h_ND), loss_chunk_rows or len(h_ND)
    if count <= rows:
        total = loss_sum((h_ND, target_N))
    else:
        padding = -count % rows  # rows without a target
        h_CRD = jnp.pad(h_ND, ((0, padding), (0, 0))).reshape(-1, rows, h_ND.shape[-1])
        target_CR = jnp.pad(target_N, (0, padding), constant_values=NO_TARGET).reshape(-1, rows)
        total = jax.lax.map(jax.checkpoint(loss_sum), (h_CRD, target_CR)).sum()
    return total / (target_N != NO_TARGET).sum()


def cross_entropy_sum(logits_RV: Array, target_R: Array) -> Array:
    """Sum of -log softmax(logits)[target] over the rows that have a target; in float32 or wider."""
    logits_RV = logits_RV.astype(jnp.promote_types(logits_RV.dtype, jnp.float32))
    has_target_R = target_R != NO_TARGET
    column_R1 = jnp.where(has_target_R, target_R, 0)[:, None]
    picked_R = jnp.take_along_axis(logits_RV, column_R1, axis=-1)[:, 0]
    return jnp.where(has_target_R, jax.nn.logsumexp(logits_RV, axis=-1) - picked_R, 0).sum()
