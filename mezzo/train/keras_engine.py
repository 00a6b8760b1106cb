"""A training session's TensorFlow side: the Keras model and `mezzo.keras`."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import mezzo.keras
from mezzo._version import __version__
from mezzo.errors import CheckpointError, ConfigError
from mezzo.models import gpt_keras
from mezzo.models.sampling_arrays import generate
from mezzo.models.shapes import GPTConfig, parameter_shapes
from mezzo.policy import Policy, Schedule
from mezzo.train import memory
from mezzo.train.adamw_state import AdamW, Options, from_disk, to_disk
from mezzo.train.arrays import Groups, Named, describe
from mezzo.train.checkpoint import check_fit
from mezzo.train.config import Config
from mezzo.train.engine import Pair
from mezzo.train.moves import Switched, comparison, gradients
from mezzo.train.scale_state import Scales

PLAIN = ("float32", "float64")  # whose products are TensorFlow's own


class TorchAdamW(keras.optimizers.AdamW):  # type: ignore[misc]
    """Keras' AdamW with epsilon where torch has it: beside the square root of the corrected second moment."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        at = self._get_variable_index(variable)
        first, second = self._momentums[at], self._velocities[at]
        rate, step = ops.cast(learning_rate, variable.dtype), ops.cast(self.iterations + 1, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        self.assign(first, self.beta_1 * first + (1 - self.beta_1) * gradient)
        self.assign(second, self.beta_2 * second + (1 - self.beta_2) * ops.square(gradient))
        one, two = (1 - ops.power(ops.cast(beta, variable.dtype), step) for beta in (self.beta_1, self.beta_2))
        self.assign_sub(variable, rate * (first / one) / (ops.sqrt(second / two) + self.epsilon))


class KerasOutcome:
    """A step's results: tensors until somebody reads them."""

    sparsity: float | None = None

    def __init__(self, losses: list[Any], norm: Any, scale: Any, finite: dict[str, Any], tokens: int) -> None:
        self._losses, self._norm, self._scale, self._finite, self.tokens = losses, norm, scale, finite, tokens

    def wait(self) -> None:
        float(self._norm)

    @property
    def loss(self) -> float:
        return float(np.mean([loss.numpy() for loss in self._losses]))

    @property
    def grad_norm(self) -> float:
        return float(self._norm)

    @property
    def loss_scale(self) -> float:
        return float(self._scale)

    @property
    def skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)

    @property
    def site(self) -> str | None:
        return gradients(self._finite) if self.skipped else None


class KerasEngine:
    """`mezzo.train.engine.Engine` for TensorFlow; what it promises stands there."""

    def __init__(self, config: Config, shape: GPTConfig) -> None:
        t = config.train
        self.config, self.shape = config, shape
        self.shapes = parameter_shapes(shape)
        self.device = choose_device(t.device)
        self.advice: list[str] = []
        self.peak_flops = 0.0  # not measured: no share of it is shown
        memory.reset_peak()
        self._resting = memory.in_use()
        schedule = config.schedule()
        policies = [config.resolved_policy()] if schedule is None else [phase.policy for phase in schedule.phases]
        with tf.device(self.device):
            self.model = gpt_keras.GPT(shape, seed=t.seed)
            self.precision = mezzo.keras.Precision(self.model, policies[0], seed=t.seed, max_norm=t.clip or None)
            for policy in policies:
                self.precision.table(policy)  # one that cannot be carried out is an error now
            self.variables = gpt_keras.parameters(self.model)
            self._optimize(Options(t.betas, t.weight_decay))
        self._rate = t.lr

    def _optimize(self, options: Options) -> None:
        beta1, beta2 = options.betas
        self.options = options
        self.inner = TorchAdamW(
            learning_rate=self.config.train.lr, weight_decay=options.weight_decay, beta_1=beta1, beta_2=beta2,
            epsilon=options.eps,
        )  # fmt: skip
        vectors = [variable for name, variable in self.variables.items() if len(self.shapes[name]) < 2]
        if vectors:
            self.inner.exclude_from_weight_decay(var_list=vectors)
        self.optimizer = self.precision.optimizer(self.inner)
        self.optimizer.build(list(self.variables.values()))
        self._functions: dict[tuple[str, str], Any] = {}

    @property
    def policy(self) -> Policy:
        return self.precision.policy

    @property
    def late(self) -> bool:
        return "GPU" in self.device

    # --- phases ---

    def phases(self, schedule: Schedule, probe: Callable[[], Pair], held_out: Callable[[], Iterable[Pair]]) -> Switched:
        return Switched(schedule, self._switch, lambda low, high: comparison(self, low, high, probe, held_out))

    def _switch(self, policy: Policy) -> None:
        if policy != self.policy:
            self.precision.switch(policy)
            self._functions.clear()  # they were traced under the policy before

    def ready(self) -> None:
        pass  # every random word is a function of seed, step and site

    def close(self) -> None:
        pass

    def warm(self) -> None:
        pass  # the first step traces

    # --- training ---

    def _function(self, name: str, python: Callable[..., Any], policy: str = "") -> Any:
        """A tf.function of this engine, traced under one policy."""
        key = name, policy or str(self.policy)
        if key not in self._functions:
            self._functions[key] = tf.function(python)
        return self._functions[key]

    def _gradient(self, x: Any, y: Any) -> tuple[list[Any], Any]:
        with tf.GradientTape() as tape:
            loss = self.model.mean_loss(x, y)
            scaled = self.optimizer.scale_loss(loss / self.config.train.accumulate)
        grads = tape.gradient(scaled, [variable.value for variable in self.variables.values()])
        return [tf.convert_to_tensor(grad) for grad in grads], loss

    def _update(self, grads: list[Any], rate: Any) -> tuple[Any, Any, list[Any]]:
        scale = tf.identity(self.precision.state.scale)
        norms = [tf.norm(grad) for grad in grads]
        self.inner.learning_rate.assign(rate)
        self.optimizer.apply(grads, list(self.variables.values()))
        return tf.norm(tf.stack(norms)) / scale, scale, [tf.math.is_finite(norm) for norm in norms]

    def step(self, batches: Iterable[Pair], rate: float) -> KerasOutcome:
        with tf.device(self.device):
            if self.late:
                self.precision.check()  # of the step before: nobody waits for this one
            draws = self.precision.state.whole["draws"]
            grads: list[Any] | None = None
            losses, tokens = [], 0
            for micro, batch in enumerate(batches):
                if micro:
                    draws.assign_add(1)  # the optimizer counts the last one itself
                more, loss = self._function("gradient", self._gradient)(*self._placed(batch))
                grads = more if grads is None else [a + b for a, b in zip(grads, more, strict=True)]
                losses.append(loss)
                tokens += batch[0].size
            rate_, self._rate = tf.constant(rate, tf.float32), rate
            norm, scale, finite = self._function("update", self._update)(grads, rate_)
            if not self.late:
                self.precision.check()
        return KerasOutcome(losses, norm, scale, dict(zip(self.variables, finite, strict=True)), tokens)

    def memory(self) -> int:
        return memory.peak() - self._resting

    def _placed(self, batch: Pair) -> list[Any]:
        return [tf.constant(a.astype(np.int32)) for a in batch]

    # --- looking ---

    def loss(self, batch: Pair) -> Any:
        with tf.device(self.device):
            return self.model.mean_loss(*self._placed(batch))

    def gradient(self, batch: Pair, policy: Policy) -> np.ndarray[Any, Any]:
        """All gradients as one vector; of the scaled loss."""
        with tf.device(self.device), self.precision.using(str(policy)):
            grads, _ = self._function("gradient", self._gradient, str(policy))(*self._placed(batch))
        return np.concatenate([tf.convert_to_tensor(g).numpy().ravel() for g in grads]).astype(np.float64)

    def evaluate(self, batches: Iterable[Pair], policy: str | None = None) -> tuple[float, int]:
        asked = str(self.policy if policy is None else Policy.of(policy))
        total, count = 0.0, 0
        with tf.device(self.device), self.precision.using(asked):
            for batch in batches:
                loss = self._function("loss", self.model.mean_loss, asked)(*self._placed(batch))
                total += float(loss) * batch[1].size
                count += batch[1].size
        return total / count, count

    def sample(self, prompt: Sequence[int], *, tokens: int, seed: int, eot: int, vocab_size: int) -> Iterator[int]:
        def logits_of(idx_BT: Any, last: int) -> Any:
            with tf.device(self.device):
                return self._function("logits", self._logits)(tf.constant(idx_BT))[0, last].numpy()

        return generate(
            logits_of, prompt, self.shape, max_new_tokens=tokens, temperature=0.8, top_k=50, seed=seed, eot=eot,
            vocab_size=vocab_size,
        )  # fmt: skip

    def _logits(self, idx: Any) -> Any:
        return self.model(idx)

    def damaged(self) -> str | None:
        found = self.variables.items()
        return next((name for name, v in found if not bool(tf.reduce_all(tf.math.is_finite(v.value)))), None)

    # --- state ---

    def routes(self, policies: Iterable[Policy]) -> dict[str, str]:
        names = {rule.fmt.name for policy in policies for rule in policy.all_rules()}
        return {name: "native" if name in PLAIN else "emulated" for name in sorted(names)}

    def environment(self, routes: dict[str, str]) -> dict[str, Any]:
        return {
            "framework": "tensorflow",
            "mezzo": __version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
            "device": "gpu" if self.late else "cpu",
            "contract": mezzo.keras.CONTRACT,
            "route": routes,
        }

    def _moments(self) -> list[tuple[str, Any, Any, bool]]:
        """Parameter, the variables of its moments, and whether Keras has it transposed."""
        found = []
        for name, variable in self.variables.items():
            at = self.inner._get_variable_index(variable)
            found.append((name, self.inner._momentums[at], self.inner._velocities[at], variable.name == "kernel"))
        return found

    def state(self) -> tuple[Groups, dict[str, Any]]:
        first: dict[str, Any] = {}
        second: dict[str, Any] = {}
        for name, one, two, turned in self._moments():
            first[name], second[name] = (a.T if turned else a for a in (one.numpy(), two.numpy()))
        scales = self.precision.state_dict()
        moments = AdamW(int(self.inner.iterations.numpy()), first, second, begun=int(scales["steps"]) > 0)
        optimizer, meta = to_disk(self.shapes, moments, self.options, self._rate)
        groups: Groups = {
            "model": gpt_keras.read_parameters(self.model), "optimizer": optimizer, "precision": scales,
        }  # fmt: skip
        return groups, {"optimizer": meta}

    def load(self, group: Callable[[str], Named], groups: Sequence[str], meta: dict[str, Any]) -> list[str]:
        weights = group("model")
        here = {name: f"float32[{', '.join(map(str, shape))}]" for name, shape in self.shapes.items()}
        check_fit(here, {name: describe(array) for name, array in weights.items()}, "model")
        moments, options = from_disk(self.shapes, group("optimizer"), meta["optimizer"])
        scales, messages = Scales.from_disk(group("precision"), meta["policy"], self.policy)
        with tf.device(self.device):
            gpt_keras.load_parameters(self.model, weights)
            if options != self.options:
                self._optimize(options)
            self.inner.iterations.assign(moments.count)
            for name, one, two, turned in self._moments():
                for variable, array in ((one, moments.first[name]), (two, moments.second[name])):
                    variable.assign(np.asarray(array).T if turned else np.asarray(array))
            try:
                self.precision.load_state_dict({name: np.asarray(array) for name, array in scales.to_disk().items()})
            except ConfigError as error:
                raise CheckpointError(f"the checkpoint's group precision: {error}") from error
        return messages


def choose_device(wanted: str) -> str:
    """The device that the config asks for; "auto" takes a GPU if TensorFlow has one.

    raises    ConfigError if there is none
    """
    there = bool(tf.config.list_physical_devices("GPU")) if wanted != "cpu" else False
    if wanted == "cuda" and not there:
        raise ConfigError(
            "train.device = 'cuda', but TensorFlow has no GPU; take device = 'cpu', or a build of tensorflow for it"
        )
    return "/GPU:0" if there else "/CPU:0"
