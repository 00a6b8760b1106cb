"""What may end a phase before its last step: triggers, pure functions of the step records since the phase began.

A record is what the training loop writes for each step, a mapping with step, loss, skipped, loss_scale and, where they
were measured, val_loss, val_loss_fp32, underflow and reference_gap. A trigger looks at some keys of the last few.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from mezzo.errors import ConfigError
from mezzo.policy.rule import Rule
from mezzo.policy.site import TENSOR_ROLES, Site
from mezzo.policy.spec import Spec

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Trigger(ABC):
    """One condition; `fires` says whether it is met.

    name    its word in a config
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            wanted = {"int": (int,), "float": (int, float), "str": (str,)}[str(f.type)]
            if isinstance(value, bool) or not isinstance(value, wanted):
                kind = {"int": "a whole number", "float": "a number", "str": "a string"}[str(f.type)]
                raise ConfigError(f"the trigger {self.name}: {f.name} is {kind}, got {value!r}")
            if isinstance(value, int) and f.name in ("window", "evaluations", "every") and value < 1:
                raise ConfigError(f"the trigger {self.name}: {f.name} is at least 1, got {value}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"the trigger {self.name}: {f.name} is a finite number, got {value}")

    @property
    @abstractmethod
    def span(self) -> int:
        """How many remembered records count."""

    @abstractmethod
    def remembered(self, record: Record) -> dict[str, Any] | None:
        """What of a record this trigger needs later; None: nothing."""

    @abstractmethod
    def fires(self, memory: Sequence[Record]) -> bool:
        """Whether the phase ends now.

        memory    what `remembered` gave, in order, at most `span` of them, since the phase began
        """

    def to_dict(self) -> dict[str, Any]:
        return {"trigger": self.name, **asdict(self)}


@dataclass(frozen=True)
class Underflow(Trigger):
    """Too large a share of the values at a class of sites becomes zero.

    sites     PATH:ROLE as in a rule: the tensors before and after their rounding there
    above     share of the nonzero values that became zero, 0 … 1
    window    measurements whose mean counts
    every     steps between two measurements
    """

    sites: str
    above: float
    window: int = 10
    every: int = 10
    name: ClassVar[str] = "underflow"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.above < 1:
            raise ConfigError(f"the trigger underflow: above is a share from 0 to 1, got {self.above:g}")
        wrong = [role for role in self.rule.roles() if role not in TENSOR_ROLES or role == "compute"]
        if wrong:
            raise ConfigError(f"the trigger underflow: {self.sites} speaks of {wrong[0]}, which no product rounds")

    @property
    def rule(self) -> Rule:
        path, colon, role = self.sites.rpartition(":")
        if not colon:
            raise ConfigError(f"the trigger underflow: sites is PATH:ROLE, such as *:grad_output; got {self.sites!r}")
        return Rule(path, role, Spec.parse("float32"))

    def matches(self, site: Site) -> bool:
        return self.rule.matches(site)

    @property
    def span(self) -> int:
        return self.window

    def remembered(self, record: Record) -> dict[str, Any] | None:
        share = record.get("underflow", {}).get(self.sites)
        return None if share is None else {"underflow": share}

    def fires(self, memory: Sequence[Record]) -> bool:
        shares = [record["underflow"] for record in memory]
        return len(shares) >= self.window and sum(shares) / len(shares) > self.above

    def __str__(self) -> str:
        return f"more than {self.above:.2%} of {self.sites} underflows"


@dataclass(frozen=True)
class Skipped(Trigger):
    """More than `above` of the last `window` steps were skipped."""

    above: int
    window: int = 100
    name: ClassVar[str] = "skipped"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.above < self.window:
            raise ConfigError(
                f"the trigger skipped: above is from 0 to window - 1 = {self.window - 1}, got {self.above}"
            )

    @property
    def span(self) -> int:
        return self.window

    def remembered(self, record: Record) -> dict[str, Any] | None:
        return {"skipped": bool(record["skipped"])}

    def fires(self, memory: Sequence[Record]) -> bool:
        return sum(bool(record["skipped"]) for record in memory) > self.above

    def __str__(self) -> str:
        return f"more than {self.above} of {self.window} steps skipped"


@dataclass(frozen=True)
class LossScaleBelow(Trigger):
    """The loss scale has collapsed: a step's was below this."""

    below: float
    name: ClassVar[str] = "loss_scale"

    @property
    def span(self) -> int:
        return 1

    def remembered(self, record: Record) -> dict[str, Any] | None:
        return {"loss_scale": record["loss_scale"]}

    def fires(self, memory: Sequence[Record]) -> bool:
        return any(bool(record["loss_scale"] < self.below) for record in memory)

    def __str__(self) -> str:
        return f"the loss scale is below {self.below:g}"


def held_out(record: Record) -> float | None:
    """The held-out loss of a record, evaluated in float32 where it was."""
    loss: float | None = record.get("val_loss_fp32", record.get("val_loss"))
    return loss


@dataclass(frozen=True)
class Stall(Trigger):
    """The held-out loss has stopped to fall.

    evaluations    so many in a row …
    margin         … brought less than this share below the best before them
    """

    evaluations: int = 3
    margin: float = 0.001
    name: ClassVar[str] = "stall"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.margin < 1:
            raise ConfigError(f"the trigger stall: margin is a share from 0 to 1, got {self.margin:g}")

    @property
    def span(self) -> int:
        return 10**6  # the best of all before: evaluations are few

    def remembered(self, record: Record) -> dict[str, Any] | None:
        loss = held_out(record)
        return None if loss is None else {"loss": loss}

    def fires(self, memory: Sequence[Record]) -> bool:
        losses = [record["loss"] for record in memory]
        before, late = losses[: -self.evaluations], losses[-self.evaluations :]
        best = min((loss for loss in before if not math.isnan(loss)), default=math.inf)
        # NaN compares false, so a loss that is none counts as no improvement
        return bool(before) and not any(loss < best * (1 - self.margin) for loss in late)

    def __str__(self) -> str:
        return f"{self.evaluations} evaluations without an improvement of {self.margin:.2%}"


@dataclass(frozen=True)
class Parts(Trigger):
    """The held-out loss has parted from a reference run's at the same step.

    run            the reference's run directory
    above          relative gap, 0.005 for half a percent …
    evaluations    … at so many evaluations in a row
    """

    run: str
    above: float
    evaluations: int = 2
    name: ClassVar[str] = "parts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.above < 0:
            raise ConfigError(f"the trigger parts: above is a relative gap from 0 up, got {self.above:g}")

    @property
    def span(self) -> int:
        return self.evaluations

    def remembered(self, record: Record) -> dict[str, Any] | None:
        gap = record.get("reference_gap", {}).get(self.run)
        return None if gap is None else {"gap": gap}

    def fires(self, memory: Sequence[Record]) -> bool:
        return len(memory) >= self.evaluations and not any(record["gap"] <= self.above for record in memory)

    def __str__(self) -> str:
        return f"the held-out loss is {self.above:.2%} above that of {self.run}"


TRIGGERS: dict[str, type[Trigger]] = {t.name: t for t in (Underflow, Skipped, LossScaleBelow, Stall, Parts)}


def trigger(data: Mapping[str, Any]) -> Trigger:
    """From a table such as `{trigger = "skipped", above = 3, window = 100}`.

    raises    ConfigError on an unknown trigger or key, a key that is missing, a value out of range
    """
    given = dict(data)
    name = given.pop("trigger", None)
    kind = TRIGGERS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(f"a phase's when needs trigger = one of {', '.join(TRIGGERS)}; got {name!r}")
    known = [f.name for f in fields(kind)]
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} of the trigger {name}; known: {', '.join(known)}")
    try:
        return kind(**given)
    except TypeError as error:
        missing = [f.name for f in fields(kind) if f.name not in given and f.default is f.default_factory]
        raise ConfigError(f"the trigger {name} needs {', '.join(missing) or str(error)}") from None
