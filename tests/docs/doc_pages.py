"""Reads what the tests need out of Markdown: fenced blocks, headings, links, tables."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    kind: str
    text: str
    line: int  # of the first line of the text


def pages() -> list[str]:
    """Every document that a user reads."""
    return [*READMES, "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, kind: str | None = None) -> list[Block]:
    """The fenced blocks, or those of one language."""
    found = [Block(m[1], m[2], text[: m.start()].count("\n") + 2) for m in _FENCED.finditer(text)]
    return [block for block in found if kind is None or block.kind == kind]


def printed(text: str) -> dict[int, str]:
    """What a page says that its Python prints: a block of `text` right below one of `python`, by the latter's line."""
    found = list(_FENCED.finditer(text))
    pairs = [(a, b) for a, b in itertools.pairwise(found) if not text[a.end() : b.start()].strip()]
    return {text[: a.start()].count("\n") + 2: b[2] for a, b in pairs if (a[1], b[1]) == ("python", "text")}


def differs(shown: str, real: str) -> str | None:
    """Why `real` is not what is shown, None if it is: words to the letter, numbers to 2%: machines differ."""
    number = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")
    words = [re.sub(r"\s+", " ", number.sub("#", text)).strip() for text in (shown, real)]
    if words[0] != words[1]:
        return f"shown: {shown!r}, printed: {real!r}"
    for a, b in zip(number.findall(shown), number.findall(real), strict=True):
        if not math.isclose(float(a.replace(",", "")), float(b.replace(",", "")), rel_tol=0.02):
            return f"shown: {a}, printed: {b}, in {real!r}"
    return None


def not_installed(code: str) -> list[str]:
    """The packages that a block imports and that are not there."""
    nodes = list(ast.walk(ast.parse(code)))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return sorted({name.split(".")[0] for name in named if importlib.util.find_spec(name.split(".")[0]) is None})


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCED.sub("", text)


def headings(text: str) -> list[tuple[int, str]]:
    """Level and title of each heading, in order."""
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.+)$", prose(text), re.MULTILINE)]


def anchor(title: str) -> str:
    """The fragment under which GitHub finds a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def links(text: str) -> list[str]:
    """Targets of links that stay in the repository."""
    found = re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", prose(text))
    return [target for target in found if "://" not in target]


def commands(text: str) -> list[str]:
    """Every `mezzo …` command line: in shell blocks, and as inline code with something after the verb."""
    shown = [line for block in blocks(text, "sh") for line in block.text.splitlines()]
    inline = [span for span in re.findall(r"`([^`\n]+)`", prose(text).replace("\n", " ")) if span.count(" ") > 1]
    lines = [line.strip().removeprefix(".venv/bin/") for line in [*shown, *inline]]
    return [line for line in lines if line.startswith("mezzo ")]


def rows(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column is called `first`."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)
            break
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table
