"""Rules by depth: `blocks.last-13%.*` speaks of the last 13% of the modules numbered below `blocks`.

`first-N%` and `last-N%` stand in a path where a number would; with `.*` behind them they mean the block itself too. How
many blocks they mean is known once there is a model: N% of them, rounded to the nearest whole number (half to even), so
perhaps none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from mezzo.policy.rule import Rule

_DEPTH = re.compile(r"(?:^|(?<=\.))(first|last)-([1-9]\d?|100)%(?=\.|$)")


def by_depth(rule: Rule) -> bool:
    return _DEPTH.search(rule.path) is not None


def numbered(rule: Rule, paths: Iterable[str]) -> int:
    """How many modules are numbered at the place of `first-N%` or `last-N%`."""
    match = _DEPTH.search(rule.path)
    assert match is not None
    before = rule.path[: match.start()]
    count = 0
    for path in paths:
        parts = path.split(".")
        for at, part in enumerate(parts):
            if part.isdecimal() and fnmatchcase("".join(f"{p}." for p in parts[:at]), before):
                count = max(count, int(part) + 1)
    return count


def expand(rules: Iterable[Rule], paths: Iterable[str]) -> tuple[Rule, ...]:
    """The rules for a model with these module paths: each rule by depth becomes one for each block that it means."""
    known, found = list(paths), []
    for rule in rules:
        match = _DEPTH.search(rule.path)
        if match is None:
            found.append(rule)
            continue
        total = numbered(rule, known)
        count = round(total * int(match[2]) / 100)
        blocks = range(count) if match[1] == "first" else range(total - count, total)
        before, after = rule.path[: match.start()], rule.path[match.end() :]
        for i in blocks:
            if after == ".*":  # the block with all that is below it
                found.append(replace(rule, path=f"{before}{i}"))
            found.append(replace(rule, path=f"{before}{i}{after}"))
    return tuple(found)
