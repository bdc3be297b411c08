"""What is remembered of calls, and for how long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache import Reason
from graphcache.cache.costs import Known
from graphcache.cache.lru import Entry
from graphcache.cache.spec import spec_of
from graphcache.modules import remembered
from graphcache.modules.remembered import Remembered, made_again
from tests.graphs.fake_driver import Torch
from tests.modules.test_engine_module import fake, load  # noqa: F401 - the fixture is used by its name


class Graph:
    nbytes = 40

    def close(self, *, wait: bool = True) -> None:
        pass


@given(st.lists(st.integers(0, 30), max_size=60), st.sets(st.integers(0, 30), max_size=5))
def test_the_longest_unseen_without_a_graph_goes_first(keys: list[int], captured: set[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "_MOST", 8)
        entries: dict[int, Entry[Graph]] = {}
        found = Remembered(entries)
        order: list[int] = []
        for key in keys:
            if key in captured:
                entries[key] = Entry(Graph())
            found.note(key, (key,), {})
            order = [each for each in order if each != key] + [key]
        assert len(found) <= 8 + len(entries)
        kept = {entry.spec for entry in found.served(lambda key: Known())[0]}
        for key in entries:
            assert spec_of((key,), {}) in kept
        for key in order[-8:]:
            assert spec_of((key,), {}) in kept


def test_long_texts_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MOST_CHARACTERS", 1000)
    found = Remembered({})
    for index in range(50):
        found.note(index, ("x" * 300, index), {})
    assert len(found) == 2
    found.note("short", (), {})
    assert len(found) == 3


def test_an_entry_holds_what_is_known() -> None:
    found = Remembered({"a": Entry(Graph())})
    found.note("a", (torch.zeros(2),), {"n": 1})
    found.note("b", (torch.zeros(3),), {})
    found.note("odd", (Reason.GRAD,), {})
    (a, b), untold = found.served(lambda key: Known(7, 5, 1e-3, 1e-4, 0.5) if key == "a" else Known(), "part")
    assert (a.hits, a.part, a.nbytes, a.eager_seconds, a.replay_seconds, a.capture_seconds) == (
        7, "part", 40, 1e-3, 1e-4, 0.5
    )  # fmt: skip
    assert (b.hits, b.nbytes, b.eager_seconds, untold) == (0, 0, None, 1)


@pytest.mark.parametrize("values", [None, [1, 2], ["a"], [[1]], [2**70], torch.zeros(1), 3])
def test_values_that_are_not_those_of_a_host_shape_tensor(fake: Torch, values: Any) -> None:  # noqa: F811
    engine = load("head")
    x = fake.driver.heap.tensor([[1.0] * 4] * 16)
    assert made_again(engine, (x, [5]))[1].tolist() == [5]
    if values == [[1]]:
        assert made_again(engine, (x, values))[1].tolist() == [1]
        return
    with pytest.raises(ValueError, match=r"args\[1\]"):
        made_again(engine, (x, values))
