"""A CUDA graph: captured, instantiated, launched and destroyed through the driver."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import ClosedError, CudaError, Reason, Refusal
from graphcache.graphs import driver
from graphcache.graphs.buffers import nbytes_of, poison
from graphcache.graphs.graph import Body
from graphcache.graphs.lane import Lane, capture_lock, own_stream
from graphcache.graphs.pointers import CannotBind, find_copies
from graphcache.graphs.slots import ALIGNMENT, Slot

NODE_BYTES = 10 * 1024
"""What a node of an instantiated graph takes on the device, estimated. The driver has no call that tells; NVIDIA's own
graph cache (CCCL, cudax/stf) budgets the same."""

_foreach_copy: Callable[..., None] = torch._foreach_copy_
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", int)
_is_inference_mode = torch.is_inference_mode_enabled


class CudaGraph:
    """An instantiated CUDA graph; see :class:`~graphcache.graphs.graph.Graph` for the contract.

    Each input and output is a :class:`~graphcache.graphs.slots.Slot`. One with pointers costs a comparison of
    addresses, and about 1 µs when the caller's tensor is another one than last time. One without is copied.

    The outputs of the next call are allocated, and the graph pointed at them, after the launch: while the device works.

    Args:
        captured: The ``CUgraph``. Whoever made it destroys it, in ``release``.
        inputs: In the order of a call.
        outputs: In the order of the answer.
        lane: Orders this graph's launches with everything that shares memory with it.
        keep: Whatever the captured kernels refer to: contexts, scratch memory, memory pools, weights.
        release: Gives that back; called once, after the last launch has finished.

    Raises:
        Refusal: If the graph has no nodes. ``release`` was called then, as it is when instantiating fails.
    """

    def __init__(
        self,
        captured: Any,
        *,
        inputs: Sequence[Slot],
        outputs: Sequence[Slot],
        lane: Lane,
        keep: object,
        release: Callable[[], object],
    ) -> None:
        self._executable: Any = None
        with ExitStack() as undo:
            undo.callback(release)
            self._nodes = driver.node_count(captured)
            if self._nodes == 0:
                raise Refusal(Reason.EMPTY_GRAPH)
            self._executable = driver.instantiate(captured, own_stream(lane.index, "capture").cuda_stream)
            undo.pop_all()
        self._launch = driver.binding().cuGraphLaunch
        self._inputs = tuple(enumerate(inputs))
        self._outputs = tuple(outputs)
        self._copied_inputs = [(index, slot.buffer) for index, slot in self._inputs if not slot.pointers]
        self._copied_outputs = [(index, slot.buffer) for index, slot in enumerate(outputs) if not slot.pointers]
        self._pointed_inputs = [(index, slot) for index, slot in self._inputs if slot.pointers]
        self._pointed_outputs = [(index, slot) for index, slot in enumerate(outputs) if slot.pointers]
        self._ready: list[Tensor] | None = None
        self._ready_stream = -1
        self._ready_inference = False
        self._lane = lane
        self._index = lane.index
        self._keep = keep
        self._release = release
        buffers = [slot.buffer for slot in (*inputs, *outputs)]
        self._nbytes = nbytes_of(buffers) + self._nodes * NODE_BYTES

    @property
    def nodes(self) -> int:
        return self._nodes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def copies(self) -> int:
        """How many inputs and outputs are copied by an operation of their own at every replay."""
        return len(self._copied_inputs) + len(self._copied_outputs)

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        stream = _raw_stream(self._index)
        lane = self._lane
        with lane.lock:
            executable = self._executable
            if executable is None:
                raise ClosedError("the graph was closed; call the module again to capture a new one")
            if lane.stream != stream:
                lane.enter(stream)
            for index, slot in self._pointed_inputs:
                if not slot.point(executable, inputs[index]):
                    slot.buffer.copy_(inputs[index])
                    slot.point(executable, slot.buffer)
            if self._copied_inputs:
                _foreach_copy(
                    [buffer for _, buffer in self._copied_inputs], [inputs[i] for i, _ in self._copied_inputs]
                )
            answer = out
            if answer is None:
                answer = self._ready
                if answer is None or self._ready_stream != stream or self._ready_inference != _is_inference_mode():
                    answer = [slot.fresh() for slot in self._outputs]
                self._ready = None
            for index, slot in self._pointed_outputs:
                if not slot.point(executable, answer[index]):
                    raise CudaError(
                        f"output {index} at {answer[index].data_ptr():#x} is not aligned to {ALIGNMENT} bytes"
                    )
            code = self._launch(executable, lane.handle)[0]
            if code:
                raise CudaError(f"cuGraphLaunch failed with {code.name} ({int(code)})")
            if self._copied_outputs:
                _foreach_copy(
                    [answer[index] for index, _ in self._copied_outputs], [b for _, b in self._copied_outputs]
                )
            if out is None:
                self._make_ready(executable, stream)
        return answer

    def poison(self) -> None:
        with self._lane.lock:
            self._lane.enter(_raw_stream(self._index))
            poison([slot.buffer for _, slot in self._inputs], indices=0)
            poison([slot.buffer for slot in self._outputs])

    def close(self) -> None:
        with self._lane.lock:
            executable, self._executable = self._executable, None
            if executable is None:
                return
            held = [self._inputs, self._outputs, self._pointed_inputs, self._pointed_outputs, self._keep, self._ready]
            held += [self._copied_inputs, self._copied_outputs]
            release = self._release
            self._inputs, self._outputs, self._ready, self._keep = (), (), None, None
            self._pointed_inputs, self._pointed_outputs, self._copied_inputs, self._copied_outputs = [], [], [], []

            def destroy() -> None:
                driver.call("cuGraphExecDestroy", executable)
                release()
                held.clear()

            self._lane.release(destroy)

    def __del__(self) -> None:
        # Nobody closed it: the executable must not stay behind, unless the process is going down anyway.
        if getattr(self, "_executable", None) is not None and not sys.is_finalizing():
            self.close()

    def _make_ready(self, executable: Any, stream: int) -> None:
        inference = _is_inference_mode()
        try:
            ready = [slot.fresh() for slot in self._outputs]
            for index, slot in self._pointed_outputs:
                slot.point(executable, ready[index])
        except (torch.cuda.OutOfMemoryError, CudaError):
            # This call has its answer; the next one will say what is wrong, if it still is.
            return
        self._ready, self._ready_stream, self._ready_inference = ready, stream, inference


def capture_enqueue(enqueue: Callable[[int], bool], lane: Lane, where: str, said: Callable[[], str] = str) -> Any:
    """Capture work that allocates nothing and says itself whether it could be enqueued, such as a TensorRT engine.

    The work must have run once before, outside of any capture, with the same shapes.

    Args:
        enqueue: Enqueues the work on a stream (a raw handle); ``False`` if it refused.
        lane: Whose device it is.
        where: The engine's name.
        said: What TensorRT said, for the message.

    Returns:
        A ``CUgraph``, to be destroyed by the caller.

    Raises:
        Refusal: If the work refused or failed.
        CudaError: If the driver failed for another reason.
    """
    stream = own_stream(lane.index, "capture")
    handle = driver.binding().CUstream(stream.cuda_stream)
    accepted: bool | BaseException = False
    with _quiet_collector():
        driver.begin_capture(handle)
        # A refusal must not be raised before the capture has ended: the stream would stay in it.
        try:
            accepted = enqueue(stream.cuda_stream)
        except BaseException as error:
            accepted = error
        captured = driver.end_capture(handle)
    if isinstance(accepted, BaseException) or not accepted or captured is None:
        if captured is not None:
            driver.call("cuGraphDestroy", captured)
        if isinstance(accepted, BaseException):
            raise accepted
        raise Refusal(Reason.NOT_CAPTURABLE, where, said() or "the enqueue was refused or invalidated the capture")
    return captured


def with_copies(
    enqueue: Callable[[int], bool], pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[int], bool]:
    """The same work with copies before and after it, which become copy nodes of the graph.

    Args:
        enqueue: The work.
        pairs: (to, from) of the copies before it; dense tensors of equal layout.
        after: (to, from) of the copies after it.
    """

    def enqueue_all(stream: int) -> bool:
        for target, source in pairs:
            _copy_node(target, source, stream)
        if not enqueue(stream):
            return False
        for target, source in after:
            _copy_node(target, source, stream)
        return True

    return enqueue_all


def record_torch(
    body: Body, *, inputs: Sequence[Tensor], expected: Sequence[Tensor], lane: Lane, keep: object, where: str
) -> CudaGraph:
    """Capture PyTorch operations, and engines between them; what they allocate comes from a pool of the graph's own.

    Inputs and outputs are copied by nodes of the graph, which are pointed at the caller's tensors.

    The body must have run before, on the capture stream, outside of any capture.

    Args:
        body: Runs the call on ``inputs`` and returns its outputs.
        inputs: Static inputs.
        expected: What the body returned when it ran before.
        lane: Orders this graph's launches.
        keep: What the body refers to beyond its own closure.
        where: The module's name.

    Raises:
        Refusal: If the body did something that cannot be captured.
    """
    stream = own_stream(lane.index, "capture")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    sources, targets = [torch.empty_like(each) for each in inputs], [torch.empty_like(each) for each in expected]
    outputs: Sequence[Tensor] = ()
    failure: BaseException | None = None
    with torch.cuda.stream(stream), torch.inference_mode(False), torch.no_grad(), _quiet_collector():
        # cuBLAS keeps a workspace per stream. One that was made in this capture lies in this graph's pool; left in
        # cuBLAS's table, the next graph captured on this stream would use it, and lose it when this one is evicted
        # (pytorch/pytorch#193402). So each capture starts and ends without.
        torch._C._cuda_clearCublasWorkspaces()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for static, source in zip(inputs, sources, strict=True):
                if _is_dense(static):
                    _copy_node(static, source, stream.cuda_stream)
            outputs = body()
            for output, target in zip(outputs, targets, strict=True):
                if _is_dense(output) and output.stride() == target.stride():
                    _copy_node(target, output, stream.cuda_stream)
        except BaseException as error:
            failure = error
        try:
            graph.capture_end()
        except RuntimeError as error:
            failure = failure or error
        torch._C._cuda_clearCublasWorkspaces()
    if failure is not None:
        graph.reset()
        if isinstance(failure, Refusal) or not isinstance(failure, Exception):
            raise failure
        raise refusal_of(failure, where) from failure
    captured = driver.binding().CUgraph(graph.raw_cuda_graph())
    try:
        pairs = [(source, _is_dense(static)) for static, source in zip(inputs, sources, strict=True)]
        pairs += [(t, _is_dense(o) and o.stride() == t.stride()) for o, t in zip(outputs, targets, strict=True)]
        found = iter(find_copies(captured, [tensor for tensor, copied in pairs if copied]))
    except CannotBind as why:
        graph.reset()
        raise Refusal(Reason.CAPTURE_FAILED, where, str(why)) from why
    pointers = [next(found) if copied else [] for _, copied in pairs]
    slots = [Slot(buffer, places, 1) for buffer, places in zip([*inputs, *outputs], pointers, strict=True)]
    return CudaGraph(
        captured,
        inputs=slots[: len(inputs)],
        outputs=slots[len(inputs) :],
        lane=lane,
        keep=(keep, body, graph),
        release=graph.reset,
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill one block of memory, so that one plain copy moves them all."""
    return tensor.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _copy_node(target: Tensor, source: Tensor, stream: int) -> None:
    nbytes = target.numel() * target.element_size()
    if nbytes:
        driver.call("cuMemcpyDtoDAsync", target.data_ptr(), source.data_ptr(), nbytes, stream)


def refusal_of(error: Exception, where: str) -> Refusal:
    """Why a capture failed, read from what CUDA and PyTorch say of it."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return Refusal(Reason.OUT_OF_MEMORY, where, text)
    if ("unsupported" in text and "captur" in text) or "Cannot copy between CPU and CUDA tensors during" in text:
        return Refusal(Reason.HOST_READ, where, text)
    return Refusal(Reason.CAPTURE_FAILED, where, f"{type(error).__name__}: {text}")


@contextmanager
def capturing(lane: Lane) -> Iterator[torch.cuda.ExternalStream]:
    """Hold the device's capture lock and the lane, with everything ordered on the capture stream.

    Inside, the capture stream is current and follows what the caller's stream did so far; afterwards the caller's
    stream follows it, and is current again, whatever happened.
    """
    with capture_lock(lane.index), lane.lock, torch.cuda.device(lane.index):
        before = torch.cuda.current_stream()
        stream = own_stream(lane.index, "capture")
        stream.wait_stream(before)
        lane.enter(stream.cuda_stream)
        try:
            with torch.cuda.stream(stream):
                yield stream
        finally:
            before.wait_stream(stream)
            lane.enter(before.cuda_stream)


@contextmanager
def _quiet_collector() -> Iterator[None]:
    # A collection inside a capture may destroy CUDA objects of anybody, which invalidates it.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
