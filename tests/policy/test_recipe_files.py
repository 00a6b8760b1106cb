"""Recipes as files: those that mezzo ships, and a user's own."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

import mezzo.policy.recipe_file as recipe_file
from mezzo.errors import ConfigError
from mezzo.policy import RECIPES, LossScaling, Policy, Site
from mezzo.policy.policy import find
from mezzo.policy.recipe import ORDER
from mezzo.policy.site import ROLES

SHIPPED = files("mezzo.policy") / "recipes"
MINE = """
about = "nvfp4, but the feed-forward part in MXFP8"
source = "me"
detail = '''
Two lines
of it.'''
recipe = "nvfp4"
loss_scale = 1024

[[rule]]
site = "*.mlp.*:input"
format = "mxfp8"

[[rule]]
site = "head:*"
format = "float32"
"""


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text=MINE, name="my.toml"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


# --- the shipped ones ---


def test_the_folder_holds_the_recipes_of_the_list_and_no_others():
    assert sorted(entry.name for entry in SHIPPED.iterdir() if entry.name.endswith(".toml")) == sorted(
        f"{name}.toml" for name in ORDER
    )
    assert tuple(RECIPES) == ORDER


@pytest.mark.parametrize("name", ORDER)
def test_a_shipped_recipe_is_whole(name):
    data = tomllib.loads((SHIPPED / f"{name}.toml").read_text("utf-8"))
    assert set(data) <= {*recipe_file.TEXTS, *recipe_file.KEYS}
    assert len(data["about"].splitlines()) == 1
    assert not data["about"].endswith(".")
    assert re.search(r"\d{4}|torchao", data["source"]), "a paper or a project that one can look up"
    sites = [row["site"] for row in data["rule"]]
    assert len(set(sites)) == len(sites)
    recipe = RECIPES[name]
    assert (recipe.about, recipe.source, recipe.base) == (data["about"], data["source"], data.get("recipe", ""))
    assert [str(rule) for rule in recipe.rules[-len(sites) :]] == [
        str(Policy.parse(f"fp32; {row['site']}={row['format']}").rules[0]) for row in data["rule"]
    ]


@pytest.mark.parametrize("name", ORDER)
def test_a_shipped_file_means_the_same_as_a_file_of_ones_own(name):
    own = Policy.parse(str(SHIPPED / f"{name}.toml"))
    assert own.loss_scaling == RECIPES[name].loss_scaling
    for path in ("x", "head", "lm_head"):
        for role in ROLES:
            assert own.spec(Site(path, role)) == Policy(name).spec(Site(path, role)), (path, role)
    depth = [f"blocks.{i}{more}" for i in range(62) for more in ("", ".up")]
    mine, shipped = own.rules_for(depth), Policy(name).rules_for(depth)
    for path in depth:
        assert find(mine, Site(path, "fprop.a")) == find(shipped, Site(path, "fprop.a")), path


@pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools builds the package")
def test_an_installed_package_has_them_too(tmp_path):
    """Built as `pip` builds it, from the sources alone, and read from the wheel's own folder."""
    root = Path(__file__).parents[2]
    shutil.copytree(root / "mezzo", "source/mezzo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, "source")
    subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build", "--build-lib", tmp_path / "lib"],
        cwd="source", check=True, capture_output=True,
    )  # fmt: skip
    code = "import mezzo; from mezzo.policy import RECIPES; print(mezzo.__file__, *RECIPES)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "lib", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "lib/mezzo/__init__.py"), *ORDER]


# --- a user's ---


def test_a_file_becomes_its_recipe_and_its_rules():
    policy = Policy.parse(write())
    assert policy == Policy.parse("nvfp4; *.mlp.*:input=mxfp8; head:*=float32; loss_scale=1024")
    assert str(policy) == "nvfp4; *.mlp.*:input=mxfp8_e4m3; head:*=float32; loss_scale=1024"


def test_what_is_stored_does_not_need_the_file():
    policy = Policy.parse(f"{write()}; *:fprop.a=bf16")
    Path("my.toml").unlink()
    assert "my.toml" not in str(policy) + policy.to_toml()
    assert Policy.from_toml(policy.to_toml()) == policy == Policy.parse(str(policy))


def test_a_path_may_lead_through_folders_and_home(monkeypatch):
    write(name="shared recipes/low.v2.toml")
    expected = Policy.parse("nvfp4; *.mlp.*:input=mxfp8; head:*=float32; loss_scale=1024")
    assert Policy.parse(" shared recipes/low.v2.toml ") == expected
    monkeypatch.setenv("HOME", str(Path("shared recipes").resolve()))
    assert Policy.parse("~/low.v2.toml") == expected == Policy.of(str(Path("shared recipes/low.v2.toml").resolve()))


def test_without_a_base_the_rules_lie_on_float32():
    policy = Policy.parse(write('[[rule]]\nsite = "*:input"\nformat = "bf16"\n'))
    assert policy == Policy.parse("fp32; *:input=bf16")
    assert Policy.parse(write("", "empty.toml")) == Policy("fp32")


def test_a_rule_on_top_wins_over_the_files_own():
    """It comes last, and takes the place of the file's rule for the same pattern, which could say nothing any more."""
    policy = Policy.parse(f"{write()}; head:input=bf16; *.mlp.*:input=float16")
    assert [str(rule) for rule in policy.rules] == ["head:*=float32", "head:input=bfloat16", "*.mlp.*:input=float16"]
    assert str(policy.spec(Site("head", "fprop.a"))) == "bfloat16"
    assert str(policy.spec(Site("head", "fprop.b"))) == "float32"


def test_two_rules_for_one_site_in_one_text_are_still_an_error():
    rule = '[[rule]]\nsite = "a:input"\nformat = "bf16"\n'
    with pytest.raises(
        ConfigError, match=r"^the recipe file my.toml: the policy has two rules for 'a:input'; keep one$"
    ):
        Policy.parse(write(rule + rule))
    with pytest.raises(ConfigError, match=r"^the policy has two rules for 'a:input'; keep one$"):
        Policy.parse(f"{write(rule)}; a:input=fp16; a:input=fp32")


def test_the_loss_scale_is_the_strings_the_files_or_the_bases():
    assert Policy.parse(write('recipe = "fp16"')).loss_scaling == LossScaling()
    assert Policy.parse(write('recipe = "fp16"\nloss_scale = "none"')).loss_scaling is None
    table = write('recipe = "fp16"\n[loss_scale]\ninit = 8.0')
    assert Policy.parse(table).loss_scaling == LossScaling(init=8.0)
    assert Policy.parse(f"{table}; loss_scale=4").loss_scaling == LossScaling.constant(4.0)


def test_a_table_may_build_on_a_file_too():
    write()
    policy = Policy.from_dict({"recipe": "my.toml", "rule": [{"site": "head:*", "format": "bf16"}]})
    assert policy == Policy.parse("nvfp4; *.mlp.*:input=mxfp8; head:*=bf16; loss_scale=1024")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = ", "the recipe file my.toml is not valid TOML: Invalid value (at end of document); `mezzo recip"),
        ("rules = []", "unknown key 'rules' in the recipe file my.toml; known: about, source, detail, recipe, rule"),
        ("rules = []", "loss_scale; did you mean rule?"),
        ("about = 3", "about in the recipe file my.toml is a text, got 3"),
        ("recipe = 3", "the recipe file my.toml: policy.recipe is a string, got 3"),
        ("recipe = 'bf61'", "the recipe file my.toml: unknown recipe 'bf61'; known: fp64, fp32"),
        ("recipe = 'my.toml'", "the recipe file my.toml builds on another file, 'my.toml'; a base is a recipe that"),
        ("[rule]\nsite = 'a:input'", "the recipe file my.toml: policy.rule is a list of tables: write [[rule]]"),
        ("[[rule]]\nsite = 'a:input'\nformat = 'fp17'", "the recipe file my.toml: unknown number format 'fp17'"),
        ("loss_scale = 0", "the recipe file my.toml: loss_scale needs 0 < floor"),
    ],
)  # fmt: skip
def test_a_bad_file_is_an_error_that_names_it(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Policy.parse(write(text))


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    with pytest.raises(
        ConfigError, match=rf"^there is no recipe file 'no.toml' \(seen from {tmp_path}\); give the path"
    ):
        Policy.parse("no.toml; head:*=fp32")
    Path("folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"^the recipe file folder.toml cannot be read: "):
        Policy.parse("folder.toml")
    Path("latin.toml").write_bytes("about = 'é'".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^the recipe file latin.toml is not valid TOML: 'utf-8' codec"):
        Policy.parse("latin.toml")
    with pytest.raises(
        ConfigError, match=r"^Policy\(…\) takes a recipe's name; Policy.parse\('my.toml'\) reads a file$"
    ):
        Policy("my.toml")
