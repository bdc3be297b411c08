"""Edges of graphs: which are programmatic, and which are made so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.copies import begin_early, edges_of, make_full, order_copies
from tests.graphs.fake_driver import Torch, installed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


def captured(fake: Torch, early: list[bool]) -> Any:
    stream, kernel = driver.new_stream(), fake.driver.kernel([], lambda memory: None)
    driver.begin_capture(stream)
    for each in early:
        fake.driver.launch(kernel, [], int(stream), programmatic=each)
    return driver.end_capture(stream)


def kinds(graph: Any) -> list[bool]:
    """Whether each edge of a chain is programmatic, in the order of the chain."""
    return [edge.is_programmatic for edge in sorted(edges_of(graph), key=lambda edge: int(edge.start))]


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_some_become_full(early: list[bool], data: st.DataObject) -> None:
    with installed() as fake:
        graph = captured(fake, early)
        assert kinds(graph) == early[1:]
        edges = sorted(edges_of(graph), key=lambda edge: int(edge.start))
        chosen = [edge for edge in edges if data.draw(st.booleans())]
        make_full(graph, chosen)
        wanted = [edge.is_programmatic and edge not in chosen for edge in edges]
        assert kinds(graph) == wanted
        for _ in range(2):
            order_copies(graph, None, full_edges=True)
            assert kinds(graph) == [False] * len(edges)
        assert {(int(e.start), int(e.end)) for e in edges_of(graph)} == {(int(e.start), int(e.end)) for e in edges}


def test_one_begins_early(fake: Torch) -> None:
    graph = captured(fake, [False, False, True])
    first, second = sorted(edges_of(graph), key=lambda edge: int(edge.start))
    for edge in (first, second):
        begin_early(graph, edge)
    ports = {int(edge.data.from_port) for edge in edges_of(graph)}
    assert kinds(graph) == [True, True]
    assert ports == {fake.driver.CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER}


@pytest.mark.parametrize("before", [False, True])
def test_a_driver_that_refuses_leaves_it_as_it_was(fake: Torch, before: bool) -> None:
    graph = captured(fake, [False, before])
    [edge] = edges_of(graph)
    fake.driver.fail("cuGraphAddDependencies", "INVALID_VALUE")
    with pytest.raises(CudaError, match="cuGraphAddDependencies failed with CUDA_ERROR_INVALID_VALUE"):
        begin_early(graph, edge)
    assert kinds(graph) == [before]


def test_the_names_of_cuda_python_12(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the plain names are those of a driver that knows no programmatic edges."""
    names = [f"cuGraph{each}Dependencies" for each in ("Add", "Remove")] + ["cuGraphGetEdges"]
    for name in names:
        monkeypatch.setattr(type(fake.driver), f"{name}_v2", getattr(type(fake.driver), name), raising=False)
        monkeypatch.delattr(type(fake.driver), name)
    graph = captured(fake, [False, True])
    assert kinds(graph) == [True]
    order_copies(graph, None, full_edges=True)
    assert kinds(graph) == [False]


def test_the_real_binding_has_what_is_asked_of_it() -> None:
    real = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    assert int(real.CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER) == 2
    data = real.CUgraphEdgeData()
    data.type = real.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    data.from_port = real.CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER
    assert (int(data.type), int(data.from_port)) == (1, 2)
