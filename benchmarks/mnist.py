"""The classic network on MNIST: do the frameworks agree, and does a low precision cost accuracy?

    python benchmarks/mnist.py [--data DIR|FILE] [--epochs 5] [--seeds 3] [--frameworks …] [--policies …]

examples/mnist_torch.py, mnist_jax.py and mnist_tensorflow.py, each under fp32, bf16, fp16 and fp8, with three seeds. A
seed gives all of them the same initial weights and the same order of the data, so runs of one seed are paired. Without
--data it is scikit-learn's digits. Three seeds show whether something is broken; they do not prove equality: for that
see benchmarks/quality.py. Each run is a process of its own, with one thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import write_result

from mezzo.data.images import load

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGES = {
    "torch": ("torch",),
    "jax": ("jax", "jaxlib", "optax"),
    "tensorflow": ("tensorflow", "tensorflow_cpu", "keras"),
}
POLICIES = ("fp32", "bf16", "fp16", "fp8")


def one_run(framework: str, policy: str, seed: int, epochs: int, data: str | None) -> dict[str, Any]:
    """Run an example and read what it printed."""
    command = [sys.executable, str(EXAMPLES / f"mnist_{framework}.py")]
    command += ["--policy", policy, "--seed", str(seed), "--epochs", str(epochs)]
    command += ["--data", data] if data else []
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    losses = [float(loss) for loss in re.findall(r"^epoch \d+  loss (\S+)", done.stdout, re.MULTILINE)]
    accuracy = float(re.findall(r"^test accuracy (\S+)%$", done.stdout, re.MULTILINE)[-1])
    seconds = round(time.perf_counter() - begin, 1)  # with imports and compilation: no figure of speed
    return {"seed": seed, "accuracy": accuracy, "losses": losses, "seconds": seconds}


def summary(runs: list[dict[str, Any]], reference: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Mean and range of the accuracy in percent, and of the paired difference to fp32 in percentage points."""
    accuracies = [run["accuracy"] for run in runs]
    found = {"mean": round(statistics.mean(accuracies), 3), "range": [min(accuracies), max(accuracies)], "runs": runs}
    if reference is not None:
        gaps = [a["accuracy"] - b["accuracy"] for a, b in zip(runs, reference, strict=True)]
        found["minus_fp32"] = {
            "mean": round(statistics.mean(gaps), 3),
            "range": [round(min(gaps), 3), round(max(gaps), 3)],
        }
    return found


def versions(frameworks: list[str]) -> dict[str, str]:
    installed = {d.metadata["Name"].replace("-", "_"): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for f in frameworks for name in PACKAGES[f] if name in installed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with IDX files, or mnist.npz; left out: scikit-learn's digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frameworks", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--dry-run", action="store_true", help="write no result")
    options = parser.parse_args()

    images = load(options.data)
    print(images.source)
    results: dict[str, dict[str, Any]] = {}
    for framework in options.frameworks:
        runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in options.policies}
        for policy in options.policies:
            for seed in range(options.seeds):
                run = one_run(framework, policy, seed, options.epochs, options.data)
                runs[policy].append(run)
                print(f"{framework:10} {policy:5} seed {seed}  {run['accuracy']:.2f}%  {run['seconds']} s", flush=True)
        results[framework] = {p: summary(r, None if p == "fp32" else runs.get("fp32")) for p, r in runs.items()}

    print(f"{'':10} {'policy':6} accuracy: mean (range)")
    for framework, policies in results.items():
        for policy, found in policies.items():
            low, high = found["range"]
            print(f"{framework:10} {policy:6} {found['mean']:.2f}% ({low:.2f} … {high:.2f})")
    if options.dry_run:
        return
    command = ["python", "benchmarks/mnist.py", *("DATA" if word == options.data else word for word in sys.argv[1:])]
    data = {
        "command": " ".join(command),  # without where the data lie on this machine
        "data": re.sub(r"\S*[/\\]", "", images.source),
        "network": f"{images.pixels}-128-10",
        "epochs": options.epochs,
        "seeds": options.seeds,
        "versions": versions(options.frameworks),
        "results": results,
    }
    print(f"wrote {write_result('mnist', data)}")


if __name__ == "__main__":
    main()
