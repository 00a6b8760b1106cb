"""Philox against Random123's published vectors, and what a shuffle must be."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzo.formats.philox import bits, bits_at, permute, philox4x32, site_id

# Random123, tests/kat_vectors, the lines "philox4x32 7" and "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = """
7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_the_known_answers_of_random123(line):
    rounds, *words = line.split()
    numbers = [int(word, 16) for word in words]
    result = philox4x32(numbers[:4], numbers[4:6], rounds=int(rounds))
    assert result.dtype == np.uint32
    assert [f"{word:08x}" for word in result] == words[6:]


def test_many_counters_at_once_give_what_each_gives_alone():
    counters = np.arange(24).reshape(2, 3, 4)
    together = philox4x32(counters, (5, 6))
    for i, j in itertools.product(range(2), range(3)):
        assert (together[i, j] == philox4x32(counters[i, j], (5, 6))).all()


def test_a_counter_that_is_not_four_words_is_refused():
    with pytest.raises(ValueError, match=r"counter must be \(\.\.\., 4\)"):
        philox4x32([1, 2, 3], [1, 2])


def test_bits_are_the_same_for_ever():
    assert bits(2026, 3, "blocks.0", 5).tolist() == [2322055506, 1493999196, 1929631342, 1582448779, 1414128091]
    assert site_id("blocks.0") == 118006865


def test_bits_are_the_philox_words_at_the_documented_counter():
    seed, step, site, element = (7 << 32) + 3, 11, 13, (5 << 34) + 4 * 9 + 2
    word = philox4x32([9, 5, step, site], [3, 7])[2]
    assert bits_at(seed, step, site, element) == word


@settings(deadline=None)  # a shared machine may be slow for a moment
@given(start=st.integers(0, 2**40), count=st.integers(0, 40))
def test_a_run_of_bits_and_single_lookups_agree(start, count):
    run = bits(1, 2, "a", count, start=start)
    assert run.shape == (count,)
    assert (run == bits_at(1, 2, "a", np.arange(start, start + count))).all()


def test_seed_step_site_and_element_each_change_the_bits():
    runs = [bits(1, 1, 1, 64), bits(2, 1, 1, 64), bits(1, 2, 1, 64), bits(1, 1, 2, 64), bits(1, 1, 1, 64, start=64)]
    for one, other in itertools.combinations(runs, 2):
        assert not np.isin(one, other).any()


def test_bits_are_uniform():
    share = np.unpackbits(bits(0, 0, 0, 1 << 15).view(np.uint8)).mean()
    # 2**20 fair bits: the mean's standard deviation is 0.5 / 2**10; five of them.
    assert abs(share - 0.5) < 5 * 0.5 / 2**10


@pytest.mark.parametrize(
    ("seed", "step", "site", "name"),
    [(-1, 0, 0, "seed"), (2**64, 0, 0, "seed"), (0, 2**32, 0, "step"), (0, 0, -1, "site")],
)
def test_numbers_out_of_range_are_refused_by_name(seed, step, site, name):
    with pytest.raises(ValueError, match=f"{name} must be in"):
        bits(seed, step, site, 1)


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**64 - 1))
def test_a_permutation_meets_every_index_once(n, seed, stream):
    assert np.bincount(permute(np.arange(n), n, (seed, stream)), minlength=n).tolist() == [1] * n


@settings(deadline=None)
@given(n=st.integers(1, 2**62), data=st.data())
def test_huge_permutations_stay_in_range_and_apart(n, data):
    index = data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1, max_size=20))
    sent = permute(index, n, (1, 2))
    assert len(set(sent.tolist())) == len(index)
    assert sent.min() >= 0
    assert sent.max() < n


def test_the_order_is_the_same_for_ever():
    assert permute(np.arange(10), 10, (0, 0)).tolist() == [5, 8, 3, 2, 4, 9, 7, 0, 6, 1]
    assert permute(np.arange(4), 10**9, (2026, 1)).tolist() == [186124897, 66150022, 463064783, 966436790]


def test_one_index_needs_none_of_the_others():
    whole = permute(np.arange(1000), 1000, (3, 4))
    assert permute(617, 1000, (3, 4)) == whole[617]
    assert (permute(np.array([[5, 999], [0, 5]]), 1000, (3, 4)) == whole[[[5, 999], [0, 5]]]).all()


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_order_of_a_few_things_is_equally_likely(n):
    tries, orders = 3000, math.factorial(n)
    counts: dict[tuple[int, ...], int] = {}
    for key in range(tries):
        order = tuple(permute(np.arange(n), n, (key // 60, key % 60)).tolist())
        counts[order] = counts.get(order, 0) + 1
    expected = tries / orders
    chi2 = sum((count - expected) ** 2 for count in counts.values()) / expected + expected * (orders - len(counts))
    freedom = orders - 1
    # chi-squared has mean `freedom` and standard deviation sqrt(2 freedom); four of them above.
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_neighbours_are_sent_apart():
    n = 100_000
    sent = permute(np.arange(n), n, (7, 0))
    # The correlation of n independent pairs has a standard deviation of 1 / sqrt(n); five of them.
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(sent, np.arange(n))[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize(("index", "n"), [(5, 5), (-1, 5), (0, 0), (0, 2**62 + 1)])
def test_an_index_or_size_out_of_range_is_refused(index, n):
    with pytest.raises(ValueError, match="must be in"):
        permute(index, n, (0, 0))
