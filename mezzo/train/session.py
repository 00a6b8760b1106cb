"""A training session: from a config to a run directory, or on from its newest checkpoint."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mezzo.data.batches import Batches, bits_per_byte, valid_batches
from mezzo.data.shards import Corpus
from mezzo.errors import CheckpointError, NonfiniteError, RunError
from mezzo.models.shapes import flops_per_token, parameter_count
from mezzo.train.arrays import Groups
from mezzo.train.checkpoint import Checkpoint, environment_differences, newest
from mezzo.train.config import Config
from mezzo.train.corpus import model_config, prepare_corpus
from mezzo.train.engine import Pair
from mezzo.train.frameworks import make_engine
from mezzo.train.listeners import Listeners, Listens, Record, RunLog, TensorBoard, Training
from mezzo.train.loop import Loop
from mezzo.train.phased import PhasedRun
from mezzo.train.rundir import RunDir
from mezzo.train.saver import BackgroundSaver, save
from mezzo.train.schedule import learning_rate
from mezzo.train.stored import anchored, check_same_settings, check_same_text, keep_corpus, read_config

SAMPLE_TOKENS = 64


class Session:
    """Everything a run is made of, ready to train; `start` or `resume` makes one.

    engine    the framework's side of it
    run       RunDir, locked
    first     the step that comes next
    """

    def __init__(self, config: Config, run: RunDir, corpus: Corpus, listener: Listens) -> None:
        t = config.train
        self.config, self.run, self.corpus = config, run, corpus
        self.shape = model_config(config, corpus)
        self.batches = Batches(
            corpus.train, batch=t.batch, seq_len=self.shape.seq_len, seed=t.seed, vocab_size=corpus.tokenizer.vocab_size
        )
        self.valid()  # a split shorter than a sequence is an error now, not at the first evaluation
        self.engine = make_engine(config, self.shape)
        self.first = 0
        self._entered: str | None = None  # told after the record of the step before it
        self.phased = PhasedRun(self.engine, config, corpus.sha256, self._probe, self.valid)
        tensorboard = [TensorBoard(run.path / "tensorboard")] if t.tensorboard else []
        self.listener = Listeners([RunLog(run), *tensorboard, listener])
        self.engine.ready()  # only now: nothing above may move what training draws from
        self.routes = self.engine.routes(self.phased.policies)
        self.environment = self.engine.environment(self.routes)
        self._stopping = False
        self._valid_bytes: dict[int, int] = {}  # by tokens evaluated

    @property
    def device(self) -> Any:
        """Where it trains."""
        return self.engine.device

    @property
    def model(self) -> Any:
        """The framework's own, as are `optimizer` and `precision`."""
        return self.engine.model

    @property
    def optimizer(self) -> Any:
        return self.engine.optimizer

    @property
    def precision(self) -> Any:
        return self.engine.precision

    # --- starting ---

    @classmethod
    def start(cls, config: Config, out: str | Path, listener: Listens, corpus: Corpus | None = None) -> Session:
        """Begin a new run in the folder `out`.

        raises    RunError if there is a run already; ConfigError, DataError
        """
        corpus = corpus or prepare_corpus(config)
        config = anchored(_with_vocab(config, model_config(config, corpus).vocab_size))
        run = RunDir.create(out, config.to_toml(), config.resolved_policy().to_toml())
        try:
            keep_corpus(run, corpus)
            return cls(config, run, corpus, listener)
        except BaseException:
            run.discard()  # nothing was trained: the folder can be used again
            raise

    @classmethod
    def resume(cls, path: str | Path, config: Config, listener: Listens, corpus: Corpus | None = None) -> Session:
        """Go on from the newest checkpoint that verifies; from the start if the run has none yet.

        raises    RunError if another process trains in it, or text or model changed; CheckpointError
        """
        run = RunDir.open(path, lock=True)
        try:
            config = anchored(config)
            check_same_settings(run, read_config(run), config)
            checkpoint, problems = newest(run)
            if checkpoint is None and problems:
                raise RunError(
                    f"no checkpoint of {run.path} can be used; to begin anew, choose another --out:\n  "
                    + "\n  ".join(problems)
                )
            for problem in problems:
                listener.message(f"not used: {problem}")
            corpus = corpus or prepare_corpus(config)
            check_same_text(run, corpus)
            session = cls(config, run, corpus, listener)
            if checkpoint is not None:
                session._load(checkpoint)
            run.cut_back(session.first)
            if not session.done:
                run.keep("config.toml", config.to_toml())
                run.keep("policy.toml", config.resolved_policy().to_toml())
            return session
        except BaseException:
            run.close()
            raise

    def _load(self, checkpoint: Checkpoint) -> None:
        meta = checkpoint.meta
        missing = [key for key in ("optimizer", "environment", "policy") if key not in meta]
        if missing:
            raise CheckpointError(f"{checkpoint.path} was not written by `mezzo train`: it has no {', '.join(missing)}")
        if changed := self.phased.load(meta.get("phases"), checkpoint.step):
            self.listener.message(changed)
        for message in self.engine.load(checkpoint.load_group, checkpoint.groups, meta):
            self.listener.message(message)
        self.first = checkpoint.step
        if self.done:
            return
        for difference in self._differences(meta["environment"]):
            if meta["policy"] == str(self.engine.policy) or not difference.startswith("route."):
                self.listener.message(f"this resume is not bitwise: {difference}")

    def _differences(self, saved: dict[str, Any]) -> list[str]:
        """Why the resume is not bitwise; of another framework everything is other, and its name says so."""
        then, now = {"framework": "torch"} | saved, self.environment  # once there was no other, and no such key
        if then["framework"] != now["framework"]:
            return environment_differences({"framework": then["framework"]}, {"framework": now["framework"]})
        return environment_differences(then, now)

    # --- training ---

    def train(self) -> Iterator[Record]:
        """Train to the end; yields each record. Ends early, with a checkpoint, on SIGTERM or SIGINT.

        raises    NonfiniteError when gradients stay nonfinite; the last good weights are saved first
        """
        t = self.config.train
        saver = BackgroundSaver(
            self.run,
            keep=t.keep,
            on_saved=lambda step, path: self.listener.message(f"saved {path}"),
            on_failure=lambda step, error: self.listener.message(f"NOT SAVED: {error}"),
        )
        self.engine.warm()
        loop = Loop(
            engine=self.engine,
            batch_at=lambda step, micro: self.batches.batch_at(step, micro, t.accumulate),
            rate_at=self._rate,
            listener=self.listener,
            accumulate=t.accumulate,
            flops_per_token=flops_per_token(self.shape),
            peak_flops=self.engine.peak_flops,
            each_step=lambda step, record: self._each_step(step, record, saver),
            due=self._due,
            stop=lambda: self._stopping,
        )
        outcome = "failed"
        try:
            engine = self.engine
            self.listener.attached(
                Training(engine.precision, self.run, lambda: engine.policy, self.listener.message, self._losses)
            )
            self.listener.started(self.info())
            with self._signals():
                for record in loop.run(self.first, t.steps):
                    if self._entered is not None:
                        self.listener.message(self._entered)
                        self._entered = None
                    yield record
                if self.first == t.steps and (left := self.phased.unreached()):
                    self.listener.message(left)
                self._save_last(saver)
            outcome = "interrupted" if self.interrupted else "finished"
        except BaseException as error:
            if isinstance(error, NonfiniteError):
                self._save_good(saver)
            self.listener.failed(error)
            raise
        finally:
            saver.close()
            self.listener.ended(outcome)
            self.close()

    def _losses(self, step: int) -> list[Callable[[], Any]]:
        """For each micro-batch of a step (1 is the first) a function that runs the uncompiled model on it."""
        count = self.config.train.accumulate

        def loss(micro: int) -> Any:
            return self.engine.loss(self.batches.batch_at(step - 1, micro, count))

        return [functools.partial(loss, micro) for micro in range(count)]

    def _probe(self) -> Pair:
        """The next step's first batch."""
        return self.batches.batch_at(self.first, 0, self.config.train.accumulate)

    def _rate(self, step: int) -> float:
        t = self.config.train
        return self.phased.lr * learning_rate(
            step, steps=t.steps, peak=t.lr, warmup=t.warmup, kind=t.schedule, min_lr=t.min_lr, decay=t.decay
        )

    def _due(self, step: int) -> bool:
        t = self.config.train
        every = [t.checkpoint_every, t.eval_every, *([t.sample_every] if t.sample_every else [])]
        return any(step % n == 0 for n in every) or self.phased.due(step)

    def _each_step(self, step: int, record: Record, saver: BackgroundSaver) -> None:
        t = self.config.train
        self.first = step
        last = step == t.steps
        if step % t.eval_every == 0 or last:
            record |= self.evaluate()
        if t.sample_every and (step % t.sample_every == 0 or last):
            try:
                record["sample"] = self.sample(t.sample_prompt)
            except NonfiniteError as error:  # whether training can go on is not for a sample to say
                self.listener.message(f"no sample: {error}")
        self._entered = self.phased.after(record)
        if step % t.checkpoint_every == 0 and not last:
            if damaged := self.engine.damaged():
                self.listener.message(f"NOT SAVED at step {step:,}: {damaged} is not finite; older checkpoints stay")
            else:
                saver.submit(step, *self._state())

    def _save_last(self, saver: BackgroundSaver) -> None:
        saver.close()
        if damaged := self.engine.damaged():
            what = f"after step {self.first:,} the weights themselves are not finite, first {damaged}"
            raise NonfiniteError(f"{what}; lower the learning rate, and go on from the newest checkpoint with --resume")
        path = save(self.run, self.first, *self._state(), keep=self.config.train.keep)
        self.listener.message(f"saved {path}")

    def _save_good(self, saver: BackgroundSaver) -> None:
        """Save the last good weights when training fails, unless they are not good; never hides why it failed."""
        try:
            self._save_last(saver)
        except (CheckpointError, NonfiniteError) as error:
            self.listener.message(f"NOT SAVED: {error}")

    def _state(self) -> tuple[Groups, dict[str, Any]]:
        groups, meta = self.engine.state()
        return groups, {
            **meta,
            "environment": self.environment,
            "corpus": self.corpus.sha256,
            "policy": str(self.engine.policy),
            "phases": self.phased.state(),
            "saved_at": time.time(),
        }

    def valid(self, batches: int | None = None) -> Iterator[Pair]:
        """The held-out batches of an evaluation, always the same ones; those of the config if no number is given."""
        t = self.config.train
        return valid_batches(self.corpus.valid, t.batch, self.shape.seq_len, batches or t.eval_batches)

    def evaluate(self, batches: int | None = None) -> Record:
        """Held-out loss under the policy and in float32, and bits per byte of the latter.

        batches   how many; those of the config by default
        """
        under, _ = self.engine.evaluate(self.valid(batches))
        in_fp32, tokens = self.engine.evaluate(self.valid(batches), "fp32")
        if tokens not in self._valid_bytes:
            lengths = self.corpus.tokenizer.byte_lengths()
            if lengths is None:
                split = self.corpus.manifest["splits"]["valid"]
                self._valid_bytes[tokens] = round(split["bytes"] * tokens / split["tokens"])
            else:
                self._valid_bytes[tokens] = int(sum(lengths[y].sum() for _, y in self.valid(batches)))
        return {
            "val_loss": under,
            "val_loss_fp32": in_fp32,
            "val_bits_per_byte": bits_per_byte(in_fp32, tokens, self._valid_bytes[tokens]),
        }

    def sample(self, prompt: str, tokens: int = SAMPLE_TOKENS, seed: int = 0) -> str:
        """A continuation of `prompt`; draws from its own generator, so training is not disturbed."""
        tokenizer = self.corpus.tokenizer
        ids = tokenizer.encode(prompt).tolist() or [tokenizer.eot]
        drawn = self.engine.sample(ids, tokens=tokens, seed=seed, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size)
        return prompt + tokenizer.decode(list(drawn))

    def info(self) -> Record:
        """What a person wants to know before the first step."""
        t = self.config.train
        tokens = t.steps * t.batch * t.accumulate * self.shape.seq_len
        return {
            "run": str(self.run.path),
            "framework": t.framework,
            "steps": t.steps,
            "first_step": self.first,
            "parameters": parameter_count(self.shape),
            "tokens": tokens,
            "policy": str(self.engine.policy),
            "phases": self.phased.lines,
            "device": str(self.engine.device),
            "routes": self.routes,
            "corpus": self.corpus.sha256,
            "train_tokens": len(self.corpus.train),
            "valid_tokens": len(self.corpus.valid),
            "invalid_utf8": self.corpus.manifest["invalid_utf8"],
            "skipped_files": self.corpus.manifest["skipped"],
            "advice": self.engine.advice,
        }

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run at the next step boundary, saved; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stopping:
                os._exit(128 + number)
            self._stopping = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def stopping(self) -> bool:
        """Whether a signal asked for the end."""
        return self._stopping

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.first >= self.config.train.steps

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self._stopping and not self.done

    def close(self) -> None:
        """Let go of the run directory; training can be resumed from it."""
        self.engine.close()
        self.run.close()


def _with_vocab(config: Config, vocab_size: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
