"""Importing the lower layers pulls in no framework; that the check can fail is shown beside it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mezzo

FRAMEWORKS = ("torch", "jax", "tensorflow", "keras")


def loaded(statement: str) -> set[str]:
    """Frameworks in sys.modules after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*(m for m in {FRAMEWORKS!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "mezzo",
        "mezzo.policy",
        "mezzo.formats",
        "mezzo.hardware",
        "mezzo.errors",
        "mezzo.storage",
        "mezzo.formats.portable.quantize",
        "mezzo.models.initial",
        "mezzo.models.sampling_arrays",
        "mezzo.policy.support",
        "mezzo.train.session",
        "mezzo.data.images",
        "mezzo.observe.incidents",
        "mezzo.observe.whatif",
        "mezzo.report.data",
        "mezzo.report.page",
    ],
)
def test_importing_a_lower_layer_pulls_in_no_framework(module):
    assert loaded(f"import {module}") == set()


def test_every_file_that_is_no_python_is_part_of_a_wheel():
    root = Path(mezzo.__file__).parent
    settings = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "mezzo"
    ]
    shipped = {path for pattern in settings for path in root.glob(pattern)}
    files = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files
    assert files <= shipped


def test_that_check_can_fail():
    assert loaded("import mezzo.torch") == {"torch"}
    assert loaded("import mezzo; mezzo.torch") == {"torch"}
    assert loaded("import mezzo.jax") == {"jax"}
    assert {"tensorflow", "keras"} <= loaded("import mezzo.keras")


@pytest.mark.parametrize(
    ("adapter", "package", "extra"),
    [("jax", "jax", "jax"), ("keras", "tensorflow", "tensorflow"), ("keras", "keras", "tensorflow")],
)
def test_an_adapter_without_its_framework_says_what_to_install(adapter, package, extra):
    code = f"import sys\nsys.modules[{package!r}] = None\nimport mezzo\nmezzo.{adapter}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mezzo.errors.MissingExtraError"), last
    assert f"{package!r}" in last
    assert "pip install" in last
    assert f"'{extra}'" in last or f"mezzo[{extra}]" in last
