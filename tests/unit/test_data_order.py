"""Orders: permutations that are permutations, interleaving that keeps its promise at every prefix."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from trireme_trainer.data.order import MAX_PERIOD, Interleaving, derive, mix, permute, shuffled

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 700), KEYS)
def test_permute_is_a_permutation(count: int, key: int) -> None:
    assert sorted(permute(i, count, key) for i in range(count)) == list(range(count))


@given(st.integers(0, 2000), KEYS)
def test_shuffled_is_a_permutation(count: int, key: int) -> None:
    assert np.array_equal(np.sort(shuffled(count, key)), np.arange(count))


def test_orders_are_the_same_in_every_version() -> None:
    """A job resumed under a newer trireme must see the same samples; change these only with a new format version."""
    assert mix(0) == 0xE220A8397B1DCDAF  # the published first output of splitmix64 for seed 0
    assert derive(1, 2, 3) == 0x882d1acc8d6c3b48
    assert [permute(i, 10, 42) for i in range(10)] == [8, 4, 9, 5, 7, 6, 2, 0, 1, 3]
    assert shuffled(10, 42).tolist() == sorted(range(10), key=lambda i: mix(i ^ 42)) == [3, 2, 9, 5, 8, 1, 4, 0, 7, 6]


def test_permute_spreads_like_a_random_permutation() -> None:
    """Where element 0 lands over many keys, and how many neighbours stay neighbours, are as chance would have it."""
    count, keys = 16, 4000
    landed = np.bincount([permute(0, count, derive(k)) for k in range(keys)], minlength=count)
    chi2 = float(((landed - keys / count) ** 2 / (keys / count)).sum())
    assert chi2 < 40, landed  # 15 degrees of freedom: 37.7 is exceeded once in a thousand
    places = [permute(i, 5000, derive(7)) for i in range(5000)]
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(places))
    assert neighbours < 15  # 2 expected


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_every_prefix_follows_the_weights_to_less_than_one_block(weights: list[int]) -> None:
    schedule = Interleaving([float(w) for w in weights])
    total = sum(weights)
    counts = [0] * len(weights)
    for index in range(2 * schedule.period + 3):
        source, number = schedule.locate(index)
        assert number == counts[source], "each source's blocks come in order, none left out"
        counts[source] += 1
        for have, weight in zip(counts, weights, strict=True):
            assert abs(have * total - (index + 1) * weight) < total


@settings(max_examples=20)
@given(st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=5))
def test_awkward_weights_are_kept_to_a_fine_share(weights: list[float]) -> None:
    schedule = Interleaving(weights)
    assert schedule.period <= MAX_PERIOD + len(weights)
    for count, weight in zip(schedule.counts, weights, strict=True):
        assert count >= 1
        assert abs(count / schedule.period - weight / sum(weights)) <= (len(weights) + 1) / MAX_PERIOD


def test_decimal_weights_mean_what_they_say() -> None:
    assert Interleaving([0.7, 0.3]).counts == [7, 3]
    assert Interleaving([2.0, 1.0, 1.0]).counts == [2, 1, 1]
    assert Interleaving([5.0]).counts == [1]


def test_locate_far_ahead_equals_counting() -> None:
    schedule = Interleaving([0.5, 0.3, 0.2])
    seen = [schedule.locate(i) for i in range(1000, 1010)]
    assert [schedule.locate(10**12 + i)[0] for i in range(10)] == [s for s, _ in seen]
    assert schedule.locate(10**12)[1] - schedule.locate(0)[1] == 10**12 * 5 // 10
