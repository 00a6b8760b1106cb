"""A policy is data: an ordered list of rules that gives each site a format. The last rule that matches wins.

As text, `str(Policy.parse(s)) == s` for the canonical spelling:

    bf16
    bf16; head:*=float32; blocks.0.*:input=float32
    fp16; loss_scale=1024

As TOML:

    recipe = "bf16"
    [[rule]]
    site = "head:*"
    format = "float32"

The recipe may be the path of such a file, `my.toml` or `my.toml; head:*=float32`: it is read once, and what the policy
then holds is the file's own recipe and rules, not the path.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import tomli_w

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat
from mezzo.policy import depth, recipe_file
from mezzo.policy.recipe import RECIPES, Recipe
from mezzo.policy.rule import Rule
from mezzo.policy.scale import LossScaling
from mezzo.policy.site import ROOT, Site
from mezzo.policy.spec import Spec

HEAD = "*head"  # what recipes call an output head
_OF_RECIPE: Any = object()  # not given: None would mean that the loss is not scaled


@dataclass(frozen=True)
class Policy:
    """Rules on top of a named recipe, and how the loss is scaled.

    recipe        a name of `mezzo.policy.RECIPES`; its rules come before `rules`
    rules         later rules win over earlier ones
    loss_scaling  the recipe's by default; None means that the loss is not scaled
    """

    recipe: str = "fp32"
    rules: tuple[Rule, ...] = ()
    loss_scaling: LossScaling | None = _OF_RECIPE

    def __post_init__(self) -> None:
        recipe = _recipe(self.recipe)
        if self.loss_scaling is _OF_RECIPE:
            object.__setattr__(self, "loss_scaling", recipe.loss_scaling)
        seen: set[str] = set()
        for rule in self.rules:
            if rule.site in seen:
                raise ConfigError(f"the policy has two rules for {rule.site!r}; keep one")
            seen.add(rule.site)

    @classmethod
    def of(cls, policy: str | Policy) -> Policy:
        """The policy itself, or the one that a string means."""
        if not isinstance(policy, (str, Policy)):
            raise ConfigError(f"a policy is text such as 'bf16', or a Policy; got {policy!r:.80}")
        return policy if isinstance(policy, Policy) else cls.parse(policy)

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read `recipe; site=format; …; loss_scale=dynamic|none|NUMBER`, the recipe a name or the path of a .toml file.

        A rule for a site that the file has a rule for takes its place.

        raises    ConfigError on an unknown recipe, role, format or key, a key given twice, a file that is no recipe
        """
        name, *rest = (part.strip() for part in text.split(";"))
        data: dict[str, Any] = {"recipe": name}
        rows: list[dict[str, str]] = []
        scale: dict[str, Any] = {}
        for part in rest:
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise ConfigError(f"expected SITE=FORMAT or loss_scale=…, got {part!r} in policy {text!r}")
            if ":" in key:
                rows.append({"site": key, "format": value})
            elif key.partition(".")[0] == "loss_scale":
                if key in scale:
                    raise ConfigError(f"{key} is given twice in policy {text!r}")
                scale[key] = value
            else:
                raise ConfigError(
                    f"unknown key {key!r} in policy {text!r}; known: loss_scale, loss_scale.FIELD, PATH:ROLE"
                )
        if scale:
            data["loss_scale"] = _scale_from_text(scale)
        return cls.from_dict(data | {"rule": rows})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """From what `to_dict` (or a TOML table of that form) gives; unknown keys are errors."""
        _known(data, ("recipe", "rule", "loss_scale"), "policy")
        recipe = data.get("recipe", "fp32")
        if not isinstance(recipe, str):
            raise ConfigError(f"policy.recipe is a string, got {recipe!r}")
        rows = data.get("rule", [])
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise ConfigError("policy.rule is a list of tables: write [[rule]] with site and format")
        rules = []
        for row in rows:
            _known(row, ("site", "format"), "policy.rule")
            missing = [key for key in ("site", "format") if not isinstance(row.get(key), str)]
            if missing:
                raise ConfigError(f"a policy rule needs the strings site and format, got {dict(row)!r}")
            rules.append(Rule.parse(row["site"], row["format"]))
        base = _base(recipe)
        own = cls(base.recipe, tuple(rules))  # two rules for one site in one text are an error, one in each are not
        sites = {rule.site for rule in own.rules}
        scaling = _scaling(data["loss_scale"]) if "loss_scale" in data else base.loss_scaling
        return cls(base.recipe, (*(rule for rule in base.rules if rule.site not in sites), *own.rules), scaling)

    @classmethod
    def from_toml(cls, text: str) -> Policy:
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"the policy is not valid TOML: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"recipe": self.recipe}
        if self.loss_scaling != _recipe(self.recipe).loss_scaling:
            scaling = self.loss_scaling
            data["loss_scale"] = "none" if scaling is None else scaling.to_dict()
        if self.rules:
            data["rule"] = [{"site": rule.site, "format": str(rule.spec)} for rule in self.rules]
        return data

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    def __str__(self) -> str:
        parts = [self.recipe, *map(str, self.rules)]
        scaling = self.loss_scaling
        if scaling != _recipe(self.recipe).loss_scaling:
            if scaling is None:
                parts.append("loss_scale=none")
            elif scaling == LossScaling.constant(scaling.init):
                parts.append(f"loss_scale={_text(scaling.init)}")
            else:
                parts.append("loss_scale=dynamic")
                usual = LossScaling().to_dict()
                parts += [
                    f"loss_scale.{key}={_text(value)}"
                    for key, value in scaling.to_dict().items()
                    if value != usual[key]
                ]
        return "; ".join(parts)

    def with_rules(self, *rules: Rule) -> Policy:
        """This policy with more rules; one for a site that has a rule already takes its place."""
        sites = {rule.site for rule in rules}
        return replace(self, rules=(*(rule for rule in self.rules if rule.site not in sites), *rules))

    def all_rules(self) -> tuple[Rule, ...]:
        """The recipe's rules, then the policy's own."""
        return (*_recipe(self.recipe).rules, *self.rules)

    def rules_for(self, paths: Iterable[str]) -> tuple[Rule, ...]:
        """All rules, those by depth (`blocks.last-13%.*`) written out for a model with these module paths."""
        return depth.expand(self.all_rules(), paths)

    def spec(self, site: Site) -> Spec | None:
        """What the rules give a site, or None where none speaks of it (the adapter then keeps float32).

        Rules by depth say nothing here: use `find` on `rules_for` a model's paths.
        """
        return find(self.all_rules(), site)

    def format(self, site: Site) -> AnyFormat | None:
        """The format of a site, or None where no rule speaks of it."""
        spec = self.spec(site)
        return None if spec is None else spec.fmt

    def spares_no_head(self, paths: Iterable[str]) -> bool:
        """Whether the recipe has rules for an output head (`*head`) and none of `paths` is one."""
        heads = [rule for rule in _recipe(self.recipe).rules if rule.path == HEAD and rule.role != "fprop.out"]
        known = list(paths)
        return bool(heads) and not any(rule.matches_path(path) for rule in heads for path in known)

    def check_paths(self, paths: Iterable[str]) -> None:
        """Refuse a rule of the policy's own whose path matches none of `paths`: it would be ignored silently."""
        known = list(paths)
        for rule in self.rules:
            meant = depth.numbered(rule, known) if depth.by_depth(rule) else any(map(rule.matches_path, known))
            if not meant:
                close = difflib.get_close_matches(rule.path.partition("#")[0], known, n=3, cutoff=0.4)
                first = ", ".join(path for path in known if path != ROOT)
                hint = f"; did you mean {' or '.join(close)}?" if close else f"; it has {first:.100}" if first else ""
                raise ConfigError(f"the rule {str(rule)!r} matches nothing in this model{hint}")


def find(rules: Sequence[Rule], site: Site) -> Spec | None:
    """What the last rule that matches gives the site."""
    for rule in reversed(rules):
        if rule.matches(site):
            return rule.spec
    return None


def _known(data: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in keys:
            raise ConfigError(f"unknown key {key!r} in {where}; known: {', '.join(keys)}")


def _scaling(value: object) -> LossScaling | None:
    """From `"none"`, `"dynamic"`, a number (a constant scale) or a table of fields."""
    if isinstance(value, Mapping):
        _known(value, tuple(f.name for f in fields(LossScaling)), "policy.loss_scale")
        return LossScaling(**value)
    if value == "none":
        return None
    if value == "dynamic":
        return LossScaling()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return LossScaling.constant(float(value))
    raise ConfigError(f"loss_scale is dynamic, none, a number or a table of fields; got {value!r}")


def _scale_from_text(keys: Mapping[str, str]) -> object:
    """What the keys `loss_scale` and `loss_scale.FIELD` of a policy string mean, in the form that TOML has it."""
    kind = keys.get("loss_scale", "dynamic")
    table = {key.partition(".")[2]: _number(value) for key, value in keys.items() if key != "loss_scale"}
    if table and kind != "dynamic":
        raise ConfigError(
            f"loss_scale={kind} leaves nothing for loss_scale.{next(iter(table))} to say; drop one of the two"
        )
    return table or (kind if kind in ("none", "dynamic") else _number(kind))


def _text(number: float) -> str:
    return str(int(number)) if float(number).is_integer() and abs(number) < 2**53 else repr(number)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _base(recipe: str) -> Policy:
    """A recipe as a policy, or what the file holds if it is the path of one."""
    if not recipe_file.is_file(recipe):
        return Policy(recipe)
    data = recipe_file.read(recipe)
    try:
        return Policy.from_dict({key: data[key] for key in recipe_file.KEYS if key in data})
    except ConfigError as error:
        raise ConfigError(f"the recipe file {recipe}: {error}") from error


def _recipe(name: str) -> Recipe:
    found = RECIPES.get(name)
    if found is None and recipe_file.is_file(name):
        raise ConfigError(f"Policy(…) takes a recipe's name; Policy.parse({name!r}) reads a file")
    if found is None:
        close = difflib.get_close_matches(name.lower(), RECIPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"unknown recipe {name!r}; known: {', '.join(RECIPES)}{hint or '; or a path ending in .toml'}"
        )
    return found
