"""One run's checkpoint under each framework that is installed: the part of `mezzo demo` that runs in processes apart.

python -m mezzo.cli.demo_frameworks RUN FRAMEWORK BATCHES     prints {"loss": held-out loss under the run's policy}
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

NAMES = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}
BATCHES = 4


def show(run: Path, console: Console) -> None:
    """Print the losses of all frameworks; one that fails says so."""
    parts = []
    for framework, name in NAMES.items():
        if find_spec(framework) is None:
            parts.append(f"{name} not installed")
            continue
        command = [sys.executable, "-m", "mezzo.cli.demo_frameworks", str(run), framework, str(BATCHES)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            parts.append(f"{name} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        else:
            parts.append(f"{name} {json.loads(done.stdout.splitlines()[-1])['loss']:.5f}")
    console.print(
        f"frameworks: the run's checkpoint, held-out loss under its policy ({BATCHES} batches):\n  {'  '.join(parts)}"
    )


def loss(run: Path, framework: str, batches: int) -> float:
    """Held-out loss of a run's newest checkpoint under another framework and the run's own policy."""
    from mezzo.data.batches import valid_batches
    from mezzo.errors import RunError
    from mezzo.train.checkpoint import newest
    from mezzo.train.corpus import model_config, prepare_corpus
    from mezzo.train.frameworks import make_engine
    from mezzo.train.rundir import RunDir
    from mezzo.train.stored import read_config

    config = read_config(RunDir.open(run))
    train = config.train.model_copy(update={"framework": framework})
    observe = config.observe.model_copy(update={"every": None, "whatif": ()})
    config = config.model_copy(update={"train": train, "observe": observe})
    corpus = prepare_corpus(config)
    shape = model_config(config, corpus)
    checkpoint, _ = newest(run)
    if checkpoint is None:
        raise RunError(f"{run} has no usable checkpoint")
    engine = make_engine(config, shape)
    engine.load(checkpoint.load_group, checkpoint.groups, checkpoint.meta)
    valid = valid_batches(corpus.valid, config.train.batch, shape.seq_len)
    return engine.evaluate(list(itertools.islice(valid, batches)))[0]


if __name__ == "__main__":
    print(json.dumps({"loss": loss(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))}))
