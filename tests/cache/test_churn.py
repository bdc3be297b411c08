"""Whether captures in vain are found, found once, and told with the advice that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.churn import HITS, MOST_OF_THEM, WINDOW, ChurnWatch, varies_most
from graphcache.cache.graph_cache import GraphCache
from graphcache.keys.call_key import describe
from graphcache.keys.call_spec import CallSpec


def watched(keys: Any, hits: int = 0) -> tuple[ChurnWatch, list[int]]:
    """A watch after some captures, with so many hits before each, and which of them it told of."""
    watch = ChurnWatch()
    return watch, [index for index, key in enumerate(keys) if watch.captured(key, index * hits)]


def captures(keys: Any, hits: int = 0) -> list[int]:
    """How many of the last captures were of keys that had a graph before, each time that it was told of."""
    watch, told = watched(keys, hits)
    return [watch.again] * len(told)


@given(st.integers(2, 500))
def test_a_loop_over_more_shapes_than_fit_is_found_in_its_second_round(shapes: int) -> None:
    found = captures((index % shapes for index in range(3 * shapes + WINDOW)), hits=2)
    assert len(found) == 1
    assert found[0] >= MOST_OF_THEM
    assert captures((index % shapes for index in range(shapes + MOST_OF_THEM - 1)), hits=2) == []


@given(st.lists(st.integers(0, 10**9), unique=True, min_size=WINDOW, max_size=200), st.integers(0, 3))
def test_keys_that_are_new_at_each_call_are_found(keys: list[int], hits: int) -> None:
    found = captures(keys, hits)
    assert found == ([0] if hits < 2 else [])
    assert captures(keys[: WINDOW - 1], hits) == []


@given(st.integers(2, 50), st.integers(HITS + 2, 10_000))
def test_captures_that_pay_are_not(shapes: int, hits: int) -> None:
    assert captures([index % shapes for index in range(300)], hits) == []


@given(st.integers(0, HITS - 1))
def test_captures_that_do_not_pay_are_whatever_the_hits(hits: int) -> None:
    assert len(captures([index % 9 for index in range(100)], hits)) == 1


def test_a_quarter_of_new_shapes_is_the_limit() -> None:
    def mixed(new: int) -> list[Any]:
        return [("new", index) if index % 8 < new else ("old", index % 8) for index in range(8 * 30)]

    assert captures(mixed(2), hits=2)
    assert not captures(mixed(3), hits=2)


def test_what_was_dropped_for_another_reason_does_not_count() -> None:
    watch = ChurnWatch()
    for _ in range(20):
        assert not any(watch.captured(key, 0) for key in range(8))
        watch.forget()


def test_a_signature_is_forgotten_after_a_thousand_others() -> None:
    assert captures((index % 2000 for index in range(6000)), hits=2) == []


@pytest.mark.parametrize("shapes", [3, 9])
@pytest.mark.parametrize("capture", ["first", "worthwhile"])
def test_the_advice_for_evictions_names_the_budgets(shapes: int, capture: str) -> None:
    watch, told = watched(index % shapes for index in range(50))
    assert len(told) == 1
    cache: GraphCache[Any] = GraphCache(max_graphs=2, max_bytes=16)
    way = "raise max_graphs (now 2), max_bytes (now 16) or the budget of the process "
    way += f"({shapes} signatures take turns), or pad shapes to a few sizes with buckets"
    if capture == "first":
        way += ", or capture only what pays for itself with capture='worthwhile'"
    assert watch.advice(cache, capture) == (
        f"graphs are evicted and captured again: {watch.again} of the last 32 captures were of signatures that had a "
        f"graph before, and only 0 calls were answered by graphs meanwhile. To change that: {way}. (Said once.)"
    )


def key(*args: Any, **kwargs: Any) -> Any:
    return describe(args, kwargs).key


X = torch.zeros(2, 3)
NAMES = ["x", "step"]
NEW = {
    "a number": ([key(X, step) for step in range(WINDOW)], "`step` had 32 values (0, 1, 2, 3, …)", "pass `step` as a"),
    "a number by name": ([key(X, step=step / 2) for step in range(WINDOW)], "`step` had 32 values (0.0, 0.5,", "pass"),
    "a number in a dictionary": (
        [key(X, {"at": step}) for step in range(WINDOW)],
        "`step['at']` had 32 values",
        "pass `step['at']` as a tensor",
    ),
    "an axis": (
        [key(torch.zeros(2, size), 1) for size in range(WINDOW)],
        "`x` dim 1 had 32 values (0, 1, 2, 3, …)",
        "buckets={'x': {1: [0, …]}}",
    ),
    "what differs most": (
        [key(torch.zeros(2, step // 2), step) for step in range(WINDOW)],
        "`step` had 32 values",
        "pass `step`",
    ),
    "nothing of that": ([key([X] * count) for count in range(1, 33)], "", "give arguments of the same kinds each time"),
    "no signatures": (range(WINDOW), "", "give arguments of the same kinds each time"),
}


@pytest.mark.parametrize("name", NEW)
def test_the_advice_names_what_changes(name: str) -> None:
    keys, seen, way = NEW[name]
    watch, told = watched(keys)
    assert told == [WINDOW - 1]
    said = watch.advice(GraphCache(max_graphs=64), "first", NAMES)
    assert said.startswith("32 of the last 32 captures were of calls that were new")
    assert seen in said
    assert way in said
    assert said.endswith("capture='worthwhile'. (Said once.)")


def test_keys_that_do_not_differ_have_nothing_that_does() -> None:
    assert varies_most([CallSpec(key(X, 1), NAMES)] * 3)[2] == [2]
