"""Incidents as the page shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mezzo.observe.incidents import read
from mezzo.report.sites import MEASURES, table
from mezzo.report.thin import number

SHOWN, WORST, CHARACTERS = 200, 10, 20_000
_NUMBERS = ("step", "time", "loss", "loss_scale", "grad_norm", "phase")
_TEXTS = ("kind", "what", "site", "rule", "policy", "traceback")
_MORE = ("rng", "batch", "scales")


def read_incidents(run: Path) -> dict[str, Any]:
    """All incidents of a run in order of their steps; of very many the first ones.

    run       the run's folder
    returns   count, shown (a list) and broken (files that could not be read)
    """
    found, broken = read(run)
    return {"count": len(found), "shown": [_shown(one) for one in found[:SHOWN]], "broken": broken}


def _shown(incident: dict[str, Any]) -> dict[str, Any]:
    sites = {site: measure for site, measure in table(incident.get("sites")).items() if isinstance(measure, dict)}
    worst = sorted(sites, key=lambda site: _badness(sites[site]))[:WORST]  # stable: else in order of computation
    more = {key: incident[key] for key in _MORE if incident.get(key)}
    steps = incident.get("steps")
    return {
        **{key: number(incident.get(key), 12) for key in _NUMBERS},
        **{key: text[:CHARACTERS] if isinstance(text := incident.get(key), str) else None for key in _TEXTS},
        "steps": [step for step in steps if type(step) is int] if isinstance(steps, list) else [incident["step"]],
        "worst": [
            {"site": site, "format": sites[site].get("format"), "nonfinite": number(sites[site].get("nonfinite")),
             **{key: number(sites[site].get(key), 4) for key in MEASURES}}
            for site in worst
        ],
        "sites": len(sites),
        "more": json.dumps(more, indent=1, default=str)[:CHARACTERS] if more else None,
    }  # fmt: skip


def _badness(measure: dict[str, Any]) -> tuple[float, float]:
    def known(key: str, otherwise: float) -> float:
        value = measure.get(key)
        is_number = isinstance(value, int | float) and not math.isnan(value)
        return float(value) if is_number else otherwise  # type: ignore[arg-type]

    # Nonfinite values spread: where they were first says more than where there were most.
    return (-math.inf, 0.0) if known("nonfinite", 0.0) > 0 else (-known("overflow", 0.0), known("sqnr", math.inf))
