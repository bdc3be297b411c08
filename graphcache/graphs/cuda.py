"""A CUDA graph: captured, instantiated, launched and destroyed through the driver."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import ClosedError, CudaError, Reason, Refusal
from graphcache.graphs import driver
from graphcache.graphs.buffers import fill_bytes, nbytes_of
from graphcache.graphs.graph import Body
from graphcache.graphs.lane import Lane, capture_lock, own_stream

NODE_BYTES = 10 * 1024
"""What a node of an instantiated graph takes on the device, estimated. The driver has no call that tells; NVIDIA's own
graph cache (CCCL, cudax/stf) budgets the same."""

_foreach_copy: Callable[..., None] = torch._foreach_copy_
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class CudaGraph:
    """A captured CUDA graph; see :class:`~graphcache.graphs.graph.Graph` for the contract.

    Args:
        captured: The ``CUgraph``; needed only until this returns.
        inputs: Static inputs, in the order of a call.
        outputs: Static outputs.
        lane: Orders this graph's launches with everything that shares memory with it.
        keep: Whatever the captured kernels refer to: contexts, scratch memory, memory pools, weights.
        release: Gives ``keep`` back; called once, after the last launch has finished.
    """

    def __init__(
        self,
        captured: Any,
        *,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        lane: Lane,
        keep: object = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._nodes = driver.node_count(captured)
        if self._nodes == 0:
            raise Refusal(Reason.EMPTY_GRAPH)
        self._executable: Any = driver.instantiate(captured, own_stream(lane.index, "capture").cuda_stream)
        self._launch = driver.binding().cuGraphLaunch
        self._inputs: list[Tensor] = list(inputs)
        self._outputs: list[Tensor] = list(outputs)
        self._lane = lane
        self._index = lane.index
        self._keep = keep
        self._release = release
        self._nbytes = nbytes_of([*inputs, *outputs]) + self._nodes * NODE_BYTES

    @property
    def nodes(self) -> int:
        return self._nodes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        stream = _raw_stream(self._index)  # type: ignore[misc]
        lane = self._lane
        with lane.lock:
            if self._executable is None:
                raise ClosedError("the graph was closed; call the module again to capture a new one")
            if lane.stream != stream:
                lane.enter(stream)
            if self._inputs:
                _foreach_copy(self._inputs, inputs)
            code = self._launch(self._executable, lane.handle)[0]
            if code:
                raise CudaError(f"cuGraphLaunch failed with {code.name} ({int(code)})")
            if len(self._outputs) == 1:
                return [self._outputs[0].clone()]
            fresh = [torch.empty_like(output) for output in self._outputs]
            if fresh:
                torch._foreach_copy_(fresh, self._outputs)
            return fresh

    def poison(self) -> None:
        with self._lane.lock:
            self._lane.enter(_raw_stream(self._index))  # type: ignore[misc]
            fill_bytes([*self._inputs, *self._outputs])

    def close(self) -> None:
        with self._lane.lock:
            executable, self._executable = self._executable, None
            if executable is None:
                return
            buffers = (self._inputs, self._outputs, self._keep)
            release, self._release = self._release, None
            self._inputs, self._outputs, self._keep = [], [], None

            def destroy() -> None:
                nonlocal buffers
                driver.call("cuGraphExecDestroy", executable)
                if release is not None:
                    release()
                del buffers

            self._lane.release(destroy)

    def __del__(self) -> None:
        # A graph that nobody closed (an interpreter going down aside) must not leave its executable behind.
        if getattr(self, "_executable", None) is not None and not _going_down():
            self.close()


def record_enqueue(
    enqueue: Callable[[int], bool],
    *,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    lane: Lane,
    keep: object,
    where: str,
    said: Callable[[], str] = str,
) -> CudaGraph:
    """Capture work that allocates nothing and says itself whether it could be enqueued, such as a TensorRT engine.

    The work must have run once before, outside of any capture, with the same shapes.

    Args:
        enqueue: Enqueues the work on a stream (a raw handle); ``False`` if it refused.
        inputs: Static inputs that the work reads.
        outputs: Static outputs that the work writes.
        lane: Orders this graph's launches.
        keep: What the work refers to.
        where: The engine's name.
        said: What TensorRT said, for the message.

    Raises:
        Refusal: If the work refused or failed, or left nothing in the graph.
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
    with ExitStack() as undo:
        if captured is not None:
            undo.callback(driver.call, "cuGraphDestroy", captured)
        if isinstance(accepted, BaseException):
            raise accepted
        if not accepted or captured is None:
            raise Refusal(Reason.NOT_CAPTURABLE, where, said() or "the enqueue was refused or invalidated the capture")
        return CudaGraph(captured, inputs=inputs, outputs=outputs, lane=lane, keep=keep)


def record_torch(body: Body, *, inputs: Sequence[Tensor], lane: Lane, keep: object, where: str) -> CudaGraph:
    """Capture PyTorch operations, and engines between them; what they allocate comes from a pool of the graph's own.

    The body must have run before, on the capture stream, outside of any capture.

    Args:
        body: Runs the call on ``inputs`` and returns its outputs.
        inputs: Static inputs.
        lane: Orders this graph's launches.
        keep: What the body refers to beyond its own closure.
        where: The module's name.

    Raises:
        Refusal: If the body did something that cannot be captured.
    """
    stream = own_stream(lane.index, "capture")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    outputs: Sequence[Tensor] = ()
    failure: BaseException | None = None
    with ExitStack() as undo:
        undo.callback(graph.reset)
        with torch.cuda.stream(stream), torch.inference_mode(False), torch.no_grad(), _quiet_collector():
            # cuBLAS keeps a workspace per stream. One that was made in this capture lies in this graph's pool; left in
            # cuBLAS's table, the next graph captured on this stream would use it, and lose it when this one is evicted
            # (pytorch/pytorch#193402). So each capture starts and ends without.
            torch._C._cuda_clearCublasWorkspaces()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                outputs = body()
            except BaseException as error:
                failure = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                failure = failure or error
            torch._C._cuda_clearCublasWorkspaces()
        if failure is not None:
            if isinstance(failure, Refusal) or not isinstance(failure, Exception):
                raise failure
            raise refusal_of(failure, where) from failure
        graph_handle = driver.binding().CUgraph(graph.raw_cuda_graph())
        made = CudaGraph(
            graph_handle, inputs=inputs, outputs=outputs, lane=lane, keep=(keep, body, graph), release=graph.reset
        )
        undo.pop_all()
        return made


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


def _going_down() -> bool:
    import sys

    return sys.is_finalizing()
