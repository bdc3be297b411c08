from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache import key_table
from graphcache.cache.admission import Admission
from graphcache.cache.graph_cache import GraphCache
from graphcache.cache.key_table import KeyTable
from tests.helpers import in_threads


class Graph:
    nbytes = 1

    def close(self, *, wait: bool = True) -> None:
        pass


class Kept:
    """A cache with the table of its keys, as a module keeps them."""

    def __init__(self) -> None:
        self.cache: GraphCache[Graph] = GraphCache(max_graphs=99, on_evict=lambda *gone: self.admission.evicted(*gone))
        self.keys = KeyTable(self.cache.entries)
        self.admission = Admission("first", self.cache, self.keys)

    def counts(self) -> dict[Any, int]:
        return {key: calls for key in self.keys.known() if (calls := self.keys.calls(key))}


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["note", "hit", "evict", "replace", "padded"])), max_size=60)
)
def test_every_call_counts_once_by_its_own_key(steps: list[tuple[int, str]]) -> None:
    """Against a plain count: notes, hits of graphs that are there or went, and hits lent to other sizes."""
    kept, wanted = Kept(), Counter[int]()
    entries = kept.cache.entries
    for size, what in steps:
        if what == "evict":
            kept.cache.evict(size)
        elif what == "replace" and size in entries:
            kept.cache.put(size, Graph())
        elif what == "hit" and size in entries:
            entries[size].hits += 1
            wanted[size] += 1
        elif what == "padded" and size + 1 in entries:
            kept.keys.note(size)
            entries[size + 1].hits += 1
            kept.keys.note(size + 1, -1)
            wanted[size] += 1
        else:
            kept.keys.note(size)
            if size not in entries:
                kept.cache.put(size, Graph())
            wanted[size] += 1
        kept.admission.account()
    assert kept.counts() == dict(wanted)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "MAX_KEYS", 3)
    seen = KeyTable({})
    for size in (1, 2, 3, 1, 4):
        seen.note(size)
    assert seen.known() == [3, 1, 4]
    assert [seen.calls(size) for size in (1, 2, 3, 4)] == [2, 0, 1, 1]


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "MAX_KEYS", 8)
    seen = KeyTable({})

    def work(index: int) -> None:
        for step in range(200):
            seen.note(step % 11)
            assert all(seen.calls(key) >= 0 for key in seen.known())

    in_threads(work)
    assert len(seen.known()) == 8


def test_calls_of_a_key_with_the_hits_of_its_graph() -> None:
    kept = Kept()
    for _ in range(3):
        kept.keys.note("a")
    kept.keys.note("a", -1)
    assert (kept.keys.known(), kept.keys.calls("a"), kept.keys.calls("b")) == (["a"], 2, 0)
    kept.cache.put("a", Graph()).hits = 5
    assert (kept.keys.calls("a"), kept.keys.hits("a")) == (7, 5)
    kept.cache.evict("a")
    assert (kept.keys.calls("a"), kept.keys.hits("a")) == (7, 5)
