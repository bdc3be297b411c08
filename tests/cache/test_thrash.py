"""Whether captures in vain are found, found once, and told with the advice that fits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.lru import GraphCache
from graphcache.cache.thrash import AGAIN, HITS, WINDOW, Thrash, Thrashing


def captures(keys: Any, hits: int = 0) -> list[Thrashing]:
    """What is said over some captures, with so many hits before each."""
    thrash = Thrash()
    return [seen for index, key in enumerate(keys) if (seen := thrash.captured(key, index * hits))]


@given(st.integers(2, 500))
def test_a_loop_over_more_shapes_than_fit_is_found_in_its_second_round(shapes: int) -> None:
    found = captures(index % shapes for index in range(3 * shapes + WINDOW))
    assert len(found) == 1
    assert found[0].again >= AGAIN
    assert captures(index % shapes for index in range(shapes + AGAIN - 1)) == []


@given(st.lists(st.integers(0, 10**9), unique=True, max_size=200))
def test_shapes_that_never_come_again_are_not(keys: list[int]) -> None:
    assert captures(keys) == []


@given(st.integers(2, 50), st.integers(HITS + 2, 10_000))
def test_captures_that_pay_are_not(shapes: int, hits: int) -> None:
    assert captures([index % shapes for index in range(300)], hits) == []


@given(st.integers(0, HITS - 1))
def test_captures_that_do_not_pay_are_whatever_the_hits(hits: int) -> None:
    assert len(captures([index % 9 for index in range(100)], hits)) == 1


def test_a_quarter_of_new_shapes_is_the_limit() -> None:
    def mixed(new: int) -> list[Any]:
        return [("new", index) if index % 8 < new else ("old", index % 8) for index in range(8 * 30)]

    assert captures(mixed(2))
    assert not captures(mixed(3))


def test_what_was_dropped_for_another_reason_does_not_count() -> None:
    thrash = Thrash()
    for _ in range(20):
        assert [thrash.captured(key, 0) for key in range(8)] == [None] * 8
        thrash.forget()


def test_a_signature_is_forgotten_after_a_thousand_others() -> None:
    assert captures(index % 2000 for index in range(6000)) == []


class Graph:
    nbytes = 8

    def close(self, *, wait: bool = True) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "graphs", "capture", "shapes", "expected"),
    [
        (
            {"max_graphs": 2},
            2,
            "first",
            9,
            (
                "raise max_graphs (now 2; 9 signatures take turns), or capture only what pays for itself with "
                "capture='worthwhile', or pad shapes to a few sizes with buckets"
            ),
        ),
        ({"max_graphs": 9, "max_bytes": 16}, 2, "worthwhile", 3, "raise max_bytes (now 16; 3 signatures take turns)"),
        (
            {"max_graphs": 9},
            2,
            "worthwhile",
            4,
            "raise the budget of the process with set_process_budget (16 bytes are held here; 4 signatures take turns)",
        ),
    ],
)
def test_the_advice_names_what_is_short(options: Any, graphs: int, capture: str, shapes: int, expected: str) -> None:
    cache: GraphCache[Graph] = GraphCache(**options)
    for key in range(graphs):
        cache.put(key, Graph())
    assert Thrashing(24, 7, shapes).advice(cache, capture) == (
        "graphs are evicted and captured again: 24 of the last 32 captures were of signatures that had a graph before, "
        f"and only 7 calls were answered by graphs meanwhile. To change that: {expected}. (Said once.)"
    )
