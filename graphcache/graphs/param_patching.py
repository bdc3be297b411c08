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
from typing import Any, NamedTuple

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


class _Move(NamedTuple):
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

    ``first`` was captured with ``tensors``, in memory of their own each, and must live as long as the pointers;
    ``second`` with ``others``, which :func:`elsewhere` made. :class:`CannotBind` says that the captures differ in
    anything else, or that a tensor stands nowhere.
    """
    nodes, other_nodes = nodes_of(first), nodes_of(second)
    if len(nodes) != len(other_nodes):
        raise CannotBind(f"two captures gave {len(nodes)} and {len(other_nodes)} nodes")
    if len(nodes) > MAX_NODES:
        raise CannotBind(f"{len(nodes)} nodes are more than {MAX_NODES}")
    moves = [
        _Move(left.data_ptr(), left.numel() * left.element_size(), right.data_ptr() - left.data_ptr())
        for left, right in zip(tensors, others, strict=True)
    ]
    kinds = driver.binding().CUgraphNodeType
    # Of each function once, not for longer: the handle may be another function's when its module is gone.
    layouts: dict[int, list[int]] = {}
    found: list[list[Pointer]] = [[] for _ in tensors]
    for (node, kind), (other, other_kind) in zip(nodes, other_nodes, strict=True):
        if kind != other_kind:
            raise CannotBind("two captures gave nodes of different kinds")
        pointers: Iterator[_Found] = iter(())
        if kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            pointers = _compare_kernels(node, other, moves, layouts)
        elif kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
            pointers = _compare_copies(node, other, moves)
        elif kind == kinds.CU_GRAPH_NODE_TYPE_MEMSET:
            _compare_memsets(node, other)
        elif kind != kinds.CU_GRAPH_NODE_TYPE_EMPTY:
            raise CannotBind(f"a node of kind {kind.name}")
        for index, pointer in pointers:
            found[index].append(pointer)
    for index, places in enumerate(found):
        if not places:
            raise CannotBind(f"tensor {index} stands in no node's arguments")
    return found


def nodes_of(graph: Any) -> list[tuple[Any, Any]]:
    """The nodes of a ``CUgraph``, in the driver's order, each with its ``CUgraphNodeType``."""
    _, count = driver.call("cuGraphGetNodes", graph, 0)
    handles, _ = driver.call("cuGraphGetNodes", graph, count)
    return [(handle, driver.call("cuGraphNodeGetType", handle)) for handle in handles[:count]]


def _differ(left: Any, right: Any, fields: Sequence[str]) -> bool:
    """Whether two structures differ in some of these fields."""
    return any(int(getattr(left, field)) != int(getattr(right, field)) for field in fields)


def _compare_memsets(node: Any, other: Any) -> None:
    """Nothing in a memset can be patched."""
    left, right = (driver.call("cuGraphMemsetNodeGetParams", each) for each in (node, other))
    if int(left.dst) != int(right.dst):
        raise CannotBind("a memset writes to an output")
    if _differ(left, right, _MEMSET_FIELDS):
        raise CannotBind("two captures set memory differently")


def _compare_kernels(node: Any, other: Any, moves: Sequence[_Move], layouts: dict[int, list[int]]) -> Iterator[_Found]:
    """The pointers in the arguments of a kernel node."""
    params, other_params = (driver.call("cuGraphKernelNodeGetParams", each) for each in (node, other))
    if _differ(params, other_params, ("func", "kern", *_LAUNCH_FIELDS)):
        raise CannotBind("two captures launch different kernels")
    if not params.kernelParams or not other_params.kernelParams:
        raise CannotBind("a kernel takes its arguments as one packed buffer")
    function = int(params.func) or int(params.kern)
    if function not in layouts:
        layouts[function] = list(_argument_sizes(params))
    sizes = layouts[function]
    mine, theirs = _arguments(params, sizes), _arguments(other_params, sizes)
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
            yield index, Pointer(word, offset, SET_KERNEL, (node, params), (copies, array))


def _compare_copies(node: Any, other: Any, moves: Sequence[_Move]) -> Iterator[_Found]:
    """The pointers in a copy node."""
    params, other_params = (driver.call("cuGraphMemcpyNodeGetParams", each) for each in (node, other))
    if _differ(params, other_params, _COPY_FIELDS):
        raise CannotBind("two captures copy differently")
    if not is_flat(params) and _differ(params, other_params, COPY_ADDRESSES):
        raise CannotBind("a copy of several rows cannot be pointed elsewhere")
    for field in COPY_ADDRESSES:
        mine, theirs = int(getattr(params, field)), int(getattr(other_params, field))
        if mine != theirs:
            index, offset = _explain(mine, theirs, moves)
            yield index, copy_pointer(node, params, field, offset)


def is_flat(params: Any) -> bool:
    """Whether a copy is of one row: all that ``cuGraphExecMemcpyNodeSetParams`` takes."""
    return int(params.Height) <= 1 and int(params.Depth) <= 1


def copy_pointer(node: Any, params: Any, field: str, offset: int) -> Pointer:
    """The place of an address in a copy node, whose parameters ``params`` are a copy of."""
    word = ctypes.c_uint64.from_address(params.getPtr() + _copy_field_offset(field))
    return Pointer(word, offset, SET_COPY, (node, params, driver.call("cuCtxGetCurrent")), params)


def _copy_field_offset(field: str) -> int:
    """Where a device address stands in ``CUDA_MEMCPY3D``: found by a mark, as the binding hides its layout."""
    mark = 0x5A5A5A5A12345678
    probe = driver.binding().CUDA_MEMCPY3D()
    setattr(probe, field, driver.binding().CUdeviceptr(mark))
    return ctypes.string_at(probe.getPtr(), 200).index(mark.to_bytes(8, "little"))


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
