"""Which tokens each step sees: a pure function of (seed, epoch, index).

B sequences in a batch, T tokens in a sequence, N tokens in all. The tokens are a ring: after the last comes the first,
which is sound because documents are independent of each other and each ends with the end token. An epoch cuts the ring
into ceil(N / T) windows from an offset of its own, so that every token is predicted in every epoch (up to T - 1 of them
twice, where the ring closes), and visits them in an order of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mezzo.data.tokens import Tokens
from mezzo.errors import ConfigError, DataError
from mezzo.formats.philox import bits, permute

Pair = tuple[NDArray[np.int64], NDArray[np.int64]]


class Batches:
    """Training batches without state: nothing to save, nothing to restore.

    The sequences of all epochs stand in one global row. Step s takes the next accumulate × world × batch of them; its
    micro-batch m on rank r takes `batch` of those, at (m × world + r) × batch. So the sequences of a step do not depend
    on how they are shared out between micro-batches and ranks.

    tokens      Tokens, or (N,) integers
    batch       B, sequences in a micro-batch on one rank
    seq_len     T
    seed        int in 0 … 2**64 - 1
    vocab_size  if given, a token outside 0 … vocab_size - 1 is an error when it is met
    rank, world this process among those that train together
    raises      DataError if there are fewer than T + 1 tokens; ConfigError if a size cannot be
    """

    def __init__(
        self,
        tokens: Tokens | NDArray[np.integer[Any]],
        *,
        batch: int,
        seq_len: int,
        seed: int,
        vocab_size: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.tokens = Tokens.of(tokens)
        _check_sizes(self.tokens, batch, seq_len, "training")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of world {world}: ranks are 0 … world - 1")
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed {seed} is out of range; give a whole number in 0 … 2**64 - 1")
        self.batch, self.seq_len, self.seed, self.vocab_size = batch, seq_len, seed, vocab_size
        self.rank, self.world = rank, world

    @property
    def windows(self) -> int:
        """Sequences in an epoch: ceil(N / T)."""
        return -(-len(self.tokens) // self.seq_len)

    def epoch(self, step: int, accumulate: int = 1) -> int:
        """The epoch, counted from 0, of the first sequence of a step."""
        return step * accumulate * self.world * self.batch // self.windows

    def batch_at(self, step: int, micro: int = 0, accumulate: int = 1) -> Pair:
        """The batch of one step.

        step        counted from 0
        micro       which of the step's micro-batches, 0 … accumulate - 1
        accumulate  micro-batches in a step
        returns     x (B, T) int64, and y (B, T) int64: the token that follows each token of x
        raises      ConfigError if micro or step is out of range; DataError if a token is outside the vocabulary
        """
        if step < 0 or not 0 <= micro < accumulate:
            raise ConfigError(f"step {step}, micro {micro} of {accumulate}: steps and micro-batches are counted from 0")
        first = ((step * accumulate + micro) * self.world + self.rank) * self.batch
        rows = [self.tokens.read(start, self.seq_len + 1) for start in self._starts(first)]
        block = np.stack(rows)  # (B, T + 1)
        _check_ids(block, self.vocab_size, f"the batch of step {step}")
        return np.ascontiguousarray(block[:, :-1]), np.ascontiguousarray(block[:, 1:])

    def _starts(self, first: int) -> Iterator[int]:
        """Where the windows of the global sequences first … first + B - 1 begin."""
        left = self.batch
        while left:  # once, or more often where a batch crosses into the next epoch
            epoch, index = divmod(first, self.windows)
            count = min(left, self.windows - index)
            order = permute(np.arange(index, index + count), self.windows, (self.seed, epoch))
            offset = _offset(self.seed, epoch, len(self.tokens))
            for window in order.tolist():
                yield (offset + window * self.seq_len) % len(self.tokens)
            first, left = first + count, left - count


@lru_cache(maxsize=8)
def _offset(seed: int, epoch: int, count: int) -> int:
    """Where an epoch's first window begins, anywhere in the ring of `count` tokens."""
    high, low = (int(word) for word in bits(seed, epoch, "mezzo.data.offset", 2))
    return ((high << 32 | low) * count) >> 64


def valid_batches(
    tokens: Tokens | NDArray[np.integer[Any]],
    batch: int,
    seq_len: int,
    limit: int | None = None,
    *,
    vocab_size: int | None = None,
) -> Iterator[Pair]:
    """Evaluation batches: consecutive windows from the start, always the same ones.

    Every target is predicted once; what is left over at the end, fewer than T tokens, is not. The last batch may have
    fewer rows. Weigh each batch by its number of targets: the mean over y.size, not over batches.

    tokens      Tokens, or (N,) integers
    batch       B
    seq_len     T
    limit       at most this many batches; None: the whole split
    vocab_size  if given, a token outside 0 … vocab_size - 1 is an error
    returns     iterator of x (≤ B, T) int64 and y (≤ B, T) int64
    raises      DataError if there are fewer than T + 1 tokens; ConfigError if a size cannot be
    """
    row = Tokens.of(tokens)
    _check_sizes(row, batch, seq_len, "validation")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}: give at least one batch, or None for all")
    windows = (len(row) - 1) // seq_len
    last = windows if limit is None else min(windows, limit * batch)
    return _valid_batches(row, batch, seq_len, last, vocab_size)


def _valid_batches(row: Tokens, batch: int, seq_len: int, last: int, vocab_size: int | None) -> Iterator[Pair]:
    for first in range(0, last, batch):
        count = min(batch, last - first)
        block = row.read(first * seq_len, count * seq_len + 1)
        _check_ids(block, vocab_size, "the validation text")
        yield block[:-1].reshape(count, seq_len), block[1:].reshape(count, seq_len)


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """What the model needs to write down one byte of text: comparable between tokenizers, as loss is not.

    loss        mean cross-entropy in nats per predicted token
    tokens      how many tokens that mean is over
    text_bytes  how many bytes of text they stand for. Exact for any stretch of a byte-level tokenizer:
                tokenizer.byte_lengths()[y].sum(); otherwise take tokens and bytes of the whole split from the manifest
    returns     bits per byte = loss × tokens / (text_bytes × ln 2)
    """
    return loss * tokens / (text_bytes * math.log(2))


def _check_sizes(tokens: Tokens, batch: int, seq_len: int, split: str) -> None:
    if batch < 1 or seq_len < 1:
        raise ConfigError(f"batch {batch}, seq_len {seq_len}: both must be 1 or more")
    if len(tokens) < seq_len + 1:
        raise DataError(
            f"the {split} text has {len(tokens):,} tokens, fewer than the {seq_len + 1:,} that one sequence of "
            f"{seq_len:,} and its last target need; give more text, a shorter sequence"
            + (", or a larger share of validation text (valid_fraction)" if split == "validation" else "")
        )


def _check_ids(block: NDArray[np.int64], vocab_size: int | None, where: str) -> None:
    if vocab_size is None:
        return
    low, high = int(block.min()), int(block.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{where} holds token {high if high >= vocab_size else low}, but the vocabulary is 0 … {vocab_size - 1}; "
            "the tokens were made by another tokenizer, or the model's vocab_size is too small"
        )
