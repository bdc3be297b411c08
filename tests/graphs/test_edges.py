"""Edges of graphs: which are programmatic, and that all become full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.graphs import driver
from graphcache.graphs.capture import make_all_full
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Torch, installed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


def captured(fake: Torch, early: list[bool]) -> Any:
    stream, kernel = fake_driver.new_stream(), fake.driver.kernel([], lambda memory: None)
    fake_driver.begin_capture(stream)
    for each in early:
        fake.driver.launch(kernel, [], int(stream), programmatic=each)
    return driver.end_capture(stream)


def edges(graph: Any) -> set[tuple[int, int]]:
    starts, ends, *_ = driver.call("cuGraphGetEdges", graph, 9)
    return {(int(start), int(end)) for start, end in zip(starts, ends, strict=True)}


def programmatic_edges(graph: Any) -> list[Any]:
    functions = driver.binding()
    get = getattr(functions, "cuGraphGetEdges_v2", None) or functions.cuGraphGetEdges
    return [data for data in get(graph, 9)[3] if int(data.type) == 1]


@given(st.lists(st.booleans(), min_size=2, max_size=6))
def test_all_become_full(early: list[bool]) -> None:
    with installed() as fake:
        graph = captured(fake, early)
        before = edges(graph)
        assert len(programmatic_edges(graph)) == sum(early[1:])
        for _ in range(2):
            make_all_full(graph)
            assert programmatic_edges(graph) == []
        assert edges(graph) == before, "the order stays"


def test_a_single_node_has_no_edges(fake: Torch) -> None:
    make_all_full(captured(fake, [True]))


def test_the_names_of_cuda_python_12(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the plain names are those of a driver that knows no programmatic edges."""
    names = [f"cuGraph{each}Dependencies" for each in ("Add", "Remove")] + ["cuGraphGetEdges"]
    for name in names:
        monkeypatch.setattr(type(fake.driver), f"{name}_v2", getattr(type(fake.driver), name), raising=False)
        monkeypatch.delattr(type(fake.driver), name)
    graph = captured(fake, [False, True])
    assert len(programmatic_edges(graph)) == 1
    make_all_full(graph)
    assert programmatic_edges(graph) == []


def test_the_real_binding_has_what_is_asked_of_it() -> None:
    real = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    assert int(real.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC) == 1
