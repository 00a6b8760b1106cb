"""Importing the lower layers pulls in no framework; that the check can fail is shown beside it."""

import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "jax", "tensorflow", "keras")


def loaded(statement: str) -> set[str]:
    """Frameworks in sys.modules after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*(m for m in {FRAMEWORKS!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["mezzo", "mezzo.policy", "mezzo.formats", "mezzo.hardware", "mezzo.errors"])
def test_importing_a_lower_layer_pulls_in_no_framework(module):
    assert loaded(f"import {module}") == set()


def test_that_check_can_fail():
    assert loaded("import mezzo.torch") == {"torch"}
    assert loaded("import mezzo; mezzo.torch") == {"torch"}
