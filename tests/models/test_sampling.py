from collections import Counter
from itertools import islice

import pytest
import torch
from torch import Tensor

from mezzo.errors import ConfigError, NonfiniteError
from mezzo.models.gpt_torch import GPT
from mezzo.models.sampling import generate, next_token_probs
from mezzo.models.shapes import GPTConfig

CONFIG = GPTConfig(vocab_size=40, layers=1, d_model=32, heads=2, seq_len=16)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Weights large enough that the distribution is far from uniform."""
    model = GPT(CONFIG, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8 if parameter.ndim == 2 else 1
    return model


def logits(seed: int = 0, count: int = 40) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3


def test_a_seed_gives_the_same_tokens_whatever_torchs_own_generator_does(model: GPT) -> None:
    torch.manual_seed(1)
    first = list(generate(model, [1, 2, 3], max_new_tokens=30, seed=7))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert list(generate(model, [1, 2, 3], max_new_tokens=30, seed=7)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert list(generate(model, [1, 2, 3], max_new_tokens=30, seed=8)) != first


def test_greedy_is_the_argmax_of_a_full_forward(model: GPT) -> None:
    context = [5, 6]
    for token in generate(model, context, max_new_tokens=14, temperature=0):
        assert token == int(model(torch.tensor([context]))[0, -1].argmax())
        context = [*context, token]
    assert len(context) == 16


def test_top_k_of_one_is_greedy(model: GPT) -> None:
    greedy = list(generate(model, [5], max_new_tokens=40, temperature=0))
    assert list(generate(model, [5], max_new_tokens=40, top_k=1, temperature=3.0, seed=3)) == greedy
    assert list(generate(model, [5], max_new_tokens=40, top_p=1e-9, seed=4)) == greedy


def test_a_full_context_keeps_its_last_half(model: GPT) -> None:
    """16 positions give 14 tokens after a prompt of 3; then 8 are read anew, which last for 9 tokens."""
    text = [5, 6, 7]
    drawn = generate(model, text, max_new_tokens=40, temperature=0)
    text += islice(drawn, 14)
    for _ in range(2):
        window = text[-8:]
        for token in islice(drawn, 9):
            assert token == int(model(torch.tensor([window]))[0, -1].argmax())
            window = [*window, token]
            text.append(token)


def test_of_a_prompt_longer_than_the_context_the_end_is_read(model: GPT) -> None:
    long = [i % 40 for i in range(50)]
    assert list(generate(model, long, max_new_tokens=9, temperature=0)) == list(
        generate(model, long[-16:], max_new_tokens=9, temperature=0)
    )


def test_tokens_stream_one_by_one(model: GPT) -> None:
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    drawn = generate(model, [1], max_new_tokens=1000)
    assert not calls
    next(drawn)
    next(drawn)
    handle.remove()
    assert len(calls) == 2


def test_the_end_of_text_token_ends_and_is_not_given(model: GPT) -> None:
    tokens = list(generate(model, [1], max_new_tokens=50, seed=1))
    end = tokens[20]
    assert list(generate(model, [1], max_new_tokens=50, seed=1, eot=end)) == tokens[: tokens.index(end)]


def test_padding_of_the_vocabulary_is_never_drawn(model: GPT) -> None:
    tokens = list(generate(model, [1], max_new_tokens=200, temperature=50.0, vocab_size=5))
    assert set(tokens) == {0, 1, 2, 3, 4}


def test_no_tokens_asked_for_gives_none(model: GPT) -> None:
    assert list(generate(model, [1], max_new_tokens=0)) == []


def test_training_mode_and_gradients_are_left_alone(model: GPT) -> None:
    model.train()
    drawn = generate(model, [1], max_new_tokens=3)
    next(drawn)
    assert torch.is_grad_enabled()
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature: float) -> None:
    expected = (logits().double() / temperature).softmax(0)
    torch.testing.assert_close(next_token_probs(logits(), temperature=temperature), expected, rtol=1e-13, atol=0)


def test_top_k_keeps_the_largest_and_their_ratios() -> None:
    everything, kept = next_token_probs(logits()), next_token_probs(logits(), top_k=6)
    assert set(kept.nonzero().flatten().tolist()) == set(everything.topk(6).indices.tolist())
    torch.testing.assert_close(kept, torch.where(kept > 0, everything, 0) / everything.topk(6).values.sum())
    assert torch.equal(next_token_probs(logits(), top_k=1000), everything)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, seed: int) -> None:
    everything, kept = next_token_probs(logits(seed)), next_token_probs(logits(seed), top_p=top_p)
    inside = kept > 0
    assert everything[inside].sum() >= top_p - 1e-12
    assert everything[inside].sum() - everything[inside].min() < top_p
    assert everything[inside].min() >= everything[~inside].max() if (~inside).any() else top_p == 1
    torch.testing.assert_close(kept.sum().item(), 1.0, rtol=1e-13, atol=0)


def test_a_tie_keeps_only_as_many_as_needed() -> None:
    assert next_token_probs(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]
    assert next_token_probs(torch.zeros(4), top_k=1).tolist() == [1, 0, 0, 0]
    assert next_token_probs(torch.zeros(4), temperature=0).tolist() == [1, 0, 0, 0]


def test_a_tiny_temperature_does_not_overflow() -> None:
    probs = next_token_probs(torch.tensor([1e38, 3e38, -3e38]), temperature=1e-300)
    assert probs.tolist() == [0, 1, 0]


def test_tokens_masked_with_minus_infinity_are_allowed() -> None:
    assert next_token_probs(torch.tensor([0.0, -torch.inf, 0.0])).tolist() == [0.5, 0, 0.5]


def test_draws_follow_the_distribution(model: GPT) -> None:
    """One token drawn with 1000 seeds: each count within five standard deviations of its binomial."""
    logits_V = model(torch.tensor([[3]]))[0, -1].detach()
    probs = next_token_probs(logits_V, temperature=2.0)
    n = 1000
    counts = Counter(next(generate(model, [3], max_new_tokens=1, temperature=2.0, seed=seed)) for seed in range(n))
    for token, p in enumerate(probs.tolist()):
        assert abs(counts[token] - n * p) <= 5 * (n * p * (1 - p)) ** 0.5 + 1


@pytest.mark.parametrize(
    ("values", "count"), [([0.0, float("nan"), 1.0], 1), ([0.0, float("inf"), 1.0], 1), ([-float("inf")] * 3, 3)]
)
def test_logits_that_are_not_numbers_are_an_error(values: list[float], count: int) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(NonfiniteError) as caught:
            next_token_probs(torch.tensor(values), temperature=temperature)
        assert str(caught.value) == (
            f"{count} of 3 logits of the next token are NaN or infinite: the weights are damaged, or the policy's "
            "formats are too narrow for this model; try --policy fp32, or an earlier checkpoint"
        )


def test_a_nan_weight_stops_generation() -> None:
    model = GPT(CONFIG)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(NonfiniteError, match=r"^40 of 40 logits"):
        next(generate(model, [1], max_new_tokens=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "the prompt has no tokens; give at least one, for instance the end-of-text token"),
        (
            {"prompt_ids": [1, 40]},
            "the prompt has the token id 40, but the model's vocabulary ends at 39; "
            "encode the prompt with the tokenizer that the model was trained with",
        ),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"temperature": -0.5}, "temperature must be 0 (greedy) or a finite number above it, not -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 (greedy) or a finite number above it, not nan"),
        ({"top_k": 0}, "top_k must be at least 1, or None to keep every token, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, or None to keep every token, not 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, or None to keep every token, not 1.5"),
        ({"seed": -1}, "seed must be between 0 and 2^64 - 1, not -1"),
        ({"vocab_size": 41}, "vocab_size must be between 1 and the model's 40, not 41"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(model: GPT, change: dict[str, object], message: str) -> None:
    arguments = {"prompt_ids": [1], "max_new_tokens": 1} | change
    with pytest.raises(ConfigError) as caught:
        generate(model, **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message
