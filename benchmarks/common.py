"""What the benchmarks share: where results go, and how they are written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mezzo import hardware

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def write_result(name: str, data: dict[str, Any]) -> Path:
    """Write results/NAME.json with the machine, the command and the commit that it came from."""
    whole = {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": hardware.machine(),
        **data,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return path
