from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.books import OVERHEAD, Books
from graphcache.cache.lru import Entry

EAGER, REPLAY, CAPTURE = 180e-6, 50e-6, 5e-3


class Graph:
    nbytes = 3

    def close(self) -> None:
        pass


def books(remembered: int = 8) -> tuple[Books, dict]:
    entries: dict = {}
    return Books(entries, remembered), entries


def kept(found: Books, entries: dict, key: str) -> Entry:
    """A graph for a signature that was called a few times."""
    for _ in range(3):
        found.ran(key, EAGER)
    record = found.charge(key, CAPTURE)
    entry = entries[key] = Entry(Graph())
    found.keep(key, record, entry, CAPTURE)
    found.replayed(record, REPLAY)
    return entry


def test_hits_are_booked_once_from_the_entries():
    found, entries = books()
    entry = kept(found, entries, "a")
    entry.hits += 100
    found.settle()
    found.settle()
    assert found.kept["a"].hits == 100
    assert found.saved == pytest.approx(100 * (EAGER - REPLAY))
    assert found.eager == pytest.approx(103 * EAGER)


def test_a_hit_that_was_taken_back_is_not_booked_twice():
    found, entries = books()
    entry = kept(found, entries, "a")
    entry.hits += 10
    found.settle()
    entry.hits -= 1
    found.settle()
    entry.hits += 1
    found.settle()
    assert found.kept["a"].hits == 11, "the one taken back is the only one too many"


def test_of_two_graphs_replayed_alike_both_are_worth_the_same_whenever_it_is_booked():
    found, entries = books()
    one, other = kept(found, entries, "a"), kept(found, entries, "b")
    for round_ in range(40):
        one.hits += 5
        other.hits += 5
        if round_ % 7 == 0:
            found.settle()
    found.settle()
    assert found.worth(found.kept["a"]) == pytest.approx(found.worth(found.kept["b"]), rel=0.02)


def test_a_graph_that_is_no_longer_replayed_is_worth_less_and_less():
    found, entries = books()
    kept(found, entries, "a").hits += 1000
    found.settle()
    worths = []
    for _ in range(10):
        for _ in range(500):
            found.ran("b", EAGER)
        worths.append(found.worth(found.kept["a"]))
    assert worths == sorted(worths, reverse=True)
    assert worths[-1] < 0.01 * worths[0]


def test_a_young_signature_is_as_hot_as_its_rate_says():
    found, _ = books()
    for _ in range(2000):
        found.ran("old", EAGER)
        found.ran("other", EAGER)
    for _ in range(30):
        found.ran("young", EAGER)
        found.ran("old", EAGER)
    # Each of them was every second call, for as long as it has been known.
    assert found.worth(found.seen["young"]) == pytest.approx(found.worth(found.seen["old"]), rel=0.05)


def test_stalls_buy_nothing():
    found, _ = books()
    for _ in range(4):
        found.ran("a", EAGER)
    before = found.credit
    found.ran("a", 30.0)
    assert found.credit - before <= OVERHEAD * 6 * EAGER
    assert found.eager > 30.0


def test_what_is_saved_up_is_limited_to_one_filling_of_the_cache():
    found, entries = books()
    kept(found, entries, "a").hits += 10**9
    found.settle()
    assert found.credit == pytest.approx(2 * CAPTURE)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=80), st.integers(1, 4))
def test_the_longest_uncalled_is_forgotten_and_a_signature_is_in_one_book(steps, remembered):
    found, entries = books(remembered)
    called: list[str] = []
    for key, captured in steps:
        capture = captured and len(entries) < 3
        if capture or key not in found.kept:
            called = [*(each for each in called if each != key), key][-remembered:]
        if capture:
            kept(found, entries, key)
            called.remove(key)
        else:
            found.ran(key, EAGER)
        assert not set(found.seen) & set(found.kept)
        assert set(found.kept) == set(entries)
        assert list(found.seen) == called


def test_without_measurements_a_replay_is_taken_for_three_tenths_and_a_capture_for_fifty_calls():
    found, _ = books()
    for _ in range(2):
        found.ran("a", EAGER)
    record = found.seen["a"]
    assert found.saving(record) == pytest.approx(0.7 * EAGER)
    assert found.capture_seconds(record) == pytest.approx(50 * EAGER)
    assert found.expected_nbytes(record) == 0


def test_captures_have_returned_nothing_until_there_were_two():
    found, entries = books()
    kept(found, entries, "a").hits += 1000
    found.settle()
    assert found.lately_returned() == 0.0
    kept(found, entries, "b")
    assert found.lately_returned() > 5.0
