"""Copies of callers' tensors as nodes of a graph: enqueued into a capture, found in it to be pointed elsewhere."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.copy_kernel import LARGEST, MOST, Copies, CopyKernel, CopyKernels
from graphcache.graphs.edges import begin_early, edges_of, make_full
from graphcache.graphs.param_patching import (
    COPY_ADDRESSES,
    SET_KERNEL,
    CannotBind,
    Pointer,
    copy_pointer,
    is_flat,
    nodes_of,
)

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(to, from): dense tensors of equal layout, of which none overlap."""


def with_copies(
    enqueue: Callable[[int], bool], before: Pairs, after: Pairs, kernels: CopyKernels | None
) -> Callable[[int], bool]:
    """The same work with copies before and after it, which become nodes of the graph."""

    def enqueue_all(stream: int) -> bool:
        copy_before(before, stream, kernels)
        if not enqueue(stream):
            return False
        copy_after(after, stream, kernels)
        return True

    return enqueue_all


def copy_before(pairs: Pairs, stream: int, kernels: CopyKernels | None) -> None:
    """Enqueue copies into a capture, before the work; without kernels they are the driver's own copies."""
    _copy(pairs, stream, None if kernels is None else kernels.before)


def copy_after(pairs: Pairs, stream: int, kernels: CopyKernels | None) -> None:
    """The same, of what the work before has written."""
    _copy(pairs, stream, None if kernels is None else kernels.after)


def _copy(pairs: Pairs, stream: int, kernel: CopyKernel | None) -> None:
    """Enqueue copies: small tensors by the kernel, :data:`MOST` in each launch, the others by the driver."""
    small: list[tuple[int, int, int]] = []
    for target, source in pairs:
        nbytes = target.numel() * target.element_size()
        if kernel is not None and 0 < nbytes <= LARGEST:
            small.append((target.data_ptr(), source.data_ptr(), nbytes))
        elif nbytes:
            driver.call("cuMemcpyDtoDAsync", target.data_ptr(), source.data_ptr(), nbytes, stream)
    if kernel is not None:
        for start in range(0, len(small), MOST):
            kernel.launch(small[start : start + MOST], stream)


def order_copies(graph: Any, kernels: CopyKernels | None, *, early: bool = True) -> None:
    """Set the edges of copy kernels, whatever the work between them was launched with.

    Work whose first kernel is launched programmatically, as some of TensorRT's are, waits for the driver's own copies,
    but would begin beside a kernel that copies its inputs. Those kernels get full edges. With ``early``, the kernel
    that copies the outputs is launched early where it waits by itself: of the 2.4 µs that both copies take in a graph
    of three small kernels, that saves 0.4 (H200, driver 580).
    """
    if kernels is None:
        return
    edges = edges_of(graph)
    make_full(graph, [edge for edge in edges if edge.is_programmatic and _runs(edge.start, kernels.before)])
    if not (early and kernels.after.waits):
        return
    starts, ends = {int(edge.start) for edge in edges}, Counter(int(edge.end) for edge in edges)
    for edge in edges:
        last = int(edge.end)
        if last not in starts and ends[last] == 1 and _runs(edge.end, kernels.after) and _runs(edge.start):
            with suppress(CudaError):
                begin_early(graph, edge)


def _runs(node: Any, kernel: CopyKernel | None = None) -> bool:
    """Whether a node launches a kernel: any, or the given one."""
    kinds = driver.binding().CUgraphNodeType
    if driver.call("cuGraphNodeGetType", node) != kinds.CU_GRAPH_NODE_TYPE_KERNEL:
        return False
    return kernel is None or int(driver.call("cuGraphKernelNodeGetParams", node).func) == int(kernel.function)


def find_copies(graph: Any, tensors: Sequence[Tensor], kernels: CopyKernels | None) -> list[list[Pointer]]:
    """For each tensor, the one node that copies exactly it; raises :class:`CannotBind` if that is none or several."""
    indices = {tensor.data_ptr(): index for index, tensor in enumerate(tensors)}
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    found: list[list[Pointer]] = [[] for _ in tensors]
    kinds = driver.binding().CUgraphNodeType
    for node in nodes_of(graph):
        if node.kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
            copies = _in_copy_node(node.handle)
        elif node.kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL and kernels is not None:
            copies = _in_kernel(node.handle, kernels)
        else:
            continue
        for address, nbytes, pointer in copies:
            index = indices.get(address)
            if index is not None and nbytes == sizes[index]:
                found[index].append(pointer)
    for index, places in enumerate(found):
        if len(places) != 1:
            raise CannotBind(f"tensor {index} is copied by {len(places)} nodes instead of one")
    return found


def _in_copy_node(node: Any) -> Iterator[tuple[int, int, Pointer]]:
    """Address, size and pointer of each end of a copy node."""
    params = driver.call("cuGraphMemcpyNodeGetParams", node)
    if is_flat(params):
        for field in COPY_ADDRESSES:
            yield int(getattr(params, field)), int(params.WidthInBytes), copy_pointer(node, params, field, 0)


def _in_kernel(node: Any, kernels: CopyKernels) -> Iterator[tuple[int, int, Pointer]]:
    """The same of each copy that a node of the copy kernel makes."""
    params = driver.call("cuGraphKernelNodeGetParams", node)
    if int(params.func) not in kernels:
        return
    theirs = (ctypes.c_void_p * 1).from_address(params.kernelParams)
    copies = Copies.from_buffer_copy(ctypes.string_at(theirs[0] or 0, ctypes.sizeof(Copies)))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(copies))
    params.kernelParams = ctypes.addressof(arguments)
    for start in range(0, len(copies), 3):
        nbytes = int(copies[start + 2])
        for place in (start, start + 1) if nbytes else ():
            word = ctypes.c_uint64.from_buffer(copies, 8 * place)
            yield int(copies[place]), nbytes, Pointer(word, 0, SET_KERNEL, (node, params), (copies, arguments))
