"""sites.jsonl as the page shows it: a matrix of sites × sampled steps for each measure, and histograms.

Of a long run the page holds at most `SAMPLES` sampled steps, and histograms of at most `HISTOGRAMS` site-steps.
Findings of all samples stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezzo.errors import RunError
from mezzo.formats import ScaledFormat, get_format
from mezzo.report.thin import SAMPLES, number, spread
from mezzo.storage import parse_line

MEASURES = ("sqnr", "underflow", "overflow", "amax")
UPDATES = ("ratio", "lost", "unseen")
HISTOGRAMS = 12_000  # about 2 MB of the page
FINDINGS = 500


def read_sites(path: Path) -> dict[str, Any] | None:
    """What was sampled, or None if nothing was.

    raises    RunError if the file cannot be read
    """
    try:
        with open(path, "rb") as file:
            lines = list(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    wanted = set(spread(len(lines), SAMPLES))
    kept, findings = [], []
    for index, line in enumerate(lines):
        if index not in wanted and b'"findings": []' in line:
            continue  # parsing takes the time
        sample = parse_line(line)
        if sample is None:
            continue
        findings += list(_findings(sample))
        if index in wanted:
            kept.append(sample)
    return _matrices(kept, len(lines), findings) if kept else None


def _matrices(kept: list[dict[str, Any]], count: int, findings: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [_tables(sample.get("sites")) for sample in kept]
    names = list(dict.fromkeys(name for sites in measured for name in sites))
    formats = list(dict.fromkeys(str(m.get("format", "")) for sites in measured for m in sites.values()))
    shown = spread(len(kept), max(2, HISTOGRAMS // max(1, len(names))))
    updates = [_tables(sample.get("updates")) for sample in kept]
    weights = list(dict.fromkeys(name for one in updates for name in one))
    logits = [table(sample.get("logits")) for sample in kept]
    whatif = [table(sample.get("whatif")) for sample in kept]
    asked = list(dict.fromkeys(policy for one in whatif for policy in one))

    def rows(tables: list[dict[str, dict[str, Any]]], of: list[str], key: str) -> list[list[Any]]:
        return [[number(one.get(name, {}).get(key), 4) for one in tables] for name in of]

    def under(tables: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
        """What another policy would have lost, and the format that it gives each site."""
        latest = {name: str(measure.get("format", "")) for one in tables for name, measure in one.items()}
        return {"format": [latest.get(name) for name in names], **{key: rows(tables, names, key) for key in MEASURES}}

    return {
        "steps": [sample["step"] for sample in kept],
        "of": count,
        "policies": [str(sample.get("policy", "")) for sample in kept],
        "names": names,
        "groups": [group(name) for name in names],
        "formats": [{"name": name, "range": value_range(name)} for name in formats],
        "format": [[formats.index(str(s[name].get("format", ""))) if name in s else None for s in measured]
                   for name in names],
        **{key: rows(measured, names, key) for key in (*MEASURES, "count", "zeros", "nonfinite")},
        "histogram_at": shown,
        "histograms": [[_histogram(measured[i].get(name, {}).get("histogram")) for i in shown] for name in names],
        "blocks": [[_blocks(measured[i].get(name, {}).get("blocks")) for i in shown] for name in names],
        "weights": weights,
        "updates": {key: rows(updates, weights, key) for key in UPDATES},
        "logits": {name: [number(one.get(name), 4) for one in logits]
                   for name in dict.fromkeys(name for one in logits for name in one)},
        "whatif": {policy: under([_tables(one.get(policy)) for one in whatif]) for policy in asked},
        "findings": findings[-FINDINGS:],
        "findings_of": len(findings),
    }  # fmt: skip


def group(site: str) -> str:
    """forward, backward or weights: how the page groups the sites."""
    role = site.rpartition(":")[2]
    if role in ("fprop.b", "dgrad.b", "weight", "master"):
        return "weights"
    return "backward" if role.startswith(("dgrad", "wgrad", "grad")) else "forward"


def value_range(spec: str) -> dict[str, Any] | None:
    """Smallest subnormal, smallest normal and largest value; relative to the largest where there is a scale.

    `whole` says that the whole tensor has one scale or none, so that the range is that of each of its values.
    """
    try:
        fmt = get_format(spec.split()[0])
    except (ValueError, IndexError):
        return None
    element = fmt.element if isinstance(fmt, ScaledFormat) else fmt
    values = (element.min_subnormal, element.min_normal, element.max)
    if not isinstance(fmt, ScaledFormat):
        return {"scaled": False, "whole": True, "values": list(values)}
    return {"scaled": True, "whole": fmt.group == "tensor", "values": [value / element.max for value in values]}


def table(value: Any) -> dict[str, Any]:
    """The value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def _tables(value: Any) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in table(value).items() if isinstance(entry, dict)}


def _findings(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found = sample.get("findings")
    for one in found if isinstance(found, list) else []:
        if isinstance(one, dict):
            yield {"step": sample["step"], **{key: str(one.get(key) or "") for key in ("kind", "site", "text")}}


def _histogram(value: Any) -> list[Any] | None:
    """[first exponent, counts], or None; counts keep three digits."""
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], int) and isinstance(value[1], list)):
        return None
    return [value[0], [number(float(f"{c:.3g}")) if isinstance(c, int | float) else 0 for c in value[1]]]


def _blocks(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    sqnr = value.get("sqnr")
    return {
        **{key: number(value.get(key), 4) for key in ("count", "zero", "lossy")},
        "sqnr": [number(one, 4) for one in sqnr] if isinstance(sqnr, list) else [],
        "amax": _histogram(value.get("amax")),
    }
