"""Delayed scales: what a history remembers and the scale it gives, the same bits in NumPy and torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzo.errors import ConfigError
from mezzo.formats import get_format, quantize
from mezzo.formats.blocks import MIN_SCALE
from mezzo.formats.spec import FLOAT32
from mezzo.policy.amax import DelayedScaling, remember, scale

E4M3 = get_format("e4m3@tensor")
KINDS = [(np, lambda x: np.asarray(x, np.float32)), (torch, lambda x: torch.tensor(x, dtype=torch.float32))]
both = pytest.mark.parametrize(("xp", "make"), KINDS, ids=["numpy", "torch"])


def run(xp, make, amaxes, history=4, margin=0, fmt=E4M3):
    """The histories and scales after each step, as NumPy arrays."""
    scaling, seen, out = DelayedScaling(history, margin), make([0.0] * history), []
    for amax in amaxes:
        seen = remember(seen, make(amax), xp)
        factor = scale(scaling, seen, fmt, xp)
        assert seen.dtype == factor.dtype == make(0.0).dtype
        assert tuple(factor.shape) == ()
        out.append((np.asarray(seen), np.asarray(factor)))
    return out


@both
def test_a_history_holds_the_latest_steps_newest_first(xp, make):
    histories = [seen.tolist() for seen, _ in run(xp, make, [1.0, 2.0, 3.0, 4.0, 5.0])]
    assert histories == [[1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2]]


@both
def test_the_scale_sends_the_largest_amax_of_the_history_to_the_largest_value(xp, make):
    scales = [float(factor) for _, factor in run(xp, make, [448.0, 896.0, 224.0, 224.0, 224.0, 224.0])]
    assert scales == [1.0, 2.0, 2.0, 2.0, 2.0, 0.5]  # 896 is forgotten after four steps


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_amax_that_is_not_finite_is_not_remembered(xp, make, bad):
    steps = run(xp, make, [896.0, bad, bad, 448.0, bad])
    assert [seen.tolist() for seen, _ in steps[1:3]] == [[896, 0, 0, 0]] * 2
    assert steps[-1][0].tolist() == [448, 896, 0, 0]
    assert [float(factor) for _, factor in steps] == [2.0] * 5
    # A history that took every amax would keep it: the maximum of anything and NaN is NaN.
    poisoned = make([bad, 896.0])
    assert not math.isfinite(float(poisoned.max()))


@both
def test_an_empty_history_gives_the_scale_one(xp, make):
    assert float(scale(DelayedScaling(3, 5), make([0.0] * 3), E4M3, xp)) == 1.0
    (seen, factor), *_ = run(xp, make, [math.nan], history=1)
    assert (seen.tolist(), float(factor)) == ([0.0], 1.0)


@both
def test_a_history_of_one_step_is_the_step_before(xp, make):
    assert [float(factor) for _, factor in run(xp, make, [448.0, 224.0, 0.0], history=1)] == [1.0, 0.5, 1.0]


@both
@pytest.mark.parametrize("margin", [0, 1, 3, 16])
def test_the_margin_makes_the_scale_larger_by_a_power_of_two(xp, make, margin):
    assert float(run(xp, make, [448.0 * 3], margin=margin)[0][1]) == 3 * 2.0**margin


@both
@pytest.mark.parametrize("margin", [0, 16])
@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-126, 1e-38, 3.4e38, FLOAT32.max])
@pytest.mark.parametrize("name", ["e4m3@tensor", "e5m2@tensor", "e2m1@row", "int8@tensor"])
def test_the_smallest_and_the_largest_amax_give_scales_that_quantize_takes(xp, make, amax, margin, name):
    fmt = get_format(name)
    factor = np.float32(run(xp, make, [amax], margin=margin, fmt=fmt)[0][1])
    assert factor >= MIN_SCALE  # a normal number, whose reciprocal is finite
    assert np.isfinite(np.float32(fmt.element.max) * factor)  # the largest value times its scale is none beyond float32
    x = np.full((1, 4), amax, np.float32)
    given_scale = factor if fmt.group == "tensor" else np.full((1, 1), factor)
    y = quantize(x, fmt, scale=given_scale)
    assert np.isfinite(y).all()


@both
def test_the_margin_counts_from_the_floor(xp, make):
    assert float(run(xp, make, [2.0**-140], margin=2)[0][1]) == MIN_SCALE * 4


amaxes = st.lists(st.floats(0, width=32) | st.just(math.nan), min_size=1, max_size=8)


@settings(deadline=None)  # a shared machine may be slow for a moment
@given(amaxes, st.integers(1, 5), st.integers(0, 16), st.sampled_from(["e4m3@tensor", "int8@row", "e2m3@1x8"]))
def test_numpy_and_torch_remember_and_scale_to_the_same_bits(steps, history, margin, name):
    one, other = (run(xp, make, steps, history, margin, get_format(name)) for xp, make in KINDS)
    for (seen, factor), (torch_seen, torch_factor) in zip(one, other, strict=True):
        assert seen.tobytes() == torch_seen.tobytes()
        assert factor.tobytes() == torch_factor.tobytes()


@settings(deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from(["e4m3@tensor", "e3m2@row", "int8@tensor"]))
def test_the_scale_is_the_quotient_rounded_once(amax, name):
    fmt = get_format(name)
    factor = float(run(*KINDS[0], [amax], fmt=fmt)[0][1])
    exact = Fraction(amax) / Fraction(fmt.element.max)
    # Half a unit of float32's last place; 2**-24 relative is the most that is.
    assert abs(Fraction(factor) - exact) <= exact / 2**24


@both
def test_many_sites_at_once_give_what_each_gives_alone(xp, make):
    histories, amaxes = make([[3.0, 1.0, 9.0], [0.0, 0.0, 0.0], [2.0, 5.0, 1.0]]), make([4.0, math.nan, 0.5])
    together = remember(histories, amaxes, xp)
    scales = scale(DelayedScaling(3, 1), together, E4M3, xp)
    for i in range(3):
        alone = remember(histories[i], amaxes[i], xp)
        assert together[i].tolist() == alone.tolist()
        assert float(scales[i]) == float(scale(DelayedScaling(3, 1), alone, E4M3, xp))
    assert together.tolist() == [[4, 3, 1], [0, 0, 0], [0.5, 2, 5]]


def test_nothing_that_is_given_is_changed():
    for xp, make in KINDS:
        seen, amax = make([3.0, 2.0]), make(5.0)
        remember(seen, amax, xp)
        scale(DelayedScaling(2), seen, E4M3, xp)
        assert (seen.tolist(), float(amax)) == ([3.0, 2.0], 5.0)


@pytest.mark.parametrize("history", [0, -1])
def test_a_history_of_no_step_is_refused(history):
    with pytest.raises(ConfigError, match=f"^delayed scaling remembers at least one step, got history {history}$"):
        DelayedScaling(history)


@pytest.mark.parametrize("margin", [-1, 17])
def test_a_margin_out_of_range_is_refused(margin):
    with pytest.raises(ConfigError, match=f"^the margin of delayed scaling is in 0 … 16, got {margin}$"):
        DelayedScaling(margin=margin)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "mxfp8_e4m3", "nvfp4"])
def test_formats_without_a_float32_scale_are_refused(name):
    with pytest.raises(ConfigError, match=f"formats scaled by a float32, such as e4m3@tensor; not for {name}$"):
        scale(DelayedScaling(), np.ones(3, np.float32), get_format(name), np)
