"""What each role of a site is given, checked: the part of the site table that all adapters share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mezzo.errors import ConfigError
from mezzo.formats import FLOAT32, AnyFormat, ScaledFormat
from mezzo.formats.spec import E8M0
from mezzo.policy.policy import find
from mezzo.policy.rule import Rule
from mezzo.policy.site import SHORTHANDS, Site
from mezzo.policy.spec import Spec

# Formats that tensors live in: they overflow to infinity. The others are for operands only, and saturate.
WIDE = ("float64", "float32", "tf32", "bfloat16", "float16")
OUTPUTS = ("fprop.out", "dgrad.out", "wgrad.out", "dgrad.query", "dgrad.key", "dgrad.value")

# The roles whose tensors carry the loss scale.
SCALED = (*SHORTHANDS["grad_output"], *(role for role in OUTPUTS if not role.startswith("fprop")))
# What the two products of explicit attention are called to those who listen.
SHOWN_SCORES = {
    "fprop.a": "fprop.query", "fprop.b": "fprop.key", "dgrad.out": "dgrad.query", "wgrad.out": "dgrad.key",
}  # fmt: skip
SHOWN_RESULT = {
    "fprop.a": "fprop.probs", "fprop.b": "fprop.value", "fprop.out": "fprop.out", "dgrad.a": "dgrad.dout",
    "wgrad.out": "dgrad.value",
}  # fmt: skip


def depends_on_axis(fmt: AnyFormat) -> bool:
    """Whether rounding along another axis gives other values; square blocks and tensor scales do not care."""
    return (
        isinstance(fmt, ScaledFormat) and fmt.group != "tensor" and (fmt.group == "row" or fmt.group[0] != fmt.group[1])
    )


def role_specs(rules: Sequence[Rule], roles: Sequence[str], path: str, call: int) -> dict[str, Spec]:
    """Role → what the rules give it, float32 where none speaks of it; `fprop.probs` only if one does.

    raises    ConfigError if a role cannot have what it is given
    """
    specs = {}
    for role in roles:
        spec = find(rules, Site(path, role, call))
        if spec is not None or role != "fprop.probs":
            specs[role] = spec or Spec(FLOAT32)
    check(path, specs)
    return specs


def shared(specs: Mapping[str, Spec], one: str, other: str) -> bool:
    """Whether a tensor rounded for one role serves the other, which sums over another axis."""
    # Random words and delayed scales are each role's own; the transform lies along the summed axis.
    return specs[one] == specs[other] and specs[one].plain and not depends_on_axis(specs[one].fmt)


def check(path: str, specs: Mapping[str, Spec]) -> None:
    """Refuse what a role cannot have."""
    for product in ("fprop", "dgrad", "wgrad"):
        blocks = [specs[role].hadamard for role in (f"{product}.a", f"{product}.b") if role in specs]
        if len(set(blocks)) > 1:
            raise ConfigError(
                f"{path}:{product}: a Hadamard transform of one operand is undone by that of the other, so both need "
                f"the same block; {product}.a has {blocks[0] or 'none'}, {product}.b has {blocks[1] or 'none'}. A rule "
                f"that gives one of them another format must speak of the other too, as {path}:wgrad.?=bfloat16 does"
            )
    delayed = [role for role, spec in specs.items() if spec.delayed]
    if "fprop.probs" in specs and delayed:
        raise ConfigError(
            f"{path}:{delayed[0]}={specs[delayed[0]]}: delayed scales are not for attention whose fprop.probs "
            "have a rule; drop that rule or the word delayed"
        )
    for role, spec in specs.items():
        fmt = spec.fmt
        if fmt is E8M0:
            raise ConfigError(f"{path}:{role}={fmt}: it is a format for scales, not for tensors")
        if role in OUTPUTS and fmt.name not in WIDE:
            raise ConfigError(
                f"{path}:{role}={fmt}: results of products are kept in {', '.join(WIDE)}; give the low format to "
                "the operands of the next product (input, weight, grad_output)"
            )


def check_no_blocks(path: str, specs: Mapping[str, Spec], what: str, roles: Sequence[str]) -> None:
    """Refuse formats with blocks, and transforms, where a product sums over several axes."""
    blocks = [role for role in roles if role in specs and (depends_on_axis(specs[role].fmt) or specs[role].hadamard)]
    if blocks:
        instead = "; ".join(f"{path}:{name}=bfloat16" for name in ("input", "weight", "grad_output"))
        raise ConfigError(
            f"{path}:{blocks[0]}={specs[blocks[0]]}: {what} sums over several axes in its three products, so "
            "blocks would lie across them; take a format without blocks, such as bfloat16 or e4m3@tensor, with the "
            f"rules {instead}"
        )


def check_same(path: str, specs: Mapping[str, Spec], what: str, roles: Sequence[str]) -> None:
    """Refuse formats that an operation with one rounded copy for these roles cannot tell apart, and blocks."""
    check_no_blocks(path, specs, what, roles)
    names = {role: str(specs[role]) for role in roles if role in specs}
    if len(set(names.values())) > 1:
        listed = ", ".join(f"{role}={name}" for role, name in names.items())
        raise ConfigError(f"{path}: {what} keeps one rounded copy for {listed}; give these roles one format")


def explicit_attention(found: Mapping[str, Spec], inner: Spec) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """The nine roles of explicit attention's two products, scores and result, from attention's own roles.

    Scores stay as the products' accumulator holds them; the gradients of probabilities and scores are rounded like the
    incoming gradient.

    inner    what is not rounded: the accumulator's format
    """
    scores = {
        "fprop.a": found["fprop.query"], "fprop.b": found["fprop.key"], "fprop.out": inner,
        "dgrad.a": found["dgrad.dout"], "dgrad.b": found["fprop.key"], "dgrad.out": found["dgrad.query"],
        "wgrad.a": found["dgrad.dout"], "wgrad.b": found["fprop.query"], "wgrad.out": found["dgrad.key"],
    }  # fmt: skip
    result = {
        "fprop.a": found["fprop.probs"], "fprop.b": found["fprop.value"], "fprop.out": found["fprop.out"],
        "dgrad.a": found["dgrad.dout"], "dgrad.b": found["fprop.value"], "dgrad.out": inner,
        "wgrad.a": found["dgrad.dout"], "wgrad.b": found["fprop.probs"], "wgrad.out": found["dgrad.value"],
    }  # fmt: skip
    return scores, result
