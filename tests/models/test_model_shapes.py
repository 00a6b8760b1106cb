import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from math import prod

import pytest
import torch

from mezzo.errors import ConfigError
from mezzo.models.gpt_torch import GPT
from mezzo.models.shapes import (
    PRESETS,
    GPTConfig,
    flops_per_token,
    kv_cache_bytes,
    matmul_parameter_count,
    padded_vocab,
    parameter_count,
    parameter_shapes,
    preset,
)

SMALL = GPTConfig(vocab_size=97, layers=2, d_model=48, heads=4, seq_len=32)
VARIANTS = {
    "llama": SMALL,
    "gpt2": replace(SMALL, norm="layernorm", positions="learned", mlp="gelu", bias=True),
    "layernorm without bias": replace(SMALL, norm="layernorm"),
    "grouped queries, QK-norm, untied": replace(SMALL, kv_heads=2, qk_norm=True, tied=False),
    "QK-norm by LayerNorm": replace(SMALL, norm="layernorm", bias=True, qk_norm=True, kv_heads=1),
    "hidden given": replace(SMALL, hidden=100, bias=True),
}


def meta(config: GPTConfig) -> GPT:
    """The module without its memory."""
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("config", [*VARIANTS.values(), *PRESETS.values()], ids=[*VARIANTS, *PRESETS])
def test_the_table_of_names_is_that_of_the_module(config: GPTConfig) -> None:
    model = meta(config)
    named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(named.items()) == list(parameter_shapes(config).items())
    assert list(model.state_dict()) == list(named)  # no buffers, no weight twice
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"), [("gpt2-124m", 124_439_808), ("gpt2-350m", 354_823_168), ("gpt2-1.5b", 1_557_611_200)]
)
def test_gpt2_presets_have_the_parameters_of_the_released_checkpoints(name: str, count: int) -> None:
    assert parameter_count(preset(name)) == count


def test_module_paths_are_those_of_the_architecture() -> None:
    gpt2 = dict(meta(VARIANTS["gpt2"]).named_modules())
    assert {"embed", "pos", "norm", "head", "blocks.1.norm1", "blocks.1.attn", "blocks.1.attn.qkv"} <= set(gpt2)
    assert {"blocks.1.attn.out", "blocks.1.norm2", "blocks.1.mlp.up", "blocks.1.mlp.down"} <= set(gpt2)
    grouped = dict(meta(VARIANTS["grouped queries, QK-norm, untied"]).named_modules())
    assert {"blocks.0.attn.q_norm", "blocks.0.attn.k_norm", "blocks.0.mlp.gate", "head"} <= set(grouped)
    assert "pos" not in grouped


def test_proof_preset_is_pinned() -> None:
    """Quality figures are compared across versions: this model must not drift."""
    assert asdict(preset("gpt-proof")) == {
        "vocab_size": 4096, "layers": 2, "d_model": 128, "heads": 4, "kv_heads": None, "seq_len": 128,
        "mlp": "swiglu", "mlp_ratio": 4.0, "hidden": None, "norm": "rmsnorm", "norm_eps": 1e-5, "positions": "rope",
        "rope_theta": 10000.0, "qk_norm": False, "bias": False, "tied": True,
    }  # fmt: skip


def test_preset_takes_overrides_and_leaves_the_preset_alone() -> None:
    assert preset("gpt2-124m", vocab_size=50304, layers=2).layers == 2
    assert PRESETS["gpt2-124m"].layers == 12
    with pytest.raises(FrozenInstanceError):
        PRESETS["gpt2-124m"].layers = 3  # type: ignore[misc]


def test_swiglu_hidden_width_is_two_thirds_rounded_up_to_64() -> None:
    assert preset("gpt-proof").mlp_hidden == 384  # 4 · 128 · 2/3 = 341.3
    assert replace(SMALL, d_model=96).mlp_hidden == 256  # 4 · 96 · 2/3 = 256 exactly, not rounded to 320
    assert replace(SMALL, mlp="gelu").mlp_hidden == 192
    assert replace(SMALL, mlp="gelu", mlp_ratio=2.5).mlp_hidden == 120
    assert replace(SMALL, hidden=77).mlp_hidden == 77


def test_flops_count_products_of_two_dimensions_and_attention() -> None:
    for config in VARIANTS.values():
        matrices = [
            prod(shape)
            for name, shape in parameter_shapes(config).items()
            if len(shape) == 2 and name not in ("pos.weight", "embed.weight")
        ]
        head = config.vocab_size * config.d_model if config.tied else 0
        assert matmul_parameter_count(config) == sum(matrices) + head
    # PaLM's formula by hand for GPT-2 124M: 6 · 123,532,032 + 12 · 12 · 768 · 1024.
    assert flops_per_token(preset("gpt2-124m")) == 6 * 123_532_032 + 113_246_208
    assert flops_per_token(SMALL, 16) == 6 * matmul_parameter_count(SMALL) + 12 * 2 * 48 * 16
    assert flops_per_token(SMALL, 16, causal=True) == 6 * matmul_parameter_count(SMALL) + 12 * 2 * 48 * 8.5


def test_flops_are_three_times_what_torch_counts_forward() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(SMALL, kv_heads=2)
    model = meta(config)
    idx_BT = torch.zeros(3, 16, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx_BT)
    assert 3 * counter.get_total_flops() == 3 * 16 * flops_per_token(config, 16)


def test_kv_cache_bytes_count_keys_and_values_of_every_layer() -> None:
    assert kv_cache_bytes(preset("gpt2-124m")) == 2 * 12 * 1024 * 768 * 2
    assert (
        kv_cache_bytes(replace(SMALL, kv_heads=1), batch=3, seq_len=10, bytes_per_element=4) == 2 * 2 * 3 * 10 * 12 * 4
    )


def test_vocabulary_is_padded_to_a_multiple() -> None:
    assert [padded_vocab(n) for n in (1, 64, 65, 50257)] == [64, 64, 128, 50304]
    assert padded_vocab(50257, 128) == 50304


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"heads": 5},
            "heads = 5 does not divide d_model = 48; choose heads from 1, 2, 3, 4, 6, 8, 12, 16, 24, 48, "
            "or a multiple of 5 for d_model",
        ),
        ({"kv_heads": 3}, "kv_heads = 3 does not divide heads = 4; choose kv_heads from 1, 2, 4"),
        (
            {"heads": 16},
            'positions = "rope" turns pairs and needs an even head dimension, but d_model / heads = 48 / 16 = 3; '
            'change heads or d_model, or take positions = "learned"',
        ),
        ({"layers": 0}, "layers must be a whole number of at least 1, not 0"),
        ({"layers": "2"}, "layers must be a whole number of at least 1, not '2'"),
        ({"layers": True}, "layers must be a whole number of at least 1, not True"),
        ({"kv_heads": 0}, "kv_heads must be a whole number of at least 1, not 0"),
        ({"hidden": 1.5}, "hidden must be a whole number of at least 1, not 1.5"),
        ({"norm_eps": 0.0}, "norm_eps must be a finite number above 0, not 0.0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number above 0, not nan"),
        ({"bias": "no"}, "bias must be true or false, not 'no'"),
        ({"mlp": "relu"}, "mlp must be one of swiglu, gelu, not 'relu'"),
        ({"norm": "batch"}, "norm must be one of rmsnorm, layernorm, not 'batch'"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_a_remedy(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(SMALL, **change)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_learned_positions_allow_an_odd_head_dimension() -> None:
    assert replace(SMALL, heads=16, positions="learned").head_dim == 3


def test_unknown_preset_or_option_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"^no preset is called 'gpt3'; presets: gpt-tiny, gpt-proof, gpt2-124m, "):
        preset("gpt3")
    with pytest.raises(ConfigError, match=r"^a GPT has no option 'depth'; options: vocab_size, layers, "):
        preset("gpt-tiny", depth=3)
    with pytest.raises(ConfigError, match=r"^vocab_size must be a whole number of at least 1, not 0$"):
        padded_vocab(0)


@pytest.mark.parametrize(("module", "imports_torch"), [("shapes", "False"), ("gpt_torch", "True")])
def test_shapes_import_no_framework(module: str, imports_torch: str) -> None:
    """The second case shows that the check can fail."""
    code = f"import sys, mezzo.models.{module}; print(any(m in sys.modules for m in ('torch', 'jax', 'tensorflow')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == imports_torch
