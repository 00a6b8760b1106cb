"""A long row of token ids that may lie in several memory-mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]


class Tokens:
    """Shards seen as one row; nothing is read before it is asked for.

    shards   1-D integer arrays, in order
    """

    def __init__(self, shards: Sequence[IntArray]) -> None:
        self.shards = list(shards)
        self._ends = np.cumsum([0, *(len(shard) for shard in self.shards)])

    @classmethod
    def of(cls, tokens: Tokens | IntArray) -> Tokens:
        """Tokens of an array, or the Tokens themselves."""
        return tokens if isinstance(tokens, Tokens) else cls([np.asarray(tokens)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """A copy of the tokens start … start + count - 1; after the last token comes the first again.

        returns   (count,) int64
        raises    IndexError if there are no tokens or start is not one of them
        """
        if not 0 <= start < len(self):
            raise IndexError(f"token {start} of {len(self)}")
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right")) - 1
        at = start - int(self._ends[shard])
        while count > 0:
            part = self.shards[shard][at : at + count]
            parts.append(part)
            count -= len(part)
            shard, at = (shard + 1) % len(self.shards), 0
        return np.concatenate(parts).astype(np.int64)
