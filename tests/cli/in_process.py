"""What a `mezzo` run in this process gives back, and a text to train on."""

from __future__ import annotations

import random
import re
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


def refused(done: Done, message: str, code: int = 1) -> None:
    """One clear error on stderr: no traceback, and the pattern in it."""
    assert done.code == code, done
    assert done.err.startswith("mezzo: error: ")
    assert re.search(message, done.err), done.err
    assert "Traceback" not in done.err + done.out
