import random

import numpy as np
import pytest
import torch

from mezzo.policy import LossScaling, ScaleState
from mezzo.policy.scale import initial, update


class Reference:
    """The loss scale written as one would explain it, with nothing shared with the code under test."""

    def __init__(self, scaling):
        self.s, self.scale, self.good, self.bad, self.at_floor = scaling, scaling.init, 0, 0, 0

    def step(self, overflow):
        s = self.s
        if overflow:
            self.at_floor = self.at_floor + 1 if self.scale <= s.floor else 0
            self.good = 0
            self.bad += 1
            if self.bad == s.hysteresis:
                self.bad = 0
                self.scale = max(self.scale * s.backoff_factor, s.floor)
        else:
            self.at_floor = self.bad = 0
            self.good += 1
            if self.good == s.growth_interval:
                self.good = 0
                self.scale = min(self.scale * s.growth_factor, s.ceiling)
        return self.scale, self.good, self.bad, self.at_floor


def python_kind(scale, good, bad, at_floor):
    return ScaleState(scale, good, bad, at_floor), lambda c, a, b: a if c else b, bool


def numpy_kind(scale, good, bad, at_floor):
    whole = (np.int32(n) for n in (good, bad, at_floor))
    return ScaleState(np.float32(scale), *whole), np.where, np.bool_


def torch_kind(scale, good, bad, at_floor):
    whole = (torch.tensor(n, dtype=torch.int32) for n in (good, bad, at_floor))
    return ScaleState(torch.tensor(scale, dtype=torch.float32), *whole), torch.where, torch.tensor


KINDS = [python_kind, numpy_kind, torch_kind]
SCALINGS = [
    LossScaling(growth_interval=3),
    LossScaling(init=4.0, floor=2.0, ceiling=16.0, growth_interval=2, hysteresis=2),
    LossScaling(
        init=8.0, floor=1.0, ceiling=8.0, growth_interval=1, hysteresis=3, growth_factor=4.0, backoff_factor=0.25
    ),
    LossScaling.constant(128.0),
]  # powers of two: exact in float32, so the comparison is exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_every_transition_is_that_of_the_reference(kind, scaling, share):
    start = initial(scaling)
    state, where, boolean = kind(start.scale, start.good, start.bad, start.at_floor)
    reference = Reference(scaling)
    rng = random.Random(share)
    for _ in range(60):
        overflow = rng.random() < share
        state = update(scaling, state, boolean(overflow), where)
        assert tuple(float(x) for x in (state.scale, state.good, state.bad, state.at_floor)) == reference.step(overflow)


@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_overflows_stop_at_the_floor_and_never_reach_zero(kind):
    scaling = LossScaling(floor=2.0**-10)
    state, where, boolean = kind(scaling.init, 0, 0, 0)
    for _ in range(200):
        state = update(scaling, state, boolean(True), where)
    assert float(state.scale) == 2.0**-10
    assert int(state.at_floor) == 200 - 26  # 26 halvings from 2^16 to 2^-10


@pytest.mark.parametrize("kind", KINDS)
def test_growth_stops_at_the_ceiling(kind):
    scaling = LossScaling(growth_interval=1)
    state, where, boolean = kind(scaling.init, 0, 0, 0)
    for _ in range(200):
        state = update(scaling, state, boolean(False), where)
    assert float(state.scale) == 2.0**24


def test_hysteresis_backs_off_only_after_so_many_overflows_in_a_row():
    scaling = LossScaling(init=64.0, hysteresis=3)
    state, where, _ = python_kind(64.0, 0, 0, 0)
    scales = []
    for overflow in (True, True, False, True, True, True, True):
        state = update(scaling, state, overflow, where)
        scales.append(state.scale)
    assert scales == [64, 64, 64, 64, 64, 32, 32]


def test_the_tensors_keep_their_dtypes():
    state, where, boolean = torch_kind(2.0**16, 0, 0, 0)
    for overflow in (True, False):
        state = update(LossScaling(growth_interval=1), state, boolean(overflow), where)
        assert state.scale.dtype is torch.float32
        assert {state.good.dtype, state.bad.dtype, state.at_floor.dtype} == {torch.int32}
        assert all(x.dim() == 0 for x in (state.scale, state.good, state.bad, state.at_floor))
