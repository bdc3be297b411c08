"""Copies of callers' tensors as nodes of a graph: enqueued into a capture, and found in it to be pointed elsewhere.

Small tensors are copied by a kernel, several in one node. A node that the driver makes of a copy moves one tensor, and
pointing it elsewhere takes the host twice as long as pointing a kernel (1.3 against 0.6 µs for an input and an output,
H200, driver 580): the driver checks the memory anew. The kernel is written in PTX, which the driver translates for
whatever device there is.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import CudaError
from graphcache.events import log
from graphcache.graphs import driver
from graphcache.graphs.param_patching import (
    COPY_ADDRESSES,
    SET_KERNEL,
    CannotBind,
    Pointer,
    copy_pointer,
    is_flat,
    nodes_of,
)

MAX_COPIES = 8
"""How many copies one launch of the kernel makes."""

LARGEST = 256 * 1024
"""Bytes; what is larger is left to the driver's own copies, next to which pointing them costs little."""

CopyList = ctypes.c_uint64 * (3 * MAX_COPIES)
"""The kernel's only argument: from, to and the number of bytes, for each copy."""

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(to, from): dense tensors of equal layout, of which none overlap."""

_THREADS = 256
"""Of a block."""

_WAITS = (9, 0)
"""The least compute capability at which a kernel can be launched while the one before still runs, and wait for it."""

_PTX = """
.version {version}
.target {target}
.address_size 64
{entries}
"""

_SOURCE = Path(__file__).with_name("copy_kernel.ptx")
"""A row of blocks for each copy, 16 bytes at a time and a rest of single bytes, or 4 at a time, or single bytes: the
alignment of addresses may change with every launch."""


@dataclass(frozen=True, slots=True)
class CopyKernels:
    """The kernel on one device, as a ``CUfunction`` for copies before some work, and one for copies after it."""

    before: Any
    after: Any
    waits: bool
    """Whether ``after`` waits by itself for what comes before it, so that it may begin earlier."""


@cache
def copy_kernels(index: int) -> CopyKernels | None:
    """The kernels of a device, kept for good; ``None`` if the driver refuses them: its own copies do too.

    Not to be called within a capture, which loading code might break.
    """
    waits = torch.cuda.get_device_capability(index) >= _WAITS
    try:
        with driver.on_device(index):
            module = driver.call("cuModuleLoadData", ptx(waits).encode() + b"\0")
            before = after = driver.call("cuModuleGetFunction", module, b"graphcache_copy")
            if waits:
                after = driver.call("cuModuleGetFunction", module, b"graphcache_copy_after")
            return CopyKernels(before, after, waits)
    except CudaError as error:
        log.debug("copies are the driver's own on device %d: %s", index, error)
        return None


def ptx(waits: bool) -> str:
    """The source; ``graphcache_copy_after`` needs compute capability 9.0."""
    entry, nbytes = Template("\n" + _SOURCE.read_text(encoding="ascii")), ctypes.sizeof(CopyList)
    entries = entry.substitute(name="graphcache_copy", nbytes=nbytes, wait="")
    if waits:
        entries += entry.substitute(name="graphcache_copy_after", nbytes=nbytes, wait="griddepcontrol.wait;")
    version, target = ("7.8", "sm_90") if waits else ("6.3", "sm_75")
    return _PTX.format(version=version, target=target, entries=entries)


def with_copies(
    enqueue: Callable[[int], bool], before: Pairs, after: Pairs, kernels: CopyKernels | None
) -> Callable[[int], bool]:
    """The same work with copies before and after it; ``enqueue`` may add to ``after``."""

    def enqueue_all(stream: int) -> bool:
        _copy(before, stream, None if kernels is None else kernels.before)
        if not enqueue(stream):
            return False
        _copy(after, stream, None if kernels is None else kernels.after)
        return True

    return enqueue_all


def _copy(pairs: Pairs, stream: int, kernel: Any) -> None:
    """Enqueue copies: small tensors by the kernel, if there is one, the others by the driver."""
    small: list[tuple[int, int, int]] = []
    for target, source in pairs:
        nbytes = target.numel() * target.element_size()
        if kernel is not None and 0 < nbytes <= LARGEST:
            small.append((source.data_ptr(), target.data_ptr(), nbytes))
        elif nbytes:
            driver.call("cuMemcpyDtoDAsync", target.data_ptr(), source.data_ptr(), nbytes, stream)
    for start in range(0, len(small), MAX_COPIES):
        some = small[start : start + MAX_COPIES]
        values = CopyList(*(value for each in some for value in each))
        # Enough threads for 4 bytes each: a loop would wait for memory in every turn.
        grid = -(-max(nbytes for _, _, nbytes in some) // (4 * _THREADS)), len(some), 1
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(values))
        driver.call("cuLaunchKernel", kernel, *grid, _THREADS, 1, 1, 0, stream, ctypes.addressof(arguments), 0)


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
    *_, count = _call_with_edges("cuGraphGetEdges", graph, 0)
    if not count:
        return []
    starts, ends, data, _ = _call_with_edges("cuGraphGetEdges", graph, count)
    return [Edge(*each) for each in zip(starts[:count], ends[:count], data[:count], strict=True)]


def order_copies(graph: Any, kernels: CopyKernels | None, *, full_edges: bool = False) -> None:
    """Set the edges of a graph that was captured with copies, whatever the work between them was launched with.

    Work whose first kernel is launched programmatically, as some of TensorRT's are, waits for the driver's own copies,
    but would begin beside a kernel that copies its inputs. Those kernels get full edges. The kernel that copies the
    outputs is launched early where it waits by itself: of the 2.4 µs that both copies take in a graph of three small
    kernels, that saves 0.4 (H200, driver 580).

    ``full_edges`` makes all edges full, for kernels that do not wait where they should, as TensorRT-RTX has on GPUs it
    was not made for: they give other answers from run to run.
    """
    if kernels is None and not full_edges:
        return
    edges = edges_of(graph)
    if full_edges or kernels is None:
        make_full(graph, edges)
        return
    make_full(graph, [edge for edge in edges if edge.is_programmatic and _runs(edge.start, kernels.before)])
    if not kernels.waits:
        return
    starts, ends = {int(edge.start) for edge in edges}, Counter(int(edge.end) for edge in edges)
    for edge in edges:
        last = int(edge.end)
        if last not in starts and ends[last] == 1 and _runs(edge.end, kernels.after) and _runs(edge.start):
            with suppress(CudaError):
                begin_early(graph, edge)


def make_full(graph: Any, edges: Iterable[Edge]) -> None:
    """Replace programmatic edges by full ones, whose ends wait for the end of their starts."""
    chosen = [edge for edge in edges if edge.is_programmatic]
    for edge in chosen:
        _call_with_edges("cuGraphRemoveDependencies", graph, [edge.start], [edge.end], [edge.data], 1)
    for edge in chosen:
        _call_with_edges("cuGraphAddDependencies", graph, [edge.start], [edge.end], None, 1)


def begin_early(graph: Any, edge: Edge) -> None:
    """Let a kernel that begins with ``griddepcontrol.wait`` be launched once all blocks of the one before have begun.

    If the driver refuses, the edge stays as it was and :class:`CudaError` is raised.
    """
    api = driver.binding()
    data = api.CUgraphEdgeData()
    data.type = api.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    data.from_port = api.CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER
    _call_with_edges("cuGraphRemoveDependencies", graph, [edge.start], [edge.end], [edge.data], 1)
    try:
        _call_with_edges("cuGraphAddDependencies", graph, [edge.start], [edge.end], [data], 1)
    except BaseException:
        _call_with_edges("cuGraphAddDependencies", graph, [edge.start], [edge.end], [edge.data], 1)
        raise


def _call_with_edges(name: str, *args: Any) -> Any:
    """Call the function that takes edge data, which cuda-python 12 names ``_v2``."""
    return driver.call(f"{name}_v2" if hasattr(driver.binding(), f"{name}_v2") else name, *args)


def _runs(node: Any, kernel: Any = None) -> bool:
    """Whether a node launches a kernel: any, or the given one."""
    kinds = driver.binding().CUgraphNodeType
    if driver.call("cuGraphNodeGetType", node) != kinds.CU_GRAPH_NODE_TYPE_KERNEL:
        return False
    return kernel is None or int(driver.call("cuGraphKernelNodeGetParams", node).func) == int(kernel)


def find_copies(graph: Any, tensors: Sequence[Tensor], kernels: CopyKernels | None) -> list[list[Pointer]]:
    """For each tensor, the one node that copies exactly it; raises :class:`CannotBind` if that is none or several."""
    indices = {tensor.data_ptr(): index for index, tensor in enumerate(tensors)}
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    found: list[list[Pointer]] = [[] for _ in tensors]
    kinds = driver.binding().CUgraphNodeType
    for node, kind in nodes_of(graph):
        if kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
            ends = _ends_of_copy(node)
        elif kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL and kernels is not None:
            ends = _ends_of_kernel(node, kernels)
        else:
            continue
        for address, nbytes, pointer in ends:
            index = indices.get(address)
            if index is not None and nbytes == sizes[index]:
                found[index].append(pointer)
    for index, places in enumerate(found):
        if len(places) != 1:
            raise CannotBind(f"tensor {index} is copied by {len(places)} nodes instead of one")
    return found


def _ends_of_copy(node: Any) -> Iterator[tuple[int, int, Pointer]]:
    """Address, size and pointer of each end of a copy node."""
    params = driver.call("cuGraphMemcpyNodeGetParams", node)
    if is_flat(params):
        for field in COPY_ADDRESSES:
            yield int(getattr(params, field)), int(params.WidthInBytes), copy_pointer(node, params, field, 0)


def _ends_of_kernel(node: Any, kernels: CopyKernels) -> Iterator[tuple[int, int, Pointer]]:
    """The same of each copy that a node of the copy kernel makes."""
    params = driver.call("cuGraphKernelNodeGetParams", node)
    if int(params.func) not in (int(kernels.before), int(kernels.after)):
        return
    theirs = (ctypes.c_void_p * 1).from_address(params.kernelParams)
    copies = CopyList.from_buffer_copy(ctypes.string_at(theirs[0] or 0, ctypes.sizeof(CopyList)))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(copies))
    params.kernelParams = ctypes.addressof(arguments)
    for start in range(0, len(copies), 3):
        nbytes = int(copies[start + 2])
        for place in (start, start + 1) if nbytes else ():
            word = ctypes.c_uint64.from_buffer(copies, 8 * place)
            yield int(copies[place]), nbytes, Pointer(word, 0, SET_KERNEL, (node, params), (copies, arguments))
