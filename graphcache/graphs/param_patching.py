"""Where a captured graph has baked the addresses of its inputs and outputs, and how to point it at other tensors.

A kernel node holds a copy of its kernel's arguments. Captured twice, with other inputs and outputs each time and
everything else the same, two copies differ exactly where an address of an input or output stands. What differs
otherwise, or stands where no argument shows it (device memory, a tensor-map descriptor), cannot be patched: such a
graph is refused here, or found out by verification, and copies instead.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcache.graphs import driver

MAX_NODES = 4096
"""Reading a node's arguments takes some 10 µs; a graph beyond this many is launched for milliseconds and can copy."""

SET_KERNEL, SET_COPY = "cuGraphExecKernelNodeSetParams", "cuGraphExecMemcpyNodeSetParams"

COPY_ADDRESSES = ("srcDevice", "dstDevice")
"""Where a copy node's addresses stand."""

_COPY_FIELDS = (
    *("WidthInBytes", "Height", "Depth", "srcPitch", "dstPitch", "srcMemoryType", "dstMemoryType"),
    *("srcXInBytes", "srcY", "srcZ", "dstXInBytes", "dstY", "dstZ"),
)
_MEMSET_FIELDS = ("value", "elementSize", "width", "height", "pitch")
_LAUNCH_FIELDS = ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes")
_DESCRIPTOR_BYTES = 128
"""``sizeof(CUtensorMap)``: an opaque descriptor with an encoded address, passed by value."""


class CannotBind(Exception):
    """Why the addresses in a graph cannot be patched; never reaches the user."""


@dataclass(frozen=True, slots=True, eq=False)
class Pointer:
    """One place in an instantiated graph where an address stands."""

    word: Any
    """The address in this object's own copy of the node's parameters; node-owned memory is never written."""
    offset: int
    """What is added to a tensor's address."""
    setter: str
    """The driver function that sets all parameters of the node, so that every pointer into the node counts."""
    arguments: Sequence[Any]
    """Of ``setter``, after the executable: node, parameters, and for a copy node the context."""
    keep: Any
    """The memory behind ``word``."""

    @property
    def raw(self) -> tuple[bool, int, int, int, int, int]:
        """For native code: is it a kernel, node, address of the parameters, context or 0, address of word, offset."""
        node, params, *context = self.arguments
        raw_context = int(context[0]) if context else 0
        return not context, int(node), params.getPtr(), raw_context, ctypes.addressof(self.word), self.offset


@dataclass(frozen=True, slots=True)
class Node:
    """A ``CUgraphNode`` and its ``CUgraphNodeType``."""

    handle: Any
    kind: Any


@dataclass(frozen=True, slots=True)
class _Move:
    """A tensor of the first capture, and how far from it the tensor of the second capture lies."""

    start: int
    nbytes: int
    distance: int


_Found = tuple[int, Pointer]
"""Which tensor a pointer stands for, and the pointer."""


def elsewhere(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like some, for a second capture: no two of them as far away from those given.

    The end of an input is often the beginning of an output. Had both moved by the same distance, it could not be told
    which of them a kernel was given.
    """
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

    Args:
        first: A ``CUgraph`` that was captured with ``tensors``; it must live as long as the pointers.
        second: One captured with ``others``.
        tensors: Inputs and outputs of the first, in memory of their own each.
        others: Those of the second, alive at the same time; best of :func:`elsewhere`.

    Raises:
        CannotBind: If the captures differ in anything else, or a tensor stands nowhere.
    """
    nodes, other_nodes = nodes_of(first), nodes_of(second)
    if len(nodes) != len(other_nodes):
        raise CannotBind(f"two captures gave {len(nodes)} and {len(other_nodes)} nodes")
    if len(nodes) > MAX_NODES:
        raise CannotBind(f"{len(nodes)} nodes are more than {MAX_NODES}")
    found: list[list[Pointer]] = [[] for _ in tensors]
    moves = [
        _Move(left.data_ptr(), left.numel() * left.element_size(), right.data_ptr() - left.data_ptr())
        for left, right in zip(tensors, others, strict=True)
    ]
    # Of each function once, not for longer: the handle may be another function's when its module is gone.
    layouts: dict[int, list[int]] = {}
    for node, other in zip(nodes, other_nodes, strict=True):
        for index, pointer in _compare(node, other, moves, layouts):
            found[index].append(pointer)
    for index, places in enumerate(found):
        if not places:
            raise CannotBind(f"tensor {index} stands in no node's arguments")
    return found


def nodes_of(graph: Any) -> list[Node]:
    """The nodes of a ``CUgraph``, in the driver's order."""
    _, count = driver.call("cuGraphGetNodes", graph, 0)
    handles, _ = driver.call("cuGraphGetNodes", graph, count)
    return [Node(handle, driver.call("cuGraphNodeGetType", handle)) for handle in handles[:count]]


def _compare(node: Node, other: Node, moves: Sequence[_Move], layouts: dict[int, list[int]]) -> Iterator[_Found]:
    """The pointers in a node, by comparison with that of another capture."""
    kinds = driver.binding().CUgraphNodeType
    if node.kind != other.kind:
        raise CannotBind("two captures gave nodes of different kinds")
    if node.kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
        yield from _compare_kernels(node.handle, other.handle, moves, layouts)
    elif node.kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
        yield from _compare_copies(node.handle, other.handle, moves)
    elif node.kind == kinds.CU_GRAPH_NODE_TYPE_MEMSET:
        left, right = (driver.call("cuGraphMemsetNodeGetParams", each.handle) for each in (node, other))
        if int(left.dst) != int(right.dst):
            raise CannotBind("a memset writes to an output")
        if _differ(left, right, _MEMSET_FIELDS):
            raise CannotBind("two captures set memory differently")
    elif node.kind != kinds.CU_GRAPH_NODE_TYPE_EMPTY:
        raise CannotBind(f"a node of kind {node.kind.name}")


def _differ(left: Any, right: Any, fields: Sequence[str]) -> bool:
    """Whether two structures differ in some of these fields."""
    return any(int(getattr(left, field)) != int(getattr(right, field)) for field in fields)


def _compare_kernels(left: Any, right: Any, moves: Sequence[_Move], layouts: dict[int, list[int]]) -> Iterator[_Found]:
    """The pointers in the arguments of a kernel node."""
    params, other = (driver.call("cuGraphKernelNodeGetParams", node) for node in (left, right))
    if _differ(params, other, ("func", "kern", *_LAUNCH_FIELDS)):
        raise CannotBind("two captures launch different kernels")
    if not params.kernelParams or not other.kernelParams:
        raise CannotBind("a kernel takes its arguments as one packed buffer")
    function = int(params.func) or int(params.kern)
    if function not in layouts:
        layouts[function] = list(_argument_sizes(params))
    sizes = layouts[function]
    mine, theirs = _arguments(params, sizes), _arguments(other, sizes)
    if mine == theirs:
        return
    # Rounded up to words, so that every argument is aligned as the driver reads it.
    copies = [
        (ctypes.c_char * (-(-size // 8) * 8)).from_buffer_copy(value.ljust(-(-size // 8) * 8, b"\0"))
        for value, size in zip(mine, sizes, strict=True)
    ]
    array = (ctypes.c_void_p * max(len(sizes), 1))(*(ctypes.addressof(copy) for copy in copies))
    params.kernelParams = ctypes.addressof(array)
    for copy, before, after, size in zip(copies, mine, theirs, sizes, strict=True):
        if before != after and size == _DESCRIPTOR_BYTES:
            raise CannotBind("a tensor-map descriptor holds an address")
        for start in range(0, size, 8):
            mine_word, their_word = before[start : start + 8], after[start : start + 8]
            if mine_word == their_word:
                continue
            if size - start < 8:
                raise CannotBind("arguments differ in something that is no address")
            index, offset = _explain(int.from_bytes(mine_word, "little"), int.from_bytes(their_word, "little"), moves)
            word = ctypes.c_uint64.from_buffer(copy, start)
            yield index, Pointer(word, offset, SET_KERNEL, (left, params), (copies, array))


def _compare_copies(left: Any, right: Any, moves: Sequence[_Move]) -> Iterator[_Found]:
    """The pointers in a copy node."""
    params, other = (driver.call("cuGraphMemcpyNodeGetParams", node) for node in (left, right))
    if _differ(params, other, _COPY_FIELDS):
        raise CannotBind("two captures copy differently")
    if not is_flat(params) and _differ(params, other, COPY_ADDRESSES):
        raise CannotBind("a copy of several rows cannot be pointed elsewhere")
    for field in COPY_ADDRESSES:
        mine, theirs = int(getattr(params, field)), int(getattr(other, field))
        if mine != theirs:
            index, offset = _explain(mine, theirs, moves)
            yield index, copy_pointer(left, params, field, offset)


def is_flat(params: Any) -> bool:
    """Whether a copy is of one row: all that ``cuGraphExecMemcpyNodeSetParams`` takes."""
    return int(params.Height) <= 1 and int(params.Depth) <= 1


def copy_pointer(node: Any, params: Any, field: str, offset: int) -> Pointer:
    """The place of an address in a copy node, whose parameters ``params`` are a copy of."""
    word = ctypes.c_uint64.from_address(params.getPtr() + _copy_field_offsets()[field])
    context = driver.call("cuCtxGetCurrent")
    return Pointer(word, offset, SET_COPY, (node, params, context), params)


def _copy_field_offsets() -> dict[str, int]:
    """Where the device addresses stand in ``CUDA_MEMCPY3D``: found by a mark, as the binding hides its layout."""
    api, mark, offsets = driver.binding(), 0x5A5A5A5A12345678, {}
    for field in COPY_ADDRESSES:
        probe = api.CUDA_MEMCPY3D()
        setattr(probe, field, api.CUdeviceptr(mark))
        offsets[field] = ctypes.string_at(probe.getPtr(), 200).index(mark.to_bytes(8, "little"))
    return offsets


def _explain(mine: int, theirs: int, moves: Sequence[_Move]) -> tuple[int, int]:
    """The one tensor that two differing words point into, and how far behind its beginning."""
    # One past the end counts: kernels are given ends of ranges too.
    fits = [
        (index, mine - move.start)
        for index, move in enumerate(moves)
        if move.start <= mine <= move.start + move.nbytes and theirs - mine == move.distance
    ]
    if len(fits) != 1:
        raise CannotBind("arguments differ in something that is no address of an input or output")
    return fits[0]


def _argument_sizes(params: Any) -> Iterator[int]:
    """The sizes of a kernel's arguments."""
    api = driver.binding()
    if int(params.func):
        get, function = api.cuFuncGetParamInfo, params.func
    else:
        get, function = api.cuKernelGetParamInfo, params.kern
    for index in itertools.count():
        code, _, size = get(function, index)
        # The documented answer to an index past the last argument. Anything else must not pass for it: the driver would
        # read the arguments that were left out from behind our array.
        if code == api.CUresult.CUDA_ERROR_INVALID_VALUE:
            return
        if code:
            raise CannotBind(f"the driver did not tell of argument {index} of a kernel ({code.name})")
        yield int(size)


def _arguments(params: Any, sizes: Sequence[int]) -> list[bytes]:
    """The values of a kernel's arguments."""
    array = (ctypes.c_void_p * len(sizes)).from_address(params.kernelParams)
    return [ctypes.string_at(address or 0, size) for address, size in zip(array, sizes, strict=True)]
