"""Loss scaling, skips, clipping, phases and measures in the steps of a training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezzo.jax
from mezzo.errors import ConfigError, NonfiniteError
from mezzo.formats import quantize
from mezzo.formats.measure import measure
from mezzo.policy import LossScaling, Phase, Policy, Site
from mezzo.policy.scale import initial, update

W = {"a": {"kernel": np.eye(4, dtype=np.float32)}, "b": {"kernel": np.full((4, 2), 0.5, np.float32)}}
X = np.arange(12, dtype=np.float32).reshape(3, 4) / 8


def loss(params, x, gain=1.0):
    return jnp.mean(((x @ params["a"]["kernel"]) @ params["b"]["kernel"]) ** 2) * gain


def make(policy, inner=None, max_norm=None, function=loss):
    precision = mezzo.jax.Precision(policy)
    rounded = precision(function)
    optimizer = precision.optimizer(inner or optax.adam(0.1), max_norm=max_norm)

    @jax.jit
    def step(params, state, x, gain):
        value, grads = jax.value_and_grad(rounded)(params, x, gain, state=state)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    params = jax.tree.map(jnp.asarray, W)
    return precision, step, params, optimizer.init(params)


def test_the_loss_scale_moves_step_by_step_as_the_state_machine_says():
    scaling = LossScaling(init=4.0, growth_interval=3, floor=1.0, ceiling=16.0, hysteresis=2)
    policy = Policy("fp16", loss_scaling=scaling)
    _, step, params, state = make(policy)
    want = initial(scaling)
    for bad in [0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]:
        gain = np.float32(np.inf if bad else 1.0)
        params, state, _, _ = step(params, state, X, gain)
        want = update(scaling, want, bool(bad), lambda c, a, b: a if c else b)
        got = state.precision
        assert (float(got.scale), int(got.good), int(got.bad), int(got.at_floor)) == (
            want.scale, want.good, want.bad, want.at_floor,
        )  # fmt: skip
    assert int(state.precision.skipped) == 6
    assert int(state.precision.steps) == 19


def test_gradients_come_out_unscaled_and_small_ones_survive():
    """Gradients below 2^-24 are below what float16 holds; times 2^16 they are not."""
    _, step, params, state = make("fp16")
    small = np.float32(2.0**-27)
    grads = step(params, state, X, small)[3]
    plain = jax.grad(loss)(jax.tree.map(jnp.asarray, W), X, small)
    np.testing.assert_allclose(grads["a"]["kernel"], plain["a"]["kernel"], rtol=2e-3, atol=1e-12)
    _, step, params, state = make("fp16; loss_scale=none")
    assert np.abs(step(params, state, X, small)[3]["a"]["kernel"]).max() < np.abs(plain["a"]["kernel"]).max() / 2


@pytest.mark.parametrize("policy", ["fp16", "bf16"])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(policy):
    _, step, params, state = make(policy)
    params, state, _, _ = step(params, state, X, np.float32(1))
    after, later, _, _ = step(params, state, X, np.float32(np.nan))
    for one, other in zip(jax.tree.leaves((params, state.inner)), jax.tree.leaves((after, later.inner)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert bool(later.precision.skips)
    again, _, _, _ = step(after, later, X, np.float32(1))
    assert (again["a"]["kernel"] != after["a"]["kernel"]).any()


def test_clipping_by_norm_is_that_of_optax():
    _, step, params, state = make("fp32", optax.sgd(1.0), max_norm=0.1)
    params, state, _, grads = step(params, state, X, np.float32(1))
    clip = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    start = jax.tree.map(jnp.asarray, W)
    updates, _ = clip.update(grads, clip.init(start))
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(optax.apply_updates(start, updates)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    np.testing.assert_allclose(state.precision.grad_norm, norm, rtol=1e-6)


def test_steps_that_keep_being_skipped_end_with_an_error():
    precision, step, params, state = make("fp16; loss_scale=4")
    for _ in range(9):
        params, state, _, _ = step(params, state, X, np.float32(np.inf))
    precision.check(state)
    params, state, _, _ = step(params, state, X, np.float32(np.inf))
    with pytest.raises(NonfiniteError, match="10 steps in a row had nonfinite gradients at the constant loss scale"):
        precision.check(state)
    with pytest.raises(ConfigError, match=r"holds no mezzo\.jax\.State"):
        precision.check({"count": 1})


def test_the_state_lives_through_chains_of_optax_and_is_found_in_them():
    precision = mezzo.jax.Precision("fp16")
    optimizer = optax.chain(precision.optimizer(optax.adam(1e-3)), optax.add_decayed_weights(0.0))
    state = optimizer.init(W)
    grads = jax.jit(jax.grad(precision(loss)))(jax.tree.map(jnp.asarray, W), X, state=state)
    assert np.isfinite(grads["a"]["kernel"]).all()


def test_a_policy_that_needs_the_state_says_how_to_give_it():
    with pytest.raises(ConfigError, match=r"fp16 scales the loss dynamically.*state=opt_state"):
        mezzo.jax.Precision("fp16")(loss)(W, X)
    with pytest.raises(ConfigError, match=r"draws random words for stochastic rounding"):
        mezzo.jax.Precision("nvfp4")(loss)(W, X)
    mezzo.jax.Precision("fp8")(loss)(W, X)
    mezzo.jax.Precision("fp16; loss_scale=8")(loss)(W, X)


def test_each_step_draws_new_words():
    word = "e5m2@tensor stochastic"
    _, step, params, state = make(f"fp32; a:dgrad.a={word}; a:wgrad.a={word}", optax.sgd(0.0))
    first = step(params, state, X, np.float32(1))
    again = step(params, state, X, np.float32(1))
    second = step(params, first[1], X, np.float32(1))
    np.testing.assert_array_equal(first[3]["a"]["kernel"], again[3]["a"]["kernel"])
    assert (first[3]["a"]["kernel"] != second[3]["a"]["kernel"]).any()


def test_the_state_can_be_donated():
    precision = mezzo.jax.Precision("fp16")
    optimizer = precision.optimizer(optax.adam(0.1))

    def step(params, state):
        grads = jax.grad(precision(loss))(params, X, state=state)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, W)
    params, state = jax.jit(step, donate_argnums=(0, 1))(params, optimizer.init(params))
    assert int(state.precision.steps) == 1


def test_accumulation_belongs_inside_of_the_guard():
    """Outside, one overflow stays in optax's sum for good."""
    _, step, params, state = make("fp16; loss_scale.init=4", optax.MultiSteps(optax.sgd(0.1), 2))
    for gain in (1.0, np.inf, 1.0, 1.0, 1.0):
        params, state, _, _ = step(params, state, X, np.float32(gain))
    assert (int(state.precision.skipped), int(state.precision.draws)) == (1, 5)
    assert (params["a"]["kernel"] != W["a"]["kernel"]).any()


def test_float16_parameters_are_refused_where_the_loss_is_scaled():
    halves = jax.tree.map(lambda w: jnp.asarray(w, jnp.float16), W)
    with pytest.raises(ConfigError, match="keep parameters and loss in float32"):
        mezzo.jax.Precision("fp16; loss_scale=8")(loss)(halves, X)


def test_a_state_of_another_optimizer_is_told():
    optimizer = mezzo.jax.Precision("bf16").optimizer(optax.adam(0.1))
    with pytest.raises(ConfigError, match=r"begin with opt_state = optimizer.init\(params\)"):
        optimizer.update(W, optax.adam(0.1).init(W), W)


def test_a_cotangent_that_is_a_plain_number_is_taken():
    precision = mezzo.jax.Precision("fp16")
    _, back = jax.vjp(lambda p: precision(loss)(p, X, state=precision.init()), jax.tree.map(jnp.asarray, W))
    assert np.isfinite(back(1.0)[0]["a"]["kernel"]).all()


# --- phases ---


def steps_of(phases, count, inner=None):
    """(params, state, scales after each step) of a training through phases."""

    def make_step(precision):
        rounded = precision(loss)
        optimizer = precision.optimizer(inner or optax.sgd(0.1))

        @jax.jit
        def step(params, state, x):
            grads = jax.grad(rounded)(params, x, state=state)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    params = jax.tree.map(jnp.asarray, W)
    state = phases.precision.optimizer(inner or optax.sgd(0.1)).init(params)
    scales = []
    for step in range(1, count + 1):
        params, state = phases.each(make_step)(params, state, X)
        state = phases.after({"step": step, "skipped": False, "loss_scale": float(state.precision.scale)}, state)
        scales.append(float(state.precision.scale))
    return params, state, scales


def test_a_phase_of_no_steps_changes_nothing_and_the_loss_scale_goes_on():
    low = Policy.parse("fp16; loss_scale.init=8; loss_scale.growth_interval=2")
    alone = steps_of(mezzo.jax.Phases([Phase(low)], steps=6), 6)
    passed = steps_of(mezzo.jax.Phases([Phase(low, until=3), Phase(Policy("fp32"), until=3), Phase(low)], steps=6), 6)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(passed), strict=True):
        np.testing.assert_array_equal(one, other)
    there = [Phase(low, until=3), Phase(Policy("fp32"), until=5), Phase(low)]
    _, state, scales = steps_of(mezzo.jax.Phases(there, steps=8), 8)
    # good steps 1 2 | 3 … in fp32 the scale is 1 …| and then it goes on with one good step counted
    assert scales == [8, 16, 1, 1, 16, 32, 32, 64]
    assert int(state.precision.steps) == 8


def test_a_position_is_saved_with_the_scales_that_wait():
    low = Policy.parse("fp16; loss_scale.init=8; loss_scale.growth_interval=2")
    plan = [Phase(low, until=3), Phase(Policy("fp32"), until=5), Phase(low)]
    phases = mezzo.jax.Phases(plan, steps=8)
    steps_of(phases, 4)
    other = mezzo.jax.Phases(plan, steps=8)
    other.load_state_dict(phases.state_dict())
    assert other.number == 2
    assert other.state_dict() == phases.state_dict()


def test_named_schedules_and_what_they_cannot_have():
    phases = mezzo.jax.Phases("dmp", policy="nvfp4", steps=100)
    assert [str(p.policy.recipe) for p in phases.schedule.phases] == ["nvfp4", "fp32", "nvfp4"]
    with pytest.raises(ConfigError, match="phase 2: loss scale measured by a calibrating phase is not there under jax"):
        mezzo.jax.Phases("dmp", policy="fp16", steps=100)
    with pytest.raises(ConfigError, match=r"phase 1.*keep float32 masters"):
        mezzo.jax.Phases([Phase(Policy("bf16-pure"))], steps=10)


# --- measures ---


def test_measures_are_those_of_the_reference():
    precision = mezzo.jax.Precision("fp8")
    sample = mezzo.jax.measure(precision, loss, W, X, whatif=["mxfp4", "fp16"])
    found = sample.sites[Site("a", "fprop.a")]
    want = measure(X, quantize(X, "e4m3@tensor"), found.spec.fmt)
    assert found.measure == want
    assert list(sample.sites)[:3] == [Site("a", "fprop.a"), Site("a", "fprop.b"), Site("a", "fprop.out")]
    assert len(sample.sites) == 18
    supposed = sample.whatif["mxfp4"][Site("a", "fprop.a")].measure
    mxfp4 = Policy("mxfp4").spec(Site("a", "fprop.a")).fmt
    assert supposed.to_dict() == measure(X, quantize(X, "mxfp4"), mxfp4).to_dict()
    # What fp16 would see of a gradient carries its loss scale.
    gradient, scaled = (sites[Site("b", "dgrad.a")].measure.amax for sites in (sample.sites, sample.whatif["fp16"]))
    assert scaled == gradient * 2**16


def test_what_is_computed_again_is_measured_once():
    again = lambda p, x: jax.checkpoint(loss)(p, x)  # noqa: E731
    precision = mezzo.jax.Precision("bf16")
    counts = [
        mezzo.jax.measure(precision, function, W, X).sites[Site("a", "fprop.a")].measure.count
        for function in (loss, again)
    ]
    assert counts == [12, 12]


def test_the_first_site_that_is_not_finite_is_named():
    def damaged(params, x):
        h = (x @ params["a"]["kernel"]) * jnp.where(x > 1, jnp.inf, 1.0)
        return jnp.mean((h @ params["b"]["kernel"]) ** 2)

    assert mezzo.jax.first_nonfinite(mezzo.jax.Precision("bf16"), damaged, W, X) == Site("b", "fprop.a")
    assert mezzo.jax.first_nonfinite(mezzo.jax.Precision("bf16"), loss, W, X) is None
    with pytest.raises(ConfigError, match="no dot product"):
        mezzo.jax.measure(mezzo.jax.Precision("bf16"), lambda p, x: x.sum() * p["a"]["kernel"].sum(), W, X)
