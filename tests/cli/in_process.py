"""What a `mezzo` run in this process gives back, and a text to train on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

WORDS = "the cat sat on a mat and saw rain fall over green hills while birds sang old songs of stone water light"


class Done(NamedTuple):
    code: int
    out: str
    err: str


Mezzo = Callable[..., Done]


def write_text(path: Path, paragraphs: int = 12, seed: int = 1) -> Path:
    rng = random.Random(seed)
    words = WORDS.split()
    path.write_text("\n\n".join(" ".join(rng.choice(words) for _ in range(60)) + "." for _ in range(paragraphs)))
    return path
