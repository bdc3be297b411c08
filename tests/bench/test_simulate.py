from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.optimum import Times
from bench.simulate import always_eager, graphcache, least_recently_used
from bench.traces import zipf

TIMES = Times(180e-6, 50e-6, 5e-3)
calls = st.lists(st.integers(0, 9), max_size=200)


def times(every) -> dict[int, Times]:
    return dict.fromkeys(every, TIMES)


@given(calls, st.integers(1, 4))
def test_plain_lru_is_the_cache_with_a_capture_at_every_miss(every, slots):
    plain = least_recently_used(every, times(every), slots)
    real = graphcache(every, times(every), slots, policy="first")
    assert (plain.captures, plain.hits) == (real.captures, real.hits)
    assert plain.seconds == pytest.approx(real.seconds)


@given(calls, st.integers(1, 4), st.sampled_from([0.0, 0.3]))
def test_the_seconds_are_those_of_the_calls_and_captures(every, slots, noise):
    for outcome in (
        always_eager(every, times(every)),
        least_recently_used(every, times(every), slots),
        graphcache(every, times(every), slots, noise=noise),
    ):
        eager = len(every) - outcome.hits
        expected = eager * TIMES.eager + outcome.hits * TIMES.replay + outcome.captures * TIMES.capture
        assert outcome.seconds == pytest.approx(expected)


def test_prepared_captures_nothing_by_itself():
    every = zipf(1.0, 2000, shapes=5).calls
    assert graphcache(every, times(every), 4, policy="prepared") == always_eager(every, times(every))


def test_noise_is_the_same_for_the_same_seed_and_changes_what_is_measured_only():
    every = zipf(1.0, 20_000).calls
    first, again, other = (graphcache(every, times(every), 8, noise=0.3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    exact = graphcache(every, times(every), 8)
    assert first.seconds < 1.1 * exact.seconds
