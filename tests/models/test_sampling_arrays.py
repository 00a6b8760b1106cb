from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mezzo.errors import ConfigError, NonfiniteError
from mezzo.models import sampling, sampling_arrays
from mezzo.models.gpt_torch import GPT
from mezzo.models.sampling_arrays import generate, next_token_probs
from mezzo.models.shapes import GPTConfig

CONFIG = GPTConfig(vocab_size=40, layers=1, d_model=32, heads=2, seq_len=16)


class LogitsOf:
    """A torch model as `generate` wants it; it keeps the contexts that it was asked about."""

    def __init__(self) -> None:
        self.model = GPT(CONFIG, generator=torch.Generator().manual_seed(0))
        for parameter in self.model.parameters():
            parameter.data *= 8 if parameter.ndim == 2 else 1  # far from uniform
        self.seen: list[tuple[NDArray[np.int32], int]] = []

    @torch.no_grad()
    def __call__(self, idx_BT: NDArray[np.int32], last: int) -> NDArray[np.float32]:
        self.seen.append((idx_BT, last))
        logits_V: NDArray[np.float32] = self.model(torch.from_numpy(idx_BT).long())[0, last].numpy()
        return logits_V


@pytest.fixture
def logits_of() -> LogitsOf:
    return LogitsOf()


def logits(seed: int = 0, count: int = 40) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=3, size=count).astype(np.float32)


@pytest.mark.parametrize(
    "choices",
    [{}, {"temperature": 0.3}, {"temperature": 0.0}, {"top_k": 6}, {"top_k": 1000}, {"top_k": 20, "top_p": 0.7}],
)
def test_the_distribution_is_that_of_torchs_sampling(choices: dict[str, Any]) -> None:
    for values in (logits(), np.zeros(4, np.float32), np.array([0, -np.inf, 0], np.float32)):
        expected = sampling.next_token_probs(torch.from_numpy(values), **choices).numpy()
        # Two exponentials and sums of 40 terms, each rounded to float64.
        np.testing.assert_allclose(next_token_probs(values, **choices), expected, rtol=40 * 2**-52, atol=0)


def test_a_tiny_temperature_does_not_overflow() -> None:
    probs = next_token_probs(np.array([1e38, 3e38, -3e38], np.float32), temperature=1e-300)
    assert probs.tolist() == [0, 1, 0]


def test_greedy_text_is_that_of_torchs_sampling_also_where_the_window_moves(logits_of: LogitsOf) -> None:
    for prompt in ([5, 6, 7], [i % 40 for i in range(50)]):
        expected = list(sampling.generate(logits_of.model, prompt, max_new_tokens=40, temperature=0))
        assert list(generate(logits_of, prompt, CONFIG, max_new_tokens=40, temperature=0)) == expected
        assert list(generate(logits_of, prompt, CONFIG, max_new_tokens=40, top_k=1, temperature=3.0)) == expected


def test_every_context_has_one_shape_with_zeros_behind_it(logits_of: LogitsOf) -> None:
    tokens = list(generate(logits_of, [3, 4], CONFIG, max_new_tokens=5))
    assert len(logits_of.seen) == 5
    for i, (idx_BT, last) in enumerate(logits_of.seen):
        assert (idx_BT.shape, idx_BT.dtype) == ((1, 16), np.int32)
        assert last == 1 + i
        assert idx_BT[0].tolist() == [3, 4, *tokens[:i]] + [0] * (14 - i)


def test_a_seed_gives_the_same_tokens(logits_of: LogitsOf) -> None:
    first, again, other = (
        list(generate(logits_of, [1, 2, 3], CONFIG, max_new_tokens=30, seed=seed)) for seed in (7, 7, 8)
    )
    assert first == again != other


def test_tokens_stream_one_by_one(logits_of: LogitsOf) -> None:
    drawn = generate(logits_of, [1], CONFIG, max_new_tokens=1000)
    assert len(logits_of.seen) == 0
    next(drawn)
    next(drawn)
    assert len(logits_of.seen) == 2


def test_the_end_of_text_token_ends_and_is_not_given(logits_of: LogitsOf) -> None:
    tokens = list(generate(logits_of, [1], CONFIG, max_new_tokens=50, seed=1))
    end = tokens[20]
    until = list(generate(logits_of, [1], CONFIG, max_new_tokens=50, seed=1, eot=end))
    assert until == tokens[: tokens.index(end)]


def test_padding_of_the_vocabulary_is_never_drawn(logits_of: LogitsOf) -> None:
    tokens = generate(logits_of, [1], CONFIG, max_new_tokens=100, temperature=50.0, vocab_size=5)
    assert set(tokens) == {0, 1, 2, 3, 4}


def test_draws_follow_the_distribution() -> None:
    """The first two tokens of 1000 seeds: each count within five standard deviations of its binomial."""
    values, n = logits(), 1000
    probs = next_token_probs(values, temperature=2.0, top_k=30)
    texts = [
        list(generate(lambda *_: values, [3], CONFIG, max_new_tokens=2, temperature=2.0, top_k=30, seed=seed))
        for seed in range(n)
    ]
    for counts in (Counter(text[0] for text in texts), Counter(text[1] for text in texts)):
        for token, p in enumerate(probs.tolist()):
            assert abs(counts[token] - n * p) <= 5 * (n * p * (1 - p)) ** 0.5 + (p > 0), token


@pytest.mark.parametrize(("word", "token"), [(0, 1), (2**32 - 1, 3)])
def test_the_ends_of_the_interval_never_draw_a_token_of_probability_0(
    word: int, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_arrays, "bits", lambda *_, **__: np.array([word, word], np.uint32))
    values = np.array([-np.inf, 0.0, 0.1, 0.2, -np.inf])
    assert list(generate(lambda *_: values, [3], CONFIG, max_new_tokens=1)) == [token]


@pytest.mark.parametrize(
    ("values", "count"), [([0.0, float("nan"), 1.0], 1), ([0.0, float("inf"), 1.0], 1), ([-float("inf")] * 3, 3)]
)
def test_logits_that_are_not_numbers_are_an_error(values: list[float], count: int) -> None:
    with pytest.raises(NonfiniteError, match=rf"^{count} of 3 logits of the next token are NaN or infinite"):
        next_token_probs(values)


def test_arguments_out_of_range_are_refused_at_once(logits_of: LogitsOf) -> None:
    """By the check that torch's sampling uses too; tests/models/test_sampling.py holds its messages."""
    with pytest.raises(ConfigError, match=r"^vocab_size must be between 1 and the model's 40, not 41$"):
        generate(logits_of, [1], CONFIG, max_new_tokens=1, vocab_size=41)
    with pytest.raises(ConfigError, match=r"^the prompt has the token id 40"):
        generate(logits_of, [40], CONFIG, max_new_tokens=1)
