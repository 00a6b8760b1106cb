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

import torch

from mezzo import hardware
from mezzo.data.batches import Batches, bits_per_byte, valid_batches
from mezzo.data.shards import Corpus
from mezzo.errors import CheckpointError, NonfiniteError, RunError
from mezzo.models.gpt_torch import GPT
from mezzo.models.sampling import generate
from mezzo.models.shapes import flops_per_token, parameter_count
from mezzo.policy import Policy
from mezzo.policy.site import ROOT
from mezzo.torch import CONTRACT
from mezzo.train import memory
from mezzo.train.assemble import choose_device, make_optimizer, make_precision, model_config, prepare_corpus, restore
from mezzo.train.checkpoint import (
    Checkpoint,
    copy_into,
    environment,
    environment_differences,
    load_optimizer,
    newest,
    optimizer_tensors,
)
from mezzo.train.config import Config
from mezzo.train.listeners import Listeners, Listens, Record, RunLog, TensorBoard, Training
from mezzo.train.loop import Loop, Trains, evaluate
from mezzo.train.phased import PhasedRun
from mezzo.train.preview import advice
from mezzo.train.rundir import RunDir
from mezzo.train.saver import BackgroundSaver, save
from mezzo.train.schedule import learning_rate
from mezzo.train.stored import anchored, check_same_settings, check_same_text, keep_corpus, read_config

SAMPLE_TOKENS = 64


class Session:
    """Everything a run is made of, ready to train; `start` or `resume` makes one.

    run       RunDir, locked
    first     the step that comes next
    """

    def __init__(self, config: Config, run: RunDir, corpus: Corpus, listener: Listens) -> None:
        t = config.train
        self.config, self.run, self.corpus = config, run, corpus
        self.device = choose_device(t.device)
        self.shape = model_config(config, corpus)
        self.batches = Batches(
            corpus.train, batch=t.batch, seq_len=self.shape.seq_len, seed=t.seed, vocab_size=corpus.tokenizer.vocab_size
        )
        self.valid()  # a split shorter than a sequence is an error now, not at the first evaluation
        self.advice = advice(config, self.device)  # what cannot train is an error before anything is made
        self.peak_flops = hardware.measure_peak(self.device.type)
        memory.reset_peak(self.device)
        self.resting = memory.in_use(self.device)
        generator = torch.Generator().manual_seed(t.seed)
        self.model = GPT(self.shape, generator=generator, checkpoint_activations=t.checkpoint_activations)
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.precision = make_precision(self.model, self.optimizer, config)
        for asked in config.observe.whatif:  # a rule that matches nothing is an error now
            Policy.of(asked).check_paths([path or ROOT for path, _ in self.model.named_modules()])
        self.trains: Trains = self.precision  # what the loop steps with
        self.first = 0
        self._running: Any = self.model
        self._entered: str | None = None  # told after the record of the step before it
        self.phased = PhasedRun(self.precision, config, corpus.sha256, self._probe, self._held_out)
        tensorboard = [TensorBoard(run.path / "tensorboard")] if t.tensorboard else []
        self.listener = Listeners([RunLog(run), *tensorboard, listener])
        self._outer_determinism = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(
            t.deterministic if t.deterministic is not None else self.device.type == "cpu"
        )
        self.environment = environment(
            device=self.device, route=self.phased.routes(), contract=CONTRACT, compile=t.compile
        )
        torch.manual_seed(t.seed)  # only now: nothing above may move what training draws from
        self._stopping = False
        self._valid_bytes: dict[int, int] = {}  # by tokens evaluated

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
        copy_into(self.model.state_dict(), checkpoint.load_group("model"), "model")
        load_optimizer(self.optimizer, checkpoint.load_group("optimizer"), meta["optimizer"])
        if changed := self.phased.load(meta.get("phases"), checkpoint.step):
            self.listener.message(changed)
        for message in restore(self.precision, checkpoint.load_group("precision"), meta["policy"]):
            self.listener.message(message)
        torch.set_rng_state(checkpoint.load_group("rng")["torch"])
        self.first = checkpoint.step
        for difference in environment_differences(meta["environment"], self.environment):
            if meta["policy"] == str(self.precision.policy) or not difference.startswith("route."):
                self.listener.message(f"this resume is not bitwise: {difference}")

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
        if t.compile:
            self._running = torch.compile(self.model)
            self.phased.warm()  # every phase is compiled before the first step
        loop = Loop(
            model=self._run_model,
            precision=self.trains,
            optimizer=self.optimizer,
            batch_at=lambda step, micro: self.batches.batch_at(step, micro, t.accumulate),
            rate_at=self._rate,
            listener=self.listener,
            device=self.device,
            accumulate=t.accumulate,
            flops_per_token=flops_per_token(self.shape),
            peak_flops=self.peak_flops,
            resting=self.resting,
            each_step=lambda step, record: self._each_step(step, record, saver),
            due=self._due,
            stop=lambda: self._stopping,
        )
        outcome = "failed"
        try:
            self.listener.attached(Training(self.precision, self.run, self.listener.message, self._losses))
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

    def _run_model(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss; uncompiled while a phase calibrates, since compiled code tells of no rounding."""
        return (self.model if self.phased.calibrates else self._running)(x, y)  # type: ignore[no-any-return]

    def _losses(self, step: int) -> list[Callable[[], torch.Tensor]]:
        """For each micro-batch of a step (1 is the first) a function that runs the uncompiled model on it."""
        count = self.config.train.accumulate

        def loss(micro: int) -> torch.Tensor:
            arrays = self.batches.batch_at(step - 1, micro, count)
            x, y = (torch.from_numpy(a).to(self.device) for a in arrays)
            return self.model(x, y)  # type: ignore[no-any-return]

        return [functools.partial(loss, micro) for micro in range(count)]

    def _probe(self) -> torch.Tensor:
        """The loss of the next step's first batch."""
        arrays = self.batches.batch_at(self.first, 0, self.config.train.accumulate)
        x, y = (torch.from_numpy(a).to(self.device) for a in arrays)
        return self._running(x, y)  # type: ignore[no-any-return]

    def _held_out(self) -> float:
        return evaluate(self.model, self.valid(), self.device)[0]

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
            if damaged := self._damaged():
                self.listener.message(f"NOT SAVED at step {step:,}: {damaged} is not finite; older checkpoints stay")
            else:
                saver.submit(step, *self._state())

    def _save_last(self, saver: BackgroundSaver) -> None:
        saver.close()
        if damaged := self._damaged():
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

    def _damaged(self) -> str | None:
        """The first parameter that is not finite: such weights must not take a good checkpoint's place."""
        return next((name for name, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())), None)

    def _state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        optimizer, meta = optimizer_tensors(self.optimizer)
        groups = {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "precision": self.precision.state_dict(),
            "rng": {"torch": torch.get_rng_state()},
        }
        return groups, {
            "optimizer": meta,
            "environment": self.environment,
            "corpus": self.corpus.sha256,
            "policy": str(self.precision.policy),
            "phases": self.phased.state(),
            "saved_at": time.time(),
        }

    def valid(self, batches: int | None = None) -> Iterator[Any]:
        """The held-out batches of an evaluation, always the same ones; those of the config if no number is given."""
        t = self.config.train
        return valid_batches(self.corpus.valid, t.batch, self.shape.seq_len, batches or t.eval_batches)

    def evaluate(self, batches: int | None = None) -> Record:
        """Held-out loss under the policy and in float32, and bits per byte of the latter.

        batches   how many; those of the config by default
        """
        under, _ = evaluate(self.model, self.valid(batches), self.device)
        with self.precision.using("fp32"):
            in_fp32, tokens = evaluate(self.model, self.valid(batches), self.device)
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
        self.model.eval()
        try:
            drawn = generate(
                self.model, ids, max_new_tokens=tokens, temperature=0.8, top_k=50, seed=seed,
                eot=tokenizer.eot, vocab_size=tokenizer.vocab_size,
            )  # fmt: skip
            return prompt + tokenizer.decode(list(drawn))
        finally:
            self.model.train()

    def info(self) -> Record:
        """What a person wants to know before the first step."""
        t = self.config.train
        tokens = t.steps * t.batch * t.accumulate * self.shape.seq_len
        return {
            "run": str(self.run.path),
            "steps": t.steps,
            "first_step": self.first,
            "parameters": parameter_count(self.shape),
            "tokens": tokens,
            "policy": str(self.precision.policy),
            "phases": self.phased.lines,
            "device": str(self.device),
            "routes": self.phased.routes(),
            "corpus": self.corpus.sha256,
            "train_tokens": len(self.corpus.train),
            "valid_tokens": len(self.corpus.valid),
            "invalid_utf8": self.corpus.manifest["invalid_utf8"],
            "skipped_files": self.corpus.manifest["skipped"],
            "advice": self.advice,
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
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self._stopping and self.first < self.config.train.steps

    def close(self) -> None:
        """Let go of the run directory; training can be resumed from it."""
        torch.use_deterministic_algorithms(self._outer_determinism)
        self.run.close()


def _with_vocab(config: Config, vocab_size: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
