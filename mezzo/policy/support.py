"""What each framework can carry out: one list, behind both the errors and the table in the docs.

A feature that an adapter lacks is an error when a policy asks for it, never left out silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mezzo.errors import ConfigError
from mezzo.policy.phases import Phase
from mezzo.policy.policy import Policy
from mezzo.policy.rule import Rule
from mezzo.policy.site import STATE_ROLES
from mezzo.policy.trigger import Underflow

FRAMEWORKS = ("torch", "jax", "tensorflow")
_PLAIN = ("float32", "float64")


@dataclass(frozen=True)
class Feature:
    """Something that a policy or a training loop can ask for.

    name     as people read it
    used     whether a rule asks for it; None: it is not asked for by a rule
    lacks    framework → what to do instead, in the imperative
    """

    name: str
    used: Callable[[Rule], bool] | None = None
    lacks: dict[str, str] = field(default_factory=dict)


def _both(remedy: str) -> dict[str, str]:
    return {"jax": remedy, "tensorflow": remedy}


def _stores(rule: Rule, roles: Iterable[str]) -> bool:
    return any(role in rule.roles() for role in roles)


FEATURES: tuple[Feature, ...] = (
    Feature("operands, results and gradients in 16, 8, 6 and 4 bits, element and block formats"),
    Feature("stochastic rounding from the same random words"),
    Feature("random Hadamard transforms"),
    Feature("current tensor, row and block scales"),
    Feature(
        "delayed tensor scales (`delayed`)",
        lambda rule: bool(rule.spec.delayed),
        _both("drop the word delayed: the tensor's own amax then decides"),
    ),
    Feature("dynamic loss scaling, nonfinite steps skipped, clipping by norm"),
    Feature("attention's own roles (query, key, value, probs)"),
    Feature(
        "16-bit operations between products (a product's result is a 16-bit tensor)",
        None,
        _both("nothing to do: what a product gives is rounded and goes on in float32"),
    ),
    Feature(
        "norms, softmax and losses in another format than float32 (`compute`)",
        lambda rule: _stores(rule, ("compute",)) and rule.role == "compute" and rule.fmt.name not in _PLAIN,
        _both("drop the rule: they run in the model's own dtype"),
    ),
    Feature(
        "weights stored below 32 bits (`master` in bfloat16, kahan, split)",
        lambda rule: _stores(rule, ("master",)) and rule.fmt.name not in _PLAIN,
        _both("keep float32 masters"),
    ),
    Feature(
        "moments stored below 32 bits (`state`)",
        lambda rule: _stores(rule, STATE_ROLES) and rule.fmt.name not in _PLAIN,
        _both("keep float32 moments"),
    ),
    Feature("phases: another policy from a step, a share of the run or a trigger on"),
    Feature(
        "loss scale measured by a calibrating phase",
        None,
        _both("let the next phase's loss scale begin at its init: phases without calibrate"),
    ),
    Feature("the trigger `underflow`", None, _both("take another trigger: stall, skipped, loss_scale, parts")),
    Feature("statistics of every site, and what another policy would lose"),
    Feature(
        "what other operations keep for the backward pass (`saved`)",
        lambda rule: _stores(rule, ("saved",)) and rule.fmt.name not in _PLAIN,
        _both("drop the rule, or checkpoint activations"),
    ),
)


def refuse(policy: Policy, framework: str) -> None:
    """Refuse what a policy asks for and a framework's adapter cannot carry out.

    raises    ConfigError that names the rule, the feature and what to do instead
    """
    for rule in policy.all_rules():
        for feature in FEATURES:
            if feature.used is not None and framework in feature.lacks and feature.used(rule):
                raise ConfigError(
                    f"{rule}: {feature.name} is not there under {framework}; {feature.lacks[framework]}, or train "
                    "under PyTorch"
                )


def refuse_phases(phases: Sequence[Phase], framework: str) -> None:
    """As `refuse`, for phases: their policies, triggers and calibrations."""
    for number, phase in enumerate(phases, 1):
        try:
            refuse(phase.policy, framework)
        except ConfigError as error:
            raise ConfigError(f"phase {number}: {error}") from error
        following = phases[number].policy.loss_scaling if number < len(phases) else None
        names = []
        if isinstance(phase.when, Underflow):
            names.append("the trigger `underflow`")
        if phase.calibrate and following is not None and not following.is_constant:
            names.append("loss scale measured by a calibrating phase")
        for feature in FEATURES:
            if feature.name in names and framework in feature.lacks:
                raise ConfigError(
                    f"phase {number}: {feature.name} is not there under {framework}; {feature.lacks[framework]}"
                )


def carried_out(recipe: str, framework: str) -> bool:
    """Whether a recipe has nothing that the framework's adapter lacks."""
    try:
        refuse(Policy(recipe), framework)
    except ConfigError:
        return False
    return True
