"""The command line as a whole: its verbs and options, its help, its speed, its errors."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import click
import pytest
from in_process import Mezzo

from mezzo.cli.main import cli

# Few flags: a verb takes its config, --set, and the handful that people use daily. Think twice before adding one.
OPTIONS = {
    "demo": ["--seconds"],
    "formats": ["NAMES", "--json"],
    "generate": ["RUN", "--prompt", "--tokens", "--temperature", "--top-k", "--top-p", "--seed", "--policy"],
    "incidents": ["RUN", "--json"],
    "parity": ["CONFIG", "--policy", "--against", "--seeds", "--margin", "--set", "--out", "--jobs"],
    "probe": ["--json", "--fresh"],
    "recipes": ["NAME", "--json"],
    "report": ["RUNS", "--out", "--live", "--port", "--lang"],
    "sites": ["SOURCE", "--policy", "--json"],
    "train": ["CONFIG", "--set", "--policy", "--data", "--framework", "--out", "--resume"],
    "whatif": ["SOURCE", "--policy", "--batches", "--batch", "--config", "--spare", "--all", "--json"],
}


def test_the_verbs_and_options_are_these_and_no_others() -> None:
    found = {
        name: [p.opts[0] if p.param_type_name == "option" else str(p.name).upper() for p in command.params]
        for name, command in cli.commands.items()
    }
    assert found == OPTIONS


def test_every_option_says_what_it_does() -> None:
    silent = [
        f"{name} {p.opts[0]}"
        for name, command in cli.commands.items()
        for p in command.params
        if isinstance(p, click.Option) and not p.help
    ]
    assert not silent


@pytest.mark.parametrize("verb", [(), *((name,) for name in OPTIONS if name != "demo")])
def test_help_has_examples_that_name_the_verb(mezzo: Mezzo, verb: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        done = mezzo(*verb, flag)
        assert (done.code, done.err) == (0, "")
        examples = done.out.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
        assert len(examples) >= 2
        assert all(line.strip().startswith(" ".join(("mezzo", *verb))) for line in examples)
        assert all(len(line) <= 100 for line in done.out.splitlines())


def test_the_options_in_the_examples_are_options() -> None:
    for command in (cli, *cli.commands.values()):
        for line in (command.help or "").partition("Examples:\n")[2].splitlines():
            words = line.split()
            if words:
                options = [p.opts[0] for p in cli.commands[words[1]].params]
                assert all(word in options for word in words if word.startswith("--")), line


def test_the_version_is_the_packages(mezzo: Mezzo) -> None:
    assert mezzo("--version") == (0, f"mezzo, version {version('mezzo')}\n", "")


HEAVY = ("torch", "pydantic", "rich", "tokenizers", "safetensors")
LOOK = f"""
import sys
{{}}
try:
    from mezzo.cli.main import cli
    cli(["{{}}", "--help"] if "{{}}" else ["--help"])
except SystemExit:
    pass
print("loaded:", *sorted(set({HEAVY}) & set(sys.modules)))
"""


@pytest.mark.parametrize("verb", ["", *OPTIONS])
def test_help_imports_nothing_heavy(verb: str) -> None:
    """A person waits for `mezzo --help`: half a second at most, and torch alone takes two."""
    done = subprocess.run([sys.executable, "-c", LOOK.format("", verb, verb)], capture_output=True, text=True)
    assert "Usage:" in done.stdout
    assert done.stdout.endswith("loaded:\n")


def test_that_test_would_see_a_heavy_import() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK.format("import rich", "", "")], capture_output=True, text=True)
    assert done.stdout.endswith("loaded: rich\n")


def test_an_unknown_verb_or_option_is_one_clear_error(mezzo: Mezzo) -> None:
    done = mezzo("trian")
    assert done.code == 2
    assert "No such command 'trian'" in done.err
    done = mezzo("train", "--steps", "5")
    assert done.code == 2
    assert "No such option" in done.err
    assert "Traceback" not in done.err
