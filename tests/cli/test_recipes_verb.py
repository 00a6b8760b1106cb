"""`mezzo recipes`: all of them, one rule by rule, and a user's own file on its way into a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from in_process import Mezzo

from mezzo import hardware
from mezzo.policy import RECIPES, Policy


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that multiplies float16 and not bfloat16, and takes no time to measure."""
    rates = {"float32": 100.0, "bfloat16": 0.5, "float16": 150.0}
    monkeypatch.setattr(hardware, "measure", lambda *_, **__: hardware.Hardware("cpu", "A CPU", rates, 150.0, "key"))
    monkeypatch.setattr(hardware, "gpu_status", lambda: ("cpu", "no reason"))


def folded(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def record(mezzo: Mezzo, name: str) -> dict[str, Any]:
    done = mezzo("recipes", name, "--json")
    assert (done.code, done.err) == (0, "")
    (found,) = json.loads(done.out)["recipes"]
    return dict(found)


def test_the_list_has_every_recipe_with_its_operands_and_base_in_order(mezzo: Mezzo) -> None:
    done = mezzo("recipes")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    rows = {words[0]: words[1:] for words in lines if words and words[0] in RECIPES}
    assert list(rows) == list(RECIPES)
    assert rows["bf16"][0] == "bfloat16"
    assert rows["fp8"][:3] == ["bf16", "e4m3@tensor,", "e5m2@tensor"]
    assert rows["nvfp4"][:3] == ["bf16", "nvfp4,", "nvfp4_16x16"]


def test_the_list_as_json_says_about_and_source_whole(mezzo: Mezzo) -> None:
    done = mezzo("recipes", "--json")
    found = {one["name"]: one for one in json.loads(done.out)["recipes"]}
    assert {name: (one["about"], one["source"]) for name, one in found.items()} == {
        name: (recipe.about, recipe.source) for name, recipe in RECIPES.items()
    }
    assert found["fp8-block"]["operands"] == ["float8_e4m3fn@1x128", "float8_e4m3fn@128x128"]
    assert found["fp16"]["loss_scale"]["init"] == 65536
    assert (found["bf16"]["loss_scale"], found["bf16"]["base"]) == (None, None)


@pytest.mark.usefixtures("measured")
def test_one_recipe_shows_each_rule_in_order_and_whose_it_is(mezzo: Mezzo) -> None:
    done = mezzo("recipes", "nvfp4")
    assert (done.code, done.err) == (0, "")
    table = done.out.partition("from ")[2].partition("\n\n")[0].splitlines()[1:]
    shown = [line.split(maxsplit=2) for line in table]
    base = len(RECIPES["bf16"].rules)
    assert [(origin, f"{site}={spec.strip()}") for origin, site, spec in shown] == [
        ("bf16" if at < base else "nvfp4", str(rule)) for at, rule in enumerate(RECIPES["nvfp4"].rules)
    ]
    text = folded(done.out)
    for part in (RECIPES["nvfp4"].about, RECIPES["nvfp4"].detail, RECIPES["nvfp4"].source):
        assert part in text
    assert "base bf16 loss scaling none" in text
    assert "bfloat16: emulated: PyTorch's own product runs at 0.5 GFLOP/s, 200 times slower than float32's" in text
    assert "nvfp4_16x16: emulated: mezzo has no product of its own for it" in text


@pytest.mark.usefixtures("measured")
def test_what_a_recipe_is_may_be_read_by_programs(mezzo: Mezzo) -> None:
    found = record(mezzo, "fp16")
    assert found["routes"] == {
        "float16": {
            "route": "native",
            "reason": "PyTorch's own product runs at 150 GFLOP/s, 1.5 times as fast as float32's",
        }
    }
    assert found["rules"][0] == {"site": "*:input", "format": "float16", "own": True}
    assert "growth_interval 2000, floor 1, ceiling 16777216" in folded(mezzo("recipes", "fp16").out)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("name", RECIPES)
def test_the_file_that_is_shown_builds_on_the_recipe_and_can_be_used(mezzo: Mezzo, name: str) -> None:
    shown = mezzo("recipes", name).out.partition("--policy my.toml:\n\n")[2]
    assert shown == record(mezzo, name)["toml"]
    Path("my.toml").write_text(shown)
    wide = "float64" if name == "fp64" else "float32"
    assert str(Policy.parse("my.toml")) == f"{name}; head:*={wide}"
    assert tomllib.loads(shown)["about"].startswith(name)


@pytest.mark.usefixtures("measured")
def test_a_file_of_ones_own_is_explained_like_any_other(mezzo: Mezzo) -> None:
    Path("my.toml").write_text(
        'about = "mine"\ndetail = """\nTwo\nlines."""\nrecipe = "fp16"\n[[rule]]\nsite = "*:weight"\nformat = "mxfp8"\n'
    )
    found = record(mezzo, "my.toml")
    assert (found["name"], found["about"], found["detail"], found["base"]) == ("my.toml", "mine", "Two lines.", "fp16")
    assert [rule["site"] for rule in found["rules"] if rule["own"]] == ["*:weight"]
    assert found["loss_scale"]["init"] == 65536
    assert list(found["routes"]) == ["float16", "mxfp8_e4m3"]
    assert found["toml"] is None
    out = mezzo("recipes", "my.toml").out
    assert re.search(r"(?m)^my\.toml +\*:weight +mxfp8_e4m3 *$", out)
    assert "To build on it" not in out


def test_an_unknown_recipe_is_one_clear_error(mezzo: Mezzo) -> None:
    done = mezzo("recipes", "nvfp5")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("mezzo: error: unknown recipe 'nvfp5'; known: fp64, ")
    assert done.err.endswith("; did you mean nvfp4?\n")
    assert mezzo("recipes", "no.toml").err.startswith("mezzo: error: there is no recipe file 'no.toml'")


def test_without_torch_only_the_routes_are_unknown() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['mezzo', 'recipes', 'fp8']\n"
        "from mezzo.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "unknown: torch is not installed, so nothing was measured; run: pip install torch" in done.stdout
    assert "*:fprop.a" in done.stdout


def test_a_run_keeps_what_its_file_said_and_goes_on_without_it(mezzo: Mezzo, config: str) -> None:
    Path("my.toml").write_text('recipe = "bf16"\n[[rule]]\nsite = "head:*"\nformat = "fp32"\n')
    done = mezzo("train", config, "--policy", "my.toml; *.up:input=fp32", "--out", "run")
    assert (done.code, done.err) == (0, "")
    Path("my.toml").unlink()
    policy = "bf16; head:*=float32; *.up:input=float32"
    assert str(Policy.from_toml(Path("run/policy.toml").read_text())) == policy
    assert tomllib.loads(Path("run/config.toml").read_text())["policy"] == policy
    done = mezzo("train", "--resume", "run", "--set", "train.steps=6")
    assert (done.code, done.err) == (0, "")
    rows = {row["site"]: row["format"] for row in json.loads(mezzo("sites", "run", "--json").out)}
    assert (rows["head:fprop.a"], rows["blocks.0.mlp.up:fprop.b"]) == ("float32", "bfloat16")
