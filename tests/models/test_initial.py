import math
from dataclasses import replace

import numpy as np
import pytest

from mezzo.models import initial
from mezzo.models.initial import initial_parameters
from mezzo.models.shapes import parameter_shapes, preset

CONFIG = preset("gpt-proof", bias=True, norm="layernorm", qk_norm=True)


def test_every_parameter_is_there_in_order_and_in_float32() -> None:
    parameters = initial_parameters(CONFIG, 3)
    assert [(name, array.shape) for name, array in parameters.items()] == list(parameter_shapes(CONFIG).items())
    assert {array.dtype for array in parameters.values()} == {np.dtype(np.float32)}


def test_initial_weights_are_normal_with_gpt2s_spread() -> None:
    for name, array in initial_parameters(CONFIG).items():
        if name.endswith("bias"):
            assert not array.any(), name
        elif array.ndim == 1:
            assert (array == 1).all(), name
        else:
            std = 0.02 / (2 * 2) ** 0.5 if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.02
            z, n = np.sort(array.astype(np.float64).ravel() / std), array.size
            # Five standard errors of a sample's mean (1/sqrt n) and of its standard deviation (1/sqrt 2n).
            assert abs(z.mean()) < 5 / n**0.5, name
            assert abs(z.std() - 1) < 5 / (2 * n) ** 0.5, name
            # Kolmogorov-Smirnov: sqrt(n) times the distance between the distributions is above 2.5 once in 10^5.
            expected = np.array([0.5 * math.erfc(-x / 2**0.5) for x in z])
            assert np.abs(expected - (np.arange(n) + 0.5) / n).max() < 2.5 / n**0.5, name


def test_neighbours_and_parameters_are_independent() -> None:
    """Correlations of n pairs: five standard errors of 1/sqrt n; also between the two of a Box-Muller pair."""
    parameters = initial_parameters(CONFIG)
    a = parameters["blocks.0.attn.out.weight"].ravel()
    b = parameters["blocks.1.attn.out.weight"].ravel()
    for x, y in ((a[0::2], a[1::2]), (abs(a[0::2]), abs(a[1::2])), (a[1:], a[:-1]), (a, b)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / len(x) ** 0.5


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, second, other = (initial_parameters(CONFIG, seed) for seed in (7, 7, 8))
    for name, array in first.items():
        assert np.array_equal(array, second[name]), name
        assert array.ndim == 1 or not np.array_equal(array, other[name]), name


def test_the_first_weights_of_seed_0_never_change() -> None:
    """Made once by this file; to a unit in the last place, which is what libm may change."""
    first = initial_parameters(CONFIG, 0)["embed.weight"][0, :4]
    expected = [-0.005585432052612305, 0.008901561610400677, -0.00720840971916914, -0.02089851163327694]
    np.testing.assert_allclose(first, expected, rtol=2**-23, atol=0)


def test_a_deeper_model_starts_with_the_same_embedding() -> None:
    deeper = initial_parameters(replace(CONFIG, layers=3))
    assert np.array_equal(initial_parameters(CONFIG)["embed.weight"], deeper["embed.weight"])


def test_weights_do_not_depend_on_the_pieces_they_are_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("gpt-tiny", d_model=6, heads=1, vocab_size=7, seq_len=3, hidden=5)
    whole = initial_parameters(config)
    monkeypatch.setattr(initial, "_PIECE", 4)
    for name, array in initial_parameters(config).items():
        assert np.array_equal(array, whole[name]), name


def test_an_odd_count_of_weights_drops_the_last_of_the_pair() -> None:
    tiny = preset("gpt-tiny", d_model=3, heads=1, vocab_size=5, positions="learned")
    larger = replace(tiny, vocab_size=6)
    assert np.array_equal(
        initial_parameters(tiny)["embed.weight"].ravel(), initial_parameters(larger)["embed.weight"].ravel()[:15]
    )
