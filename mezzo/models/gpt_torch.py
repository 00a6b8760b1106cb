"""A GPT in plain PyTorch: read it from top to bottom.

It knows nothing of precision. Formats come from outside: `mezzo.torch.Precision`, `torch.autocast`, `.to(dtype)`. So
nothing here fixes a dtype, and a branch may come back in 16 bits: the residual sum promotes it.

The paths of its modules are the paths of its sites, the same in every framework (mezzo.models.shapes.parameter_shapes).

Shape suffixes
    B  batch               D  width of the residual stream     F  hidden width of the feed-forward part
    T  positions given     S  positions attended to            V  vocabulary
    H  query heads         G  key and value heads              K  width of a head; k half of it
    R  rows of a chunk of positions (batch and time together)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mezzo.errors import ConfigError
from mezzo.models.shapes import GPTConfig

NO_TARGET = -100  # a target with this value has no loss (torch's own ignore_index)


def rope_table(first: int, count: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which RoPE turns `count` positions from `first` on.

    Made anew in each forward pass, some 100 µs: a buffer would be rounded by `model.to(torch.bfloat16)`, and bfloat16
    does not hold every position above 256.

    like      the tensor whose device is used, and whose dtype if that is wider than float32
    returns   (cos, cos) and (-sin, sin) side by side, each (T, 1, K), float32 or wider
    source    Su et al. 2021, arXiv 2104.09864, equation 34; the pairs are (i, i + K/2), as in GPT-NeoX and Llama
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    pair_k = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype)
    position_T = torch.arange(first, first + count, device=like.device, dtype=dtype)
    angle_T1k = position_T[:, None, None] * theta ** (-pair_k / head_dim)
    cos_T1k, sin_T1k = angle_T1k.cos(), angle_T1k.sin()
    return torch.cat((cos_T1k, cos_T1k), dim=-1), torch.cat((-sin_T1k, sin_T1k), dim=-1)


def rotate(x_BTHK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Turn each pair of x by its position's angle: (a, b) → (a cos - b sin, b cos + a sin).

    x         (B, T, H, K)
    returns   array like x, in the table's dtype
    """
    x_BTHK = x_BTHK.to(cos_T1K.dtype)
    a_BTHk, b_BTHk = x_BTHK.chunk(2, dim=-1)
    return torch.addcmul(x_BTHK * cos_T1K, torch.cat((b_BTHk, a_BTHk), dim=-1), sin_T1K)


class KVCache:
    """The keys and values of the positions read so far, layer by layer.

    Room for `config.seq_len` positions is taken at the first use, in the dtype that the keys then have.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        self.length = 0  # positions held
        self._store: list[tuple[Tensor, Tensor] | None] = [None] * config.layers

    def extend(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values behind those that a layer has; return all of them, (B, S, G, K)."""
        batch, count = k_BTGK.shape[:2]
        store = self._store[layer]
        if store is None:
            room = (batch, self.config.seq_len, *k_BTGK.shape[2:])
            store = self._store[layer] = (k_BTGK.new_empty(room), v_BTGK.new_empty(room))
        end = self.length + count
        for all_BSGK, new_BTGK in zip(store, (k_BTGK, v_BTGK), strict=True):
            all_BSGK[:, self.length : end] = new_BTGK
        return store[0][:, :end], store[1][:, :end]

    def advance(self, count: int) -> None:
        """Count `count` positions as read, after every layer has extended."""
        self.length += count


def make_norm(config: GPTConfig, width: int) -> nn.RMSNorm | nn.LayerNorm:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Causal attention: grouped queries, one fused projection in, one out."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.heads, config.key_heads, config.head_dim
        self.qkv = nn.Linear(config.d_model, config.qkv_width, bias=config.bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, kv_cache: KVCache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        qkv_BTXK = self.qkv(x_BTD).view(B, T, -1, self.head_dim)  # not unflatten: Dynamo breaks the graph there
        # split, not slices: its backward is one concatenation
        q_BTHK, k_BTGK, v_BTGK = qkv_BTXK.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            wide = self.q_norm.weight.dtype  # torch has no fused norm of a 16-bit input with a float32 weight
            q_BTHK, k_BTGK = self.q_norm(q_BTHK.to(wide)), self.k_norm(k_BTGK.to(wide))
        if rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *rope), rotate(k_BTGK, *rope)
        # Normalised and turned in float32; attention takes the three in the one format that the projection gave them.
        q_BTHK, k_BTGK = q_BTHK.to(v_BTGK.dtype), k_BTGK.to(v_BTGK.dtype)

        past = 0
        if kv_cache is not None:
            past = kv_cache.length
            k_BTGK, v_BTGK = kv_cache.extend(self.layer, k_BTGK, v_BTGK)
        if self.kv_heads < self.heads:
            # Written out: the CPU flash kernel wants as many key heads as query heads.
            k_BTGK = k_BTGK.repeat_interleave(self.heads // self.kv_heads, dim=2)
            v_BTGK = v_BTGK.repeat_interleave(self.heads // self.kv_heads, dim=2)

        count = q_BTHK.shape[1]
        mask_TS = None
        if past and count > 1:
            # Position t is at past + t and sees every key up to itself.
            mask_TS = torch.ones(count, past + count, dtype=torch.bool, device=x_BTD.device).tril(past)
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2),
            attn_mask=mask_TS, is_causal=past == 0 and count > 1,
        )  # fmt: skip
        return self.out(y_BHTK.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """The feed-forward part: SwiGLU or GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, hidden, bias = config.d_model, config.mlp_hidden, config.bias
        self.gate = nn.Linear(width, hidden, bias=bias) if config.mlp == "swiglu" else None
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate is not None:
            h_BTF = F.silu(self.gate(x_BTD)) * self.up(x_BTD)
        else:
            h_BTF = F.gelu(self.up(x_BTD), approximate="tanh")
        return self.down(h_BTF)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = make_norm(config, config.d_model)
        self.attn = Attention(config, layer)
        self.norm2 = make_norm(config, config.d_model)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, kv_cache: KVCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD), rope, kv_cache)
        return x_BTD + self.mlp(self.norm2(x_BTD))  # type: ignore[no-any-return]


class TiedHead(nn.Module):
    """The head that multiplies by the embedding's weight; a module, so that this product has the path `head`."""

    def forward(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(x_BTD, weight_VD)


class GPT(nn.Module):
    """A decoder-only transformer.

    config                   its sizes
    generator                source of the initial weights; torch's global one by default
    loss_chunk_rows          positions whose logits exist at one time while the loss is computed; None: all of them
    checkpoint_activations   keep only the input of each block and compute the rest again in the backward pass: about a
                             third more time for far less memory, the same gradients to the bit
    raises                   ConfigError if loss_chunk_rows is below 1
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        generator: torch.Generator | None = None,
        loss_chunk_rows: int | None = 1024,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if loss_chunk_rows is not None and loss_chunk_rows < 1:
            raise ConfigError(f"loss_chunk_rows must be at least 1, or None for all at once, not {loss_chunk_rows}")
        self.config = config
        self.loss_chunk_rows = loss_chunk_rows
        self.checkpoint_activations = checkpoint_activations
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.pos = nn.Embedding(config.seq_len, config.d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = make_norm(config, config.d_model)
        self.head = TiedHead() if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialize(generator)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew, as GPT-2 does.

        Matrices and embeddings from N(0, 0.02²); what adds to the residual stream (attn.out, mlp.down) a factor
        1/sqrt(2 · layers) smaller, so that the stream's variance does not grow with depth; norms 1, biases 0. Drawn on
        the generator's device and then copied, so that a seed gives the same weights on every device.

        source   Radford et al. 2019, section 2.3
        """
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
                device = generator.device if generator is not None else parameter.device
                parameter.copy_(torch.empty(parameter.shape, device=device).normal_(0.0, std, generator=generator))

    def forward(
        self,
        idx_BT: Tensor,
        targets_BT: Tensor | None = None,
        kv_cache: KVCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token at each position, or their mean cross-entropy against the targets.

        idx_BT       (B, T) int64 token ids; T at most seq_len, the cache's positions included
        targets_BT   (B, T) int64, -100 where there is no target; given: returns the loss
        kv_cache     positions already read; these T are added behind them
        last_only    logits of the last position alone, (B, 1, V)
        returns      (B, T, V) logits, or the loss, a scalar
        raises       ConfigError if the context is longer than seq_len, or targets and a cache are given together
        """
        count = idx_BT.shape[1]
        past = kv_cache.length if kv_cache is not None else 0
        if past + count > self.config.seq_len:
            raise ConfigError(
                f"a context of {past + count} positions is longer than the model's seq_len = {self.config.seq_len}; "
                f"give at most {self.config.seq_len - past} tokens here, or build the model with a longer seq_len"
            )
        if targets_BT is not None and kv_cache is not None:
            raise ConfigError("targets_BT and kv_cache were both given; a loss needs no cache: leave one of them out")

        x_BTD = self.embed(idx_BT)
        rope = None
        if self.pos is not None:
            x_BTD = x_BTD + self.pos(torch.arange(past, past + count, device=idx_BT.device))
        else:
            rope = rope_table(past, count, self.config.head_dim, self.config.rope_theta, like=x_BTD)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled() and kv_cache is None:
                # A block draws no random numbers: there is no generator state to restore.
                x_BTD = checkpoint(block, x_BTD, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = block(x_BTD, rope, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(count)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        h_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return self.logits(h_BTD)
        return self.loss(h_BTD, targets_BT)

    def logits(self, h_XD: Tensor) -> Tensor:
        """The head's product, for hidden states of any leading shape."""
        if self.config.tied:
            return self.head(h_XD, self.embed.weight)  # type: ignore[no-any-return]
        return self.head(h_XD)  # type: ignore[no-any-return]

    def loss(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy of the positions that have a target, computed a chunk of rows at a time.

        A chunk's logits, their gradient and the loss's own copies are short-lived; only log-probabilities are kept for
        the backward pass. Two AVX2 cores, 4096 rows, vocabulary 4096, forward and backward: 344 ms in one piece, 243 ms
        in chunks of 1024 rows. (Computing the logits again in the backward pass took 348 ms: not done.)
        """
        h_ND, target_N = h_BTD.flatten(0, 1), targets_BT.flatten()
        rows = self.loss_chunk_rows or len(h_ND)
        losses = [
            F.cross_entropy(self.logits(h_RD), target_R, ignore_index=NO_TARGET, reduction="sum")
            for h_RD, target_R in zip(torch.split(h_ND, rows), torch.split(target_N, rows), strict=True)
        ]
        return torch.stack(losses).sum() / (target_N != NO_TARGET).sum()
