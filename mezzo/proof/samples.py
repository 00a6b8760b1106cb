"""Quality as people feel it: what the models of both policies write from the same prompts with the same seeds."""

from __future__ import annotations

import ast
import warnings
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzo.train.session import Session

CODE_PROMPTS = ("def ", "class ", "import ", "for ")
TOKENS = 64
DRAWS = 2  # samples a prompt


def prompts_for(session: Session) -> list[str]:
    """Beginnings of Python code for the stdlib corpus, else of held-out text."""
    if session.config.data.corpus == "stdlib":
        return list(CODE_PROMPTS)
    tokenizer = session.corpus.tokenizer
    return [tokenizer.decode(x[0, :8].tolist()) for x, _ in islice(session.valid(), len(CODE_PROMPTS))]


def draw(session: Session) -> list[dict[str, str | int]]:
    """Samples under the policy that the session's run ended with, at temperature 0.8 among the 50 best tokens."""
    return [
        {"prompt": prompt, "seed": seed, "text": session.sample(prompt, TOKENS, seed)}
        for prompt in prompts_for(session)
        for seed in range(DRAWS)
    ]


def parses(text: str) -> bool:
    """Whether the whole lines of a sample are Python: all up to the last line break, which the token limit cut off."""
    whole, _, _ = text.rpartition("\n")
    if not whole.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes, say
            ast.parse(whole + "\n")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
