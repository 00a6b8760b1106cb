"""Whole policies by name: the rules that `Policy(recipe=NAME)` starts from.

A recipe says what the products' operands are rounded to, what norms, softmax, embeddings and losses compute in, and
how the weights are stored. Weight gradients stay float32 in every low recipe: their sum over the batch is where 16
bits lose most, and keeping it is free where the accumulator is float32 (the sums then never pass through 16 bits).
For the same reason the logits of an output head (`head`, `lm_head`) reach the loss as the accumulator holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from mezzo.policy.rule import Rule
from mezzo.policy.scale import LossScaling


@dataclass(frozen=True)
class Recipe:
    """A named policy: its rules in order, its loss scaling, and where it comes from."""

    name: str
    about: str
    source: str
    rules: tuple[Rule, ...]
    loss_scaling: LossScaling | None = None


def _rules(operands: str, out: str, sums: str, compute: str, master: str) -> tuple[Rule, ...]:
    table = {
        "*:input": operands,
        "*:weight": operands,
        "*:grad_output": operands,
        "*:out": out,
        "*:wgrad.out": sums,
        "head:fprop.out": sums,
        "lm_head:fprop.out": sums,
        "*:compute": compute,
        "*:master": master,
    }
    return tuple(Rule.parse(site, fmt) for site, fmt in table.items())


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "fp64",
            "everything in float64: the reference",
            "IEEE 754-2019",
            _rules("float64", "float64", "float64", "float64", "float64"),
        ),
        Recipe(
            "fp32",
            "everything in float32, never TF32",
            "IEEE 754-2019",
            _rules("float32", "float32", "float32", "float32", "float32"),
        ),
        Recipe(
            "tf32",
            "operands of products rounded to 10 bits of fraction, float32 elsewhere",
            "NVIDIA A100 Tensor Core GPU Architecture, 2020",
            _rules("tf32", "float32", "float32", "float32", "float32"),
        ),
        Recipe(
            "bf16",
            "products in bfloat16 with float32 sums; norms, softmax, loss and masters in float32",
            "Kalamkar et al. 2019, arXiv 1905.12322",
            _rules("bfloat16", "bfloat16", "float32", "float32", "float32"),
        ),
        Recipe(
            "fp16",
            "as bf16 but in float16, with dynamic loss scaling",
            "Micikevicius et al. 2017, arXiv 1710.03740",
            _rules("float16", "float16", "float32", "float32", "float32"),
            LossScaling(),
        ),
    )
}
