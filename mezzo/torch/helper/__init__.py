"""Stub; helper-12 writes this."""

from typing import Any


def load() -> Any:
    return None
