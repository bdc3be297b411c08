from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.key_table import LARGEST, Estimate, Mean

times = st.floats(1e-7, 10.0)


def estimate(seconds) -> Estimate:
    found = Estimate()
    for each in seconds:
        found.add(each)
    return found


def test_a_slow_first_call_leaves_no_trace():
    assert estimate([1.5, 0.0005]).value == 0.0005


def test_slow_first_calls_are_forgotten_at_the_first_that_is_not():
    assert estimate([1.5, 0.006, 0.0005]).value == 0.0005


def test_one_stall_raises_it_by_a_fifth_at_most():
    settled = estimate([0.001] * 20)
    settled.add(3.0)
    assert settled.value <= 0.001 * (1 + (LARGEST - 1) / 16) + 1e-9


def test_a_change_that_lasts_is_followed():
    changed = estimate([0.001] * 20 + [0.01] * 60)
    assert changed.value == pytest.approx(0.01, rel=0.05)


def test_it_leaves_zero_again():
    assert estimate([0.0] * 4 + [0.001] * 100).value == pytest.approx(0.001, rel=0.2)


@given(st.lists(times, min_size=1, max_size=60))
def test_it_lies_among_what_was_measured(seconds):
    found = estimate(seconds)
    assert found.count == len(seconds)
    assert min(seconds) <= found.value * (1 + 1e-12)
    assert found.value <= max(seconds) + 1e-9


@given(times, st.integers(1, 50))
def test_of_equal_times_it_is_that_time(seconds, count):
    assert estimate([seconds] * count).value == pytest.approx(seconds, rel=1e-12)


def test_a_mean_is_its_prior_until_the_first_figure_which_replaces_it():
    mean = Mean(0.3)
    assert mean.value == 0.3
    mean.add(0.5)
    assert (mean.value, mean.count) == (0.5, 1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=16))
def test_of_a_few_figures_it_is_the_mean(figures):
    mean = Mean(7.0)
    for figure in figures:
        mean.add(figure)
    assert mean.value == pytest.approx(sum(figures) / len(figures), abs=1e-6)
