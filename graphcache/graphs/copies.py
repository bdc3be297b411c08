"""Copies of callers' tensors as nodes of a graph: enqueued into a capture, and found in it to be pointed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from graphcache.graphs import driver
from graphcache.graphs.param_patching import COPY_ADDRESSES, CannotBind, Pointer, copy_pointer, is_flat, nodes_of

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(to, from): dense tensors of equal layout, of which none overlap."""


def with_copies(enqueue: Callable[[int], bool], before: Pairs, after: Pairs) -> Callable[[int], bool]:
    """The same work with copies before and after it; ``enqueue`` may add to ``after``."""

    def enqueue_all(stream: int) -> bool:
        _copy(before, stream)
        if not enqueue(stream):
            return False
        _copy(after, stream)
        return True

    return enqueue_all


def _copy(pairs: Pairs, stream: int) -> None:
    """Enqueue copies; empty tensors need none."""
    for target, source in pairs:
        if nbytes := target.numel() * target.element_size():
            driver.call("cuMemcpyDtoDAsync", target.data_ptr(), source.data_ptr(), nbytes, stream)


def find_copies(graph: Any, tensors: Sequence[Tensor]) -> list[list[Pointer]]:
    """For each tensor, the one node that copies exactly it; raises :class:`CannotBind` if that is none or several."""
    indices = {tensor.data_ptr(): index for index, tensor in enumerate(tensors)}
    found: list[list[Pointer]] = [[] for _ in tensors]
    copy = driver.binding().CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY
    for node, kind in nodes_of(graph):
        if kind != copy or not is_flat(params := driver.call("cuGraphMemcpyNodeGetParams", node)):
            continue
        for field in COPY_ADDRESSES:
            index = indices.get(int(getattr(params, field)))
            if index is not None and int(params.WidthInBytes) == tensors[index].numel() * tensors[index].element_size():
                found[index].append(copy_pointer(node, params, field, 0))
    for index, places in enumerate(found):
        if len(places) != 1:
            raise CannotBind(f"tensor {index} is copied by {len(places)} nodes instead of one")
    return found


def programmatic_edges(graph: Any) -> list[tuple[Any, Any, Any]]:
    """Start, end and data of the edges whose end may begin before their start has ended (dependent launch)."""
    *_, count = _call_with_edges("cuGraphGetEdges", graph, 0)
    if not count:
        return []
    starts, ends, data, _ = _call_with_edges("cuGraphGetEdges", graph, count)
    kind = driver.binding().CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    edges = zip(starts[:count], ends[:count], data[:count], strict=True)
    return [edge for edge in edges if int(edge[2].type) == int(kind)]


def make_all_full(graph: Any) -> None:
    """Let every node wait for the end of the nodes before it.

    For kernels that do not wait where they should, as TensorRT-RTX has on GPUs it was not made for: they give other
    answers from run to run.
    """
    edges = programmatic_edges(graph)
    for start, end, data in edges:
        _call_with_edges("cuGraphRemoveDependencies", graph, [start], [end], [data], 1)
    for start, end, _ in edges:
        _call_with_edges("cuGraphAddDependencies", graph, [start], [end], None, 1)


def _call_with_edges(name: str, *args: Any) -> Any:
    """Call the function that takes edge data, which cuda-python 12 names ``_v2``."""
    return driver.call(f"{name}_v2" if hasattr(driver.binding(), f"{name}_v2") else name, *args)
