"""Whether captures in vain are found, found once, and told with the advice that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache.cache.churn import HITS, MOST_OF_THEM, WINDOW, advice, varies_most
from graphcache.cache.graph_cache import GraphCache
from graphcache.keys.call_key import describe
from graphcache.keys.call_spec import CallSpec


def told(keys: Any, hits: int = 0, **options: Any) -> list[str]:
    """What is said of each :data:`WINDOW` captures, with so many hits for each of them."""
    seen: set[Any] = set()
    found = [(key, key in seen or seen.add(key) is not None) for key in keys]
    cache: GraphCache[Any] = GraphCache(max_graphs=2, max_bytes=16)
    windows = [found[start : start + WINDOW] for start in range(0, len(found) - WINDOW + 1, WINDOW)]
    said = [advice(each, WINDOW * hits, cache, options.get("capture", "first"), NAMES) for each in windows]
    return [each for each in said if each is not None]


def again(said: str) -> int:
    """How many captures were of keys that had a graph before, or 0."""
    return int(said.split("again: ")[1].split(" of")[0]) if "again: " in said else 0


@given(st.integers(2, 500))
def test_a_loop_over_more_shapes_than_fit_is_found_in_its_second_round(shapes: int) -> None:
    found = told((index % shapes for index in range(2 * shapes + 2 * WINDOW)), hits=2)
    assert found
    assert again(found[0]) >= MOST_OF_THEM
    assert told((index % shapes for index in range(shapes + MOST_OF_THEM - 1)), hits=2) == []


@given(st.lists(st.integers(0, 10**9), unique=True, min_size=WINDOW, max_size=200), st.integers(0, 3))
def test_keys_that_are_new_at_each_call_are_found(keys: list[int], hits: int) -> None:
    assert len(told(keys, hits)) == (len(keys) // WINDOW if hits < 1 else 0)
    assert told(keys[: WINDOW - 1], hits) == []


@given(st.integers(2, 50), st.integers(HITS, 10_000))
def test_captures_that_pay_are_not(shapes: int, hits: int) -> None:
    assert told([index % shapes for index in range(300)], hits) == []


@given(st.integers(0, HITS - 1))
def test_captures_that_do_not_pay_are_whatever_the_hits(hits: int) -> None:
    assert told([index % 9 for index in range(100)], hits)


def test_a_quarter_of_new_shapes_is_the_limit() -> None:
    def mixed(new: int) -> list[Any]:
        return [("new", index) if index % 8 < new else ("old", index % 8) for index in range(8 * 30)]

    assert told(mixed(2), hits=2)
    assert not told(mixed(3), hits=2)


def test_a_module_is_warned_of_once_and_what_was_dropped_for_another_reason_does_not_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def warnings() -> int:
        return sum("graphs are evicted and captured again" in record.message for record in caplog.records)

    fast = graphcache.wrap(nn.ReLU(), max_graphs=1)
    for turn in range(200):
        fast(torch.zeros(1 + turn % 3))
    assert warnings() == 1
    other = graphcache.wrap(nn.ReLU())
    for _ in range(40):
        for size in range(3):
            for _ in range(4):
                other(torch.zeros(1 + size))
        other.clear()
    assert warnings() == 1


@pytest.mark.parametrize("shapes", [3, 9])
@pytest.mark.parametrize("capture", ["first", "worthwhile"])
def test_the_advice_for_evictions_names_the_budgets(shapes: int, capture: str) -> None:
    [said] = told((index % shapes for index in range(50)), capture=capture)
    way = "raise max_graphs (now 2), max_bytes (now 16) or the budget of the process "
    way += f"({shapes} signatures take turns), or pad shapes to a few sizes with buckets"
    if capture == "first":
        way += ", or capture only what pays for itself with capture='worthwhile'"
    assert said == (
        f"graphs are evicted and captured again: {32 - shapes} of the last 32 captures were of signatures that had a "
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
    [said] = told(keys)
    assert said.startswith("32 of the last 32 captures were of calls that were new")
    assert seen in said
    assert way in said
    assert said.endswith("capture='worthwhile'. (Said once.)")


def test_keys_that_do_not_differ_have_nothing_that_does() -> None:
    assert varies_most([CallSpec(key(X, 1), NAMES)] * 3)[2] == [2]
