from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.ladder import MOST_STEPS, Rung, knee, ladder
from graphcache.errors import ConfigError

histograms = st.dictionaries(st.integers(1, 40), st.integers(0, 9), min_size=1, max_size=9)


def padding_of(weights: Mapping[int, int], buckets: Sequence[int]) -> int:
    """By definition: each size goes to the smallest bucket that holds it."""
    targets = {size: min(bucket for bucket in buckets if bucket >= size) for size in weights}
    return sum(weight * (targets[size] - size) for size, weight in weights.items())


def cheapest(weights: Mapping[int, int], most: int, price: int) -> tuple[int, int]:
    """The least cost over every choice of up to ``most`` buckets, and the least number that reaches it; by trying."""
    top = max(weights)
    return min(
        (padding_of(weights, chosen) + price * sum(chosen), number)
        for number in range(1, most + 1)
        for rest in combinations(sorted(set(weights) - {top}), number - 1)
        for chosen in [(*rest, top)]
    )


@given(histograms, st.integers(1, 10), st.integers(0, 30))
def test_no_choice_of_buckets_is_cheaper_and_none_as_cheap_has_fewer(weights, most, price):
    rungs = ladder(weights, most, price=price)
    assert len(rungs) == min(most, len(weights))
    for number, rung in enumerate(rungs, 1):
        assert (rung.cost, len(rung.sizes)) == cheapest(weights, number, price)


@given(st.dictionaries(st.integers(1, 7), st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3))
def test_sizes_that_were_not_seen_would_not_help(weights, most):
    top = max(weights)
    anything = min(
        padding_of(weights, (*rest, top))
        for number in range(most)
        for rest in combinations(range(1, top), min(number, top - 1))
    )
    assert ladder(weights, most)[-1].padding == anything


@given(histograms, st.integers(1, 10), st.integers(0, 30))
def test_what_a_rung_says_of_itself_is_so(weights, most, price):
    for rung in ladder(weights, most, price=price):
        assert list(rung.sizes) == sorted(set(rung.sizes) & set(weights))
        assert rung.sizes[-1] == max(weights)
        assert rung.padding == padding_of(weights, rung.sizes)
        assert rung.held == sum(rung.sizes)
        assert rung.cost == rung.padding + price * rung.held
        assert rung.work == sum(size * weight for size, weight in weights.items())
        assert 0 <= rung.share < 1


@given(st.dictionaries(st.integers(1, 500), st.integers(0, 99), min_size=1, max_size=40), st.integers(0, 30))
def test_each_further_bucket_saves_at_most_what_the_one_before_saved(weights, price):
    costs = [rung.cost for rung in ladder(weights, 40, price=price)]
    savings = [before - after for before, after in pairwise(costs)]
    assert savings == sorted(savings, reverse=True)
    assert all(saving >= 0 for saving in savings)


@given(histograms)
def test_a_bucket_for_each_size_pads_nothing(weights):
    assert ladder(weights, len(weights))[-1].padding == 0


def test_sizes_that_count_nothing_get_no_bucket_but_the_largest_stays():
    rungs = ladder({1: 0, 5: 3, 6: 0, 9: 0}, 4)
    assert [rung.sizes for rung in rungs] == [(9,), (5, 9), (5, 9), (5, 9)]
    assert ladder({4: 0}, 1) == [Rung((4,), 0, 0, 4, 0)]
    assert ladder({4: 0}, 1)[0].share == 0


def test_a_price_on_memory_leaves_buckets_out():
    weights = dict.fromkeys(range(1, 65), 1)
    free, dear = ladder(weights, 16)[-1], ladder(weights, 16, price=10)[-1]
    assert dear.held < free.held
    assert dear.padding > free.padding


def test_no_sizes_no_rungs():
    assert ladder({}, 3) == []


def test_numbers_of_any_size_stay_exact():
    huge = 10**400
    assert ladder({1: huge, 2: 1, 3: huge}, 2)[1].padding == 1
    assert ladder({huge: 1, huge + 1: 1}, 1)[0].padding == 1


def test_ten_times_the_sizes_cost_hardly_more_than_ten_times_the_work():
    def seconds(count: int) -> float:
        weights = {size: size * 7919 % 1000 + 1 for size in range(1, count + 1)}
        start = time.perf_counter()
        ladder(weights, 16)
        return time.perf_counter() - start

    # A table with every pair of sizes would take a hundred times as long.
    assert min(seconds(10_000) for _ in range(3)) < 30 * min(seconds(1_000) for _ in range(3))


def test_more_steps_than_anybody_waits_for_are_refused():
    count = MOST_STEPS // 100 + 1
    with pytest.raises(ConfigError, match=rf"^most=100: {count} distinct sizes times 100 buckets are more than"):
        ladder(dict.fromkeys(range(1, count + 1), 1), 100)


@pytest.mark.parametrize("threshold", [0, 0.001, 0.01, 0.1, 1, 50])
def test_the_knee_is_where_the_next_bucket_saves_less_than_the_threshold(threshold):
    rungs = ladder({size: 100 // size + 1 for size in range(1, 100)}, 40)
    at = [rung.sizes for rung in rungs].index(knee(rungs, threshold).sizes)
    savings = [before.cost - after.cost for before, after in pairwise(rungs)]
    assert all(saving >= threshold * rungs[0].work for saving in savings[:at])
    assert at == len(savings) or savings[at] < threshold * rungs[0].work or savings[at] == 0


def test_a_saving_of_just_the_threshold_is_enough():
    rungs = ladder({1: 2, 3: 2}, 2)
    assert (rungs[0].cost - rungs[1].cost, rungs[0].work) == (4, 8)
    assert [knee(rungs, threshold).sizes for threshold in (0.5, 0.5001)] == [(1, 3), (3,)]


def test_the_knee_of_equal_rungs_is_the_first():
    assert knee(ladder({8: 1, 9: 0}, 2), 0).sizes == (8, 9)
    assert knee(ladder({8: 0, 9: 1}, 2), 0).sizes == (9,)


@pytest.mark.parametrize(
    ("weights", "most", "price", "message"),
    [
        ([(1, 2)], 1, 0, r"^weights=\[\(1, 2\)\]: expected a mapping"),
        ({0: 1}, 1, 0, r"^weights: the size 0; expected a whole number, 1 or more"),
        ({-3: 1}, 1, 0, r"^weights: the size -3;"),
        ({True: 1}, 1, 0, r"^weights: the size True;"),
        ({"8": 1}, 1, 0, r"^weights: the size '8';"),
        ({8: 1.5}, 1, 0, r"^weights\[8\]=1.5: expected a whole number, 0 or more"),
        ({8: -1}, 1, 0, r"^weights\[8\]=-1:"),
        ({10**5000: None}, 1, 0, r"^weights\[an object of type int"),
        ({8: 1}, 0, 0, r"^most=0: expected a whole number, 1 or more"),
        ({8: 1}, True, 0, r"^most=True:"),
        ({8: 1}, 1, -1, r"^price=-1: expected a whole number, 0 or more"),
        ({8: 1}, 1, "a", r"^price='a':"),
    ],
)
def test_what_is_no_number_is_refused_by_name(weights: Any, most: Any, price: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        ladder(weights, most, price=price)


@pytest.mark.parametrize("threshold", [-1, float("nan"), float("inf"), True, "1", None, 1j])
def test_a_threshold_that_is_no_share_is_refused(threshold: Any):
    with pytest.raises(ConfigError, match=r"^threshold=.*: expected a share, 0 or more"):
        knee(ladder({8: 1}, 1), threshold)


def test_a_knee_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"^rungs: there are none"):
        knee([])
