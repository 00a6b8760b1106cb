"""Which tokens a step sees: everything once an epoch, the same for every way to share out the work."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzo.data.batches import Batches, bits_per_byte, valid_batches
from mezzo.data.tokens import Tokens
from mezzo.errors import ConfigError, DataError


def tokens(count):
    """Tokens that tell their own place."""
    return np.arange(count, dtype=np.uint16)


def sequences(batches, first, count):
    """The first tokens of the global sequences first … first + count - 1, for batch 1 on one rank."""
    return [int(batches.batch_at(step)[0][0, 0]) for step in range(first, first + count)]


@settings(deadline=None, max_examples=50)  # a shared machine may be slow for a moment
@given(count=st.integers(5, 300), seq_len=st.integers(1, 12), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 5))
def test_an_epoch_visits_every_window_once_and_predicts_every_token(count, seq_len, seed, epoch):
    if count <= seq_len:
        return
    batches = Batches(tokens(count), batch=1, seq_len=seq_len, seed=seed)
    n = batches.windows
    starts = sequences(batches, epoch * n, n)
    # Windows follow each other around the ring: from the first one's start, they lie at 0, T, 2T, …
    places = {(start - starts[0]) % count for start in starts}
    assert len(places) == n
    predicted = [int(y) for step in range(epoch * n, (epoch + 1) * n) for y in batches.batch_at(step)[1].ravel()]
    assert set(predicted) == set(range(count))
    assert len(predicted) - count < seq_len


def test_targets_are_the_inputs_one_later_around_the_ring():
    batches = Batches(tokens(50), batch=4, seq_len=8, seed=0)
    for step in range(20):
        x, y = batches.batch_at(step)
        assert x.shape == y.shape == (4, 8)
        assert x.dtype == y.dtype == np.int64
        assert x.flags.c_contiguous
        assert y.flags.c_contiguous
        assert (y == (x + 1) % 50).all()


def test_each_epoch_has_an_order_and_an_offset_of_its_own():
    batches = Batches(tokens(1000), batch=1, seq_len=10, seed=3)
    epochs = [sequences(batches, epoch * 100, 100) for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({epoch[0] % 10 for epoch in epochs}) > 1
    assert epochs[0] != sorted(epochs[0])


def test_another_seed_is_another_order():
    one, two = (Batches(tokens(1000), batch=1, seq_len=10, seed=seed) for seed in (1, 2))
    assert sequences(one, 0, 20) != sequences(two, 0, 20)


def test_a_step_can_be_asked_for_in_any_order_and_again():
    batches = Batches(tokens(333), batch=3, seq_len=7, seed=5)
    forward = [batches.batch_at(step) for step in range(40)]
    other = Batches(tokens(333), batch=3, seq_len=7, seed=5)
    for step in reversed(range(40)):
        for one, two in zip(forward[step], other.batch_at(step), strict=True):
            assert (one == two).all()


def test_a_batch_that_crosses_into_the_next_epoch_takes_the_rest_of_one_and_the_start_of_the_other():
    single = Batches(tokens(101), batch=1, seq_len=10, seed=9)  # 11 windows
    wide = Batches(tokens(101), batch=4, seq_len=10, seed=9)
    for step in range(12):
        assert wide.batch_at(step)[0][:, 0].tolist() == sequences(single, 4 * step, 4)
    larger_than_an_epoch = Batches(tokens(101), batch=30, seq_len=10, seed=9)
    assert larger_than_an_epoch.batch_at(1)[0][:, 0].tolist() == sequences(single, 30, 30)


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(12, 1, 1), (3, 4, 1), (3, 1, 4), (1, 6, 2), (2, 2, 3)])
def test_the_sequences_of_a_step_do_not_depend_on_how_they_are_shared_out(batch, accumulate, world):
    whole = Batches(tokens(500), batch=12, seq_len=9, seed=4)
    ranks = [Batches(tokens(500), batch=batch, seq_len=9, seed=4, rank=r, world=world) for r in range(world)]
    for step in (0, 1, 7, 30):
        parts = [rank.batch_at(step, micro, accumulate)[0] for micro in range(accumulate) for rank in ranks]
        assert (np.concatenate(parts) == whole.batch_at(step)[0]).all()
        assert ranks[-1].epoch(step, accumulate) == whole.epoch(step)


def test_epochs_are_counted_from_the_first_sequence_of_a_step():
    batches = Batches(tokens(101), batch=4, seq_len=10, seed=0)  # 11 windows
    assert [batches.epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert batches.epoch(3, accumulate=2) == 2


def test_the_order_is_the_same_for_ever():
    batches = Batches(tokens(1000), batch=6, seq_len=10, seed=2026)
    assert batches.batch_at(0)[0][:, 0].tolist() == [38, 858, 588, 828, 418, 628]
    assert batches.batch_at(100)[0][:, 0].tolist() == [346, 926, 406, 706, 526, 26]


def test_another_process_sees_the_same_batches():
    script = (
        "import numpy as np; from mezzo.data.batches import Batches\n"
        "print(Batches(np.arange(700), batch=5, seq_len=3, seed=8).batch_at(77)[0].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out.strip() == str(Batches(np.arange(700), batch=5, seq_len=3, seed=8).batch_at(77)[0].tolist())


def test_shards_are_one_row():
    parts = Tokens([tokens(300)[:7], tokens(300)[7:8], tokens(300)[8:]])
    split = Batches(parts, batch=4, seq_len=5, seed=1)
    whole = Batches(tokens(300), batch=4, seq_len=5, seed=1)
    for step in range(40):
        assert (split.batch_at(step)[1] == whole.batch_at(step)[1]).all()


def test_the_shortest_text_is_one_sequence_and_its_target():
    x, y = Batches(tokens(9), batch=1, seq_len=8, seed=0).batch_at(0)
    assert ((x + 1) % 9 == y).all()
    message = r"training text has 8 tokens, fewer than the 9 that one sequence of 8 and its last target need; give more"
    with pytest.raises(DataError, match=message):
        Batches(tokens(8), batch=1, seq_len=8, seed=0)
    with pytest.raises(DataError, match=r"validation text has 8 tokens, .* or a larger share of validation text"):
        valid_batches(tokens(8), 1, 8)


def test_a_token_outside_the_vocabulary_is_an_error_when_it_is_met():
    batches = Batches(tokens(40), batch=8, seq_len=5, seed=0, vocab_size=39)
    with pytest.raises(DataError, match=r"the batch of step 0 holds token 39, but the vocabulary is 0 … 38"):
        batches.batch_at(0)
    Batches(tokens(40), batch=8, seq_len=5, seed=0, vocab_size=40).batch_at(0)
    with pytest.raises(DataError, match=r"validation text holds token -3"):
        list(valid_batches(np.array([1, 2, -3, 4, 5]), 2, 2, vocab_size=10))


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"seq_len": 0}, {"seed": -1}, {"seed": 2**64}, {"rank": 1}, {"rank": -1}, {"rank": 0, "world": 0}],
)
def test_sizes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"must be 1 or more|out of range|ranks are 0"):
        Batches(tokens(40), **{"batch": 1, "seq_len": 4, "seed": 0, **wrong})


@pytest.mark.parametrize("asked", [(-1, 0, 1), (0, 1, 1), (0, -1, 2), (0, 0, 0)])
def test_steps_and_micro_batches_that_cannot_be_are_refused(asked):
    with pytest.raises(ConfigError, match="counted from 0"):
        Batches(tokens(40), batch=1, seq_len=4, seed=0).batch_at(*asked)


@settings(deadline=None)
@given(count=st.integers(2, 200), seq_len=st.integers(1, 12), batch=st.integers(1, 5))
def test_evaluation_predicts_each_token_once_from_the_start(count, seq_len, batch):
    if count <= seq_len:
        return
    found = list(valid_batches(tokens(count), batch, seq_len))
    x = np.concatenate([x.ravel() for x, _ in found])
    y = np.concatenate([y.ravel() for _, y in found])
    windows = (count - 1) // seq_len
    assert x.tolist() == list(range(windows * seq_len))
    assert (y == x + 1).all()
    assert all(x.shape == (batch, seq_len) for x, _ in found[:-1])


def test_evaluation_can_be_limited_and_is_the_same_each_time():
    first = [x.tolist() for x, _ in valid_batches(tokens(100), 2, 8, limit=3)]
    assert first == [x.tolist() for x, _ in valid_batches(tokens(100), 2, 8)][:3]
    with pytest.raises(ConfigError, match="limit 0"):
        valid_batches(tokens(100), 2, 8, limit=0)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8)
    assert bits_per_byte(math.log(2), 500, 1000) == pytest.approx(0.5)
