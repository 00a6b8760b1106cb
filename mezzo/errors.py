"""Everything mezzo raises on purpose.

MezzoError
├── ConfigError        a config, policy or option that cannot mean anything (also a ValueError)
├── DataError          text, shards or tokenizer that cannot be used
├── RunError           a run directory that cannot be used: locked, or of another model
│   └── CheckpointError    a checkpoint that is corrupt or does not fit
├── NonfiniteError     training stopped because values stayed nonfinite; names the sites
└── MissingExtraError  an optional dependency is not installed (also an ImportError)

An error says what was given, what is possible and what to do.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class MezzoError(Exception):
    """Base of all errors that mezzo raises on purpose."""


class ConfigError(MezzoError, ValueError):
    """A config, policy or option that cannot mean anything."""


class DataError(MezzoError):
    """Text, shards or a tokenizer that cannot be used."""


class RunError(MezzoError):
    """A run directory that cannot be used as asked."""


class CheckpointError(RunError):
    """A checkpoint that is corrupt, incomplete or does not fit the model."""


class NonfiniteError(MezzoError):
    """Training cannot go on because gradients or the loss stay nonfinite."""


class MissingExtraError(MezzoError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, *, extra: str, option: str) -> ModuleType:
    """Import an optional `module`, or say which `option` needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{option} needs the package {error.name!r}, which is not installed; run: pip install {error.name} "
            f"(it belongs to mezzo's extra {extra!r})"
        ) from error
