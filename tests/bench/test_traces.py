from __future__ import annotations

from collections import Counter

import pytest

from bench.traces import SYNTHETIC, loop, phases, tides, uniform, zipf


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("calls", [1, 7, 1000])
def test_every_generator_gives_as_many_calls_and_the_same_again(name, calls):
    made = SYNTHETIC[name](calls, 3)
    assert made == SYNTHETIC[name](calls, 3)
    assert calls - 8 < len(made.calls) <= calls
    assert all(isinstance(signature, int) and signature >= 0 for signature in made.calls)


def test_another_seed_gives_other_calls():
    assert zipf(1.0, 1000, seed=1) != zipf(1.0, 1000, seed=2)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.1])
def test_the_nth_hottest_comes_with_the_probability_it_should(exponent):
    calls, shapes = 200_000, 20
    counts = [count for _, count in Counter(zipf(exponent, calls, shapes=shapes).calls).most_common()]
    whole = sum(rank**-exponent for rank in range(1, shapes + 1))
    for rank, count in enumerate(counts, 1):
        expected = calls * rank**-exponent / whole
        assert abs(count - expected) < 6 * expected**0.5


def test_one_offs_come_once_and_as_often_as_they_should():
    counts = Counter(zipf(1.1, 20_000, shapes=60, one_offs=0.3).calls)
    fresh = [count for signature, count in counts.items() if signature >= 60]
    assert set(fresh) == {1}
    assert abs(len(fresh) - 6000) < 400


def test_uniform_has_no_favourites():
    made = uniform(100_000, shapes=10)
    assert not made.favourites
    assert max(Counter(made.calls).values()) < 1.1 * min(Counter(made.calls).values())


def test_a_loop_takes_turns():
    assert loop(7, shapes=3).calls == [0, 1, 2, 0, 1, 2, 0]


def test_phases_share_no_signature():
    made = phases(1003, count=4, shapes=10)
    parts = [{signature // 10 for signature in made.calls[start : start + 250]} for start in (0, 251, 502, 753)]
    assert parts == [{0}, {1}, {2}, {3}]
    assert len(made.calls) == 1003


def test_tides_come_back():
    made = tides(800, count=8, shapes=10)
    assert [made.calls[start] // 10 for start in range(0, 800, 100)] == [0, 1] * 4
    first = Counter(signature for signature in made.calls if signature < 10)
    assert len(made.calls) == 800
    assert sum(first.values()) == 400
