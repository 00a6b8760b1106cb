"""Drawing text from a model of any framework: NumPy arrays in and out, no key/value cache.

As mezzo.models.sampling, which is torch's and far faster for long texts: here each token reads the whole context again.
Good for the samples that a training run shows.

Shape suffixes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mezzo.errors import ConfigError, NonfiniteError
from mezzo.formats.philox import bits
from mezzo.models.shapes import GPTConfig

LogitsOf = Callable[[NDArray[np.int32], int], ArrayLike]


def next_token_probs(
    logits_V: ArrayLike, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> NDArray[np.float64]:
    """The distribution that the next token is drawn from; as mezzo.models.sampling.next_token_probs.

    logits_V   (V,) any float dtype; worked on in float64
    returns    (V,) float64
    raises     NonfiniteError if a logit is NaN or +inf, or none is finite
    """
    values_V = np.asarray(logits_V).astype(np.float64)
    if not np.isfinite(values_V.max()):  # NaN if any is NaN, -inf if all are
        raise nonfinite_logits(int((~np.isfinite(values_V)).sum()), len(values_V))
    probs_V = np.zeros_like(values_V)
    if temperature == 0:
        probs_V[values_V.argmax()] = 1.0
        return probs_V
    token_V = np.argsort(-values_V, stable=True)[:top_k]
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf
        kept_V = np.exp((values_V[token_V] - values_V.max()) / temperature)
    kept_V /= kept_V.sum()
    if top_p is not None and top_p < 1:
        before_V = kept_V.cumsum() - kept_V  # what the likelier tokens hold together
        kept_V[1:][before_V[1:] >= top_p] = 0.0
        kept_V /= kept_V.sum()
    probs_V[token_V] = kept_V
    return probs_V


def generate(
    logits_of: LogitsOf,
    prompt_ids: Sequence[int],
    config: GPTConfig,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eot: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Continue a prompt; yields each token as soon as it is drawn.

    `logits_of(idx_BT, last)` gives the (V,) logits that follow position `last` of the context idx_BT. The context comes
    as (1, seq_len) int32, zeros behind position `last`: one shape, so that a compiled model is compiled once. A causal
    model never looks at them; one that takes any length may cut them off, `idx_BT[:, : last + 1]`. With JAX:

        @jax.jit
        def logits_of(idx_BT, last):
            return gpt_jax.head(params, gpt_jax.hidden_states(params, idx_BT, config)[0, last], config)

    The window moves as in mezzo.models.sampling: when the context is full, its last half is kept. Greedy text is the
    same as there; a drawn one is not: token i takes word pair i of the seed's Philox bits, the same on every machine.

    prompt_ids       at least one token id
    config           the model's: its seq_len and vocab_size
    max_new_tokens   how many tokens at most
    temperature      0 is greedy
    top_k, top_p     see next_token_probs
    eot              a token that ends the text; it is not yielded
    vocab_size       ids at or above it are never drawn (the padding of mezzo.models.shapes.padded_vocab)
    returns          iterator of token ids
    raises           ConfigError, at once, for an argument out of range; NonfiniteError, while it runs, for NaN logits
    """
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    prompt = check_arguments(
        prompt_ids, config.vocab_size, vocab_size, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip

    def stream() -> Iterator[int]:
        context = prompt[-config.seq_len :]
        for i in range(max_new_tokens):
            if len(context) > config.seq_len:
                context = context[-max(1, config.seq_len // 2) :]
            idx_BT = np.zeros((1, config.seq_len), np.int32)
            idx_BT[0, : len(context)] = context
            logits_V = np.asarray(logits_of(idx_BT, len(context) - 1))[:vocab_size]
            probs_V = next_token_probs(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
            token = _draw(probs_V, seed, i)
            if token == eot:
                return
            yield token
            context.append(token)

    return stream()


def _draw(probs_V: NDArray[np.float64], seed: int, i: int) -> int:
    """The token at whose interval of the cumulated probabilities a uniform number u in [0, 1) points."""
    high, low = (int(word) for word in bits(seed, 0, "sample", 2, start=2 * i))
    u = ((high << 32 | low) >> 11) * 2.0**-53
    cumulated_V = probs_V.cumsum()
    # u is at most 1 - 2^-53, so u · total stays below the total also when rounded; a token of probability 0 is skipped.
    return int(np.searchsorted(cumulated_V, u * cumulated_V[-1], side="right"))


def nonfinite_logits(count: int, total: int) -> NonfiniteError:
    return NonfiniteError(
        f"{count} of {total} logits of the next token are NaN or infinite: the weights are damaged, or the "
        f"policy's formats are too narrow for this model; try --policy fp32, or an earlier checkpoint"
    )


def check_arguments(
    prompt_ids: Sequence[int],
    rows: int,
    vocab_size: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> list[int]:
    """Refuse what cannot be sampled with; the prompt as a list.

    rows     the model's vocabulary, padding included
    raises   ConfigError
    """
    if not 1 <= vocab_size <= rows:
        raise ConfigError(f"vocab_size must be between 1 and the model's {rows}, not {vocab_size}")
    prompt = [int(token) for token in prompt_ids]
    if not prompt:
        raise ConfigError("the prompt has no tokens; give at least one, for instance the end-of-text token")
    for token in prompt:
        if not 0 <= token < rows:
            raise ConfigError(
                f"the prompt has the token id {token}, but the model's vocabulary ends at {rows - 1}; "
                f"encode the prompt with the tokenizer that the model was trained with"
            )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 (greedy) or a finite number above it, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, or None to keep every token, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, or None to keep every token, not {top_p}")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed must be between 0 and 2^64 - 1, not {seed}")
    return prompt
