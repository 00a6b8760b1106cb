"""Drawing text from a model, one token at a time.

Shape suffixes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mezzo.errors import ConfigError, NonfiniteError
from mezzo.models.gpt_torch import GPT, KVCache


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
        raise NonfiniteError(
            f"{count} of {len(logits_V)} logits of the next token are NaN or infinite: the weights are damaged, or the "
            f"policy's formats are too narrow for this model; try --policy fp32, or an earlier checkpoint"
        )
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
