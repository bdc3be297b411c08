"""A CUDA graph: instantiated, pointed at tensors, launched and destroyed through the driver."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import ClosedError, CudaError, Reason, Refusal
from graphcache.graphs import driver
from graphcache.graphs.buffers import nbytes_of, poison
from graphcache.graphs.executables import Executables
from graphcache.graphs.io_slots import ALIGNMENT, IoSlot
from graphcache.graphs.stream_order import StreamOrder, own_stream

_empty_like: Callable[[Tensor], Tensor] = torch.empty_like
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", int)
_is_inference_mode = torch.is_inference_mode_enabled


class CudaGraph:
    """An instantiated CUDA graph; see :class:`~graphcache.graphs.graph.Graph` for the contract.

    An input or output whose slot has pointers costs a comparison of addresses, and some µs when no executable is
    pointed at the caller's tensor. One without is copied. The outputs of the next call are allocated after the launch,
    while the device works.

    Native code replays it too, by its public attributes, which only a holder of the lane's lock may change.

    Args:
        captured: The ``CUgraph``, destroyed by ``release``.
        inputs: In the order of a call.
        outputs: In the order of the answer.
        lane: Orders this graph's launches with everything that shares memory with it.
        keep: Whatever the captured kernels refer to: contexts, scratch memory, memory pools, weights.
        release: Called once, after the last launch has finished, or when the graph cannot be made.
        pool_bytes: What of the lane's memory this graph alone uses.
    """

    # Native code reads and writes these at fixed offsets.
    __slots__ = ("__dict__", "__weakref__", "executables", "ready", "ready_inference", "ready_stream")

    def __init__(
        self,
        captured: Any,
        *,
        inputs: Sequence[IoSlot],
        outputs: Sequence[IoSlot],
        lane: StreamOrder,
        keep: object,
        release: Callable[[], object],
        pool_bytes: int = 0,
    ) -> None:
        self.executables: Executables | None = None
        with ExitStack() as undo:
            undo.callback(release)
            self.nodes = driver.node_count(captured)
            if self.nodes == 0:
                raise Refusal(Reason.EMPTY_GRAPH)
            stream = own_stream(lane.index, "capture").cuda_stream
            self.executables = Executables(captured, inputs, outputs, stream, lane)
            undo.pop_all()
        self.captured: Any = captured
        self.launcher = driver.binding().cuGraphLaunch
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._copied = [index for index, slot in enumerate(outputs) if not slot.pointers]
        self.ready: list[Tensor] | None = None
        self.ready_stream = -1
        self.ready_inference = False
        self.lane = lane
        self.index = lane.index
        self._keep = keep
        self._release = release
        self.context, self._current_context = int(driver.primary_context(lane.index)), driver.binding().cuCtxGetCurrent
        self._pool_bytes = pool_bytes
        self.nbytes = self._account()
        # The executable that is pointed at the static buffers.
        self.pinned: Any = None

    @property
    def copies(self) -> int:
        """How many inputs and outputs are copied by an operation of their own at every replay."""
        return sum(not slot.pointers for slot in (*self.inputs, *self.outputs))

    def _account(self) -> int:
        """The bytes of buffers, executables, the pool, and the outputs that lie ready for the next call."""
        assert self.executables is not None
        buffers = nbytes_of([slot.buffer for slot in (*self.inputs, *self.outputs)])
        return buffers + sum(slot.nbytes for slot in self.outputs) + self._pool_bytes + self.executables.nbytes

    def _is_elsewhere(self) -> bool:
        """Whether the legacy default stream here is another device's, or no context is current."""
        code, context = self._current_context()
        return bool(code) or int(context) != self.context

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        stream = _raw_stream(self.index)
        if not stream and self._is_elsewhere():
            with driver.on_device(self.index):
                return self.replay(inputs, out)
        lane = self.lane
        with lane.lock:
            executables = self.executables
            if executables is None:
                raise ClosedError("the graph was closed; call the module again to capture a new one")
            if lane.stream != stream:
                lane.enter(stream)
            wanted = [slot.take(tensor) for slot, tensor in zip(self.inputs, inputs)]  # noqa: B905 - the signature
            answer = self.ready
            if (
                out is not None
                or answer is None
                or self.ready_stream != stream
                or self.ready_inference is not _is_inference_mode()
            ):
                answer = [slot.fresh() for slot in self.outputs] if out is None else out
            wanted += self._addresses(answer)
            code = self.launcher(executables.aim(wanted), lane.handle)[0]
            if code:
                raise driver.failure("cuGraphLaunch", code)
            for index in self._copied:
                answer[index].copy_(self.outputs[index].buffer)
            if out is None:
                self._prepare_next(executables, stream)
            else:
                executables.launched()
        return answer

    def accepts(self, out: Sequence[Tensor]) -> bool:
        buffers = [slot.buffer for slot in self.outputs]
        return len(out) == len(buffers) and all(
            tensor.data_ptr() % ALIGNMENT == 0 and tensor.numel() > 0 and _lies_as(tensor, buffer)
            for tensor, buffer in zip(out, buffers, strict=True)
        )

    def pin(self) -> tuple[list[Tensor], list[Tensor]]:
        with self.lane.lock:
            if self.executables is None:
                raise ClosedError("the graph was closed; make a new session")
            self.pinned = self.executables.aim([slot.address for slot in (*self.inputs, *self.outputs)])
            return [slot.buffer for slot in self.inputs], [slot.buffer for slot in self.outputs]

    def launch(self) -> None:
        stream = _raw_stream(self.index)
        if not stream and self._is_elsewhere():
            with driver.on_device(self.index):
                return self.launch()
        lane = self.lane
        with lane.lock:
            if lane.stream != stream:
                if lane.handle is not None and driver.is_capturing(stream):
                    # Waiting there for work outside of the capture would invalidate it.
                    raise CudaError(
                        f"stream {stream:#x} is being captured, and this session ran last on stream "
                        f"{lane.stream:#x}, which a capture cannot wait for; run it on one stream, or after the capture"
                    )
                lane.enter(stream)
            if self.executables is None:
                raise ClosedError("the graph was closed; make a new session")
            code = self.launcher(self.pinned, lane.handle)[0]
            if code:
                raise driver.failure("cuGraphLaunch", code)

    def let_go(self) -> None:
        """Give the memory of outputs that copy nodes hand out to other graphs of the lane; ends poison and pin."""
        with self.lane.lock:
            for slot in self.outputs:
                if slot.pointers:
                    slot.let_go()
            self.nbytes = self._account()

    def poison(self) -> None:
        with self.lane.lock:
            self.lane.enter(_raw_stream(self.index))
            poison([slot.buffer for slot in self.inputs], indices=0)
            poison([slot.buffer for slot in self.outputs])

    def close(self, *, wait: bool = True) -> None:
        with self.lane.lock:
            executables, self.executables = self.executables, None
            if executables is None:
                return
            held = [self.inputs, self.outputs, self._keep, self.ready]
            release, self._release = self._release, _nothing
            self.inputs, self.outputs, self.ready, self._keep, self.pinned = (), (), None, None, None

            def destroy() -> None:
                try:
                    executables.close()
                finally:
                    held.clear()
                    release()

            self.lane.release(destroy, wait=wait)

    def __del__(self) -> None:
        if getattr(self, "executables", None) is not None and not sys.is_finalizing():
            # On a lost device nothing can be given back.
            with suppress(CudaError):
                self.close(wait=False)

    def _addresses(self, answer: Sequence[Tensor]) -> list[int]:
        """Where the next launch writes; 0 for outputs that are copied afterwards."""
        addresses = []
        for slot, tensor in zip(self.outputs, answer, strict=True):
            address = tensor.data_ptr() if slot.pointers else 0
            if address & slot.mask or (slot.pointers and not address):
                raise CudaError(f"an output at {address:#x} is not aligned to {slot.mask + 1} bytes")
            addresses.append(address)
        return addresses

    def _prepare_next(self, executables: Executables, stream: int) -> None:
        """Allocate the outputs of the next call, while the device works."""
        self.ready = None
        try:
            ready = [_empty_like(slot.buffer) for slot in self.outputs]
            executables.launched(self._addresses(ready))
        except (torch.cuda.OutOfMemoryError, CudaError):
            # This call has its answer; the next one raises, if it still has to.
            return
        self.ready, self.ready_stream, self.ready_inference = ready, stream, _is_inference_mode()


def _lies_as(tensor: Tensor, buffer: Tensor) -> bool:
    """Whether a tensor can take the place of a buffer."""
    return (
        tensor.shape == buffer.shape
        and tensor.stride() == buffer.stride()
        and tensor.dtype is buffer.dtype
        and tensor.device == buffer.device
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _nothing() -> None:
    """The ``release`` of a closed graph, which keeps nothing alive."""
