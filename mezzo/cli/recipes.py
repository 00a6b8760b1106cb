"""`mezzo recipes`: the policies that have a name, and one of them rule by rule."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from mezzo.hardware import Hardware
    from mezzo.policy import Recipe, Rule

OPERANDS = ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b")
SHORT = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


@click.command()
@click.argument("name", required=False, metavar="[NAME|FILE]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes(name: str | None, as_json: bool) -> None:
    """Every recipe: what it does, what it gives the operands of products, and where it comes from.

    With a NAME, or a TOML file of your own: every rule, how this machine carries the formats out, how to build on it.

    \b
    Examples:
      mezzo recipes
      mezzo recipes nvfp4
      mezzo recipes fp8-block --json
    """
    from mezzo.cli.formats import table_console, this_machine
    from mezzo.policy import RECIPES

    if name is None:
        records = [_record(recipe) for recipe in RECIPES.values()]
        if as_json:
            click.echo(json.dumps({"recipes": records}, indent=2))
        else:
            _print_list(table_console(), records)
        return
    hardware, machine = this_machine()
    recipe = _named(name)
    record = _record(recipe) | {"routes": _routes(recipe, hardware, machine["reason"]), "toml": _starter(name)}
    if as_json:
        click.echo(json.dumps({"machine": machine, "recipes": [record]}, indent=2))
    else:
        _print_page(table_console(), record, machine)


def _named(name: str) -> Recipe:
    """The recipe of that name, or what a user's own file says.

    raises    ConfigError if there is none
    """
    from mezzo.policy import RECIPES, Policy, Recipe, recipe_file

    if not recipe_file.is_file(name):
        return RECIPES[Policy(name).recipe]  # Policy's error for an unknown name says which are known
    texts, policy = recipe_file.read(name), Policy.parse(name)
    about, source, detail = (" ".join(texts.get(key, "").split()) for key in recipe_file.TEXTS)
    return Recipe(name, about, source, policy.all_rules(), policy.loss_scaling, detail, policy.recipe)


def _record(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON has it."""
    from mezzo.policy import RECIPES, Site
    from mezzo.policy.policy import find

    inherited = len(RECIPES[recipe.base].rules) if recipe.base else 0
    operands = [find(recipe.rules, Site("x", role)) for role in OPERANDS]  # of a layer that no rule names
    return {
        "name": recipe.name,
        "about": recipe.about,
        "detail": recipe.detail,
        "source": recipe.source,
        "base": recipe.base or None,
        "operands": list(dict.fromkeys(str(spec.fmt) for spec in operands if spec)),
        "loss_scale": None if recipe.loss_scaling is None else recipe.loss_scaling.to_dict(),
        "rules": [
            {"site": rule.site, "format": str(rule.spec), "own": at >= inherited}
            for at, rule in enumerate(recipe.rules)
        ],
    }


def _routes(recipe: Recipe, hardware: Hardware | None, unknown: str | None) -> dict[str, dict[str, str | None]]:
    """Format → how products of it run here, for every format that a rule gives to operands of products."""
    formats = {rule.fmt.name: rule.fmt for rule in recipe.rules if _of_products(rule)}
    routes = {name: hardware.route(fmt) if hardware else ("unknown", unknown) for name, fmt in formats.items()}
    return {name: {"route": route, "reason": reason} for name, (route, reason) in routes.items()}


def _of_products(rule: Rule) -> bool:
    return any(role in OPERANDS for role in rule.roles())


def _starter(name: str) -> str | None:
    """A file that builds on the recipe, to be copied and changed; None where the recipe is a file itself."""
    from mezzo.policy import RECIPES

    if name not in RECIPES:
        return None
    wide = "float64" if name == "fp64" else "float32"
    return (
        f'about = "{name}, with the output head in {wide}"\n'
        f'recipe = "{name}"  # its rules come first, then yours: the last that matches a site wins\n\n'
        f'[[rule]]\nsite = "head:*"  # PATH:ROLE of your model; a path may be a glob, such as blocks.0.*\n'
        f'format = "{wide}"\n'
    )


def _print_list(console: Console, records: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("recipe", "base", "operands", "what it does", "source", box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for record in records:
        operands = ", ".join(map(_short, record["operands"]))
        table.add_row(record["name"], record["base"] or "", operands, record["about"], record["source"])
    console.print(table)
    console.print(
        "\noperands: what a layer without a rule of its own multiplies in; head, attention and the ends of a deep model"
        " may differ\nOne recipe in full: mezzo recipes nvfp4"
    )


def _short(name: str) -> str:
    element, at, group = name.partition("@")
    return SHORT.get(element, element) + at + group


def _print_page(console: Console, record: dict[str, Any], machine: dict[str, Any]) -> None:
    from rich.table import Table

    if machine["device"] is None:
        here = f"unknown: {machine['reason']}"
    else:
        routes = "\n".join(f"{name}: {r['route']}: {r['reason']}" for name, r in record["routes"].items())
        here = f"on {machine['device']} ({machine['name']})\n{routes}"
    scale = record["loss_scale"]
    page = {
        "recipe": record["name"],
        "about": record["about"],
        "detail": record["detail"],
        "source": record["source"],
        "base": record["base"],
        "loss scaling": "none" if scale is None else ", ".join(f"{key} {value:.10g}" for key, value in scale.items()),
        "here": here,
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in page.items():
        if text:
            table.add_row(name, text)
    console.print(table)
    console.print("\nIts rules; the last that matches a site wins:")
    rules = Table("from", "site", "format", box=None, pad_edge=False, header_style="bold")
    for rule in record["rules"]:
        rules.add_row(record["name"] if rule["own"] else record["base"], rule["site"], rule["format"])
    console.print(rules)
    if record["toml"]:
        console.print("\nTo build on it, save this as my.toml and train with --policy my.toml:\n")
        console.print(record["toml"].rstrip(), soft_wrap=True)
