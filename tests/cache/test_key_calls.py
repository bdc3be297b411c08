from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache import key_table
from graphcache.cache.key_table import KeyTable
from tests.helpers import in_threads


def counts(seen: KeyTable, hits: dict[Any, int]) -> dict[Any, int]:
    """How often each shape of the first argument was seen."""
    return {shapes[0]: calls for shapes, calls in seen.shapes(hits) if calls}


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["note", "hit", "evict", "padded"])), max_size=60))
def test_every_call_counts_once_by_its_own_shape(steps: list[tuple[int, str]]) -> None:
    """Against a plain count: notes, hits of graphs that are there or went, and hits lent to other sizes."""
    seen, wanted = KeyTable(), Counter[tuple[int, int]]()
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
            seen.note(size + 1, (torch.zeros(size + 1, 2),), {}, -1)
            wanted[(size, 2)] += 1
        else:
            seen.note(size, (torch.zeros(size, 2),), {})
            hits.setdefault(size, 0)
            wanted[(size, 2)] += 1
    assert counts(seen, hits) == dict(wanted)


def test_an_argument_has_its_position_or_its_name() -> None:
    seen = KeyTable()
    seen.note("a", (torch.zeros(2, 3), 5), {})
    seen.note("b", (), {"x": torch.zeros(4, 3), "y": torch.zeros(9)})
    seen.note("c", ([torch.zeros(7, 3)],), {})
    assert seen.shapes({"b": 2}) == [({0: (2, 3)}, 1), ({"x": (4, 3), "y": (9,)}, 3), ({}, 1)]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "MAX_KEYS", 3)
    seen = KeyTable()
    for size in (1, 2, 3, 1, 4):
        seen.note(size, (torch.zeros(size),), {})
    assert len(seen) == 3
    assert counts(seen, {2: 100}) == {(3,): 1, (1,): 2, (4,): 1}
    seen.retire(2, 5)
    assert len(seen) == 3


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "MAX_KEYS", 8)
    seen = KeyTable()

    def work(index: int) -> None:
        for step in range(200):
            seen.note(step % 11, (torch.zeros(step % 11),), {})
            counts(seen, {})

    in_threads(work)
    assert len(seen) == 8


def test_calls_of_a_signature_with_the_hits_of_its_graph():
    seen = KeyTable()
    x = torch.zeros(2)
    for _ in range(3):
        seen.note("a", (x,), {})
    seen.note("a", (x,), {}, -1)
    assert seen.keys() == ["a"]
    assert (seen.calls("a"), seen.calls("a", 5), seen.calls("b"), seen.calls("b", 5)) == (2, 7, 0, 5)
