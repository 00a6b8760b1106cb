"""What-if against the truth: the predicted SQNR of each site beside that of a run that uses the format.

    python benchmarks/whatif.py [--steps 300]

gpt-proof is trained under bf16 on the stdlib corpus. At its weights and on one batch, `what_if` predicts every site
under each policy while the model runs under fp32 (as `mezzo whatif` does) and under bf16; then the model runs under
that policy, at the same weights and batch, and its sites are measured. The figure is the largest difference in dB over
all sites that round something in that run. Counted apart: sites of which one of the two knows nothing, since their
tensor arrives in 16 bits already (a kernel rounded its result itself, or an operation that no rule speaks of computed
in them). Writes benchmarks/results/whatif.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write_result

from mezzo.policy import Policy
from mezzo.torch import Precision, what_if
from mezzo.train.assemble import prepare_corpus
from mezzo.train.config import load
from mezzo.train.listeners import Listener
from mezzo.train.session import Session

POLICIES = ("bf16", "fp16", "tf32", "fp8", "fp8-row", "fp8-block", "mxfp8", "mxfp8; *:input=mxfp8_e4m3+floor",
            "mxfp4", "nvfp4")  # fmt: skip


def sites(model: Any, under: str, policy: str | None, x: Any, y: Any) -> dict[str, float]:
    """Site → SQNR; of another policy than the one that the model runs under if that is given."""
    precision = Precision(model, None, under)
    try:
        sample = what_if(precision, [policy] if policy else [], [lambda: model(x, y)])
    finally:
        precision.remove()
    found = sample.whatif[str(Policy.of(policy))] if policy else sample.sites
    return {str(site): one.measure.sqnr for site, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    config = load(None, ["model.preset=gpt-proof", f"train.steps={options.steps}", "policy=bf16"])
    with tempfile.TemporaryDirectory() as folder:
        session = Session.start(config, Path(folder) / "run", Listener(), prepare_corpus(config))
        for _ in session.train():
            pass
    session.precision.remove()
    x, y = (torch.from_numpy(a) for a in session.batches.batch_at(options.steps))
    rows = []
    for policy in POLICIES:
        truth = sites(session.model, policy, None, x, y)
        for under in ("fp32", "bf16"):
            predicted = sites(session.model, under, policy, x, y)
            both = [site for site in truth if site in predicted]
            off = {s: predicted[s] - truth[s] for s in both if math.isfinite(truth[s]) and math.isfinite(predicted[s])}
            known = [s for s in both if not math.isnan(truth[s]) and not math.isnan(predicted[s])]
            worst = max(off, key=lambda site: abs(off[site]))
            rows.append({
                "policy": policy, "under": under, "sites": len(truth), "compared": len(off),
                "only_exact_in_truth": [s for s in known if math.isinf(truth[s]) and math.isfinite(predicted[s])],
                "only_predicted_exact": [s for s in known if math.isinf(predicted[s]) and math.isfinite(truth[s])],
                "both_exact": sum(math.isinf(truth[s]) and math.isinf(predicted[s]) for s in known),
                "unknown": len(both) - len(known), "missing": sorted(set(truth) - set(predicted)),
                "largest_db": abs(off[worst]), "worst_site": worst,
                "median_db": statistics.median(map(abs, off.values())),
                "within_half_db": sum(abs(d) <= 0.5 for d in off.values()),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    print(f"\nwritten to {write_result('whatif', {'rows': rows, 'steps': options.steps})}")


if __name__ == "__main__":
    main()
