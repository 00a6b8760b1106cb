"""Parity: train pairs of runs under two policies on the same data, and decide whether the low one lost anything.

OUT/plan.json              what was decided before the first run
OUT/runs/ARM-SEED/         run directories: reference, candidate, control
OUT/results.jsonl          a line for each finished run
OUT/parity.json, gaps.png  the verdict
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mezzo.errors import ConfigError, MezzoError, RunError
from mezzo.proof import samples
from mezzo.proof.pool import side_by_side
from mezzo.proof.run import Job, arms, paired, run, with_seed
from mezzo.proof.statistics import Finding, Plan, find
from mezzo.storage import write_atomically
from mezzo.train.assemble import choose_device, prepare_corpus
from mezzo.train.config import Config
from mezzo.train.preview import policies

Result = dict[str, Any]


class Parity:
    """A proof in the folder `out`: begun, or gone on with if it was begun with the same plan.

    config     of the runs
    policy     of the candidate; None: the config's own
    against    of the reference
    plan       when to look, and what a verdict takes
    jobs       processes at a time; the processor's cores are shared among them
    raises     ConfigError if an arm cannot be trained; RunError if `out` holds something else or is in use
    """

    def __init__(
        self, config: Config, policy: str | None, against: str, plan: Plan, out: Path, jobs: int | None = None
    ) -> None:
        self.plan, self.out = plan, out
        self.configs = arms(config, policy, against)
        on_cpu = choose_device(config.train.device).type == "cpu"
        cores = len(os.sched_getaffinity(0))
        self.jobs = jobs if jobs is not None else min(cores, 8) if on_cpu else 1
        if self.jobs < 1:
            raise ConfigError(f"--jobs is at least 1, got {self.jobs}")
        self.threads = max(1, cores // self.jobs)
        decided = {
            "plan": asdict(plan),
            "threads": self.threads,
            "arms": {arm: _settings(one) for arm, one in self.configs.items()},
        }
        self._begin(json.loads(json.dumps(decided)))

    def _begin(self, decided: dict[str, Any]) -> None:
        plan = self.out / "plan.json"
        if not plan.exists() and self.out.exists() and {path.name for path in self.out.iterdir()} - {".lock"}:
            raise RunError(f"{self.out} is not empty and holds no parity proof; choose another --out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make {self.out}: {error.strerror or error}; choose another --out") from error
        with self._lock():
            # Until a run has begun nothing was decided: an error in text or policy is not kept for good.
            if not plan.exists() or not any((self.out / "runs").glob("*/config.toml")):
                write_atomically(plan, json.dumps(decided, indent=2).encode())
                return
        before = json.loads(plan.read_text())
        changed = sorted({text.replace("arms.control.", "arms.reference.") for text in _differences(before, decided)})
        if changed == [f"threads was {before['threads']!r}, now {self.threads}"]:
            raise RunError(f"{self.out}: {changed[0]} for each run; give --jobs so that it stays the same")
        if changed:
            raise RunError(
                f"{self.out} was begun otherwise: {', '.join(changed[:4])}. What decides a verdict is fixed before "
                "the first run; for another plan choose another --out"
            )

    # --- runs ---

    def results(self) -> dict[tuple[str, int], Result]:
        """Those of the runs that ended, by arm and seed; a last line that a crash tore off does not count."""
        path = self.out / "results.jsonl"
        if not path.exists():
            return {}
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        return {(result["arm"], result["seed"]): result for result in map(json.loads, whole.splitlines())}

    def train(self, told: Callable[[Result, Finding | None], None]) -> Iterator[Finding]:
        """Run what is missing, pair by pair; yields the finding at each look and ends at the first verdict.

        told      called after each run with its result and what the pairs so far say
        raises    MezzoError if the reference cannot be trained; KeyboardInterrupt after a signal, everything saved
        """
        with self._lock():
            prepare_corpus(self.configs["reference"])  # once, not in every process
            for look in self.plan.looks:
                self._until(look, told)
                finding = self.finding(look)
                yield finding
                if finding.verdict != "not enough evidence":
                    return

    def _until(self, seeds: int, told: Callable[[Result, Finding | None], None]) -> None:
        done = self.results()
        where = next((result["where"] for result in done.values()), None)
        jobs = [self._job(arm, seed, where) for arm, seed in paired(self.configs, seeds) if (arm, seed) not in done]
        for result in map(run, jobs) if self.jobs == 1 else side_by_side(jobs, self.jobs):
            if "arm" in result:
                self._keep({key: value for key, value in result.items() if key != "interrupted"})
                told(result, self.finding())
            if result.get("interrupted"):
                raise KeyboardInterrupt

    def _job(self, arm: str, seed: int, where: dict[str, Any] | None = None) -> Job:
        config = with_seed(self.configs[arm], seed).model_dump(exclude_none=True)
        return Job(arm, seed, config, self.out / "runs" / f"{arm}-{seed:03d}", self.threads, where)

    def _keep(self, result: Result) -> None:
        if "failed" in result and result["arm"] != "candidate":
            raise MezzoError(
                f"the {result['arm']} of seed {result['seed']} could not be trained, so there is nothing to compare: "
                f"{result['failed']}"
            )
        path = self.out / "results.jsonl"
        if path.exists() and not (whole := path.read_bytes()).endswith(b"\n"):
            write_atomically(path, whole[: whole.rfind(b"\n") + 1])  # a crash tore the last line off
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.out / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"another `mezzo parity` works in {self.out}; wait for it, or choose another --out"
            ) from None
        try:
            yield
        finally:
            lock.release()

    # --- what they say ---

    def gaps(self, arm: str, seeds: int | None = None) -> dict[int, float]:
        """Relative gap of held-out loss in float32 to the reference, by seed, of the pairs that ended."""
        done = self.results()
        return {
            seed: done[arm, seed]["val_loss_fp32"] / done["reference", seed]["val_loss_fp32"] - 1
            for seed in range(seeds or self.plan.seeds)
            if (arm, seed) in done and ("reference", seed) in done and "failed" not in done[arm, seed]
        }

    def finding(self, seeds: int | None = None, arm: str = "candidate") -> Finding:
        """What the first `seeds` pairs say of an arm."""
        done = self.results()
        failed = sum("failed" in done.get((arm, seed), {}) for seed in range(seeds or self.plan.seeds))
        return find(list(self.gaps(arm, seeds).values()), self.plan, failed)

    def summary(self) -> dict[str, Any]:
        """Everything that the verdict rests on, plain data; what `parity.json` holds."""
        done, found = self.results(), {}
        for arm in self.configs:
            mine = [result for (name, _), result in sorted(done.items()) if name == arm and "failed" not in result]
            row: dict[str, Any] = {"seeds": len(mine)}
            if mine:
                drawn = [one["text"] for result in mine for one in result["samples"]]
                row |= {
                    "policy": mine[0]["policy"],
                    "phases": mine[0]["phases"],
                    **{key: statistics.fmean(r[key] for r in mine) for key in _MEANS},
                    "skipped": sum(result["skipped"] for result in mine),
                    "samples": len(drawn),
                }
                if self.code:
                    row["parsed"] = sum(map(samples.parses, drawn))
            if arm != "reference":
                row |= {"gaps": self.gaps(arm), "finding": asdict(self.finding(arm=arm))}
            found[arm] = row
        return {"plan": asdict(self.plan), "arms": found, "results": [done[key] for key in sorted(done)]}

    @property
    def candidate(self) -> str:
        """The candidate's policies in words."""
        return " → ".join(map(str, policies(self.configs["candidate"])))

    @property
    def code(self) -> bool:
        """Whether the text is Python, so that a sample may parse."""
        return self.configs["reference"].data.corpus == "stdlib"

    def write(self) -> list[Path]:
        """Write parity.json and the plot of the paired differences; returns their paths."""
        from mezzo.proof.plot import plot

        table = self.out / "parity.json"
        write_atomically(table, json.dumps(self.summary(), indent=2).encode())
        return [table, plot(self, self.out / "gaps.png")]


_MEANS = ("val_loss", "val_loss_fp32", "val_bits_per_byte", "seconds")


def _settings(config: Config) -> dict[str, Any]:
    """What makes an arm; where text lies and tokens are cached does not."""
    data = config.model_dump(exclude_none=True)
    data["data"].pop("cache", None)
    return data


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before.keys() | now.keys():
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key} was {before!r}, now {now!r}"
