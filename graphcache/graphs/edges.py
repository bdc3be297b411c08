"""The edges of a graph: what a node waits for, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from graphcache.graphs import driver


@dataclass(frozen=True, slots=True)
class Edge:
    """Node ``end`` waits for node ``start``.

    Args:
        start: A ``CUgraphNode``.
        end: Another one.
        data: A ``CUgraphEdgeData``.
    """

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
    """Replace programmatic edges by full ones: their ends wait until everything of their starts has ended.

    Args:
        graph: A ``CUgraph``.
        edges: Of it; full ones stay as they are.

    Returns:
        How many were replaced.
    """
    chosen = [edge for edge in edges if edge.is_programmatic]
    for edge in chosen:
        _call("cuGraphRemoveDependencies", graph, [edge.start], [edge.end], [edge.data], 1)
    for edge in chosen:
        _call("cuGraphAddDependencies", graph, [edge.start], [edge.end], None, 1)
    return len(chosen)


def make_all_full(graph: Any) -> int:
    """The same for all of a graph.

    For kernels that do not wait where they should, as TensorRT-RTX has on GPUs it was not made for: they give other
    answers from run to run.
    """
    return make_full(graph, edges_of(graph))


def begin_early(graph: Any, edge: Edge) -> None:
    """Let a kernel that waits by itself be launched as soon as all blocks of the one before have begun.

    Args:
        graph: A ``CUgraph``.
        edge: Between two kernels, of which the second one executes ``griddepcontrol.wait`` before anything else.

    Raises:
        CudaError: If the driver refuses; then the edge is as it was.
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
    # In cuda-python 12 the functions that know of programmatic edges have another name.
    named: Callable[..., Any] | None = getattr(driver.binding(), f"{name}_v2", None)
    return driver.call(name if named is None else f"{name}_v2", *args)
