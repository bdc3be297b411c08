"""The edges of a graph: what a node waits for, and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from graphcache.graphs import driver


@dataclass(frozen=True, slots=True)
class Edge:
    """Node ``end`` waits for node ``start``, as the ``CUgraphEdgeData`` says."""

    start: Any
    end: Any
    data: Any

    @property
    def is_programmatic(self) -> bool:
        """Whether the node itself has to wait (dependent launch): it may begin before the other one has ended."""
        kind = driver.binding().CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
        return int(self.data.type) == int(kind)


def edges_of(graph: Any) -> list[Edge]:
    """All edges of a ``CUgraph``."""
    *_, count = _call("cuGraphGetEdges", graph, 0)
    if not count:
        return []
    starts, ends, data, _ = _call("cuGraphGetEdges", graph, count)
    return [Edge(*each) for each in zip(starts[:count], ends[:count], data[:count], strict=True)]


def make_full(graph: Any, edges: Iterable[Edge]) -> int:
    """Replace programmatic edges by full ones, whose ends wait for the end of their starts; returns how many."""
    chosen = [edge for edge in edges if edge.is_programmatic]
    for edge in chosen:
        _call("cuGraphRemoveDependencies", graph, [edge.start], [edge.end], [edge.data], 1)
    for edge in chosen:
        _call("cuGraphAddDependencies", graph, [edge.start], [edge.end], None, 1)
    return len(chosen)


def make_all_full(graph: Any) -> int:
    """The same for all edges.

    For kernels that do not wait where they should, as TensorRT-RTX has on GPUs it was not made for: they give other
    answers from run to run.
    """
    return make_full(graph, edges_of(graph))


def begin_early(graph: Any, edge: Edge) -> None:
    """Let a kernel that begins with ``griddepcontrol.wait`` be launched once all blocks of the one before have begun.

    If the driver refuses, the edge stays as it was and :class:`CudaError` is raised.
    """
    api = driver.binding()
    data = api.CUgraphEdgeData()
    data.type = api.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    data.from_port = api.CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER
    _call("cuGraphRemoveDependencies", graph, [edge.start], [edge.end], [edge.data], 1)
    try:
        _call("cuGraphAddDependencies", graph, [edge.start], [edge.end], [data], 1)
    except BaseException:
        _call("cuGraphAddDependencies", graph, [edge.start], [edge.end], [edge.data], 1)
        raise


def _call(name: str, *args: Any) -> Any:
    """Call the function that takes edge data, which cuda-python 12 names ``_v2``."""
    return driver.call(f"{name}_v2" if hasattr(driver.binding(), f"{name}_v2") else name, *args)
