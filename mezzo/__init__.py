"""mezzo: train networks in the lowest precision that loses nothing, with the proof on the table.

The names here need no framework. The adapters are imported when they are used: `mezzo.torch`, `mezzo.jax`,
`mezzo.keras`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mezzo._version import __version__
from mezzo.errors import MezzoError
from mezzo.formats import Format, get_format, quantize
from mezzo.policy import RECIPES, LossScaling, Policy, Rule, Site

if TYPE_CHECKING:
    from mezzo import jax as jax
    from mezzo import keras as keras
    from mezzo import torch as torch

__all__ = [
    "RECIPES",
    "Format",
    "LossScaling",
    "MezzoError",
    "Policy",
    "Rule",
    "Site",
    "__version__",
    "get_format",
    "quantize",
]

_ADAPTERS = ("torch", "jax", "keras")


def __getattr__(name: str) -> Any:
    if name in _ADAPTERS:
        return importlib.import_module(f"mezzo.{name}")
    raise AttributeError(f"module 'mezzo' has no attribute {name!r}")
