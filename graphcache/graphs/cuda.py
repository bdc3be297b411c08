"""A CUDA graph: instantiated, pointed at tensors, launched and destroyed through the driver."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import ClosedError, CudaError, Reason, Refusal
from graphcache.graphs import driver
from graphcache.graphs.buffers import extent_of, is_plain_copy, nbytes_of, packed, poison, put
from graphcache.graphs.param_patching import Pointer
from graphcache.graphs.stream_order import StreamOrder, own_stream, raw_stream

ALIGNMENT = 256
"""Bytes that TensorRT documents for bindings, so that a kernel may rely on it. Torch allocates at 512."""

MAX_EXECUTABLES, SMALL = 8, 32
"""Of a graph up to so many nodes, in native code: see native/executables.h. A change of executables took 0.3 µs with 3
nodes, a patch 0.7 (H200) to 3.5 (H100); with 106 nodes a change took 10 µs (driver 580)."""

EXECUTABLE_BYTES, NODE_BYTES = 96 * 1024, 2 * 1024
"""Device memory of an executable and of each node, estimates: 80 to 128 KiB were seen with 3 nodes, 192 to 256 with 106
(H100, driver 580)."""

UNKNOWN = 2**64 - 1
"""No address: of a slot that was never patched, or whose patch the driver refused."""

_empty_strided: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


class IoSlot:
    """An input or output of a graph: its static buffer, and where its address stands in the graph.

    Without pointers it is copied by an operation of its own. ``alignment`` is what an address must be divisible by for
    the graph to be pointed there: 1 where a node of the graph copies.
    """

    __slots__ = ("buffer", "mask", "nbytes", "pointers")

    def __init__(self, buffer: Tensor, pointers: Sequence[Pointer], alignment: int) -> None:
        self.buffer = buffer
        self.pointers = tuple(pointers)
        self.mask = alignment - 1
        self.nbytes = extent_of(buffer)

    @property
    def address(self) -> int:
        """Of the static buffer; 0 if the graph cannot be pointed anywhere."""
        return self.buffer.data_ptr() if self.pointers else 0

    def fresh(self) -> Tensor:
        """A new tensor of the same shape, strides and dtype."""
        own = self.buffer
        return torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=own.device)

    @property
    def maker(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """For native code: what makes such a tensor, and its arguments. That of Inductor takes half the time."""
        if self.buffer.is_cuda and _empty_strided is not None:
            return _empty_strided, (tuple(self.buffer.shape), self.buffer.stride(), self.buffer.dtype)
        return self.fresh, ()


class CudaGraph:
    """An instantiated CUDA graph; see :class:`~graphcache.graphs.graph.Graph` for the contract.

    It owns ``captured``, a ``CUgraph``, and keeps whatever its kernels refer to. ``release`` is called once, after the
    last launch has finished or when the graph cannot be made. It is charged for ``pool_bytes`` of the order's memory.
    ``executable`` (``None`` once the graph is closed), ``pointed`` and ``native`` belong to the holder of the lock.
    """

    # Native code reads the executable at a fixed offset.
    __slots__ = ("__dict__", "__weakref__", "executable")

    def __init__(
        self,
        captured: Any,
        *,
        inputs: Sequence[IoSlot],
        outputs: Sequence[IoSlot],
        order: StreamOrder,
        keep: object,
        release: Callable[[], object],
        pool_bytes: int = 0,
    ) -> None:
        self.executable: Any = None
        with ExitStack() as undo:
            undo.callback(release)
            undo.callback(driver.call, "cuGraphDestroy", captured)
            # Kernels read and write all of this until the end.
            self._held = [inputs, outputs, keep]
            undo.callback(self._held.clear)
            _, self.nodes = driver.call("cuGraphGetNodes", captured, 0)
            if self.nodes == 0:
                raise Refusal(Reason.EMPTY_GRAPH)
            api = driver.binding()
            params = api.CUDA_GRAPH_INSTANTIATE_PARAMS()
            params.flags = int(api.CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD)
            params.hUploadStream = stream = own_stream(order.index, "capture").cuda_stream
            executable = driver.call("cuGraphInstantiateWithParams", captured, params)
            undo.callback(driver.call, "cuGraphExecDestroy", executable)
            driver.call("cuStreamSynchronize", stream)
            # Gives everything back, from the last to the first, each even if one raises.
            self._undo = undo.pop_all()
        self.executable = executable
        self.captured: Any = captured
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        slots = (*self.inputs, *self.outputs)
        # Where the executable points, for each slot; 0 for one without pointers. Native code keeps it right too.
        self.pointed = array("Q", [UNKNOWN if slot.pointers else 0 for slot in slots])
        self.max_executables = MAX_EXECUTABLES if self.nodes <= SMALL and any(slot.pointers for slot in slots) else 1
        self.native: Any = None
        self.order = order
        self.index = order.index
        self._pool_bytes = pool_bytes
        self._account()

    def _account(self) -> None:
        """Count the bytes of buffers, executables, the pool, and the outputs that lie ready for the next call."""
        buffers = nbytes_of([slot.buffer for slot in (*self.inputs, *self.outputs)])
        executables = self.max_executables * (EXECUTABLE_BYTES + self.nodes * NODE_BYTES)
        self.nbytes = buffers + sum(slot.nbytes for slot in self.outputs) + self._pool_bytes + executables

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        stream, order = raw_stream(self.index), self.order
        if not stream and not driver.is_current(self.index):
            # The legacy default stream here is another device's.
            with driver.on_device(self.index):
                return self.replay(inputs, out)
        with order.lock:
            if self.executable is None:
                raise ClosedError("the graph was closed; call the module again to capture a new one")
            if order.stream != stream:
                order.enter(stream)
            wanted = []
            for slot, tensor in zip(self.inputs, inputs, strict=True):
                address = tensor.data_ptr() if slot.pointers else 0
                if not address or address & slot.mask:
                    put(slot.buffer, tensor)
                    address = slot.address
                wanted.append(address)
            answer = [slot.fresh() for slot in self.outputs] if out is None else out
            for slot, tensor in zip(self.outputs, answer, strict=True):
                address = tensor.data_ptr() if slot.pointers else 0
                if slot.pointers and (address & slot.mask or not address):
                    raise CudaError(f"an output at {address:#x} is not aligned to {slot.mask + 1} bytes")
                wanted.append(address)
            self._point(wanted)
            driver.call("cuGraphLaunch", self.executable, stream)
            for slot, tensor in zip(self.outputs, answer, strict=True):
                if not slot.pointers:
                    put(packed(tensor), slot.buffer)
        return answer

    def accepts(self, out: Sequence[Tensor]) -> bool:
        return len(out) == len(self.outputs) and all(
            tensor.data_ptr() % ALIGNMENT == 0
            and tensor.numel() > 0
            and (tensor.shape, tensor.dtype, tensor.device)
            == (slot.buffer.shape, slot.buffer.dtype, slot.buffer.device)
            and is_plain_copy(tensor, slot.buffer)
            for tensor, slot in zip(out, self.outputs, strict=True)
        )

    def pin(self) -> tuple[list[Tensor], list[Tensor]]:
        with self.order.lock:
            if self.executable is None:
                raise ClosedError("the graph was closed; make a new session")
            self._point([slot.address for slot in (*self.inputs, *self.outputs)])
            return [slot.buffer for slot in self.inputs], [slot.buffer for slot in self.outputs]

    def as_pinned(self) -> Any:
        """The captured graph, to be put into another one, on the static inputs and outputs."""
        with self.order.lock:
            if self.executable is None:
                raise ClosedError("the graph was closed; make a new session")
            slots = (*self.inputs, *self.outputs)
            pointers = [(slot, pointer) for slot in slots for pointer in slot.pointers]
            for slot, pointer in pointers:
                pointer.word.value = slot.address + pointer.offset
            for _, pointer in pointers:
                # The same functions without an executable.
                driver.call(pointer.setter.replace("Exec", ""), *pointer.arguments[:2])
        return self.captured

    def launch(self) -> None:
        stream, order = raw_stream(self.index), self.order
        if not stream and not driver.is_current(self.index):
            with driver.on_device(self.index):
                return self.launch()
        with order.lock:
            if order.stream != stream:
                if order.stream != -1 and driver.is_capturing(stream):
                    # Waiting there for work outside of the capture would invalidate it.
                    raise CudaError(
                        f"stream {stream:#x} is being captured, and this session ran last on stream {order.stream:#x}, "
                        f"which a capture cannot wait for; run it on one stream, or after the capture"
                    )
                order.enter(stream)
            if self.executable is None:
                raise ClosedError("the graph was closed; make a new session")
            driver.call("cuGraphLaunch", self.executable, stream)

    def _point(self, wanted: Sequence[int]) -> None:
        """Patch the executable where it points elsewhere; what the driver refuses, and what comes after, is UNKNOWN."""
        pointed = self.pointed
        if pointed.tolist() == wanted:
            return
        slots = [*self.inputs, *self.outputs]
        changed = [index for index, address in enumerate(wanted) if pointed[index] != address]
        # The driver takes a node's parameters as a whole, and several tensors may stand in one node: all words are
        # written before any node is set. Native code may have written others there.
        for slot, address in zip(slots, wanted, strict=True):
            for pointer in slot.pointers:
                pointer.word.value = address + pointer.offset
        for index in changed:
            pointed[index] = UNKNOWN
        done = set()
        for index in changed:
            for pointer in slots[index].pointers:
                if (node := int(pointer.arguments[0])) not in done:
                    driver.call(pointer.setter, self.executable, *pointer.arguments)
                    done.add(node)
            pointed[index] = wanted[index]

    def in_native_code(self, library: Any) -> Any:
        """What native code keeps of this graph; ``None`` where it cannot replay it."""
        slots = (*self.inputs, *self.outputs)
        with self.order.lock:
            if self.executable is None or not self.outputs or not all(slot.pointers for slot in slots):
                return None
            if self.native is None:
                self.native = library.graph(
                    int(self.captured),
                    int(self.executable),
                    self.pointed,
                    self.max_executables,
                    slots,
                    tuple([(slot.mask, slot.nbytes, tuple([each.raw for each in slot.pointers])) for slot in slots]),
                    self.outputs[0].buffer,
                    tuple([slot.maker for slot in self.outputs]),
                )
            return self.native

    def let_go(self) -> None:
        """Give the memory of outputs that copy nodes hand out to other graphs of the order; ends poison and pin."""
        with self.order.lock, torch.inference_mode(False):
            for slot in self.outputs:
                if slot.pointers:
                    # A tensor of the same layout without memory, to allocate others by.
                    slot.buffer = slot.buffer.new_empty_strided(slot.buffer.shape, slot.buffer.stride())
                    slot.buffer.untyped_storage().resize_(0)
            self._account()

    def poison(self, out: Sequence[Tensor] = ()) -> None:
        with self.order.lock:
            if self.order.stream != (stream := raw_stream(self.index)):
                self.order.enter(stream)
            poison([*(slot.buffer for slot in self.outputs), *out], [slot.buffer for slot in self.inputs])

    def close(self, *, wait: bool = True) -> None:
        with self.order.lock:
            if self.executable is None:
                return
            if self.native is not None:
                self._undo.callback(self.native.close)
            self.executable = self.native = None
            self.inputs = self.outputs = ()
            self.order.release(self._undo.close, wait=wait)

    def __del__(self) -> None:
        if getattr(self, "executable", None) is not None and not sys.is_finalizing():
            # On a lost device nothing can be given back.
            with suppress(CudaError):
                self.close(wait=False)
