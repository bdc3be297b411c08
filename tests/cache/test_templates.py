"""What evicted graphs can be had back from: how much of it stays, and what is closed when."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.templates import Templates
from tests.helpers import in_threads


class Item:
    def __init__(self, key: Hashable = None) -> None:
        self.key = key
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_the_longest_unused_goes_first_and_is_closed() -> None:
    gone: list[Hashable] = []
    templates: Templates[Item] = Templates(2, gone.append)
    items = [Item() for _ in "abc"]
    for key, item in zip("abc", items, strict=True):
        assert templates.put(key, item, templates.generation)
    assert ([item.closed for item in items], gone, len(templates)) == ([1, 0, 0], ["a"], 2)
    assert ("a" in templates, "b" in templates) == (False, True)


def test_what_is_taken_is_the_callers() -> None:
    gone: list[Hashable] = []
    templates: Templates[Item] = Templates(2, gone.append)
    item = Item()
    templates.put("a", item, templates.generation)
    assert templates.take("a") is item
    assert (item.closed, gone, templates.take("a"), len(templates)) == (0, [], None, 0)


def test_one_takes_the_place_of_another_of_its_key() -> None:
    gone: list[Hashable] = []
    templates: Templates[Item] = Templates(1, gone.append)
    old, new = Item(), Item()
    templates.put("a", old, templates.generation)
    templates.put("a", new, templates.generation)
    assert (old.closed, new.closed, gone, templates.take("a")) == (1, 0, [], new)


def test_what_is_of_before_does_not_stay() -> None:
    """An eviction under way in another thread while everything is forgotten."""
    gone: list[Hashable] = []
    templates: Templates[Item] = Templates(2, gone.append)
    before = templates.generation
    kept, late = Item(), Item()
    templates.put("a", kept, before)
    templates.clear()
    assert not templates.put("b", late, before)
    assert (kept.closed, late.closed, gone, len(templates)) == (1, 1, ["a", "b"], 0)


def test_none_is_kept_where_none_may_be() -> None:
    templates: Templates[Item] = Templates(0)
    item = Item()
    assert not templates.put("a", item, templates.generation)
    assert item.closed == 1


def test_all_are_closed_even_if_one_raises() -> None:
    class Bad(Item):
        def close(self) -> None:
            super().close()
            raise RuntimeError("refused")

    templates: Templates[Item] = Templates(3)
    items = [Item(), Bad(), Item()]
    for index, item in enumerate(items):
        templates.put(index, item, templates.generation)
    with pytest.raises(RuntimeError, match="refused"):
        templates.clear()
    assert ([item.closed for item in items], len(templates)) == ([1, 1, 1], 0)


@given(st.integers(0, 3), st.lists(st.tuples(st.sampled_from(["put", "late", "take", "clear"]), st.integers(0, 4))))
def test_any_sequence(most: int, steps: list[tuple[str, int]]) -> None:
    gone: list[Hashable] = []
    templates: Templates[Item] = Templates(most, gone.append)
    made: list[Item] = []
    taken: list[Item] = []
    expected: list[int] = []
    for what, key in steps:
        if what == "put" or what == "late":
            made.append(Item(key))
            stays = templates.put(key, made[-1], templates.generation - (what == "late"))
            assert stays == (what == "put" and most > 0)
            if stays:
                expected = [*(each for each in expected if each != key), key][-most:]
        elif what == "take":
            item = templates.take(key)
            assert (item is not None) == (key in expected)
            if item is not None:
                assert item.key == key
                taken.append(item)
                expected.remove(key)
        else:
            templates.clear()
            expected = []
        assert len(templates) == len(expected)
        assert all(key in templates for key in expected)
    open_now = [item for item in made if not item.closed]
    assert len(open_now) == len(expected) + len(taken)
    assert all(item.closed <= 1 for item in made)


def test_threads_that_put_and_clear_leave_nothing_of_before() -> None:
    templates: Templates[Item] = Templates(8)
    made: list[Item] = []

    def work(index: int) -> None:
        for turn in range(200):
            generation = templates.generation
            made.append(item := Item(generation))
            if index == 0 and turn % 5 == 0:
                templates.clear()
            templates.put((index, turn % 3), item, generation)
            other = templates.take((index - 1, turn % 3))
            if other is not None:
                other.close()

    in_threads(work, 4)
    assert all(item.key == templates.generation for item in templates._items.values())
    templates.clear()
    assert all(item.closed == 1 for item in made)
