"""A training session's JAX side."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mezzo.jax
from mezzo._version import __version__
from mezzo.errors import ConfigError, NonfiniteError
from mezzo.jax.rounding import HALVES
from mezzo.jax.scaling import check
from mezzo.models.initial import initial_parameters
from mezzo.models.sampling_arrays import generate
from mezzo.models.shapes import GPTConfig, parameter_shapes
from mezzo.policy import Policy, Schedule
from mezzo.train import adamw_state, memory
from mezzo.train.arrays import Groups, Named, describe
from mezzo.train.checkpoint import check_fit
from mezzo.train.config import Config
from mezzo.train.engine import Pair
from mezzo.train.jax_parts import Compiled, Moments, Params, adamw, compiled
from mezzo.train.moves import Switched, comparison, gradients
from mezzo.train.scale_state import Scales

PLAIN = ("float32", "float64")  # whose products are JAX's own


class JaxOutcome:
    """A step's results: arrays on the device until somebody reads them.

    find    names the first site that was not finite; asked only of a skipped step
    """

    def __init__(self, losses: list[Any], scale: Any, state: Any, tokens: int, find: Callable[[], str]) -> None:
        self._losses, self._scale, self._state, self._find, self.tokens = losses, scale, state, find, tokens

    def wait(self) -> None:
        self._state.grad_norm.block_until_ready()

    @cached_property
    def loss(self) -> float:
        return float(np.mean(np.stack([np.asarray(loss) for loss in self._losses])))

    @property
    def grad_norm(self) -> float:
        return float(self._state.grad_norm)

    @property
    def loss_scale(self) -> float:
        return float(self._scale)

    @property
    def skipped(self) -> bool:
        return bool(self._state.skips)

    @cached_property
    def site(self) -> str | None:
        return self._find() if self.skipped else None

    @property
    def sparsity(self) -> float | None:
        return None


class JaxEngine:
    """`mezzo.train.engine.Engine` for JAX; what it promises stands there.

    params    name → array, by torch's names
    counters  mezzo.jax.State: loss scale, draws, steps
    """

    counters: Any

    def __init__(self, config: Config, shape: GPTConfig) -> None:
        t = config.train
        self.config, self.shape = config, shape
        self.shapes = parameter_shapes(shape)
        self.device = choose_device(t.device)
        self.advice: list[str] = []
        self.peak_flops = 0.0  # not measured: no share of it is shown
        self._resting = self._in_use()
        self.params: Params = jax.device_put(dict(initial_parameters(shape, t.seed)), self.device)
        self.options = adamw_state.Options(t.betas, t.weight_decay)
        self.moments: Moments = jax.device_put(adamw(self.options).init(self.params), self.device)
        self._compiled: dict[Policy, Compiled] = {}
        schedule = config.schedule()
        self.policy = config.resolved_policy() if schedule is None else schedule.phases[0].policy
        self._take(Scales.begin(self.policy))
        for policy in [self.policy] if schedule is None else [phase.policy for phase in schedule.phases]:
            self._check(policy)
        self._rate = t.lr

    @property
    def model(self) -> Params:
        return self.params

    @property
    def optimizer(self) -> Moments:
        return self.moments

    @property
    def precision(self) -> Any:
        return self._at(self.policy).precision

    @property
    def late(self) -> bool:
        return bool(self.device.platform != "cpu")

    @property
    def _native(self) -> bool:
        """Whether the device multiplies 16-bit operands itself."""
        return bool(self.device.platform != "cpu")

    def _check(self, policy: Policy) -> None:
        """A rule that matches nothing, or cannot be carried out, is an error now; nothing is computed."""
        x = jax.ShapeDtypeStruct((self.config.train.batch, self.shape.seq_len), jnp.int32)
        parts = self._at(policy)
        parts.precision.sites(parts.plain, self.params, x, x)

    def _at(self, policy: Policy) -> Compiled:
        if policy not in self._compiled:
            parts = compiled(policy, self.config, self.shape, self.options)
            parts.precision.native = self._native  # of this device, not of JAX's default
            self._compiled[policy] = parts
        return self._compiled[policy]

    # --- phases ---

    def phases(self, schedule: Schedule, probe: Callable[[], Pair], held_out: Callable[[], Iterable[Pair]]) -> Switched:
        return Switched(schedule, self._switch, lambda low, high: comparison(self, low, high, probe, held_out))

    def _switch(self, policy: Policy) -> None:
        if policy != self.policy:
            self._take(self._numbers().switch(self.policy, policy))
            self.policy = policy

    # --- training ---

    def ready(self) -> None:
        pass  # every random word is a function of seed, step and site

    def close(self) -> None:
        pass

    def warm(self) -> None:
        pass  # the first step compiles

    def step(self, batches: Iterable[Pair], rate: float) -> JaxOutcome:
        if self.late:
            check(self.policy, self.counters)  # of the step before: nobody waits for this one
        parts, before, micros = self._at(self.policy), self.counters, []
        grads, losses, state = None, [], before
        for batch in batches:
            x, y = self._placed(batch)
            more, loss = parts.gradient(self.params, state, x, y)
            grads = more if grads is None else parts.add(grads, more)
            state = state._replace(draws=state.draws + 1)
            losses.append(loss)
            micros.append((x, y))
        # The optimizer counts a draw itself: the last.
        state = state._replace(draws=state.draws - 1)
        self.params, self.moments, self.counters, finite = parts.update(self.params, self.moments, state, grads, rate)
        self._rate = rate
        after, tokens = self.counters, sum(x.size for x, _ in micros)

        def find() -> str:
            first = None
            if self.counters is after and int(after.bad_run) == 1:  # the weights are still those that the step had
                first = self._first_nonfinite(parts, before, micros)
            return first or gradients(finite)

        outcome = JaxOutcome(losses, before.scale, after, tokens, find)
        if not self.late and outcome.skipped:
            self._patience(outcome)
        return outcome

    def _patience(self, outcome: JaxOutcome) -> None:
        """raises    NonfiniteError when steps keep being skipped"""
        try:
            check(self.policy, self.counters)
        except NonfiniteError:
            check(self.policy, self.counters, outcome.site or "")

    def _first_nonfinite(self, parts: Compiled, state: Any, micros: list[tuple[Any, Any]]) -> str | None:
        for draw, (x, y) in enumerate(micros):
            here = state._replace(draws=state.draws + draw)
            site = mezzo.jax.first_nonfinite(parts.precision, parts.plain, self.params, x, y, state=here)
            if site is not None:
                return str(site)
        return None

    def memory(self) -> int:
        return self._peak() - self._resting

    def _in_use(self) -> int:
        if self.device.platform == "cpu":
            memory.reset_peak()
            return memory.in_use()
        return int((self.device.memory_stats() or {}).get("bytes_in_use", 0))

    def _peak(self) -> int:
        if self.device.platform == "cpu":
            return memory.peak()
        return int((self.device.memory_stats() or {}).get("peak_bytes_in_use", 0))

    def _placed(self, batch: Pair) -> tuple[Any, Any]:
        x, y = (jax.device_put(a.astype(np.int32), self.device) for a in batch)
        return x, y

    # --- looking ---

    def loss(self, batch: Pair) -> Any:
        return self._at(self.policy).loss(self.params, self.counters, *self._placed(batch))

    def gradient(self, batch: Pair, policy: Policy) -> np.ndarray[Any, Any]:
        """All gradients as one vector."""
        grads, _ = self._at(policy).gradient(self.params, self.counters, None, *self._placed(batch))
        return np.concatenate([np.asarray(g).ravel() for g in grads.values()]).astype(np.float64)

    def evaluate(self, batches: Iterable[Pair], policy: str | None = None) -> tuple[float, int]:
        parts = self._at(self.policy if policy is None else Policy.of(policy))
        total, count = 0.0, 0
        for batch in batches:
            total += float(parts.loss(self.params, self.counters, *self._placed(batch))) * batch[1].size
            count += batch[1].size
        return total / count, count

    def sample(self, prompt: Sequence[int], *, tokens: int, seed: int, eot: int, vocab_size: int) -> Iterator[int]:
        parts = self._at(self.policy)

        def logits_of(idx_BT: Any, last: int) -> Any:
            return parts.logits(self.params, self.counters, jax.device_put(idx_BT, self.device), last)

        return generate(
            logits_of, prompt, self.shape, max_new_tokens=tokens, temperature=0.8, top_k=50, seed=seed, eot=eot,
            vocab_size=vocab_size,
        )  # fmt: skip

    def damaged(self) -> str | None:
        return next((name for name, p in self.params.items() if not bool(jnp.isfinite(p).all())), None)

    # --- state ---

    def routes(self, policies: Iterable[Policy]) -> dict[str, str]:
        names = {rule.fmt.name for policy in policies for rule in policy.all_rules()}
        native = (*PLAIN, *HALVES) if self._native else PLAIN
        return {name: "native" if name in native else "emulated" for name in sorted(names)}

    def environment(self, routes: dict[str, str]) -> dict[str, Any]:
        return {
            "framework": "jax",
            "mezzo": __version__,
            "jax": jax.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
            "device": self.device.platform,
            "device_name": None if self.device.platform == "cpu" else self.device.device_kind,
            "contract": mezzo.jax.CONTRACT,
            "route": routes,
        }

    def _numbers(self) -> Scales:
        s = self.counters
        return Scales(
            scale=float(s.scale), good=int(s.good), bad=int(s.bad), at_floor=int(s.at_floor), steps=int(s.steps),
            skipped=int(s.skipped), bad_run=int(s.bad_run), draws=int(s.draws), waiting=self.waiting,
        )  # fmt: skip

    def _take(self, scales: Scales) -> None:
        def whole(n: int) -> Any:
            return jnp.asarray(n, jnp.int32)

        state = mezzo.jax.State(
            scale=jnp.asarray(scales.scale, jnp.float32), good=whole(scales.good), bad=whole(scales.bad),
            at_floor=whole(scales.at_floor), bad_run=whole(scales.bad_run), draws=whole(scales.draws),
            steps=whole(scales.steps), skipped=whole(scales.skipped), skips=jnp.zeros((), bool),
            grad_norm=jnp.zeros((), jnp.float32),
        )  # fmt: skip
        self.counters, self.waiting = jax.device_put(state, self.device), scales.waiting

    def state(self) -> tuple[Groups, dict[str, Any]]:
        m = self.moments
        moments = adamw_state.AdamW(int(m.count), m.first, m.second, begun=int(self.counters.steps) > 0)
        optimizer, meta = adamw_state.to_disk(self.shapes, moments, self.options, self._rate)
        groups: Groups = {"model": self.params, "optimizer": optimizer, "precision": self._numbers().to_disk()}
        return groups, {"optimizer": meta}

    def load(self, group: Callable[[str], Named], groups: Sequence[str], meta: dict[str, Any]) -> list[str]:
        weights = group("model")
        here = {name: f"float32[{', '.join(map(str, shape))}]" for name, shape in self.shapes.items()}
        check_fit(here, {name: describe(array) for name, array in weights.items()}, "model")
        moments, options = adamw_state.from_disk(self.shapes, group("optimizer"), meta["optimizer"])
        scales, messages = Scales.from_disk(group("precision"), meta["policy"], self.policy)
        self.params = jax.device_put({name: weights[name] for name in self.shapes}, self.device)
        count = np.array(moments.count, np.int32)
        self.moments = jax.device_put(Moments(count, dict(moments.first), dict(moments.second)), self.device)
        self._take(scales)
        if options != self.options:
            self.options = options
            self._compiled.clear()
        return messages


def choose_device(wanted: str) -> Any:
    """The first device of the kind that the config asks for; "auto" takes JAX's own choice.

    raises    ConfigError if there is none
    """
    if wanted == "auto":
        return jax.devices()[0]
    try:
        return jax.devices({"cuda": "gpu"}.get(wanted, wanted))[0]
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(
            f"train.device = {wanted!r}, but JAX has none ({why}); take device = 'cpu', or a build of jax for it"
        ) from error
