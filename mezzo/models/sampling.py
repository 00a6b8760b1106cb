"""Drawing text from a model, one token at a time.

Shape suffixes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mezzo.models.gpt_torch import GPT, KVCache
from mezzo.models.sampling_arrays import check_arguments, nonfinite_logits


def next_token_probs(
    logits_V: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that the next token is drawn from.

    In this order: the logits are divided by the temperature; only the top_k largest stay; of these the smallest set of
    the likeliest whose probability reaches top_p stays, at least one; the rest is scaled to sum to 1.

    logits_V      (V,) any float dtype; worked on in float64
    temperature   0 is greedy: all the probability on the first of the largest logits
    top_k         how many tokens may be drawn; None: all
    top_p         share of the probability that stays; None: all
    returns       (V,) float64
    raises        NonfiniteError if a logit is NaN or +inf, or none is finite
    source        top-p: Holtzman et al. 2019, arXiv 1904.09751
    """
    logits_V = logits_V.double()
    if not bool(torch.isfinite(logits_V.max())):  # NaN if any is NaN, -inf if all are
        count = int((~torch.isfinite(logits_V)).sum())
        raise nonfinite_logits(count, len(logits_V))
    if temperature == 0:
        return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
    # The largest logit is moved to 0 first: dividing by a tiny temperature can then not overflow to inf - inf.
    scaled_V, token_V = torch.sort((logits_V - logits_V.max()) / temperature, descending=True, stable=True)
    if top_k is not None:
        scaled_V[top_k:] = -torch.inf
    probs_V = scaled_V.softmax(dim=0)
    if top_p is not None and top_p < 1:
        before_V = probs_V.cumsum(dim=0) - probs_V  # what the likelier tokens hold together
        probs_V[1:].masked_fill_(before_V[1:] >= top_p, 0.0)
        probs_V /= probs_V.sum()
    return torch.zeros_like(probs_V).index_copy_(0, token_V, probs_V)


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
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

    The prompt is read once and its keys and values are kept; after that each token costs one position. When the context
    is full, its last half is kept and read anew, so that text may go on beyond seq_len; of a prompt longer than seq_len
    the last seq_len tokens are read. The same seed gives the same tokens: drawn on the CPU from a generator of its own.

    prompt_ids       at least one token id
    max_new_tokens   how many tokens at most
    temperature      0 is greedy
    top_k, top_p     see next_token_probs
    eot              a token that ends the text; it is not yielded
    vocab_size       ids at or above it are never drawn (the padding of mezzo.models.shapes.padded_vocab)
    returns          iterator of token ids
    raises           ConfigError, at once, for an argument out of range; NonfiniteError, while it runs, for NaN logits
    """
    rows = model.config.vocab_size
    vocab_size = rows if vocab_size is None else vocab_size
    prompt = check_arguments(
        prompt_ids, rows, vocab_size, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def stream() -> Iterator[int]:
        seq_len = model.config.seq_len
        context = unread = prompt[-seq_len:]
        cache = KVCache(model.config)
        for _ in range(max_new_tokens):
            if cache.length + len(unread) > seq_len:
                context = unread = context[-max(1, seq_len // 2) :]
                cache = KVCache(model.config)
            logits_V = _read(model, unread, cache)[:vocab_size]
            probs_V = next_token_probs(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
            token = int(torch.multinomial(probs_V, 1, generator=generator))
            if token == eot:
                return
            yield token
            context.append(token)
            unread = [token]

    return stream()


@torch.no_grad()  # not inference_mode: rounded copies of the weights may be made here that training uses later
def _read(model: GPT, tokens: list[int], cache: KVCache) -> Tensor:
    """Logits of the token that follows, on the CPU."""
    idx_BT = torch.tensor([tokens], device=next(model.parameters()).device)
    logits_BTV: Tensor = model(idx_BT, kv_cache=cache, last_only=True)
    return logits_BTV[0, -1].cpu()
