"""A recipe of your own: a TOML file in the form of `recipes/*.toml`, named by its path where a recipe's name may stand.

about = "nvfp4, the feed-forward part in MXFP8"   optional, as are source and detail
recipe = "nvfp4"                                  whose rules come first; fp32 by default

[[rule]]
site = "*.mlp.*:input"
format = "mxfp8"
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from mezzo.errors import ConfigError

TEXTS = ("about", "source", "detail")  # for people: they change no number
KEYS = ("recipe", "rule", "loss_scale")


def is_file(recipe: str) -> bool:
    """Whether this is the path of a recipe's file, not a recipe's name."""
    return recipe.endswith(".toml")


def read(path: str) -> dict[str, Any]:
    """The file as a table with none but the known keys; what they hold is for `Policy.from_dict` to check.

    path      from the current folder; `~` is the home folder
    raises    ConfigError that names the file and what to do about it
    """
    try:
        data = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no recipe file {path!r} (seen from {Path.cwd()}); give the path of a TOML file, or a recipe's "
            "name, which `mezzo recipes` lists"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the recipe file {path} is not valid TOML: {error}; `mezzo recipes bf16` shows one"
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such user's home folder
        raise ConfigError(f"the recipe file {path} cannot be read: {error}") from None
    for key in data:
        if key not in (*TEXTS, *KEYS):
            close = difflib.get_close_matches(key, (*TEXTS, *KEYS), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown key {key!r} in the recipe file {path}; known: {', '.join(TEXTS + KEYS)}{hint}")
    for key in TEXTS:
        if not isinstance(data.get(key, ""), str):
            raise ConfigError(f"{key} in the recipe file {path} is a text, got {data[key]!r}")
    base = data.get("recipe", "")
    if isinstance(base, str) and is_file(base):
        raise ConfigError(
            f"the recipe file {path} builds on another file, {base!r}; a base is a recipe that `mezzo recipes` lists: "
            f"copy the rules of {base} that this model has modules for into {path}"
        )
    return data
