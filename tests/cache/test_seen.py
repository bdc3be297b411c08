from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.places import Place
from graphcache.cache.seen import Seen, advise_axes
from graphcache.errors import ConfigError
from tests.helpers import in_threads

X = Place(0, "x")


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["note", "hit", "evict", "padded"])), max_size=60))
def test_every_call_counts_once_by_its_own_shape(steps: list[tuple[int, str]]) -> None:
    """Against a plain count: notes, hits of graphs that are there or went, and hits lent to other sizes."""
    seen, wanted = Seen(), Counter[tuple[int, int]]()
    hits: dict[Any, int] = {}
    for size, what in steps:
        if what == "evict":
            seen.retire(size, hits.pop(size, 0))
        elif what == "hit" and size in hits:
            hits[size] += 1
            wanted[(size, 2)] += 1
        elif what == "padded" and size + 1 in hits:
            seen.note(size, (torch.zeros(size, 2),), {})
            hits[size + 1] += 1
            seen.lend(size + 1)
            wanted[(size, 2)] += 1
        else:
            seen.note(size, (torch.zeros(size, 2),), {})
            hits.setdefault(size, 0)
            wanted[(size, 2)] += 1
    assert seen.counts(X, hits) == dict(wanted)


def test_an_argument_is_found_by_position_and_by_name() -> None:
    seen = Seen()
    seen.note("a", (torch.zeros(2, 3), 5), {})
    seen.note("b", (), {"x": torch.zeros(4, 3), "y": torch.zeros(9)})
    seen.note("c", ([torch.zeros(7, 3)],), {})
    assert seen.counts(X, {}) == {(2, 3): 1, (4, 3): 1}
    assert seen.counts(Place(None, "y"), {}) == {(9,): 1}
    assert seen.counts(Place(1, None), {}) == {}


def test_of_shapes_of_several_ranks_those_of_most_calls() -> None:
    seen = Seen()
    for key, shape in enumerate([(2, 3), (2,), (3,), (4, 5, 6)]):
        seen.note(key, (torch.zeros(shape),), {})
    assert seen.counts(X, {}) == {(2,): 1, (3,): 1}


def test_what_is_remembered_is_bounded() -> None:
    seen = Seen(size=3)
    for size in (1, 2, 3, 1, 4):
        seen.note(size, (torch.zeros(size),), {})
    assert len(seen) == 3
    assert seen.counts(X, {2: 100}) == {(3,): 1, (1,): 2, (4,): 1}
    seen.retire(2, 5)
    seen.lend(2)


def test_threads() -> None:
    seen = Seen(size=8)

    def work(index: int) -> None:
        for step in range(200):
            seen.note(step % 11, (torch.zeros(step % 11),), {})
            seen.counts(X, {})

    in_threads(work)
    assert len(seen) == 8


def test_axes_that_do_not_differ_need_no_buckets() -> None:
    assert advise_axes([((1, 4, 2), 1), ((2, 4, 3), 1)], 5).option() == {0: [1, 2], 2: [2, 3]}
    assert advise_axes([((3, 4), 1)], 5).option() == {0: [3], 1: [4]}
    assert advise_axes(iter([((3, 4), 1), ((4, 4), 2)]), {1: 1}).option() == {1: [4]}


@pytest.mark.parametrize("trace", [None, 5, "abc", b"abc", [5], [()], [((1,), 0)], [((1,), 1), ((1, 2), 1)], [(1, 1)]])
@pytest.mark.parametrize("most", [1, 8])
def test_odd_traces_are_named(trace: Any, most: int) -> None:
    with pytest.raises(ConfigError, match=r"^trace"):
        advise_axes(trace, most)


@pytest.mark.parametrize("most", [0, -1, True, 1.5, "8", None, [1], {}, {0: 0}, {"0": 1}])
def test_odd_numbers_are_named(most: Any) -> None:
    with pytest.raises(ConfigError, match=r"^most"):
        advise_axes({(1,): 1}, most)


def test_calls_of_a_signature_with_the_hits_of_its_graph():
    seen = Seen()
    x = torch.zeros(2)
    for _ in range(3):
        seen.note("a", (x,), {})
    seen.lend("a")
    assert seen.keys() == ["a"]
    assert (seen.calls("a"), seen.calls("a", 5), seen.calls("b"), seen.calls("b", 5)) == (2, 7, 0, 5)
