"""A GPT's sizes: its configuration, the names and shapes of its parameters, and what they cost.

No framework is imported here: the PyTorch, JAX and TensorFlow versions of the model share this one table of names, so
that a checkpoint or a site table made under one of them serves under the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from mezzo.errors import ConfigError

Norm = Literal["rmsnorm", "layernorm"]
Positions = Literal["rope", "learned"]
MLPKind = Literal["swiglu", "gelu"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "positions": get_args(Positions),
    "mlp": get_args(MLPKind),
}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The sizes and the choices of a decoder-only transformer.

    vocab_size   rows of the embedding and outputs of the head; see padded_vocab
    layers       blocks
    d_model      width of the residual stream
    heads        query heads; divides d_model
    kv_heads     key and value heads (grouped-query attention, arXiv 2305.13245); divides heads; None: as many as heads
    seq_len      the longest context
    mlp          "swiglu" (arXiv 2002.05202): down(silu(gate x) * up x); "gelu": down(gelu(up x)), tanh form as GPT-2
    mlp_ratio    hidden width of the feed-forward part over d_model, for two matrices; SwiGLU has three matrices, takes
                 two thirds of it and rounds up to a multiple of 64
    hidden       that hidden width itself; overrides mlp_ratio
    norm         "rmsnorm" (arXiv 1910.07467) or "layernorm"
    norm_eps     added to the mean square, or to the variance
    positions    "rope" (arXiv 2104.09864), or "learned": one embedding row for each position
    rope_theta   base of RoPE's wavelengths
    qk_norm      normalise queries and keys head by head (arXiv 2302.05442), which keeps attention's logits small
    bias         biases in every Linear but the head, and in LayerNorm
    tied         the head multiplies by the embedding's weight
    raises       ConfigError for a wrong type, a value out of range, or sizes that do not go together
    """

    vocab_size: int
    layers: int
    d_model: int
    heads: int
    kv_heads: int | None = None
    seq_len: int = 1024
    mlp: MLPKind = "swiglu"
    mlp_ratio: float = 4.0
    hidden: int | None = None
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    positions: Positions = "rope"
    rope_theta: float = 10000.0
    qk_norm: bool = False
    bias: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "d_model", "heads", "seq_len"):
            _check_count(name, getattr(self, name))
        for name in ("kv_heads", "hidden"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("mlp_ratio", "norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        for name in ("qk_norm", "bias", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

        if self.d_model % self.heads:
            raise ConfigError(
                f"heads = {self.heads} does not divide d_model = {self.d_model}; "
                f"choose heads from {_divisors(self.d_model)}, or a multiple of {self.heads} for d_model"
            )
        if self.heads % self.key_heads:
            raise ConfigError(
                f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; "
                f"choose kv_heads from {_divisors(self.heads)}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ConfigError(
                f'positions = "rope" turns pairs and needs an even head dimension, but d_model / heads = '
                f"{self.d_model} / {self.heads} = {self.head_dim}; change heads or d_model, "
                'or take positions = "learned"'
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def key_heads(self) -> int:
        """Key and value heads, also where kv_heads is None."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused projection: queries, then keys, then values."""
        return (self.heads + 2 * self.key_heads) * self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the feed-forward part."""
        if self.hidden is not None:
            return self.hidden
        width = self.mlp_ratio * self.d_model
        if self.mlp == "swiglu":
            return math.ceil(round(width * 2 / 3, 6) / 64) * 64
        return round(width)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a finite number above 0, not {value!r}")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


# GPT-2's choices: Radford et al. 2019 and the released code. Its vocabulary is 50257; train with padded_vocab(50257).
_GPT2 = GPTConfig(
    vocab_size=50257, layers=12, d_model=768, heads=12, seq_len=1024, mlp="gelu", norm="layernorm",
    positions="learned", bias=True, tied=True,
)  # fmt: skip

PRESETS: dict[str, GPTConfig] = {
    # Seconds on a laptop; for trying things out and for tests.
    "gpt-tiny": GPTConfig(vocab_size=512, layers=2, d_model=64, heads=2, seq_len=64),
    # The model of every quality claim, trained with batch 8: small enough for many seeds (numerics.md, "Proof").
    "gpt-proof": GPTConfig(vocab_size=4096, layers=2, d_model=128, heads=4, seq_len=128),
    "gpt2-124m": _GPT2,
    "gpt2-350m": replace(_GPT2, layers=24, d_model=1024, heads=16),
    "gpt2-1.5b": replace(_GPT2, layers=48, d_model=1600, heads=25),
}


def preset(name: str, **overrides: Any) -> GPTConfig:
    """The configuration called `name`, with some fields changed.

    name        one of PRESETS
    overrides   fields of GPTConfig
    returns     a new GPTConfig
    raises      ConfigError if there is no such preset or field, or the fields do not go together
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; presets: {', '.join(PRESETS)}")
    known = [field.name for field in fields(GPTConfig)]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"a GPT has no option {key!r}; options: {', '.join(known)}")
    return replace(PRESETS[name], **overrides)


def padded_vocab(vocab_size: int, multiple: int = 64) -> int:
    """`vocab_size` rounded up to a multiple: matrix products are faster on even tiles (nanoGPT: 50257 → 50304, +25%).

    The rows that this adds are never a target and never an input; `mezzo.models.sampling.generate(vocab_size=…)` never
    draws them.
    """
    _check_count("vocab_size", vocab_size)
    _check_count("multiple", multiple)
    return -(-vocab_size // multiple) * multiple


def check_context(config: GPTConfig, count: int) -> None:
    """Refuse a context longer than the model's.

    count    positions given
    raises   ConfigError if they are more than seq_len
    """
    if count > config.seq_len:
        raise ConfigError(
            f"a context of {count} positions is longer than the model's seq_len = {config.seq_len}; "
            f"give at most {config.seq_len} tokens here, or build the model with a longer seq_len"
        )


def check_loss_chunk_rows(rows: int | None) -> None:
    """Refuse chunks of the loss that hold no row: ConfigError."""
    if rows is not None and rows < 1:
        raise ConfigError(f"loss_chunk_rows must be at least 1, or None for all at once, not {rows}")


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the model; the same in every framework.

    A name is a site's path with `.weight` or `.bias` behind it. A Linear's weight is (outputs, inputs). A tied head has
    no parameter of its own.
    """
    c = config
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(path: str, inputs: int, outputs: int, bias: bool = c.bias) -> None:
        shapes[f"{path}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{path}.bias"] = (outputs,)

    def norm(path: str, width: int) -> None:
        shapes[f"{path}.weight"] = (width,)
        if c.norm == "layernorm" and c.bias:
            shapes[f"{path}.bias"] = (width,)

    shapes["embed.weight"] = (c.vocab_size, c.d_model)
    if c.positions == "learned":
        shapes["pos.weight"] = (c.seq_len, c.d_model)
    for i in range(c.layers):
        block = f"blocks.{i}"
        norm(f"{block}.norm1", c.d_model)
        linear(f"{block}.attn.qkv", c.d_model, c.qkv_width)
        if c.qk_norm:
            norm(f"{block}.attn.q_norm", c.head_dim)
            norm(f"{block}.attn.k_norm", c.head_dim)
        linear(f"{block}.attn.out", c.d_model, c.d_model)
        norm(f"{block}.norm2", c.d_model)
        if c.mlp == "swiglu":
            linear(f"{block}.mlp.gate", c.d_model, c.mlp_hidden)
        linear(f"{block}.mlp.up", c.d_model, c.mlp_hidden)
        linear(f"{block}.mlp.down", c.mlp_hidden, c.d_model)
    norm("norm", c.d_model)
    if not c.tied:
        linear("head", c.d_model, c.vocab_size, bias=False)
    return shapes


def parameter_count(config: GPTConfig) -> int:
    """Trainable numbers in the model, a tied weight counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def matmul_parameter_count(config: GPTConfig) -> int:
    """The weights that every token is multiplied by: qkv, out, gate, up, down, and the head, also where it is tied.

    Not in it: looking up an embedding or a position, norms, biases.
    """
    c = config
    matrices = 3 if c.mlp == "swiglu" else 2
    block = c.d_model * c.qkv_width + c.d_model * c.d_model + matrices * c.d_model * c.mlp_hidden
    return c.layers * block + c.vocab_size * c.d_model


def flops_per_token(config: GPTConfig, seq_len: int | None = None, *, causal: bool = False) -> float:
    """Floating-point operations that one token of training costs, forward and backward.

        6 N + 12 · layers · d_model · T

    N is matmul_parameter_count: one product forward and two backward, two operations for each multiply-add. The second
    term is attention's q·k and p·v: 2 products × 2 · T · d_model forward, twice that backward. It counts the whole
    T × T square, as published MFU figures do; `causal=True` counts only what a causal kernel has to do, (T + 1) / 2
    keys a token. Recomputed activations count for nothing: MFU measures useful work.

    seq_len   T; the configuration's by default
    returns   operations per token
    source    Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B
    """
    length = config.seq_len if seq_len is None else seq_len
    keys = (length + 1) / 2 if causal else length
    return 6 * matmul_parameter_count(config) + 12 * config.layers * config.d_model * keys


def kv_cache_bytes(
    config: GPTConfig, *, batch: int = 1, seq_len: int | None = None, bytes_per_element: float = 2
) -> float:
    """Bytes of the keys and values of `batch` contexts of T positions.

        2 · layers · batch · T · kv_heads · head_dim · bytes_per_element

    seq_len   T; the configuration's by default
    """
    length = config.seq_len if seq_len is None else seq_len
    return 2 * config.layers * batch * length * config.key_heads * config.head_dim * bytes_per_element
