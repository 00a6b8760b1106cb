"""Which frameworks can train, and which options of the loop each leaves to torch: one table, also for the docs.

What a policy and its phases ask for stands in mezzo.policy.support. An option that a framework cannot carry out is an
error before anything is made, with the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

from mezzo.errors import ConfigError, MissingExtraError
from mezzo.models.shapes import GPTConfig
from mezzo.policy.support import refuse, refuse_phases
from mezzo.train.config import Config
from mezzo.train.engine import Engine


@dataclass(frozen=True)
class Option:
    """A key of the config, or what one can ask for.

    asked    whether a config asks for what not every framework has
    lacks    framework → what to do instead, in the imperative
    """

    key: str
    asked: Callable[[Config], bool]
    lacks: dict[str, str] = field(default_factory=dict)


def _float64(config: Config) -> bool:
    schedule = config.schedule()
    policies = [config.resolved_policy()] if schedule is None else [phase.policy for phase in schedule.phases]
    return any(rule.fmt.name == "float64" for policy in policies for rule in policy.all_rules())


def _both(remedy: str) -> dict[str, str]:
    return {"jax": remedy, "tensorflow": remedy}


_NORM = "set it to 0; train.clip bounds the norm"
OPTIONS: tuple[Option, ...] = (
    Option("float64 sites", _float64, _both("take float32: its weights are float32 there")),
    Option("train.compile", lambda c: c.train.compile, _both("set it to false: its step is always compiled")),
    Option("train.deterministic", lambda c: c.train.deterministic is not None, _both("leave it out")),
    Option("train.checkpoint_activations", lambda c: c.train.checkpoint_activations, {"tensorflow": "set it to false"}),
    Option("train.clip_value", lambda c: c.train.clip_value > 0, _both(_NORM)),
    Option("train.clip_adaptive", lambda c: c.train.clip_adaptive > 0, _both(_NORM)),
    Option("train.prune", lambda c: c.train.prune != "none", _both("set it to 'none'")),
    Option("observe.every", lambda c: bool(c.observe.every), _both("set it to 0")),
    Option("observe.whatif", lambda c: bool(c.observe.whatif), _both("set it to []")),
)


@dataclass(frozen=True)
class Framework:
    """How to come by an engine.

    make      imports the framework and makes its engine
    package   that must be installed
    extra     of mezzo, that installs it
    """

    make: Callable[[Config, GPTConfig], Engine]
    package: str
    extra: str


def _torch(config: Config, shape: GPTConfig) -> Engine:
    from mezzo.train.torch_engine import TorchEngine

    return TorchEngine(config, shape)


def _jax(config: Config, shape: GPTConfig) -> Engine:
    from mezzo.train.jax_engine import JaxEngine

    return JaxEngine(config, shape)


def _tensorflow(config: Config, shape: GPTConfig) -> Engine:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else it tells of the instructions it was built for
    from mezzo.train.keras_engine import KerasEngine

    return KerasEngine(config, shape)


FRAMEWORKS: dict[str, Framework] = {
    "torch": Framework(_torch, "torch", "torch"),
    "jax": Framework(_jax, "jax", "jax"),
    "tensorflow": Framework(_tensorflow, "tensorflow", "tensorflow"),
}


def check(config: Config) -> None:
    """raises    ConfigError that names every option which the config's framework cannot carry out, with the remedies"""
    name = config.train.framework
    if name not in FRAMEWORKS:
        raise ConfigError(f"train.framework = {name!r} cannot train yet; take --framework {' or '.join(FRAMEWORKS)}")
    lacking = [f"{o.key} ({o.lacks[name]})" for o in OPTIONS if name in o.lacks and o.asked(config)]
    if lacking:
        raise ConfigError(f"{name} cannot carry out {', '.join(lacking)}; or take --framework torch")
    schedule = config.schedule()
    if schedule is None:
        refuse(config.resolved_policy(), name)
    else:
        refuse_phases(schedule.phases, name)


def make_engine(config: Config, shape: GPTConfig) -> Engine:
    """The engine of the config's framework, which is imported now.

    raises    ConfigError if it cannot carry the config out; MissingExtraError if it is not installed
    """
    check(config)
    framework = FRAMEWORKS[config.train.framework]
    if find_spec(framework.package) is None:
        raise MissingExtraError(
            f"train.framework = {config.train.framework!r} needs the package {framework.package!r}, which is not "
            f"installed; run: pip install 'mezzo[{framework.extra}]'"
        )
    return framework.make(config, shape)
