"""An axis that keeps growing is named once."""

from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.growing import MANY, Growing, Growth


def test_the_eighth_size_is_told_and_no_other():
    growing = Growing()
    found = [growing.new({0: (4, size), "mask": (4,)}) for size in (9, 1, 2, 2, 3, 4, 5, 6, 7, 8, 10, 11)]
    assert [index for index, each in enumerate(found) if each] == [8]
    assert found[8] == Growth(0, 1, (1, 2, 3, 4, 5, 6, 7, 9))


def test_axes_are_counted_apart():
    growing = Growing()
    for size in range(MANY - 1):
        assert growing.new({0: (size,), 1: (size + 100,), "x": (size + 200, 1)}) is None
    assert growing.new({0: (0,), 1: (100,), "x": (1000, 1)}) == Growth("x", 0, (*range(200, 207), 1000))


@given(st.lists(st.dictionaries(st.integers(0, 400), st.tuples(st.integers(0, 3)), max_size=3), max_size=300))
def test_few_sizes_are_never_told_and_memory_is_bounded(calls):
    growing = Growing()
    assert all(growing.new(shapes) is None for shapes in calls)
    assert len(growing._sizes) <= 256


def test_the_advice_names_what_was_seen_and_three_ways():
    growth = Growth(0, 1, tuple(range(70, 78)))
    said = growth.advice("input_ids", capture="first")
    assert said.startswith("`input_ids` dim 1 came in 8 sizes that had no graph (70, 71, 72, 73, 74, 75, 76, 77), ")
    for way in ("buckets={'input_ids': {1: [70, …]}}", "advise_buckets", "prepare()", "capture='worthwhile'"):
        assert way in said
    assert "worthwhile" not in growth.advice("input_ids", capture="prepared")
