"""Where a captured graph has baked the addresses of its inputs and outputs, and how to point it at other tensors.

A kernel node holds a copy of its kernel's arguments. Captured twice, with other inputs and outputs each time and
everything else the same, two copies differ exactly where an address of an input or output stands. What differs
otherwise, or stands where no argument shows it (device memory, a tensor-map descriptor), cannot be patched: such a
graph is refused here, or found out by verification, and copies instead.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcache.graphs import driver

MAX_NODES = 4096
"""Reading a node's arguments takes some 10 µs; a graph beyond this many is launched for milliseconds and can copy."""

COPY_ADDRESSES = ("srcDevice", "dstDevice")
"""Where a copy node's addresses stand."""

_COPY_FIELDS = (
    *("WidthInBytes", "Height", "Depth", "srcPitch", "dstPitch", "srcMemoryType", "dstMemoryType"),
    *("srcXInBytes", "srcY", "srcZ", "dstXInBytes", "dstY", "dstZ"),
)
_MEMSET_FIELDS = ("value", "elementSize", "width", "height", "pitch")
_DESCRIPTOR_BYTES = 128
"""``sizeof(CUtensorMap)``: an opaque descriptor with an encoded address, passed by value."""


class CannotBind(Exception):
    """Why the addresses in a graph cannot be patched; never reaches the user."""


class Pointer:
    """One place in an instantiated graph where an address stands.

    Args:
        word: The address in this object's own copy of the node's parameters; node-owned memory is never written.
        offset: What is added to a tensor's address.
        setter: The driver's function for this kind of node; it takes all parameters of the node, so that what ``word``
            of each other pointer into it says counts too.
        arguments: What it is called with after the executable.
        keep: The memory behind ``word``.
    """

    __slots__ = ("arguments", "keep", "offset", "setter", "word")

    def __init__(self, word: Any, offset: int, setter: Callable[..., Any], arguments: Sequence[Any], keep: Any) -> None:
        self.word = word
        self.offset = offset
        self.setter = setter
        self.arguments = arguments
        self.keep = keep

    @property
    def raw(self) -> tuple[bool, int, int, int, int, int]:
        """The same for compiled code.

        Returns:
            Whether the node is a kernel, the node, the address of its parameters, the context (0 for kernels), the
            address of ``word``, and ``offset``. The addresses hold for as long as this object lives.
        """
        node, params, *context = self.arguments
        raw_context = int(context[0]) if context else 0
        return not context, int(node), params.getPtr(), raw_context, ctypes.addressof(self.word), self.offset


@dataclass(frozen=True, slots=True)
class Node:
    """A ``CUgraphNode`` and its ``CUgraphNodeType``."""

    handle: Any
    kind: Any


def elsewhere(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like some, for a second capture: no two of them as far away from those given.

    An allocator often hands out one tensor after the other, so that the end of an input is the beginning of an output.
    Had both moved by the same distance, nobody could tell which of them a kernel was given.

    Args:
        tensors: On the device, in memory of their own each.
    """
    found: list[Tensor] = []
    moves: set[int] = set()
    # What lies at a distance that is taken stays allocated until the end, so that the next one lies elsewhere.
    kept: list[Tensor] = []
    for tensor in tensors:
        other = torch.empty_like(tensor)
        while (move := other.data_ptr() - tensor.data_ptr()) in moves:
            kept.append(other)
            other = torch.empty_like(tensor)
        moves.add(move)
        found.append(other)
    return found


def find_pointers(first: Any, second: Any, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[list[Pointer]]:
    """Where two captures of the same work show the addresses of their tensors.

    Args:
        first: A ``CUgraph`` that was captured with ``tensors``; its nodes are the ones to patch, so it must live as
            long as the pointers.
        second: One captured with ``others``.
        tensors: Inputs and outputs of the first, in memory of their own each.
        others: Those of the second, alive at the same time; best of :func:`elsewhere`.

    Returns:
        For each tensor the places where its address stands.

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
        (left.data_ptr(), left.numel() * left.element_size(), right.data_ptr() - left.data_ptr())
        for left, right in zip(tensors, others, strict=True)
    ]
    kinds = driver.binding().CUgraphNodeType
    # Of each function once, not for longer: the handle may be another function's when its module is gone.
    layouts: dict[int, list[int]] = {}
    for node, other in zip(nodes, other_nodes, strict=True):
        if node.kind != other.kind:
            raise CannotBind("two captures gave nodes of different kinds")
        if node.kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            _compare_kernels(node.handle, other.handle, moves, found, layouts)
        elif node.kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
            _compare_copies(node.handle, other.handle, moves, found)
        elif node.kind == kinds.CU_GRAPH_NODE_TYPE_MEMSET:
            left = driver.call("cuGraphMemsetNodeGetParams", node.handle)
            right = driver.call("cuGraphMemsetNodeGetParams", other.handle)
            if int(left.dst) != int(right.dst):
                raise CannotBind("a memset writes to an output")
            if any(int(getattr(left, name)) != int(getattr(right, name)) for name in _MEMSET_FIELDS):
                raise CannotBind("two captures set memory differently")
        elif node.kind != kinds.CU_GRAPH_NODE_TYPE_EMPTY:
            raise CannotBind(f"a node of kind {node.kind.name}")
    for index, places in enumerate(found):
        if not places:
            raise CannotBind(f"tensor {index} stands in no node's arguments")
    return found


def nodes_of(graph: Any) -> list[Node]:
    """The nodes of a ``CUgraph``, in the driver's order."""
    _, count = driver.call("cuGraphGetNodes", graph, 0)
    handles, _ = driver.call("cuGraphGetNodes", graph, count)
    return [Node(handle, driver.call("cuGraphNodeGetType", handle)) for handle in handles[:count]]


def _compare_kernels(
    left: Any,
    right: Any,
    moves: Sequence[tuple[int, int, int]],
    found: list[list[Pointer]],
    layouts: dict[int, list[int]],
) -> None:
    params, other = (driver.call("cuGraphKernelNodeGetParams", node) for node in (left, right))
    shape = ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes")
    same = int(params.func) == int(other.func) and int(params.kern) == int(other.kern)
    if not same or any(getattr(params, name) != getattr(other, name) for name in shape):
        raise CannotBind("two captures launch different kernels")
    if not params.kernelParams or not other.kernelParams:
        raise CannotBind("a kernel takes its arguments as one packed buffer")
    function = int(params.func) or int(params.kern)
    layout = layouts.get(function)
    if layout is None:
        layout = layouts[function] = list(_argument_sizes(params))
    mine, theirs = _arguments(params, layout), _arguments(other, layout)
    if mine == theirs:
        return
    # Rounded up to words, so that every argument is aligned as the driver reads it.
    copies = [
        (ctypes.c_char * (-(-size // 8) * 8)).from_buffer_copy(value.ljust(-(-size // 8) * 8, b"\0"))
        for value, size in zip(mine, layout, strict=True)
    ]
    array = (ctypes.c_void_p * max(len(layout), 1))(*(ctypes.addressof(copy) for copy in copies))
    params.kernelParams = ctypes.addressof(array)
    setter = driver.binding().cuGraphExecKernelNodeSetParams
    for copy, before, after, size in zip(copies, mine, theirs, layout, strict=True):
        if before == after:
            continue
        if size == _DESCRIPTOR_BYTES:
            raise CannotBind("a tensor-map descriptor holds an address")
        for start in range(0, size, 8):
            mine_word, their_word = before[start : start + 8], after[start : start + 8]
            if mine_word == their_word:
                continue
            if size - start < 8:
                raise CannotBind("arguments differ in something that is no address")
            index, offset = _explain(int.from_bytes(mine_word, "little"), int.from_bytes(their_word, "little"), moves)
            word = ctypes.c_uint64.from_buffer(copy, start)
            found[index].append(Pointer(word, offset, setter, (left, params), (copies, array)))


def _compare_copies(left: Any, right: Any, moves: Sequence[tuple[int, int, int]], found: list[list[Pointer]]) -> None:
    params, other = (driver.call("cuGraphMemcpyNodeGetParams", node) for node in (left, right))
    if any(int(getattr(params, name)) != int(getattr(other, name)) for name in _COPY_FIELDS):
        raise CannotBind("two captures copy differently")
    if not is_flat(params) and any(int(getattr(params, f)) != int(getattr(other, f)) for f in COPY_ADDRESSES):
        raise CannotBind("a copy of several rows cannot be pointed elsewhere")
    for field in COPY_ADDRESSES:
        mine, theirs = int(getattr(params, field)), int(getattr(other, field))
        if mine != theirs:
            index, offset = _explain(mine, theirs, moves)
            found[index].append(copy_pointer(left, params, field, offset))


def is_flat(params: Any) -> bool:
    """Whether a copy is of one row: all that ``cuGraphExecMemcpyNodeSetParams`` takes."""
    return int(params.Height) <= 1 and int(params.Depth) <= 1


def copy_pointer(node: Any, params: Any, field: str, offset: int) -> Pointer:
    """The place of an address in a copy node.

    Args:
        node: A ``CUgraphNode``.
        params: Its parameters, a copy of the node's own.
        field: One of :data:`COPY_ADDRESSES`.
        offset: As for :class:`Pointer`.
    """
    word = ctypes.c_uint64.from_address(params.getPtr() + _copy_field_offsets()[field])
    context = driver.call("cuCtxGetCurrent")
    return Pointer(word, offset, driver.binding().cuGraphExecMemcpyNodeSetParams, (node, params, context), params)


def _copy_field_offsets() -> dict[str, int]:
    """Where the device addresses stand in ``CUDA_MEMCPY3D``: found by a mark, as the binding hides its layout."""
    api = driver.binding()
    offsets = {}
    for field in COPY_ADDRESSES:
        probe = api.CUDA_MEMCPY3D()
        setattr(probe, field, api.CUdeviceptr(0x5A5A5A5A12345678))
        raw = ctypes.string_at(probe.getPtr(), 200)
        offsets[field] = raw.index((0x5A5A5A5A12345678).to_bytes(8, "little"))
    return offsets


def _explain(mine: int, theirs: int, moves: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Which tensor two differing words point into, and how far behind its beginning.

    Raises:
        CannotBind: If none, or more than one.
    """
    # One past the end counts: kernels are given ends of ranges too.
    fits = [
        (index, mine - start)
        for index, (start, nbytes, move) in enumerate(moves)
        if start <= mine <= start + nbytes and theirs - mine == move
    ]
    if len(fits) != 1:
        raise CannotBind("arguments differ in something that is no address of an input or output")
    return fits[0]


def _argument_sizes(params: Any) -> Iterator[int]:
    api = driver.binding()
    get, function = (
        (api.cuFuncGetParamInfo, params.func) if int(params.func) else (api.cuKernelGetParamInfo, params.kern)
    )
    for index in itertools.count():
        code, _, size = get(function, index)
        # The documented answer to an index past the last argument. Anything else must not pass for it: the driver would
        # read the arguments that were left out from behind our array.
        if code == api.CUresult.CUDA_ERROR_INVALID_VALUE:
            return
        if code:
            raise CannotBind(f"the driver did not tell of argument {index} of a kernel ({code.name})")
        yield int(size)


def _arguments(params: Any, layout: Sequence[int]) -> list[bytes]:
    array = (ctypes.c_void_p * len(layout)).from_address(params.kernelParams)
    return [ctypes.string_at(address or 0, size) for address, size in zip(array, layout, strict=True)]
