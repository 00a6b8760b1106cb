"""What the documents show is true: code runs, commands parse, keys and figures are real, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from doc_pages import (
    READMES,
    ROOT,
    anchor,
    blocks,
    commands,
    differs,
    headings,
    links,
    not_installed,
    pages,
    printed,
    prose,
    read,
    rows,
)
from pydantic import BaseModel

from mezzo.cli.main import cli
from mezzo.errors import MissingExtraError
from mezzo.policy import RECIPES, Policy
from mezzo.train.config import Config, load, parse

PAGES = pages()


@pytest.mark.usefixtures("undone")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page), "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = read(page)
    shown, left_out = printed(text), {}
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(text, "python"):
        if missing := not_installed(block.text):  # a framework or two; such a block stands by itself
            left_out[block.line] = missing
            continue
        source = "\n" * (block.line - 1) + block.text  # an error then names the page's own line
        capsys.readouterr()
        try:
            exec(compile(source, str(ROOT / page), "exec"), names)
        except MissingExtraError as error:  # what follows may build on it
            pytest.skip(f"{page} ran up to line {block.line}: {error}")
        if block.line in shown:
            assert differs(shown[block.line], capsys.readouterr().out) is None, f"{page}, line {block.line}"
    if left_out:
        pytest.skip(f"{page} ran but for the blocks at these lines, whose packages are not installed: {left_out}")


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in commands(read(page))])
def test_a_command_line_that_is_shown_parses(page: str, line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "mezzo tran",
        "mezzo train --dat x",
        "mezzo train a b",
        "mezzo train --set train.step=1",
        "mezzo train --policy bf17",
        "mezzo train --policy",
    ],
)
def test_that_test_can_fail(line: str) -> None:
    with pytest.raises((ValueError, click.ClickException, AssertionError)):
        check_command(line)


def check_command(line: str) -> None:
    """Verb, options and arguments exist; settings and policies mean something. Nothing runs."""
    _, verb, *arguments = shlex.split(line, comments=True)
    # With the group's settings: a command keeps the help option that it made for the first context it met.
    group = click.Context(cli, **cli.context_settings)
    if verb.startswith("-"):
        assert any(verb in p.opts for p in cli.get_params(group))
        return
    command = cli.get_command(group, verb)
    assert command is not None, f"there is no verb {verb}"
    context = click.Context(command, parent=group, info_name=verb)
    given, extra, _ = command.make_parser(context).parse_args(list(arguments))
    assert not extra, f"too many arguments: {extra}"
    settings = given.get("settings") or []
    load(None, settings)
    if isinstance(given.get("policy"), str):
        Policy.parse(re.sub(r"^my\.toml(?=;|$)", "bf16", given["policy"]))  # a file that the reader has, not we


@pytest.mark.parametrize("page", PAGES)
def test_toml_that_is_shown_is_a_config_or_a_recipe(page: str, tmp_path: Path) -> None:
    for block in blocks(read(page), "toml"):
        data = tomllib.loads(block.text)
        if "recipe" in data:
            (tmp_path / "my.toml").write_text(block.text)
            Policy.parse(str(tmp_path / "my.toml"))
        else:
            parse(data)


def test_the_config_table_has_every_key_with_its_default() -> None:
    documented = {row[0].strip("`"): row[1] for row in rows(read("docs/guide.md"), "key")}
    real = defaults(Config)
    assert list(documented) == list(real)
    for key, shown in documented.items():
        value = None if shown == "–" else tomllib.loads(f"value = {shown.strip('`')}")["value"]
        assert (tuple(value) if isinstance(value, list) else value) == real[key], key


def defaults(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= defaults(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.default
    return found


def test_the_recipes_of_the_guide_are_the_recipes() -> None:
    assert [row[0].strip("`") for row in rows(read("docs/guide.md"), "recipe")] == list(RECIPES)


def test_both_readmes_have_the_same_headings_blocks_and_tables() -> None:
    english, chinese = map(read, READMES)
    assert blocks(english) == [b._replace(line=a.line) for a, b in zip(blocks(english), blocks(chinese), strict=True)]
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert [line for line in english.splitlines() if line.startswith("    ")] == [
        line for line in chinese.splitlines() if line.startswith("    ")
    ]
    assert figures(english) == figures(chinese)
    assert english.count("\n|") == chinese.count("\n|")
    for text, other in ((english, "README.zh-CN.md"), (chinese, "README.md")):
        assert f"]({other})" in text.split("\n## ")[0]


def figures(text: str) -> list[str]:
    """Measured numbers and the places kept for them, in order of value: prose may name them in another order."""
    return sorted(re.findall(r"TODO-FIGURE: [^|。.]+|\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+", prose(text).replace("\n", " ")))


def test_one_example_has_nothing_to_do_with_text() -> None:
    assert any(
        "Conv2d" in block.text and "Embedding" not in block.text for block in blocks(read("README.md"), "python")
    )


def test_the_figure_of_exactness_is_the_measured_one() -> None:
    result = json.loads((ROOT / "benchmarks/results/exactness.json").read_text())
    for page in READMES:
        text = read(page)
        assert f"{result['results_compared']:,}" in text
        assert str(result["worst_ratio_to_bound"]) in text


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(read(page)):
        path, _, fragment = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if fragment:
            assert fragment in [anchor(title) for _, title in headings(file.read_text(encoding="utf-8"))], target


@pytest.mark.parametrize("page", READMES)
def test_scripts_and_folders_that_are_named_exist(page: str) -> None:
    text = read(page)
    for name in re.findall(r"`(benchmarks/\w+\.py)`", text) + re.findall(r"\bmezzo/[a-z]+\b", text):
        assert (ROOT / name).exists(), name
    makefile = read("Makefile")
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
