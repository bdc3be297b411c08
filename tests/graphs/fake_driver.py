"""Stands in for ``cuda.bindings.driver``, and for the parts of torch that need a device, by the documented rules.

Memory is an arena in which no address is used twice, so that reading or writing what was freed is always noticed. Work
runs at once, on the CPU; that it would also be right if it ran late is checked by the clocks of the streams: two
accesses of the same bytes, one of them a write, must be ordered by a stream or by events. What the driver leaves
undefined raises :class:`Violation`; what it refuses is refused with its code.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import inspect
import itertools
import mmap
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from graphcache.graphs import (
    buffers,
    capture,
    cuda,
    param_patching,
    stream_order,
)
from graphcache.graphs import driver as room

ALIGNMENT = 256
Kind = tuple[int, int]
"""Of an edge: its type (1 is programmatic), and the port that it begins at."""
_ARENA = 1 << 25


class Violation(AssertionError):
    """Undefined behaviour, had this been the driver."""


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_STATE = 401
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904
    CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908
    CUDA_ERROR_UNKNOWN = 999


class CUstreamCaptureStatus(enum.IntEnum):
    CU_STREAM_CAPTURE_STATUS_NONE = 0
    CU_STREAM_CAPTURE_STATUS_ACTIVE = 1
    CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class CUstream_flags(enum.IntEnum):
    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(enum.IntEnum):
    CU_EVENT_DEFAULT = 0
    CU_EVENT_DISABLE_TIMING = 2


class CUgraphNodeType(enum.IntEnum):
    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_MEMCPY = 1
    CU_GRAPH_NODE_TYPE_MEMSET = 2
    CU_GRAPH_NODE_TYPE_GRAPH = 4
    CU_GRAPH_NODE_TYPE_EMPTY = 5
    CU_GRAPH_NODE_TYPE_HOST = 3
    CU_GRAPH_NODE_TYPE_CONDITIONAL = 13


class CUgraphConditionalNodeType(enum.IntEnum):
    CU_GRAPH_COND_TYPE_IF = 0
    CU_GRAPH_COND_TYPE_WHILE = 1


class CUgraphInstantiate_flags(enum.IntEnum):
    CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD = 2


class CUgraphDebugDot_flags(enum.IntEnum):
    CU_GRAPH_DEBUG_DOT_FLAGS_VERBOSE = 1


class CUmemorytype(enum.IntEnum):
    CU_MEMORYTYPE_HOST = 1
    CU_MEMORYTYPE_DEVICE = 2
    CU_MEMORYTYPE_ARRAY = 3
    CU_MEMORYTYPE_UNIFIED = 4


class CUgraphDependencyType(enum.IntEnum):
    CU_GRAPH_DEPENDENCY_TYPE_DEFAULT = 0
    CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC = 1


class _Handle:
    def __init__(self, init_value: int = 0) -> None:
        self._value = int(init_value)

    def __int__(self) -> int:
        return self._value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and int(other) == self._value

    def __hash__(self) -> int:
        return hash((type(self), self._value))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._value:#x}>"


class CUstream(_Handle): ...


class CUevent(_Handle): ...


class CUgraph(_Handle): ...


class CUgraphExec(_Handle): ...


class CUgraphNode(_Handle): ...


class CUfunction(_Handle): ...


class CUkernel(_Handle): ...


class CUcontext(_Handle): ...


class CUdeviceptr(_Handle):
    """Unlike the others it compares by identity; only its ``int`` says where it points."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class cuuint64_t(CUdeviceptr): ...


class _Struct:
    """Fields by name over memory of C's layout, as the binding's structures are."""

    _raw_class: ClassVar[Any]
    _wrapped: ClassVar[dict[str, type[_Handle]]] = {}

    def __init__(self) -> None:
        object.__setattr__(self, "_raw", self._raw_class())

    def getPtr(self) -> int:
        return ctypes.addressof(self._raw)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._raw, name) or 0
        if name.endswith("MemoryType"):
            return CUmemorytype(value)
        return self._wrapped[name](value) if name in self._wrapped else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in dict(self._raw_class._fields_):
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        setattr(self._raw, name, int(value))

    def copy(self) -> Any:
        made = type(self)()
        ctypes.memmove(made.getPtr(), self.getPtr(), ctypes.sizeof(self._raw))
        return made


def _layout(**fields: Any) -> Any:
    return type("Raw", (ctypes.Structure,), {"_fields_": list(fields.items())})


_u32, _size, _pointer = ctypes.c_uint32, ctypes.c_size_t, ctypes.c_void_p


class CUDA_MEMCPY3D(_Struct):
    _raw_class = _layout(
        **dict.fromkeys(("srcXInBytes", "srcY", "srcZ", "srcLOD"), _size),
        srcMemoryType=_u32,
        srcHost=_pointer,
        srcDevice=ctypes.c_uint64,
        srcArray=_pointer,
        reserved0=_pointer,
        srcPitch=_size,
        srcHeight=_size,
        **dict.fromkeys(("dstXInBytes", "dstY", "dstZ", "dstLOD"), _size),
        dstMemoryType=_u32,
        dstHost=_pointer,
        dstDevice=ctypes.c_uint64,
        dstArray=_pointer,
        reserved1=_pointer,
        dstPitch=_size,
        dstHeight=_size,
        **dict.fromkeys(("WidthInBytes", "Height", "Depth"), _size),
    )
    _wrapped: ClassVar[dict[str, type[_Handle]]] = {"srcDevice": CUdeviceptr, "dstDevice": CUdeviceptr}


class CUDA_KERNEL_NODE_PARAMS(_Struct):
    _raw_class = _layout(
        func=_pointer,
        **dict.fromkeys(("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ"), _u32),
        sharedMemBytes=_u32,
        kernelParams=_pointer,
        extra=_pointer,
        kern=_pointer,
        ctx=_pointer,
    )
    _wrapped: ClassVar[dict[str, type[_Handle]]] = {"func": CUfunction, "kern": CUkernel, "ctx": CUcontext}


class CUDA_MEMSET_NODE_PARAMS(_Struct):
    _raw_class = _layout(dst=ctypes.c_uint64, pitch=_size, value=_u32, elementSize=_u32, width=_size, height=_size)
    _wrapped: ClassVar[dict[str, type[_Handle]]] = {"dst": CUdeviceptr}


class CUgraphEdgeData(_Struct):
    _raw_class = _layout(from_port=ctypes.c_uint8, to_port=ctypes.c_uint8, type=ctypes.c_uint8)


class CUDA_GRAPH_INSTANTIATE_PARAMS(_Struct):
    _raw_class = _layout(flags=ctypes.c_uint64, hUploadStream=_pointer, hErrNode_out=_pointer, result_out=_u32)
    _wrapped: ClassVar[dict[str, type[_Handle]]] = {"flags": cuuint64_t, "hUploadStream": CUstream}


class CUgraphNodeParams:
    """Of conditional nodes alone."""

    def __init__(self) -> None:
        self.type: Any = None
        self.conditional = SimpleNamespace(handle=None, type=None, size=0, ctx=None, phGraph_out=[])


class _Failed(Exception):
    def __init__(self, name: str) -> None:
        self.code = CUresult[f"CUDA_ERROR_{name}"]


class _Block:
    def __init__(self, start: int, nbytes: int) -> None:
        self.start = start
        self.nbytes = nbytes
        # (start, end, stream, tick, whether it was a write)
        self.accesses: list[tuple[int, int, int, int, bool]] = []


class Heap:
    """Device memory: tensors at 256-byte aligned addresses, none of which is ever given out twice."""

    def __init__(self) -> None:
        self._arena = mmap.mmap(-1, _ARENA)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._arena))
        self._next = -self._base % ALIGNMENT
        self.blocks: dict[int, _Block] = {}
        self.refuse_after: int | None = None
        """After how many more allocations memory has run out."""
        self.pool: Pool | None = None
        """Where memory comes from now, which keeps it."""

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32, offset: int = 0, **_: Any) -> Tensor:
        """An uninitialised tensor, ``offset`` bytes behind an aligned address."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return self._strided(torch.empty(sizes, dtype=dtype, device="meta"), offset)

    def zeros(self, *shape: Any, **options: Any) -> Tensor:
        return self.empty(*shape, **options).zero_()

    def empty_like(self, tensor: Tensor, **options: Any) -> Tensor:
        options.pop("device", None)
        return self._strided(torch.empty_like(tensor, device="meta", **options), 0)

    def empty_strided(self, size: Any, stride: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        return self._strided(torch.empty_strided(size, stride, dtype=dtype, device="meta"), 0)

    def clone(self, tensor: Tensor, *, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        return self.empty_like(tensor, memory_format=memory_format).copy_(tensor)

    def tensor(self, values: Any, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        source = torch.as_tensor(values, dtype=dtype)
        return self.empty(source.shape, dtype=dtype, offset=offset).copy_(source)

    def _strided(self, meta: Tensor, offset: int) -> Tensor:
        nbytes = meta.untyped_storage().nbytes()
        if self.refuse_after is not None:
            if self.refuse_after <= 0:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            self.refuse_after -= 1
        if nbytes == 0:
            return torch.empty_like(meta, device="cpu")
        place = self._next + offset
        self._next += -(-(nbytes + offset + 1) // ALIGNMENT) * ALIGNMENT
        memory = (ctypes.c_char * nbytes).from_buffer(self._arena, place)
        start = self._base + place
        self.blocks[start] = _Block(start, nbytes)
        if self.pool is not None:
            self.pool.kept.append(memory)
        weakref.finalize(memory, self.blocks.pop, start).atexit = False
        return torch.frombuffer(memory, dtype=meta.dtype).as_strided(meta.shape, meta.stride())

    def find(self, start: int, nbytes: int) -> _Block | None:
        """The living block that an access lies in as a whole."""
        for block in list(self.blocks.values()):
            if block.start <= start and start + nbytes <= block.start + block.nbytes:
                return block
        return None

    def is_mine(self, address: int) -> bool:
        return self._base <= address < self._base + _ARENA


class _Capture:
    def __init__(self, origin: int, mode: CUstreamCaptureMode) -> None:
        self.origin = origin
        self.mode = mode
        self.thread = threading.get_ident()
        self.nodes: list[_Node] = []
        self.streams = {origin}
        self.joined = {origin}
        self.valid = True


class _Stream:
    def __init__(self, handle: int, blocking: bool) -> None:
        self.handle = handle
        self.blocking = blocking
        self.clock: dict[int, int] = {}
        self.known: dict[int, int] = {}
        self.capture: _Capture | None = None


class _Event:
    def __init__(self) -> None:
        self.clock: dict[int, int] | None = None
        self.capture: _Capture | None = None
        self.stream = -1


class _Function:
    def __init__(self, sizes: Sequence[int], body: Callable[..., None]) -> None:
        self.sizes = tuple(sizes)
        self.body = body


class _Node:
    """A node of a graph; its parameters' memory belongs to it, and nobody else may write there."""

    def __init__(self, kind: CUgraphNodeType, params: Any, arguments: Sequence[bytes] = (), packed: bool = False):
        self.kind = kind
        self.params = params
        self.packed = packed
        self.original = [bytes(each) for each in arguments]
        self._memory = [ctypes.create_string_buffer(each, max(len(each), 1)) for each in arguments]
        self._array = (ctypes.c_void_p * max(len(arguments), 1))(*map(ctypes.addressof, self._memory))
        if kind == CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
            params.kernelParams = 0 if packed else ctypes.addressof(self._array)
        self.children: list[_Node] = []
        self.programmatic = False
        self.body: tuple[int, _Graph, int] | None = None
        """Of a conditional node: its body by handle, which is filled later, and its condition."""

    @property
    def arguments(self) -> list[bytes]:
        return [memory.raw[: len(each)] for memory, each in zip(self._memory, self.original, strict=True)]

    def copy(self) -> _Node:
        made = _Node(self.kind, self.params.copy(), self.original, self.packed)
        made.body = self.body
        made.children = [child.copy() for child in (self.children if self.body is None else self.body[1].nodes)]
        return made

    def forget(self) -> None:
        """What the driver frees may hold anything."""
        if self.arguments != self.original:
            raise Violation("the memory of a node's parameters was written")
        for memory in self._memory:
            ctypes.memset(memory, 0xDD, len(memory))
        ctypes.memset(self._array, 0, ctypes.sizeof(self._array))


class _Graph:
    def __init__(self, nodes: Sequence[_Node]) -> None:
        self.nodes = list(nodes)
        self.handles: list[int] = []
        self.edges: list[tuple[int, int, Kind]] = []


class _Executable:
    def __init__(self, graph: int, nodes: dict[int, _Node]) -> None:
        self.graph = graph
        self.nodes = nodes
        self.last: tuple[int, int] | None = None


class Memory:
    """What a kernel sees of memory: every access is checked."""

    def __init__(self, driver: Driver, stream: _Stream) -> None:
        self._driver = driver
        self._stream = stream

    def read(self, address: int, nbytes: int) -> bytes:
        self._driver.access(self._stream, address, nbytes, writes=False)
        return ctypes.string_at(address, nbytes)

    def write(self, address: int, data: bytes) -> None:
        self._driver.access(self._stream, address, len(data), writes=True)
        ctypes.memmove(address, data, len(data))

    def load(self, address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        data = bytearray(self.read(address, count * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)

    def store(self, address: int, tensor: Tensor) -> None:
        if tensor.numel():
            dense = tensor.contiguous()
            self.write(address, ctypes.string_at(dense.data_ptr(), dense.numel() * dense.element_size()))


def _api(results: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A driver function: logged, refused when the context is lost or a fault was asked for, answered with a tuple."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__

        @functools.wraps(function)
        def called(self: Driver, *args: Any) -> tuple[Any, ...]:
            inspect.signature(function).bind(self, *args)
            with self.lock:
                self.calls.append(name)
                try:
                    if self.lost is not None:
                        raise _Failed(self.lost)
                    self._inject(name)
                    made = function(self, *args)
                except _Failed as failed:
                    return (failed.code, *[None] * results)
            return (CUresult.CUDA_SUCCESS, *(() if results == 0 else (made,) if results == 1 else made))

        return called

    return decorate


_handles = itertools.count(0x1010, 0x10)
"""Of all drivers together: what an earlier test left to the garbage collector must not be taken for what a later one
made."""


class Driver:
    """The functions of ``cuda.bindings.driver``; every object that was made is accounted for."""

    CUresult = CUresult
    CUstreamCaptureStatus = CUstreamCaptureStatus
    CUstreamCaptureMode = CUstreamCaptureMode
    CUstream_flags = CUstream_flags
    CUevent_flags = CUevent_flags
    CUgraphNodeType = CUgraphNodeType
    CUgraphInstantiate_flags = CUgraphInstantiate_flags
    CUgraphDebugDot_flags = CUgraphDebugDot_flags
    CUmemorytype = CUmemorytype
    CUgraphDependencyType = CUgraphDependencyType
    CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER = 2
    CUgraphEdgeData = CUgraphEdgeData
    CUgraphConditionalNodeType = CUgraphConditionalNodeType
    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUgraphNodeParams = CUgraphNodeParams
    CUstream = CUstream
    CUevent = CUevent
    CUgraph = CUgraph
    CUgraphExec = CUgraphExec
    CUgraphNode = CUgraphNode
    CUfunction = CUfunction
    CUkernel = CUkernel
    CUcontext = CUcontext
    CUdeviceptr = CUdeviceptr
    CUDA_MEMCPY3D = CUDA_MEMCPY3D
    CUDA_KERNEL_NODE_PARAMS = CUDA_KERNEL_NODE_PARAMS
    CUDA_MEMSET_NODE_PARAMS = CUDA_MEMSET_NODE_PARAMS
    CUDA_GRAPH_INSTANTIATE_PARAMS = CUDA_GRAPH_INSTANTIATE_PARAMS

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.heap = Heap()
        self.calls: list[str] = []
        self.lost: str | None = None
        self.foreign = False
        """Whether memory outside of the heap (of torch's own, on the CPU) counts as device memory."""
        self.streams = {0: _Stream(0, blocking=True)}
        self.events: dict[int, _Event] = {}
        self.strangers: set[int] = set()
        """Threads that have not used CUDA yet: the legacy stream is none of theirs."""
        self._pushed: Counter[int] = Counter()
        self.busy: set[int] = set()
        """Streams whose work goes on and on, for whoever asks without waiting."""
        self.graphs: dict[int, _Graph] = {}
        self.executables: dict[int, _Executable] = {}
        self.conditions: dict[int, tuple[int, int]] = {}
        """Handles of conditions: their values, and those at the start of a launch."""
        self._nodes: dict[int, tuple[int, _Node]] = {}
        self._functions: dict[int, _Function] = {}
        self._context = CUcontext(0x77)
        self._faults: dict[str, list[str | None]] = {}

    # ---- for tests

    def fail(self, name: str, code: str = "UNKNOWN", *, after: int = 0) -> None:
        """Let a function fail once, without effect, after ``after`` further calls that do not."""
        self._faults[name] = [None] * after + [code]

    def kernel(self, sizes: Sequence[int], body: Callable[..., None]) -> int:
        """A kernel with arguments of these sizes in bytes, which ``body(memory, *arguments)`` runs."""
        handle = self._new()
        self._functions[handle] = _Function(sizes, body)
        return handle

    def launch(
        self,
        function: int,
        arguments: Sequence[bytes],
        stream: int,
        *,
        grid: Sequence[int] = (1, 1, 1),
        block: Sequence[int] = (32, 1, 1),
        shared: int = 0,
        packed: bool = False,
        by_kern: bool = False,
        programmatic: bool = False,
    ) -> None:
        """``cuLaunchKernelEx``.

        Args:
            packed: Hand the arguments over as one buffer.
            by_kern: Name a kernel of a library rather than a function.
            programmatic: Start before the work that comes before has ended.
        """
        known = self._functions[function]
        if [len(each) for each in arguments] != list(known.sizes):
            raise Violation(f"arguments of {[len(each) for each in arguments]} bytes, expected {known.sizes}")
        params = CUDA_KERNEL_NODE_PARAMS()
        params.kern, params.func = (function, 0) if by_kern else (0, function)
        params.gridDimX, params.gridDimY, params.gridDimZ = grid
        params.blockDimX, params.blockDimY, params.blockDimZ = block
        params.sharedMemBytes = shared
        node = _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL, params, arguments, packed)
        node.programmatic = programmatic
        self._enqueue(stream, node)

    def memset(self, tensor: Tensor, value: int, stream: int, nbytes: int | None = None) -> None:
        """``cuMemsetD8Async``."""
        params = CUDA_MEMSET_NODE_PARAMS()
        params.dst, params.value, params.elementSize, params.height = tensor.data_ptr(), value, 1, 1
        params.width = tensor.numel() * tensor.element_size() if nbytes is None else nbytes
        self._enqueue(stream, _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET, params))

    def copy(self, params: CUDA_MEMCPY3D, stream: int) -> None:
        """``cuMemcpy3DAsync``."""
        self._enqueue(stream, _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY, params.copy()))

    def empty_node(self, stream: int) -> None:
        self._enqueue(stream, _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_EMPTY, CUDA_MEMSET_NODE_PARAMS()))

    def invalidate(self, stream: int) -> None:
        """As any call that is not allowed during a capture does."""
        capture = self.streams[stream].capture
        assert capture is not None
        capture.valid = False

    def capturing(self) -> list[int]:
        """Streams that are in a capture."""
        return [handle for handle, stream in self.streams.items() if stream.capture is not None]

    def leaked(self) -> dict[str, int]:
        """What was made and not destroyed, streams aside."""
        made = {"graphs": self.graphs, "executables": self.executables, "events": self.events}
        return {name: len(items) for name, items in made.items() if items}

    def ordered(self, before: int, after: int) -> bool:
        """Whether all that is on stream ``before`` happens before what comes next on stream ``after``."""
        return self.streams[after].clock.get(before, 0) >= self.streams[before].clock.get(before, 0)

    def synchronize(self, device: Any = None) -> None:
        """``torch.cuda.synchronize``."""
        for stream in self.streams.values():
            self._wait(stream)

    def forgive(self) -> None:
        """Forget planned faults and lost contexts, so that what is left can be taken down."""
        self._faults.clear()
        self.lost = None

    # ---- the driver

    @_api(1)
    def cuCtxGetCurrent(self) -> Any:
        thread = threading.get_ident()
        return CUcontext(0) if thread in self.strangers and not self._pushed[thread] else self._context

    @_api(0)
    def cuCtxPushCurrent(self, ctx: Any) -> None:
        if ctx != self._context:
            raise _Failed("INVALID_VALUE")
        self._pushed[threading.get_ident()] += 1

    @_api(1)
    def cuCtxPopCurrent(self) -> Any:
        if not self._pushed[threading.get_ident()]:
            raise _Failed("INVALID_CONTEXT")
        self._pushed[threading.get_ident()] -= 1
        return self._context

    @_api(1)
    def cuDeviceGet(self, ordinal: int) -> Any:
        return ordinal

    @_api(1)
    def cuDeviceTotalMem(self, dev: Any) -> Any:
        return 2**36

    @_api(1)
    def cuDevicePrimaryCtxRetain(self, dev: Any) -> Any:
        return self._context

    @_api(1)
    def cuStreamCreate(self, Flags: int) -> Any:
        handle = self._new()
        self.streams[handle] = _Stream(handle, blocking=Flags == CUstream_flags.CU_STREAM_DEFAULT)
        return CUstream(handle)

    @_api(0)
    def cuStreamSynchronize(self, hStream: Any) -> None:
        self._wait(self._stream(hStream))

    @_api(0)
    def cuStreamQuery(self, hStream: Any) -> None:
        stream = self._stream(hStream)
        # What a stream waits for keeps it as busy as what it runs itself.
        if stream.capture is None and self.busy.intersection((stream.handle, *stream.clock)):
            raise _Failed("NOT_READY")
        self._wait(stream)

    @_api(1)
    def cuStreamIsCapturing(self, hStream: Any) -> Any:
        stream = self._stream(hStream)
        if stream.handle == 0 and any(other.blocking and other.capture for other in self.streams.values()):
            raise _Failed("STREAM_CAPTURE_IMPLICIT")
        if stream.capture is None:
            return CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        if stream.capture.valid:
            return CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
        return CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_INVALIDATED

    @_api(0)
    def cuStreamBeginCapture(self, hStream: Any, mode: Any) -> None:
        stream = self._stream(hStream)
        if stream.handle == 0:
            raise _Failed("STREAM_CAPTURE_UNSUPPORTED")
        if stream.capture is not None:
            raise _Failed("ILLEGAL_STATE")
        stream.capture = _Capture(stream.handle, CUstreamCaptureMode(mode))

    @_api(1)
    def cuStreamEndCapture(self, hStream: Any) -> Any:
        stream = self._stream(hStream)
        capture = stream.capture
        if capture is None:
            raise _Failed("ILLEGAL_STATE")
        relaxed = capture.mode == CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        if not relaxed and capture.thread != threading.get_ident():
            raise _Failed("STREAM_CAPTURE_WRONG_THREAD")
        if capture.origin != stream.handle:
            raise Violation("a capture must be ended on the stream where it began")
        for handle in capture.streams:
            self.streams[handle].capture = None
        if not capture.valid:
            raise _Failed("STREAM_CAPTURE_INVALIDATED")
        if capture.joined != capture.streams:
            raise _Failed("STREAM_CAPTURE_UNJOINED")
        return self._keep_graph(capture.nodes)

    @_api(1)
    def cuEventCreate(self, Flags: int) -> Any:
        CUevent_flags(Flags)
        handle = self._new()
        self.events[handle] = _Event()
        return CUevent(handle)

    @_api(0)
    def cuEventDestroy(self, hEvent: Any) -> None:
        self._take(self.events, hEvent, CUevent)

    @_api(0)
    def cuEventRecord(self, hEvent: Any, hStream: Any) -> None:
        event, stream = self._get(self.events, hEvent, CUevent), self._stream(hStream)
        event.stream, event.capture = stream.handle, stream.capture
        event.clock = dict(self._tick(stream)) if stream.capture is None else {}

    @_api(0)
    def cuEventQuery(self, hEvent: Any) -> None:
        event = self._get(self.events, hEvent, CUevent)
        if event.clock is None:
            raise Violation("asking for an event that was never recorded tells nothing")
        captures = [stream.capture for stream in self.streams.values() if stream.capture is not None]
        if any(capture.thread == threading.get_ident() for capture in captures):
            raise _Failed("STREAM_CAPTURE_UNSUPPORTED")
        if event.stream in self.busy:
            raise _Failed("NOT_READY")
        for other, tick in event.clock.items():
            known = self.streams[other].known
            known[other] = max(known.get(other, 0), tick)

    @_api(0)
    def cuStreamWaitEvent(self, hStream: Any, hEvent: Any, Flags: int) -> None:
        event, stream = self._get(self.events, hEvent, CUevent), self._stream(hStream)
        if event.clock is None:
            raise Violation("waiting for an event that was never recorded orders nothing")
        if event.capture is not None:
            if stream.capture not in (None, event.capture):
                raise Violation("two captures were merged")
            if stream.capture is None:
                stream.capture = event.capture
                event.capture.streams.add(stream.handle)
            elif stream.handle == event.capture.origin:
                event.capture.joined.add(event.stream)
        elif stream.capture is not None:
            stream.capture.valid = False
            raise _Failed("STREAM_CAPTURE_ISOLATION")
        else:
            for other, tick in event.clock.items():
                stream.clock[other] = max(stream.clock.get(other, 0), tick)

    @_api(0)
    def cuMemcpyDtoDAsync(self, dstDevice: Any, srcDevice: Any, ByteCount: int, hStream: Any) -> None:
        if ByteCount == 0:
            raise Violation("a copy of nothing cannot be a node that is pointed elsewhere")
        params = CUDA_MEMCPY3D()
        params.srcMemoryType = params.dstMemoryType = CUmemorytype.CU_MEMORYTYPE_DEVICE
        params.srcDevice, params.dstDevice = srcDevice, dstDevice
        params.WidthInBytes, params.Height, params.Depth = ByteCount, 1, 1
        self._enqueue(int(hStream), _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY, params))

    @_api(2)
    def cuGraphGetNodes(self, hGraph: Any, numNodes: int) -> Any:
        graph = self._get(self.graphs, hGraph, CUgraph)
        handles = [CUgraphNode(handle) for handle in graph.handles]
        return ([], len(handles)) if numNodes == 0 else (handles[:numNodes], min(numNodes, len(handles)))

    @_api(0)
    def cuGraphDebugDotPrint(self, hGraph: Any, path: bytes, flags: int) -> None:
        graph = self._get(self.graphs, hGraph, CUgraph)
        nodes = "".join(f'"graph_0_node_{index}"[label="KERNEL"];\n' for index, _ in enumerate(graph.handles))
        Path(os.fsdecode(path)).write_text(f"digraph dot {{\n{nodes}}}\n")

    @_api(4)
    def cuGraphGetEdges(self, hGraph: Any, numEdges: int) -> Any:
        edges = self._get(self.graphs, hGraph, CUgraph).edges
        if numEdges == 0:
            return [], [], [], len(edges)
        data = []
        for _, _, (kind, port) in edges[:numEdges]:
            data.append(CUgraphEdgeData())
            data[-1].type, data[-1].from_port = kind, port
        starts, ends, _ = zip(*edges[:numEdges], strict=True)
        return list(map(CUgraphNode, starts)), list(map(CUgraphNode, ends)), data, len(data)

    @_api(0)
    def cuGraphRemoveDependencies(self, hGraph: Any, from_: Any, to: Any, edgeData: Any, numDependencies: int) -> None:
        edges = self._get(self.graphs, hGraph, CUgraph).edges
        for edge in self._edges(from_, to, edgeData, numDependencies):
            if edge not in edges:
                raise _Failed("INVALID_VALUE")
            edges.remove(edge)

    @_api(0)
    def cuGraphAddDependencies(self, hGraph: Any, from_: Any, to: Any, edgeData: Any, numDependencies: int) -> None:
        edges = self._get(self.graphs, hGraph, CUgraph).edges
        for edge in self._edges(from_, to, edgeData, numDependencies):
            if any(edge[:2] == other[:2] for other in edges):
                raise _Failed("INVALID_VALUE")
            edges.append(edge)

    @_api(1)
    def cuGraphNodeGetType(self, hNode: Any) -> Any:
        return self._node(hNode).kind

    @_api(1)
    def cuGraphKernelNodeGetParams(self, hNode: Any) -> Any:
        return self._node(hNode, CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL).params.copy()

    @_api(1)
    def cuGraphMemcpyNodeGetParams(self, hNode: Any) -> Any:
        return self._node(hNode, CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY).params.copy()

    @_api(1)
    def cuGraphMemsetNodeGetParams(self, hNode: Any) -> Any:
        return self._node(hNode, CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET).params.copy()

    @_api(2)
    def cuFuncGetParamInfo(self, func: Any, paramIndex: int) -> Any:
        if not isinstance(func, CUfunction):
            raise TypeError(f"expected a CUfunction, got {func!r}")
        return self._argument(int(func), paramIndex)

    @_api(2)
    def cuKernelGetParamInfo(self, kernel: Any, paramIndex: int) -> Any:
        if not isinstance(kernel, CUkernel):
            raise TypeError(f"expected a CUkernel, got {kernel!r}")
        return self._argument(int(kernel), paramIndex)

    @_api(1)
    def cuGraphInstantiateWithParams(self, hGraph: Any, instantiateParams: Any) -> Any:
        graph = self._get(self.graphs, hGraph, CUgraph)
        if int(instantiateParams.flags) & CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD:
            self._stream(instantiateParams.hUploadStream)
        handle = self._new()
        nodes = {node: self._nodes[node][1].copy() for node in graph.handles}
        self.executables[handle] = _Executable(int(hGraph), nodes)
        return CUgraphExec(handle)

    @_api(0)
    def cuGraphDestroy(self, hGraph: Any) -> None:
        graph = self._take(self.graphs, hGraph, CUgraph)
        for handle in graph.handles:
            _, node = self._nodes.pop(handle)
            node.forget()
            if node.body is not None:
                self.cuGraphDestroy(CUgraph(node.body[0]))

    @_api(1)
    def cuGraphCreate(self, flags: int) -> Any:
        return self._keep_graph([])

    @_api(1)
    def cuGraphAddMemsetNode(
        self, hGraph: Any, dependencies: Any, numDependencies: int, memsetParams: Any, ctx: Any
    ) -> Any:
        return self._add(
            hGraph, dependencies, numDependencies, _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET, memsetParams.copy())
        )

    @_api(1)
    def cuGraphAddKernelNode(self, hGraph: Any, dependencies: Any, numDependencies: int, nodeParams: Any) -> Any:
        return self._add(hGraph, dependencies, numDependencies, self._kernel_node(nodeParams))

    @_api(1)
    def cuGraphAddChildGraphNode(self, hGraph: Any, dependencies: Any, numDependencies: int, childGraph: Any) -> Any:
        node = _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_GRAPH, CUDA_MEMSET_NODE_PARAMS())
        node.children = [each.copy() for each in self._get(self.graphs, childGraph, CUgraph).nodes]
        return self._add(hGraph, dependencies, numDependencies, node)

    @_api(1)
    def cuGraphConditionalHandleCreate(self, hGraph: Any, ctx: Any, defaultLaunchValue: int, flags: int) -> Any:
        self._get(self.graphs, hGraph, CUgraph)
        if flags != self.CU_GRAPH_COND_ASSIGN_DEFAULT:
            raise Violation("the condition has no value at the start")
        handle = self._new()
        self.conditions[handle] = 0, defaultLaunchValue
        return handle

    @_api(1)
    def cuGraphAddNode(
        self, hGraph: Any, dependencies: Any, dependencyData: Any, numDependencies: int, nodeParams: Any
    ) -> Any:
        given = nodeParams.conditional
        if nodeParams.type != CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL or given.size != 1:
            raise _Failed("INVALID_VALUE")
        if given.type != CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE or given.ctx != self._context:
            raise _Failed("INVALID_VALUE")
        node = _Node(nodeParams.type, CUDA_MEMSET_NODE_PARAMS())
        body = self._keep_graph([])
        node.body = int(body), self.graphs[int(body)], given.handle
        given.phGraph_out = [body]
        return self._add(hGraph, dependencies, numDependencies, node)

    @_api(0)
    def cuGraphKernelNodeSetParams(self, hNode: Any, nodeParams: Any) -> None:
        self._replace(hNode, self._kernel(self._node(hNode, CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL), nodeParams))

    @_api(0)
    def cuGraphMemcpyNodeSetParams(self, hNode: Any, nodeParams: Any) -> None:
        self._node(hNode, CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY)
        self._replace(hNode, _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY, nodeParams.copy()))

    @_api(0)
    def cuGraphExecDestroy(self, hGraphExec: Any) -> None:
        executable = self._take(self.executables, hGraphExec, CUgraphExec)
        if executable.last is not None:
            stream, tick = executable.last
            if self.streams[stream].known.get(stream, 0) < tick:
                # The driver itself would wait; whoever frees the memory next to it would not.
                raise Violation("an executable was destroyed before its last launch was waited for")

    @_api(0)
    def cuGraphExecKernelNodeSetParams(self, hGraphExec: Any, hNode: Any, nodeParams: Any) -> None:
        executable, node = self._patched(hGraphExec, hNode, CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL)
        executable.nodes[int(hNode)] = self._kernel(node, nodeParams)

    @_api(0)
    def cuGraphExecMemcpyNodeSetParams(self, hGraphExec: Any, hNode: Any, copyParams: Any, ctx: Any) -> None:
        executable, node = self._patched(hGraphExec, hNode, CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY)
        if ctx != self._context:
            raise _Failed("INVALID_VALUE")
        for params in (node.params, copyParams):
            if params.Height != 1 or params.Depth != 1 or params.WidthInBytes == 0:
                raise _Failed("INVALID_VALUE")
        for field in ("srcMemoryType", "dstMemoryType"):
            if getattr(node.params, field) != getattr(copyParams, field):
                raise _Failed("INVALID_VALUE")
        executable.nodes[int(hNode)] = _Node(node.kind, copyParams.copy())

    @_api(0)
    def cuGraphLaunch(self, hGraphExec: Any, hStream: Any) -> None:
        executable = self._get(self.executables, hGraphExec, CUgraphExec)
        stream = self._stream(hStream)
        if stream.capture is not None:
            node = _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_GRAPH, CUDA_MEMSET_NODE_PARAMS())
            node.children = [each.copy() for each in executable.nodes.values()]
            self._enqueue(stream.handle, node)
            return
        self._tick(stream)
        for each in executable.nodes.values():
            self._run(each, stream)
        executable.last = (stream.handle, stream.clock[stream.handle])

    # ---- inside

    def access(self, stream: _Stream, start: int, nbytes: int, *, writes: bool) -> None:
        """Check one access of memory: that it is there, and ordered after all that it must not overlap."""
        block = self.heap.find(start, nbytes)
        if block is None:
            if self.foreign and start and not self.heap.is_mine(start):
                return
            self.lost = "ILLEGAL_ADDRESS"
            raise _Failed(self.lost)
        end, now = start + nbytes, stream.clock.get(stream.handle, 0)
        kept = []
        for access in block.accesses:
            first, last, other, tick, wrote = access
            before = stream.clock.get(other, 0) >= tick
            if first < end and start < last and (writes or wrote) and not before:
                raise Violation(f"streams {other:#x} and {stream.handle:#x} race for memory at {start:#x}")
            if not (before and writes and start <= first and last <= end):
                kept.append(access)
        entry = (start, end, stream.handle, now, writes)
        block.accesses = kept if entry in kept else [*kept, entry]

    def _new(self) -> int:
        return next(_handles)

    def _inject(self, name: str) -> None:
        planned = self._faults.get(name)
        if planned and (code := planned.pop(0)) is not None:
            raise _Failed(code)

    def _get(self, made: dict[int, Any], handle: Any, kind: type[_Handle]) -> Any:
        if not isinstance(handle, (kind, int)) or isinstance(handle, bool):
            raise TypeError(f"expected a {kind.__name__}, got {handle!r}")
        if int(handle) not in made:
            raise Violation(f"{kind.__name__} {int(handle):#x} was destroyed, or never made")
        return made[int(handle)]

    def _take(self, made: dict[int, Any], handle: Any, kind: type[_Handle]) -> Any:
        found = self._get(made, handle, kind)
        del made[int(handle)]
        return found

    def _stream(self, handle: Any) -> _Stream:
        found: _Stream = self._get(self.streams, handle, CUstream)
        thread = threading.get_ident()
        if found.handle == 0 and thread in self.strangers and not self._pushed[thread]:
            raise _Failed("INVALID_CONTEXT")
        return found

    def _node(self, handle: Any, kind: CUgraphNodeType | None = None) -> _Node:
        _, node = self._get(self._nodes, handle, CUgraphNode)
        if kind is not None and node.kind != kind:
            raise _Failed("INVALID_VALUE")
        return node  # type: ignore[no-any-return]

    def _patched(self, executable: Any, handle: Any, kind: CUgraphNodeType) -> tuple[_Executable, _Node]:
        found: _Executable = self._get(self.executables, executable, CUgraphExec)
        graph, _ = self._get(self._nodes, handle, CUgraphNode)
        if graph != found.graph or found.nodes[int(handle)].kind != kind:
            raise _Failed("INVALID_VALUE")
        return found, found.nodes[int(handle)]

    def _wait(self, stream: _Stream) -> None:
        if stream.capture is not None:
            stream.capture.valid = False
            raise _Failed("STREAM_CAPTURE_UNSUPPORTED")
        for other, tick in stream.clock.items():
            known = self.streams[other].known
            known[other] = max(known.get(other, 0), tick)

    def _replace(self, handle: Any, node: _Node) -> None:
        graph, before = self._nodes[int(handle)]
        node.programmatic = before.programmatic
        nodes = self.graphs[graph].nodes
        nodes[nodes.index(before)] = node
        self._nodes[int(handle)] = graph, node
        before.forget()

    def _kernel(self, node: _Node, nodeParams: Any) -> _Node:
        if self._function(nodeParams) is not self._function(node.params):
            raise _Failed("INVALID_VALUE")
        return self._kernel_node(nodeParams)

    def _kernel_node(self, nodeParams: Any) -> _Node:
        known = self._function(nodeParams)
        if not _readable(nodeParams.kernelParams, 8 * len(known.sizes)):
            raise Violation("the array of arguments is no memory")
        addresses = (ctypes.c_void_p * max(len(known.sizes), 1)).from_address(nodeParams.kernelParams)
        if not all(map(_readable, addresses, known.sizes)):
            raise Violation("the array of arguments is shorter than the kernel's list of them")
        copied = [ctypes.string_at(address or 0, size) for address, size in zip(addresses, known.sizes, strict=False)]
        return _Node(CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL, nodeParams.copy(), copied)

    def _add(self, graph: Any, dependencies: Any, count: int, node: _Node) -> CUgraphNode:
        """Add a node to a graph whose nodes follow one another."""
        found: _Graph = self._get(self.graphs, graph, CUgraph)
        if len(dependencies) != count or list(map(int, dependencies)) != found.handles[-1:]:
            raise Violation("a node that does not follow the last one would run beside it")
        found.nodes.append(node)
        found.handles.append(self._new())
        self._nodes[found.handles[-1]] = int(graph), node
        return CUgraphNode(found.handles[-1])

    def _edges(self, starts: Any, ends: Any, data: Any, count: int) -> list[tuple[int, int, Kind]]:
        if not len(starts) == len(ends) == count or (data is not None and len(data) != count):
            raise ValueError("lists of another length than said")
        kinds = [(each.type, each.from_port) for each in data] if data is not None else [(0, 0)] * count
        for start, end, (kind, port) in zip(starts, ends, kinds, strict=True):
            nodes = self._node(start), self._node(end)
            if kind == CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC:
                if any(node.kind != CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL for node in nodes) or not port:
                    raise _Failed("INVALID_VALUE")
            elif port:
                raise _Failed("INVALID_VALUE")
        return [(int(a), int(b), kind) for a, b, kind in zip(starts, ends, kinds, strict=True)]

    def _function(self, params: Any) -> _Function:
        return self._functions[int(params.func) or int(params.kern)]

    def _argument(self, function: int, index: int) -> tuple[int, int]:
        sizes = self._functions[function].sizes
        if not 0 <= index < len(sizes):
            raise _Failed("INVALID_VALUE")
        return sum(-(-size // 8) * 8 for size in sizes[:index]), sizes[index]

    def _keep_graph(self, nodes: Sequence[_Node]) -> CUgraph:
        graph, handle = _Graph(nodes), self._new()
        for node in nodes:
            graph.handles.append(self._new())
            self._nodes[graph.handles[-1]] = (handle, node)
        for before, after, previous, node in zip(graph.handles, graph.handles[1:], nodes, nodes[1:], strict=False):
            # A kernel that is launched programmatically waits for anything but a kernel all the same.
            early = node.programmatic and previous.kind == CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
            graph.edges.append((before, after, (int(early), int(early))))
        self.graphs[handle] = graph
        return CUgraph(handle)

    def _tick(self, stream: _Stream) -> dict[int, int]:
        # The legacy stream waits for all blocking streams, and they for it.
        for other in self.streams.values():
            if other is not stream and stream.blocking and other.blocking and 0 in (stream.handle, other.handle):
                for handle, tick in other.clock.items():
                    stream.clock[handle] = max(stream.clock.get(handle, 0), tick)
        stream.clock[stream.handle] = stream.clock.get(stream.handle, 0) + 1
        return stream.clock

    def _enqueue(self, handle: int, node: _Node) -> None:
        stream = self._stream(handle)
        if stream.handle == 0 and any(each.blocking and each.capture for each in self.streams.values()):
            raise _Failed("STREAM_CAPTURE_IMPLICIT")
        if stream.capture is None:
            self._tick(stream)
            self._run(node, stream)
        elif stream.capture.valid:
            stream.capture.nodes.append(node)
            if stream.handle != stream.capture.origin:
                stream.capture.joined.discard(stream.handle)
        else:
            raise _Failed("STREAM_CAPTURE_INVALIDATED")

    def _run(self, node: _Node, stream: _Stream) -> None:
        kinds, memory, params = CUgraphNodeType, Memory(self, stream), node.params
        if node.kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            self._function(params).body(memory, *node.arguments)
        elif node.kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
            for row in range(params.Height):
                source = int(params.srcDevice) + row * params.srcPitch
                memory.write(int(params.dstDevice) + row * params.dstPitch, memory.read(source, params.WidthInBytes))
        elif node.kind == kinds.CU_GRAPH_NODE_TYPE_MEMSET:
            memory.write(int(params.dst), bytes([params.value]) * params.width * max(params.elementSize, 1))
        if node.body is not None:
            condition = node.body[2]
            self.conditions[condition] = (self.conditions[condition][1],) * 2
        while node.body is None or self.conditions[condition][0]:
            for child in node.children:
                self._run(child, stream)
            if node.body is None:
                break


def _readable(address: int | None, nbytes: int) -> bool:
    """Whether there is memory, without the crash if there is none: the kernel looks before it copies into a pipe."""
    if not nbytes or os.name != "posix":
        return True
    source, sink = os.pipe()
    try:
        return bool(ctypes.CDLL(None).write(sink, ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) == nbytes)
    finally:
        os.close(source)
        os.close(sink)


class Event:
    """``torch.cuda.Event``."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.handle: Any = None

    def record(self, stream: Stream) -> None:
        self.handle = self._driver.cuEventCreate(0)[1]
        self._driver.cuEventRecord(self.handle, stream.cuda_stream)

    def __del__(self) -> None:
        if self.handle is not None:
            self._driver.cuEventDestroy(self.handle)


class Stream:
    """Stands in for ``torch.cuda.Stream``."""

    def __init__(self, driver: Driver, handle: int) -> None:
        self._driver = driver
        self.cuda_stream = handle

    def wait_event(self, event: Event) -> None:
        self._driver.cuStreamWaitEvent(self.cuda_stream, event.handle, 0)

    def wait_stream(self, other: Stream) -> None:
        code, event = self._driver.cuEventCreate(0)
        if not code:
            code = (
                self._driver.cuEventRecord(event, other.cuda_stream)[0]
                or self._driver.cuStreamWaitEvent(self.cuda_stream, event, 0)[0]
            )
            self._driver.cuEventDestroy(event)
        if code:
            raise RuntimeError(f"CUDA error: {code.name}")

    def synchronize(self) -> None:
        code = self._driver.cuStreamSynchronize(self.cuda_stream)[0]
        if code:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({code.name})")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)


class Pool:
    """One private pool of the allocator: what was allocated in it stays for as long as somebody holds it."""

    def __init__(self) -> None:
        self.holders = 0
        self.kept: list[Any] = []


class Pools:
    """Stands in for the private pools of torch's allocator, and what may be done to them in which order.

    Args:
        heap: Where allocations happen.
    """

    def __init__(self, heap: Heap) -> None:
        self.heap = heap
        self.alive: dict[tuple[int, int], Pool] = {}
        self._numbers = itertools.count(1)
        self._outer: list[Pool | None] = []

    def handle(self) -> tuple[int, int]:
        """``torch.cuda.graph_pool_handle``."""
        return (0, next(self._numbers))

    def begin(self, index: int, number: tuple[int, int]) -> None:
        """``torch._C._cuda_beginAllocateCurrentThreadToPool``: makes the pool if there is none, and holds it."""
        pool = self.alive.setdefault(number, Pool())
        pool.holders += 1
        self._outer.append(self.heap.pool)
        self.heap.pool = pool

    def end(self, index: int, number: tuple[int, int]) -> None:
        """``torch._C._cuda_endAllocateToPool``."""
        if self.heap.pool is not self.alive.get(number):
            raise Violation("a pool is left that was not entered last")
        self.heap.pool = self._outer.pop()

    def release(self, index: int, number: tuple[int, int]) -> None:
        """``torch._C._cuda_releasePool``: nobody holds it any more means that its memory goes."""
        pool = self.alive.get(number)
        if pool is None:
            raise Violation("a pool is released once more than it was held")
        pool.holders -= 1
        if not pool.holders:
            del self.alive[number]

    def segments(self) -> list[dict[str, Any]]:
        """``torch.cuda.memory_snapshot``."""
        everybody = {"total_size": 1 << 20, "segment_pool_id": (0, 0)}
        return [everybody] + [
            {"total_size": ctypes.sizeof(memory), "segment_pool_id": number}
            for number, pool in self.alive.items()
            for memory in pool.kept
        ]


class Torch:
    """Stands in for the ``torch`` that a module of graphcache has imported: devices are the CPU, streams the driver's.

    Everything else is torch's own.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.current = threading.local()
        self.empty = driver.heap.empty
        self.zeros = driver.heap.zeros
        self.empty_like = driver.heap.empty_like
        self.empty_strided = driver.heap.empty_strided
        self.workspaces_cleared = 0
        self.pools = Pools(driver.heap)
        self._C = SimpleNamespace(
            _cuda_clearCublasWorkspaces=self._clear,
            _cuda_beginAllocateCurrentThreadToPool=self.pools.begin,
            _cuda_endAllocateToPool=self.pools.end,
            _cuda_releasePool=self.pools.release,
            _cuda_getCurrentRawStream=self.raw_stream,
            # Devices are the CPU, which has no index.
            _cuda_getDevice=lambda: None,
        )
        self.current_index = 0
        self.capability = (9, 0)
        self.cuda = SimpleNamespace(
            current_stream=lambda device=None: Stream(driver, self.raw_stream(0)),
            stream=self.on,
            synchronize=driver.synchronize,
            device=lambda index: nullcontext(),
            current_device=lambda: self.current_index,
            get_device_capability=lambda index: self.capability,
            device_count=lambda: 1,
            set_device=lambda index: setattr(self, "current_index", index),
            is_initialized=lambda: True,
            is_available=lambda: True,
            Event=lambda: Event(driver),
            ExternalStream=lambda handle, device: Stream(driver, handle),
            graph_pool_handle=self.pools.handle,
            memory_snapshot=self.pools.segments,
            OutOfMemoryError=torch.cuda.OutOfMemoryError,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> torch.device:
        return torch.device("cpu")

    def raw_stream(self, index: int) -> int:
        """The current stream of this thread."""
        return getattr(self.current, "stream", 0)

    def is_capturing(self) -> bool:
        """Whether the current stream of this thread is being captured."""
        return self.driver.streams[self.raw_stream(0)].capture is not None

    def new_stream(self) -> Stream:
        return Stream(self.driver, int(self.driver.cuStreamCreate(CUstream_flags.CU_STREAM_NON_BLOCKING)[1]))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """``torch.cuda.stream``."""
        before, self.current.stream = self.raw_stream(0), stream.cuda_stream
        try:
            yield
        finally:
            self.current.stream = before

    def _clear(self) -> None:
        self.workspaces_cleared += 1


@contextmanager
def installed(*others: Any, patch: pytest.MonkeyPatch | None = None) -> Iterator[Torch]:
    """Put the stand-ins where ``graphcache.graphs``, and any other modules, look for the driver and for torch.

    Graphs that are still there at the end are closed: the real driver would be asked to destroy them later.

    Args:
        others: Further modules.
        patch: What undoes it; if ``None``, it is undone at the end. A test that patches more hands its own in.
    """
    if patch is None:
        with pytest.MonkeyPatch.context() as own, installed(*others, patch=own) as fake:
            yield fake
        return
    fake, made = Torch(Driver()), []
    # Streams that earlier tests were given belong to another driver.
    own_stream, initialise = functools.cache(stream_order.own_stream.__wrapped__), cuda.CudaGraph.__init__

    orders: list[weakref.ref[stream_order.StreamOrder]] = []
    make_lane = stream_order.StreamOrder.__init__

    def remember_lane(self: stream_order.StreamOrder, index: int) -> None:
        make_lane(self, index)
        orders.append(weakref.ref(self))

    patch.setattr(stream_order.StreamOrder, "__init__", remember_lane)

    def remember(self: cuda.CudaGraph, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        made.append(weakref.ref(self))

    patch.setattr(room, "binding", lambda: fake.driver)
    patch.setattr(room, "primary_context", functools.cache(room.primary_context.__wrapped__))
    patch.setattr(cuda.CudaGraph, "__init__", remember)
    for module in (buffers, capture, cuda, stream_order, param_patching, *others):
        patch.setattr(module, "torch", fake)
        if hasattr(module, "own_stream"):
            patch.setattr(module, "own_stream", own_stream)
    # Memory that torch allocates on a device is aligned, whichever function asks for it.
    patch.setattr(torch.Tensor, "clone", lambda tensor, **options: fake.driver.heap.clone(tensor, **options))
    for module in (cuda, stream_order):
        patch.setattr(module, "raw_stream", fake.raw_stream)
    try:
        yield fake
    finally:
        fake.driver.forgive()
        for reference in made:
            if (graph := reference()) is not None:
                graph.close()
        for each in orders:
            if (left := each()) is not None:
                # Its event is of this driver, and a number to the next one.
                left._event = None
                left._releases.clear()


class Affine:
    """Work that can be captured: ``y = 3 x + 1`` for float32 vectors, by two kernels over scratch memory.

    Args:
        fake: Whose memory and streams are used.
        size: How many elements.
        order: Whose scratch memory is used.
    """

    def __init__(self, fake: Torch, size: int, owner: stream_order.StreamOrder) -> None:
        self.fake = fake
        self.order = owner
        self.scratch = owner.scratch(size * 4)
        self.x = fake.driver.heap.empty(size)
        self.y = fake.driver.heap.empty(size)
        self.size = size
        self.first = fake.driver.kernel([8, 8, 4], self._scale)
        self.second = fake.driver.kernel([8, 4, 8], self._add)
        self.accepts = True

    @staticmethod
    def _scale(memory: Memory, x: bytes, scratch: bytes, size: bytes) -> None:
        count = int.from_bytes(size, "little")
        memory.store(address(scratch), memory.load(address(x), (count,), torch.float32) * 3)

    @staticmethod
    def _add(memory: Memory, scratch: bytes, size: bytes, y: bytes) -> None:
        count = int.from_bytes(size, "little")
        memory.store(address(y), memory.load(address(scratch), (count,), torch.float32) + 1)

    def enqueue(self, stream: int, x: Tensor | None = None, y: Tensor | None = None) -> bool:
        """Enqueue it on a stream, from ``x`` into ``y``."""
        if not self.accepts:
            return False
        size, scratch = integer(self.size, 4), pointer(self.scratch)
        self.fake.driver.launch(self.first, [pointer(self.x if x is None else x), scratch, size], stream)
        self.fake.driver.launch(self.second, [scratch, size, pointer(self.y if y is None else y)], stream)
        return True

    def capture(self, x: Tensor | None = None, y: Tensor | None = None) -> Any:
        """A ``CUgraph`` of it."""
        return stream_order.capture_enqueue(lambda stream: self.enqueue(stream, x, y), self.order, "affine")

    def bound(self) -> cuda.CudaGraph:
        """A graph whose kernels are pointed at the caller's tensors."""
        others = [self.fake.empty_like(self.x), self.fake.empty_like(self.y)]
        graph, second = self.capture(), self.capture(*others)
        found = param_patching.find_pointers(graph, second, [self.x, self.y], others)
        room.call("cuGraphDestroy", second)
        return self._graph(
            graph, [cuda.IoSlot(self.x, found[0], ALIGNMENT)], [cuda.IoSlot(self.y, found[1], ALIGNMENT)]
        )

    def copying(self) -> cuda.CudaGraph:
        """A graph that begins and ends with nodes that copy."""
        graph, (source, target) = capture.capture_copying(
            lambda enqueue: stream_order.capture_enqueue(enqueue, self.order, "affine"),
            lambda stream: [self.y] if self.enqueue(stream) else None,
            [self.x],
            [True],
            [self.y],
            "affine",
            full_edges=False,
        )
        return self._graph(graph, [source], [target])

    def staged(self) -> cuda.CudaGraph:
        """A graph whose input and output are copied by operations of their own."""
        return self._graph(self.capture(), [cuda.IoSlot(self.x, [], 1)], [cuda.IoSlot(self.y, [], 1)])

    def _graph(self, graph: Any, inputs: list[cuda.IoSlot], outputs: list[cuda.IoSlot]) -> cuda.CudaGraph:
        return cuda.CudaGraph(
            graph,
            inputs=inputs,
            outputs=outputs,
            order=self.order,
            keep=self,
            release=lambda: None,
        )


def new_stream() -> Any:
    """A stream that does not wait for the legacy default stream."""
    return room.call("cuStreamCreate", CUstream_flags.CU_STREAM_NON_BLOCKING)


def begin_capture(stream: Any) -> None:
    """Start a capture as graphcache does."""
    room.call("cuStreamBeginCapture", stream, CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)


def order(event: Any, before: Any, after: Any) -> None:
    """Later work on stream ``after`` waits for earlier work on stream ``before``."""
    room.call("cuEventRecord", event, before)
    room.call("cuStreamWaitEvent", after, event, 0)


def node_count(graph: Any) -> int:
    """How many nodes a ``CUgraph`` has."""
    return int(room.call("cuGraphGetNodes", graph, 0)[1])


def instantiate(graph: Any, stream: Any) -> Any:
    """An executable graph."""
    params = room.binding().CUDA_GRAPH_INSTANTIATE_PARAMS()
    params.flags = int(CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD)
    params.hUploadStream = stream
    return room.call("cuGraphInstantiateWithParams", graph, params)


def copies(graph: cuda.CudaGraph) -> int:
    """How many inputs and outputs are copied by an operation of their own at every replay."""
    return sum(not slot.pointers for slot in (*graph.inputs, *graph.outputs))


def pointer(tensor: Tensor, offset: int = 0) -> bytes:
    """A kernel's argument: an address."""
    return (tensor.data_ptr() + offset).to_bytes(8, "little")


def integer(value: int, nbytes: int = 8) -> bytes:
    """A kernel's argument: a whole number."""
    return value.to_bytes(nbytes, "little", signed=value < 0)


def address(argument: bytes) -> int:
    """What a kernel finds in an argument."""
    return int.from_bytes(argument[:8], "little")
