"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mezzo._version import __version__
from mezzo.errors import RunError, require

EXTRA = "report"
LANGUAGES = ("en", "zh")
SCRIPTS = (
    "base.js",
    "plots.js",
    "matrix.js",
    "panel.js",
    "tables.js",
    "sections.js",
    "main.js",
)  # in the order they are loaded


def render(runs: Sequence[dict[str, Any]], lang: str = "auto", live: str | None = None) -> str:
    """The page of some runs.

    runs      as `read_runs` gives them
    lang      "en", "zh", or "auto": what the browser prefers
    live      version of the data if a server stands behind the page; plotly.js is then a file of its own
    raises    MissingExtraError if Jinja2 or plotly is not installed
    """
    jinja2 = require("jinja2", extra=EXTRA, option="mezzo report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    data = embed({"runs": list(runs), "lang": lang, "live": live, "version": __version__})
    texts: dict[str, list[str]] = json.loads(resource("texts.json"))
    start = LANGUAGES.index(lang) if lang in LANGUAGES else 0
    return str(
        environment.from_string(resource("report.html.j2")).render(
            title=", ".join(run["name"] for run in runs),
            lang=LANGUAGES[start],
            text={key: both[start] for key, both in texts.items()},
            # A script runs only with this word, which a text inside the data cannot hold: it is the data's own hash.
            nonce=hashlib.sha256(data.encode()).hexdigest()[:32],
            live=live is not None,
            plotly_version=plotly_version(),
            plotly="" if live is not None else plotly_js(),
            style=resource("report.css"),
            script="\n".join(resource(name) for name in SCRIPTS),
            texts=embed(texts),
            data=data,
        )
    )


def write(page: str, out: Path) -> None:
    """Write the page to a file.

    raises    RunError if it cannot be written
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(page.encode("utf-8", "replace"))  # a path may hold what is not UTF-8
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def resource(name: str) -> str:
    """One of the page's own files."""
    return (files("mezzo.report") / "templates" / name).read_text(encoding="utf-8")


def plotly_js() -> str:
    """The library that draws, out of the installed package; nothing else of that package is used."""
    package = require("plotly", extra=EXTRA, option="mezzo report")
    return (files(package) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def plotly_version() -> str:
    return str(require("plotly", extra=EXTRA, option="mezzo report").__version__)
