"""The config of a training run: typed, checked, written back whole into the run directory."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzo.errors import ConfigError
from mezzo.models.shapes import GPTConfig, preset
from mezzo.policy import Phase, Policy, Schedule
from mezzo.policy.phases import named
from mezzo.policy.trigger import trigger

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
SAMPLE_EVERY = 50  # observe.every, where the framework measures sites


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelSection(_Section):
    """model.*: a preset, and any of its sizes replaced."""

    preset: str = "gpt-proof"
    vocab_size: Count | None = None
    layers: Count | None = None
    d_model: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    seq_len: Count | None = None
    mlp: Literal["swiglu", "gelu"] | None = None
    mlp_ratio: float | None = None
    hidden: Count | None = None
    norm: Literal["rmsnorm", "layernorm"] | None = None
    norm_eps: float | None = None
    positions: Literal["rope", "learned"] | None = None
    rope_theta: float | None = None
    qk_norm: bool | None = None
    bias: bool | None = None
    tied: bool | None = None

    def resolve(self, **more: Any) -> GPTConfig:
        """The model's shape; `more` replaces further fields."""
        given = {k: v for k, v in self.model_dump(exclude={"preset"}).items() if v is not None}
        return preset(self.preset, **(given | more))


class DataSection(_Section):
    """data.*: which text, and how it becomes tokens."""

    corpus: str = "stdlib"
    text_key: str = "text"
    vocab_size: Annotated[int, Field(ge=258)] = 4096
    tokenizer: str | None = None
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    cache: str | None = None


class TrainSection(_Section):
    """train.*: the loop."""

    steps: Count = 1000
    seed: Annotated[int, Field(ge=0)] = 0
    batch: Count = 8
    accumulate: Count = 1
    lr: Annotated[float, Field(gt=0)] = 3e-3
    min_lr: Share = 0.1
    warmup: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay: Share = 0.2
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip: Annotated[float, Field(ge=0)] = 1.0  # total norm of the gradients; 0 clips nothing
    clip_value: Annotated[float, Field(ge=0)] = 0.0
    clip_adaptive: Annotated[float, Field(ge=0)] = 0.0
    prune: Literal["none", "magnitude", "2:4"] = "none"
    prune_sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    prune_begin: Share = 0.1  # of the steps of the run, as prune_end
    prune_end: Share = 0.6
    prune_every: Count = 20
    checkpoint_every: Count = 500
    keep: Count = 2
    eval_every: Count = 250
    eval_batches: Count = 20
    sample_every: Annotated[int, Field(ge=0)] = 0
    sample_prompt: str = "def "
    checkpoint_activations: bool = False
    compile: bool = False
    tensorboard: bool = False
    framework: Literal["torch", "jax", "tensorflow"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool | None = None


class ObserveSection(_Section):
    """observe.*: what is measured of the sites while training, and what is kept of what goes wrong."""

    every: Annotated[int, Field(ge=0)] | None = (
        None  # steps between two samples; 0: none; None: SAMPLE_EVERY, if it can
    )
    whatif: tuple[str, ...] = ()  # further policies, measured at the same tensors
    incidents: Annotated[int, Field(ge=0)] = 20  # the most that are kept

    @property
    def interval(self) -> int:
        """Steps between two samples under a framework that measures sites."""
        return SAMPLE_EVERY if self.every is None else self.every


class PhaseSection(_Section):
    """[[phase]]: one part of the run; its policy is the config's unless it names another, with `rules` on top."""

    policy: str | dict[str, Any] | None = None
    rules: str | None = None  # SITE=FORMAT; …
    lr: Annotated[float, Field(gt=0)] = 1.0
    until: int | float | None = None
    when: dict[str, Any] | None = None
    calibrate: bool = False

    def resolve(self, base: Policy) -> Phase:
        policy = base if self.policy is None else _policy(self.policy)
        if self.rules is not None:
            policy = policy.with_rules(*Policy.parse(f"fp32; {self.rules}").rules)
        return Phase(policy, self.lr, self.until, None if self.when is None else trigger(self.when), self.calibrate)


class Config(_Section):
    """Everything needed to run it again."""

    policy: str | dict[str, Any] = "bf16"
    phase: str | tuple[PhaseSection, ...] | None = None
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    observe: ObserveSection = ObserveSection()

    def resolved_policy(self) -> Policy:
        return _policy(self.policy)

    def schedule(self) -> Schedule | None:
        """The run's phases; None if it has one policy throughout.

        raises    ConfigError on phases that overlap, never end or leave steps without a policy
        """
        if self.phase is None:
            return None
        base = self.resolved_policy()
        if isinstance(self.phase, str):
            return Schedule(named(self.phase, base), self.train.steps)
        found = []
        for number, section in enumerate(self.phase, 1):
            try:
                found.append(section.resolve(base))
            except ConfigError as error:
                raise ConfigError(f"phase {number}: {error}") from error
        return Schedule(tuple(found), self.train.steps)

    def self_contained(self) -> Config:
        """The same config with its policy as it is now, spelled out: it names no recipe's file any more."""
        phases = self.phase
        if isinstance(phases, tuple):
            phases = tuple(
                one if one.policy is None else one.model_copy(update={"policy": _spelled_out(one.policy)})
                for one in phases
            )
        return self.model_copy(update={"policy": _spelled_out(self.policy), "phase": phases})

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def _policy(given: str | dict[str, Any]) -> Policy:
    return Policy.parse(given) if isinstance(given, str) else Policy.from_dict(given)


def _spelled_out(given: str | dict[str, Any]) -> str | dict[str, Any]:
    policy = _policy(given)
    return str(policy) if isinstance(given, str) else policy.to_dict()


def load(path: str | Path | None = None, settings: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> Config:
    """Read a config.

    path       a TOML file; None starts from `base` or from the defaults
    settings   `key=value` pairs that win over the file, such as train.steps=200; the value is TOML, or a bare string
    raises     ConfigError naming the key, what was given and what is possible
    """
    data: dict[str, Any] = {key: _copied(value) for key, value in (base or {}).items()}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"no config file {path}; without one `mezzo train` chooses a model, other verbs take the defaults"
            ) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} is not a config: {error}") from error
    seen: set[str] = set()
    for setting in settings:
        key = _apply(data, setting)
        if key in seen:
            raise ConfigError(f"--set {key} is given twice")
        seen.add(key)
    return parse(data)


def parse(data: Mapping[str, Any]) -> Config:
    """Check a config given as nested dicts; ConfigError says what is wrong with which key."""
    try:
        config = Config.model_validate(_tuples(data))
    except ValidationError as error:
        raise ConfigError(
            "; ".join(dict.fromkeys(text for e in error.errors() if (text := _explain(dict(e)))))
        ) from None
    config.model.resolve()
    config.schedule()
    for policy in config.observe.whatif:
        _policy(policy)
    _check_pruning(config.train)
    return config.self_contained()


def _check_pruning(t: TrainSection) -> None:
    if t.prune == "magnitude" and t.prune_begin > t.prune_end:
        raise ConfigError(
            f"train.prune_begin = {t.prune_begin} comes after train.prune_end = {t.prune_end}; give a smaller begin or "
            "a larger end, both shares of the run"
        )
    if t.prune == "2:4" and t.prune_sparsity != 0.5:
        raise ConfigError(
            f"train.prune_sparsity = {t.prune_sparsity}, but train.prune = '2:4' makes it 0.5; leave it out, or take "
            "train.prune = 'magnitude'"
        )


def _apply(data: dict[str, Any], setting: str) -> str:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, such as train.steps=200; got {setting!r}")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *groups, leaf = key.split(".")
    at = data
    for group in groups:
        at = at.setdefault(group, {})
        if not isinstance(at, dict):
            raise ConfigError(f"--set {key}: {group} is a value, not a group of keys")
    at[leaf] = value
    return key


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _tuples(value: Any) -> Any:
    """TOML has lists only, and whole numbers where a float was meant; strict checking wants tuples."""
    if isinstance(value, Mapping):
        return {k: _tuples(v) if k != "policy" else v for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _explain(error: dict[str, Any]) -> str:
    where = [str(part) for part in error["loc"]]
    if where[0] == "policy":  # pydantic tells of each form that it might have had
        return f"policy: a string such as bf16, or a table with recipe, rule, loss_scale; got {error['input']!r}"
    if where[0] == "phase":
        if len(where) < 3:
            if isinstance(error["input"], (list, tuple)):
                return ""  # no name; what is wrong with which phase is told beside this
            return f"phase: the name of a schedule such as dmp, or a list of [[phase]]; got {error['input']!r}"
        key = ".".join([f"phase {int(where[2]) + 1}", *where[3:4]])
        if error["type"] == "extra_forbidden":
            close = difflib.get_close_matches(where[3], PhaseSection.model_fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(PhaseSection.model_fields)}"
            return f"unknown key {where[3]!r} in {key.partition('.')[0]}; {hint}"
        wanted = _PHASE_VALUES.get(".".join(where[3:4]), error["msg"])
        return f"{key}: {wanted}, got {error['input']!r}"
    key = ".".join(where)
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in where[:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        close = difflib.get_close_matches(where[-1], known, n=1)
        if not close:
            elsewhere = [f"{group}.{where[-1]}" for group in _GROUPS if where[-1] in _GROUPS[group].model_fields]
            hint = f"did you mean {elsewhere[0]}?" if elsewhere else f"known: {', '.join(known)}"
            return f"unknown key {key!r}; {hint}"
        return f"unknown key {key!r}; did you mean {'.'.join([*where[:-1], close[0]])}?"
    if error["type"] == "model_type":
        return (
            f"{key} is a group of keys, such as {key}.{next(iter(_GROUPS[key].model_fields))}; got {error['input']!r}"
        )
    wanted = "a list, such as ['nvfp4']" if error["type"] == "tuple_type" else error["msg"]
    return f"{key}: {wanted}, got {error['input']!r}"


_PHASE_VALUES = {
    "": "a table of keys such as until",
    "until": "a step, or a share of the run with a point",
    "policy": "a string such as bf16, or a table with recipe, rule, loss_scale",
    "when": "a table such as {trigger = 'stall'}",
}
_GROUPS: dict[str, type[_Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "train": TrainSection,
    "observe": ObserveSection,
}
