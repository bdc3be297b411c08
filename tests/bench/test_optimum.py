from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.optimum import Times, optimum
from bench.simulate import always_eager, graphcache, least_recently_used


def every_way(calls: tuple[int, ...], times: dict[int, Times], slots: int) -> float:
    """The least total of all ways to serve the calls: each may be captured, and any graph dropped at any call."""

    @cache
    def rest(index: int, held: frozenset[int]) -> float:
        if index == len(calls):
            return 0
        signature = calls[index]
        eager, replay, capture = times[signature]
        if signature in held:
            return replay + min(rest(index + 1, held), rest(index + 1, held - {signature}))
        without = [held - dropped for dropped in (frozenset(), *({each} for each in held))]
        ways = [rest(index + 1, kept) for kept in without]
        ways += [capture + rest(index + 1, kept | {signature}) for kept in without if len(kept) < slots]
        return eager + min(ways)

    return rest(0, frozenset())


whole = st.integers(0, 8)
traces = st.lists(st.integers(0, 3), max_size=12)
tables = st.lists(st.builds(Times, whole, whole, st.integers(0, 12)), min_size=4, max_size=4)


@settings(max_examples=300)
@given(traces, tables, st.integers(1, 3))
def test_it_is_the_least_of_all_ways(calls, times, slots):
    table = dict(enumerate(times))
    assert optimum(calls, table, slots) == every_way(tuple(calls), table, slots)


costs = st.builds(Times, st.floats(1e-4, 1e-3), st.floats(1e-5, 1e-3), st.floats(1e-4, 1e-2))


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=30),
    st.lists(costs, min_size=6, max_size=6),
    st.integers(1, 4),
)
def test_no_policy_takes_less(runs, times, slots):
    table = dict(enumerate(times))
    calls = [signature for signature, length in runs for _ in range(length)]
    best = optimum(calls, table, slots)
    for outcome in (
        always_eager(calls, table),
        least_recently_used(calls, table, slots),
        graphcache(calls, table, slots),
        graphcache(calls, table, slots, policy="first"),
    ):
        assert best <= outcome.seconds + 1e-9


@given(traces, tables)
def test_more_slots_never_take_longer_and_none_takes_longer_than_always_eager(calls, times):
    table = dict(enumerate(times))
    totals = [optimum(calls, table, slots) for slots in (1, 2, 3, 4, 9)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] <= always_eager(calls, table).seconds
    assert totals[3] == totals[4], "four signatures need no fifth slot"


def test_with_room_for_all_each_signature_is_captured_at_once_or_never():
    times = {0: Times(3.0, 1.0, 10.0), 1: Times(3.0, 1.0, 10.0)}
    calls = [0] * 6 + [1] * 7
    # Five hits save what a capture costs; six save more.
    assert optimum(calls, times, slots=2) == 6 * 3 + (3 + 10 + 6 * 1)


@pytest.mark.parametrize("slots", [1, 5])
def test_of_no_calls_it_is_nothing(slots):
    assert optimum([], {}, slots) == 0
