"""Where a captured graph has baked the addresses of its inputs and outputs, and how to point it at other tensors.

A kernel node holds a copy of its kernel's arguments. Captured twice, with other inputs and outputs each time and
everything else the same, two copies differ exactly where an address of an input or output stands. What differs
otherwise, or stands where no argument shows it (device memory, a tensor-map descriptor), cannot be patched: such a
graph is refused here, or found out by verification, and copies instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcache.graphs import driver

COPY_ADDRESSES = {"srcDevice": 48, "dstDevice": 136}
"""Where a copy node's addresses stand in ``CUDA_MEMCPY3D``, in bytes (cuda.h)."""

_COPY_FIELDS = (
    *("WidthInBytes", "Height", "Depth", "srcPitch", "dstPitch", "srcMemoryType", "dstMemoryType"),
    *("srcXInBytes", "srcY", "srcZ", "dstXInBytes", "dstY", "dstZ"),
)
_MEMSET_FIELDS = ("dst", "value", "elementSize", "width", "height", "pitch")
_KERNEL_FIELDS = (
    *("func", "kern", "gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes"),
)
_DESCRIPTOR_BYTES = 128
"""``sizeof(CUtensorMap)``: an opaque descriptor with an encoded address, passed by value."""


class CannotBind(Exception):
    """Why the addresses in a graph cannot be patched; never reaches the user."""


@dataclass(frozen=True, slots=True, eq=False)
class Pointer:
    """One place in an instantiated graph where an address stands."""

    # The address in our own copy of the node's parameters (node-owned memory is never written), and what is added to a
    # tensor's address there.
    word: Any
    offset: int
    # The driver function that sets all parameters of the node, so that every pointer into the node counts, and its
    # arguments after the executable: node, parameters, and for a copy node the context.
    setter: str
    arguments: Sequence[Any]
    # The memory behind ``word``.
    keep: Any

    @property
    def raw(self) -> tuple[bool, int, int, int, int, int]:
        """For native code: is it a kernel, node, address of the parameters, context or 0, address of word, offset."""
        node, params, *context = self.arguments
        raw_context = int(context[0]) if context else 0
        return not context, int(node), params.getPtr(), raw_context, ctypes.addressof(self.word), self.offset


_Move = tuple[int, int, int]
"""Address and bytes of a tensor of the first capture, and how far from it that of the second capture lies."""
_Found = list[tuple[int, Pointer]]
"""Which tensors pointers stand for, and the pointers."""


def elsewhere(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like some, for a second capture: no two of them as far away from those given."""
    # The end of an input is often the beginning of an output: moved alike, they could not be told apart.
    found: list[Tensor] = []
    distances: set[int] = set()
    # What lies at a distance that is taken stays allocated until the end, so that the next one lies elsewhere.
    kept: list[Tensor] = []
    for tensor in tensors:
        other = torch.empty_like(tensor)
        while (distance := other.data_ptr() - tensor.data_ptr()) in distances:
            kept.append(other)
            other = torch.empty_like(tensor)
        distances.add(distance)
        found.append(other)
    return found


def find_pointers(first: Any, second: Any, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[list[Pointer]]:
    """For each tensor the places in the first of two captures of the same work where its address stands.

    ``first`` was captured with ``tensors``, in memory of their own each, and must live as long as the pointers;
    ``second`` with ``others``, which :func:`elsewhere` made. :class:`CannotBind` says that the captures differ in
    anything else, or that a tensor stands nowhere.
    """
    nodes, other_nodes = nodes_of(first), nodes_of(second)
    if len(nodes) != len(other_nodes):
        raise CannotBind(f"two captures gave {len(nodes)} and {len(other_nodes)} nodes")
    moves = [
        (left.data_ptr(), left.numel() * left.element_size(), right.data_ptr() - left.data_ptr())
        for left, right in zip(tensors, others, strict=True)
    ]
    kinds = driver.binding().CUgraphNodeType
    compare: dict[Any, Callable[[Any, Any, Sequence[_Move]], _Found]] = {
        kinds.CU_GRAPH_NODE_TYPE_KERNEL: _compare_kernels,
        kinds.CU_GRAPH_NODE_TYPE_MEMCPY: _compare_copies,
        kinds.CU_GRAPH_NODE_TYPE_MEMSET: _compare_memsets,
        kinds.CU_GRAPH_NODE_TYPE_EMPTY: lambda *_: [],
    }
    found: list[list[Pointer]] = [[] for _ in tensors]
    for (node, kind), (other, other_kind) in zip(nodes, other_nodes, strict=True):
        if kind != other_kind:
            raise CannotBind("two captures gave nodes of different kinds")
        if kind not in compare:
            raise CannotBind(f"a node of kind {kind.name}")
        for index, pointer in compare[kind](node, other, moves):
            found[index].append(pointer)
    if [] in found:
        raise CannotBind(f"tensor {found.index([])} stands in no node's arguments")
    return found


def find_copies(graph: Any, tensors: Sequence[Tensor]) -> list[list[Pointer]]:
    """For each tensor, the one node that copies exactly it; raises :class:`CannotBind` if that is none or several."""
    indices = {tensor.data_ptr(): index for index, tensor in enumerate(tensors)}
    found: list[list[Pointer]] = [[] for _ in tensors]
    copy = driver.binding().CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY
    for node, kind in nodes_of(graph):
        if kind != copy or not _is_flat(params := driver.call("cuGraphMemcpyNodeGetParams", node)):
            continue
        for field in COPY_ADDRESSES:
            index = indices.get(int(getattr(params, field)))
            if index is not None and int(params.WidthInBytes) == tensors[index].numel() * tensors[index].element_size():
                found[index].append(_copy_pointer(node, params, field, 0))
    for index, places in enumerate(found):
        if len(places) != 1:
            raise CannotBind(f"tensor {index} is copied by {len(places)} nodes instead of one")
    return found


def nodes_of(graph: Any) -> list[tuple[Any, Any]]:
    """The nodes of a ``CUgraph``, in the driver's order, each with its ``CUgraphNodeType``."""
    _, count = driver.call("cuGraphGetNodes", graph, 0)
    handles, _ = driver.call("cuGraphGetNodes", graph, count)
    return [(handle, driver.call("cuGraphNodeGetType", handle)) for handle in handles[:count]]


def _differ(left: Any, right: Any, fields: Sequence[str]) -> bool:
    return any(int(getattr(left, field)) != int(getattr(right, field)) for field in fields)


def _compare_kernels(node: Any, other: Any, moves: Sequence[_Move]) -> _Found:
    params, other_params = (driver.call("cuGraphKernelNodeGetParams", each) for each in (node, other))
    if _differ(params, other_params, _KERNEL_FIELDS):
        raise CannotBind("two captures launch different kernels")
    if not params.kernelParams or not other_params.kernelParams:
        raise CannotBind("a kernel takes its arguments as one packed buffer")
    sizes = _argument_sizes(params)
    pointers = ctypes.c_void_p * len(sizes)
    mine, theirs = (
        [ctypes.string_at(at or 0, size) for at, size in zip(pointers.from_address(array), sizes, strict=True)]
        for array in (params.kernelParams, other_params.kernelParams)
    )
    # Rounded up to words, so that every argument is aligned as the driver reads it.
    copies = [ctypes.create_string_buffer(value, -(-len(value) // 8) * 8) for value in mine]
    array = pointers(*map(ctypes.addressof, copies))
    params.kernelParams = ctypes.addressof(array)
    setter, arguments, keep = "cuGraphExecKernelNodeSetParams", (node, params), (copies, array)
    found: _Found = []
    for copy, before, after in zip(copies, mine, theirs, strict=True):
        if before != after and len(before) == _DESCRIPTOR_BYTES:
            raise CannotBind("a tensor-map descriptor holds an address")
        for start in range(0, len(before), 8):
            left, right = before[start : start + 8], after[start : start + 8]
            if left == right:
                continue
            if len(left) < 8:
                raise CannotBind("arguments differ in something that is no address")
            index, offset = _explain(int.from_bytes(left, "little"), int.from_bytes(right, "little"), moves)
            word = ctypes.c_uint64.from_buffer(copy, start)
            found.append((index, Pointer(word, offset, setter, arguments, keep)))
    return found


def _argument_sizes(params: Any) -> list[int]:
    api = driver.binding()
    sizes: list[int] = []
    by_function = api.cuFuncGetParamInfo, params.func
    get, function = by_function if int(params.func) else (api.cuKernelGetParamInfo, params.kern)
    while True:
        code, _, size = get(function, len(sizes))
        # The documented answer to an index past the last argument. Anything else must not pass for it: the driver would
        # read the arguments that were left out from behind our array.
        if code == api.CUresult.CUDA_ERROR_INVALID_VALUE:
            return sizes
        if code:
            raise CannotBind(f"the driver did not tell of argument {len(sizes)} of a kernel ({code.name})")
        sizes.append(int(size))


def _compare_memsets(node: Any, other: Any, _: Sequence[_Move]) -> _Found:
    """No pointers: nothing in a memset can be patched."""
    params, other_params = (driver.call("cuGraphMemsetNodeGetParams", each) for each in (node, other))
    if _differ(params, other_params, _MEMSET_FIELDS):
        raise CannotBind("two captures set memory differently")
    return []


def _compare_copies(node: Any, other: Any, moves: Sequence[_Move]) -> _Found:
    params, other_params = (driver.call("cuGraphMemcpyNodeGetParams", each) for each in (node, other))
    if _differ(params, other_params, _COPY_FIELDS):
        raise CannotBind("two captures copy differently")
    if not _is_flat(params) and _differ(params, other_params, tuple(COPY_ADDRESSES)):
        raise CannotBind("a copy of several rows cannot be pointed elsewhere")
    found: _Found = []
    for field in COPY_ADDRESSES:
        mine, theirs = int(getattr(params, field)), int(getattr(other_params, field))
        if mine != theirs:
            index, offset = _explain(mine, theirs, moves)
            found.append((index, _copy_pointer(node, params, field, offset)))
    return found


def _is_flat(params: Any) -> bool:
    """Whether a copy is of one row: all that ``cuGraphExecMemcpyNodeSetParams`` takes."""
    return int(params.Height) <= 1 and int(params.Depth) <= 1


def _copy_pointer(node: Any, params: Any, field: str, offset: int) -> Pointer:
    """The place of an address in a copy node, whose parameters ``params`` are a copy of."""
    word = ctypes.c_uint64.from_address(params.getPtr() + COPY_ADDRESSES[field])
    context = driver.call("cuCtxGetCurrent")
    return Pointer(word, offset, "cuGraphExecMemcpyNodeSetParams", (node, params, context), params)


def _explain(mine: int, theirs: int, moves: Sequence[_Move]) -> tuple[int, int]:
    """The one tensor that two differing words point into, and how far behind its beginning."""
    # One past the end counts: kernels are given ends of ranges too.
    fits = [
        (index, mine - start)
        for index, (start, nbytes, distance) in enumerate(moves)
        if start <= mine <= start + nbytes and theirs - mine == distance
    ]
    if len(fits) != 1:
        raise CannotBind("arguments differ in something that is no address of an input or output")
    return fits[0]
