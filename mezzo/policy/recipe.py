"""Whole policies by name: one TOML file each in `recipes/`, in the form that a user's own has too.

A recipe says what the products' operands are rounded to, what norms, softmax, embeddings and losses compute in, and
how weights and moments are stored. Weight gradients stay float32 in every recipe but the pure ones: their sum over the
batch is where 16 bits lose most, and keeping it is free where the accumulator is float32 (the sums then never pass
through 16 bits). For the same reason the logits of an output head (`head`, `lm_head`) reach the loss as the accumulator
holds them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from mezzo.policy.rule import Rule
from mezzo.policy.scale import LossScaling

ORDER = (
    "fp64", "fp32", "tf32", "bf16", "fp16",
    "bf16-pure", "bf16-pure-kahan", "bf16-pure-split",
    "fp8", "fp8-row", "fp8-block", "mxfp8", "mxfp4", "nvfp4",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A named policy: its rules in order, its loss scaling, and where it comes from.

    about   what it does, one line
    detail  more, for `mezzo recipes NAME`
    base    the recipe whose rules come first; "" for none
    rules   all of them, those of the base first
    """

    name: str
    about: str
    source: str
    rules: tuple[Rule, ...]
    loss_scaling: LossScaling | None = None
    detail: str = ""
    base: str = ""


def _read(name: str, known: Mapping[str, Recipe]) -> Recipe:
    data: dict[str, Any] = tomllib.loads((files("mezzo.policy") / "recipes" / f"{name}.toml").read_text("utf-8"))
    base = known[data["recipe"]] if "recipe" in data else None
    rules = (*(base.rules if base else ()), *(Rule.parse(row["site"], row["format"]) for row in data["rule"]))
    scaling = LossScaling() if data.get("loss_scale") == "dynamic" else None
    detail = " ".join(data.get("detail", "").split())
    return Recipe(name, data["about"], data["source"], rules, scaling, detail, base.name if base else "")


def _all() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for name in ORDER:
        found[name] = _read(name, found)
    return found


RECIPES: dict[str, Recipe] = _all()
