import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mezzo.errors import ConfigError
from mezzo.models.gpt_torch import GPT, KVCache
from mezzo.models.shapes import GPTConfig, preset

SMALL = GPTConfig(vocab_size=61, layers=2, d_model=32, heads=4, seq_len=24)
VARIANTS = {
    "llama": SMALL,
    "gpt2": replace(SMALL, norm="layernorm", positions="learned", mlp="gelu", bias=True),
    "grouped": replace(SMALL, kv_heads=2, qk_norm=True, tied=False),
    "one key head": replace(SMALL, kv_heads=1, norm="layernorm", bias=True, qk_norm=True),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
EPS32, EPS64 = 2.0**-23, 2.0**-52


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: GPTConfig, **options: Any) -> GPT:
    return GPT(config, generator=seeded(), **options)


def tokens(config: GPTConfig, batch: int = 2, length: int | None = None, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length or config.seq_len), generator=seeded(seed))


def scattered(config: GPTConfig) -> GPT:
    """A float64 model with weights large enough that no part of it is hidden by the residual stream."""
    model = build(config).double()
    generator = seeded(5)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3 + 0.05)
    return model


def reference_logits(config: GPTConfig, weights: dict[str, np.ndarray], idx_T: np.ndarray) -> np.ndarray:
    """The same network written a second time: NumPy, one sequence, one head at a time, RoPE by complex numbers."""
    c = config

    def linear(path: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{path}.weight"].T + weights.get(f"{path}.bias", 0.0)

    def norm(path: str, x: np.ndarray) -> np.ndarray:
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
        return x * weights[f"{path}.weight"] + weights.get(f"{path}.bias", 0.0)

    def rope(x_TK: np.ndarray) -> np.ndarray:
        half = c.head_dim // 2
        angle = np.arange(len(x_TK))[:, None] * c.rope_theta ** (-np.arange(half) / half)
        z = (x_TK[:, :half] + 1j * x_TK[:, half:]) * np.exp(1j * angle)
        return np.concatenate((z.real, z.imag), -1)

    def attention(path: str, x: np.ndarray) -> np.ndarray:
        heads = np.split(linear(f"{path}.qkv", x), c.heads + 2 * c.key_heads, axis=-1)
        outputs = []
        for h in range(c.heads):
            group = h // (c.heads // c.key_heads)
            q, k, v = heads[h], heads[c.heads + group], heads[c.heads + c.key_heads + group]
            if c.qk_norm:
                q, k = norm(f"{path}.q_norm", q), norm(f"{path}.k_norm", k)
            if c.positions == "rope":
                q, k = rope(q), rope(k)
            scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / np.sqrt(c.head_dim), -np.inf)
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(probs / probs.sum(-1, keepdims=True) @ v)
        return linear(f"{path}.out", np.concatenate(outputs, -1))

    def mlp(path: str, x: np.ndarray) -> np.ndarray:
        up = linear(f"{path}.up", x)
        if c.mlp == "swiglu":
            gate = linear(f"{path}.gate", x)
            return linear(f"{path}.down", gate / (1 + np.exp(-gate)) * up)
        return linear(f"{path}.down", up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))))

    x = weights["embed.weight"][idx_T]
    if c.positions == "learned":
        x = x + weights["pos.weight"][: len(idx_T)]
    for i in range(c.layers):
        x = x + attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", x))
        x = x + mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.norm2", x))
    return norm("norm", x) @ weights["embed.weight" if c.tied else "head.weight"].T


@variants
def test_float64_forward_equals_an_independent_formula(config: GPTConfig) -> None:
    model = scattered(config)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    idx_BT = tokens(config, batch=1)
    logits_BTV = model(idx_BT)
    assert logits_BTV.dtype == torch.float64
    expected = reference_logits(config, weights, idx_BT[0].numpy())
    # Both round each sum of at most n = 128 products, relative error n·eps; some 40 such sums follow one another.
    assert np.abs(logits_BTV[0].detach().numpy() - expected).max() <= 40 * 128 * EPS64 * np.abs(expected).max()


@variants
def test_float64_gradient_equals_finite_differences(config: GPTConfig) -> None:
    model = scattered(config)
    idx_BT, targets_BT = tokens(config), tokens(config, seed=2)
    model(idx_BT, targets_BT).backward()
    h = 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=seeded(7), dtype=torch.float64)
        direction /= direction.norm()
        at = []
        with torch.no_grad():
            for side in (h, -h):
                parameter += side * direction
                at.append(model(idx_BT, targets_BT).item())
                parameter -= side * direction
        slope = float((parameter.grad * direction).sum())
        # Central differences: h²/6 · f''' (taken as at most 1000) and the loss's rounding, some 1e4 eps over h.
        assert abs((at[0] - at[1]) / (2 * h) - slope) <= h * h / 6 * 1000 + 1e4 * EPS64 * abs(at[0]) / h, name


@variants
def test_loss_is_the_cross_entropy_of_the_logits(config: GPTConfig) -> None:
    model = build(config)
    idx_BT, targets_BT = tokens(config), tokens(config, seed=2)
    expected = F.cross_entropy(model(idx_BT).flatten(0, 1), targets_BT.flatten())
    torch.testing.assert_close(model(idx_BT, targets_BT), expected, rtol=48 * EPS32, atol=0)  # a sum of 48 rows


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_do_not_depend_on_the_chunks(tied: bool) -> None:
    config = replace(SMALL, tied=tied)
    idx_BT, targets_BT = tokens(config), tokens(config, seed=2)
    targets_BT[0, :7] = -100  # without a target: a chunk of these alone sums to 0, the mean is over the others
    results = []
    for rows in (None, 1, 5, 48, 1000):
        model = build(config, loss_chunk_rows=rows).double()
        loss = model(idx_BT, targets_BT)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a, b, rtol=0, atol=float(48 * 64 * EPS64 * a.abs().max()))


def test_loss_chunk_rows_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^loss_chunk_rows must be at least 1, or None for all at once, not 0$"):
        build(SMALL, loss_chunk_rows=0)


@variants
def test_checkpointed_activations_give_the_same_gradients_to_the_bit(config: GPTConfig) -> None:
    idx_BT, targets_BT = tokens(config), tokens(config, seed=2)
    plain, recomputed = build(config), build(config, checkpoint_activations=True)
    losses = [model(idx_BT, targets_BT) for model in (plain, recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name


def test_checkpointed_activations_save_less() -> None:
    def saved_bytes(model: GPT) -> int:
        kept: dict[int, int] = {}
        held: list[Tensor] = []  # alive until the end: a freed storage's address would come again

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            held.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(tokens(SMALL), tokens(SMALL))
        return sum(kept.values())

    config = replace(SMALL, layers=4)
    assert saved_bytes(build(config, checkpoint_activations=True)) < 0.5 * saved_bytes(build(config))


@variants
@pytest.mark.parametrize("pieces", [(24,), (1,) * 24, (10, *(1,) * 14), (7, 9, 1, 7)], ids=str)
def test_reading_with_a_cache_equals_reading_at_once(config: GPTConfig, pieces: tuple[int, ...]) -> None:
    model = scattered(config)
    idx_BT = tokens(config)
    with torch.no_grad():
        whole = model(idx_BT)
        cache = KVCache(config)
        parts = [model(part, kv_cache=cache) for part in idx_BT.split(pieces, dim=1)]
    assert cache.length == 24
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=float(40 * 128 * EPS64 * whole.abs().max()))


def test_last_only_gives_the_last_position() -> None:
    model, idx_BT = build(SMALL), tokens(SMALL)
    torch.testing.assert_close(
        model(idx_BT, last_only=True), model(idx_BT)[:, -1:], rtol=0, atol=32 * EPS32
    )  # sums of 32 products below 1


def test_context_beyond_seq_len_is_refused() -> None:
    model = build(SMALL)
    with pytest.raises(ConfigError) as caught:
        model(tokens(SMALL, length=25))
    assert str(caught.value) == (
        "a context of 25 positions is longer than the model's seq_len = 24; "
        "give at most 24 tokens here, or build the model with a longer seq_len"
    )
    cache = KVCache(SMALL)
    model(tokens(SMALL, length=20), kv_cache=cache)
    with pytest.raises(ConfigError, match=r"^a context of 25 positions .* give at most 4 tokens here"):
        model(tokens(SMALL, length=5), kv_cache=cache)


def test_targets_and_a_cache_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^targets_BT and kv_cache were both given; a loss needs no cache"):
        build(SMALL)(tokens(SMALL), tokens(SMALL), KVCache(SMALL))


def test_a_generator_makes_the_initial_weights_reproducible() -> None:
    torch.manual_seed(1)
    first = build(SMALL)
    torch.manual_seed(2)
    second = build(SMALL)
    other = GPT(SMALL, generator=seeded(9))
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name


def test_initial_weights_have_gpt2s_spread() -> None:
    model = build(preset("gpt-proof", bias=True, norm="layernorm"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / (2 * 2) ** 0.5 if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.02
            # The sample's standard deviation has relative standard error 1/sqrt(2n); five of those.
            assert abs(parameter.std().item() / std - 1) < 5 / (2 * parameter.numel()) ** 0.5, name


def test_a_tied_head_follows_the_embedding_also_in_a_copy() -> None:
    model = copy.deepcopy(build(SMALL)).double()
    assert sum(p.numel() for p in model.head.parameters()) == 0
    before = model(tokens(SMALL))
    with torch.no_grad():
        model.embed.weight[3] += 1
    changed = (model(tokens(SMALL, length=1) * 0) - before[:1, :1]).abs() > 0
    assert changed[..., 3].all()


class SixteenBitProducts(TorchFunctionMode):
    """Linear layers hand out bfloat16 while norms and the residual stream stay float32, as under a mezzo policy."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dtypes: set[torch.dtype] = set()
        self.norm_dtypes: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return func(args[0].float(), args[1].float(), *args[2:], **kwargs).bfloat16()
        if func is F.scaled_dot_product_attention:
            self.attention_dtypes |= {x.dtype for x in args[:3]}
        if func in (F.rms_norm, F.layer_norm):
            self.norm_dtypes.add(args[0].dtype)
        if func is F.cross_entropy:
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


@variants
def test_sixteen_bit_products_leave_the_residual_stream_in_float32(config: GPTConfig) -> None:
    model = build(config)
    idx_BT, targets_BT = tokens(config), tokens(config, seed=2)
    expected = model(idx_BT, targets_BT)
    mode = SixteenBitProducts()
    with mode:
        loss = model(idx_BT, targets_BT)
    loss.backward()
    assert mode.attention_dtypes == {torch.bfloat16}
    assert mode.norm_dtypes == {torch.float32}
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # Initial logits are below 1 and each carries a relative error of a few bfloat16 roundings (2^-9 each).
    assert abs(loss.item() - expected.item()) < 8 * 2**-9


@variants
@pytest.mark.parametrize("way", ["autocast", "to"])
def test_torchs_own_16_bits_work_unchanged(config: GPTConfig, way: str) -> None:
    model, idx_BT, targets_BT = build(config), tokens(config), tokens(config, seed=2)
    expected = model(idx_BT, targets_BT).item()
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx_BT, targets_BT)
    else:
        loss = model.to(torch.bfloat16)(idx_BT, targets_BT)
    loss.backward()
    # As above; the mean itself may be held in bfloat16, a relative 2^-9 of ln 61 = 4.1 for each of two roundings.
    assert abs(loss.item() - expected) < 8 * 2**-9 + 2 * 4.2 * 2**-9 + 48 * 2**-9 * (way == "to")


def test_it_learns_a_short_text_by_heart() -> None:
    text = b"the quick brown fox jumps over a lazy dog; "
    config = GPTConfig(vocab_size=128, layers=2, d_model=64, heads=4, seq_len=len(text) - 1)
    model = build(config)
    ids = torch.tensor([list(text)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for _ in range(80):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert torch.equal(model(ids[:, :-1]).argmax(-1), ids[:, 1:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own, when imported
@pytest.mark.parametrize("config", [VARIANTS["gpt2"], VARIANTS["grouped"]], ids=["gpt2", "grouped"])
def test_torch_compile_gives_the_same_loss_and_gradients(config: GPTConfig) -> None:
    model = build(config)
    idx_BT, targets_BT = tokens(config), tokens(config, seed=2)
    loss = model(idx_BT, targets_BT)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)(idx_BT, targets_BT)
    torch.testing.assert_close(compiled, loss, rtol=64 * EPS32, atol=0)
    for a, b in zip(torch.autograd.grad(compiled, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=float(1024 * EPS32 * b.abs().max()))
