"""Capturing work into a CUDA graph: begin, enqueue, end, and only then judge."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.cuda import graphs as torch_graphs

from graphcache.errors import Reason, Refusal
from graphcache.graphs import driver
from graphcache.graphs.buffers import is_dense
from graphcache.graphs.copy_kernel import copy_kernels
from graphcache.graphs.copy_nodes import copy_after, copy_before, find_copies, order_copies
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.edges import make_all_full
from graphcache.graphs.graph import Body
from graphcache.graphs.io_slots import IoSlot
from graphcache.graphs.param_patching import CannotBind
from graphcache.graphs.stream_order import StreamOrder, capture_lock, own_stream


def capture_enqueue(
    enqueue: Callable[[int], bool], lane: StreamOrder, where: str, said: Callable[[], str] = str
) -> Any:
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
    with quiet_collector():
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
            try:
                raise accepted
            finally:
                # The exception refers to this frame: no cycle may keep buffers until the next collection.
                accepted = False
        raise Refusal(Reason.NOT_CAPTURABLE, where, said() or "the enqueue was refused or invalidated the capture")
    return captured


def record_torch(
    body: Body,
    *,
    inputs: Sequence[Tensor],
    direct: Sequence[bool],
    expected: Sequence[Tensor],
    lane: StreamOrder,
    keep: object,
    release: Callable[[], object],
    where: str,
    shared: bool = False,
    full_edges: bool = False,
) -> CudaGraph:
    """Capture PyTorch operations, and engines between them; what they allocate comes from the lane's memory pool.

    Inputs and outputs are copied by nodes of the graph, which are pointed at the caller's tensors.

    The capture is the driver's and the pool is PyTorch's. ``torch.cuda.CUDAGraph`` would do
    both, but a failed capture leaves it, the allocator and the random number generator half way through
    (pytorch/pytorch#92684, #190348).

    The body must have run before, on the capture stream, outside of any capture.

    Args:
        body: Runs the call on ``inputs`` and returns its outputs.
        inputs: Static inputs.
        direct: For each whether the caller's tensor has the same layout, so that one plain copy moves it.
        expected: What the body returned when it ran before.
        lane: Orders this graph's launches.
        keep: What the body refers to beyond its own closure.
        release: Called once the graph is gone.
        where: The module's name.
        shared: Whether other graphs use the lane's memory pool too, so that no graph is charged for it.
        full_edges: Whether every kernel waits for the ones before it, however it was launched.

    Raises:
        Refusal: If the body did something that cannot be captured.
    """
    sources, targets = [torch.empty_like(each) for each in inputs], [torch.empty_like(each) for each in expected]
    whole = [plain and is_dense(static) for plain, static in zip(direct, inputs, strict=True)]
    pool, kernels = lane.pool(), copy_kernels(lane.index)
    outputs: list[Tensor] = []

    def enqueue(stream: int) -> bool:
        given = zip(inputs, sources, whole, strict=True)
        copy_before([(static, source) for static, source, copied in given if copied], stream, kernels)
        outputs.extend(body())
        made = zip(targets, outputs, strict=True)
        copy_after([(target, output) for target, output in made if _copies_whole(output, target)], stream, kernels)
        return True

    # cuBLAS keeps a workspace per stream, which the next capture on this stream would find, in this lane or another,
    # and lose when this lane is closed (pytorch/pytorch#193402). So each capture starts and ends without, and finds
    # its workspace in the pool of its own lane, where it stays.
    forget_workspaces()
    try:
        with torch.inference_mode(False), torch.no_grad(), quiet_collector(), pool.allocating():
            captured = capture_enqueue(enqueue, lane, where)
    except Refusal:
        raise
    except Exception as error:
        raise refusal_of(error, where) from error
    finally:
        forget_workspaces()

    def destroy() -> None:
        driver.call("cuGraphDestroy", captured)
        release()

    with ExitStack() as undo:
        undo.callback(driver.call, "cuGraphDestroy", captured)
        pairs = list(zip(sources, whole, strict=True))
        pairs += [(target, _copies_whole(output, target)) for output, target in zip(outputs, targets, strict=True)]
        if full_edges:
            make_all_full(captured)
        order_copies(captured, kernels, early=not full_edges)
        try:
            found = iter(find_copies(captured, [tensor for tensor, copied in pairs if copied], kernels))
        except CannotBind as why:
            raise Refusal(Reason.CAPTURE_FAILED, where, str(why)) from why
        pointers = [next(found) if copied else [] for _, copied in pairs]
        slots = [IoSlot(buffer, places, 1) for buffer, places in zip([*inputs, *outputs], pointers, strict=True)]
        undo.pop_all()
    return CudaGraph(
        captured,
        inputs=slots[: len(inputs)],
        outputs=slots[len(inputs) :],
        lane=lane,
        keep=(keep, body, pool),
        release=destroy,
        pool_bytes=0 if shared else pool.nbytes,
    )


def _copies_whole(output: Tensor, target: Tensor) -> bool:
    return is_dense(output) and output.stride() == target.stride()


def forget_workspaces() -> None:
    """Give back the memory that cuBLAS works in; the next product on a stream takes it again (32 MiB on an H100)."""
    torch._C._cuda_clearCublasWorkspaces()


def refusal_of(error: Exception, where: str) -> Refusal:
    """Why a capture failed, read from what CUDA and PyTorch say of it."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return Refusal(Reason.OUT_OF_MEMORY, where, text)
    if "captur" in text and any(word in text for word in ("unsupported", "not permitted", "Cannot copy between")):
        return Refusal(Reason.HOST_READ, where, text)
    return Refusal(Reason.CAPTURE_FAILED, where, f"{type(error).__name__}: {text}")


@contextmanager
def capturing(lane: StreamOrder) -> Iterator[torch.cuda.ExternalStream]:
    """Hold the device's capture lock and the lane, with everything ordered on the capture stream.

    Inside, the capture stream is current and follows what the caller's stream did so far; afterwards the caller's
    stream follows it, and is current again, whatever happened.
    """
    with capture_lock(lane.index), lane.lock, torch.cuda.device(lane.index):
        before = torch.cuda.current_stream()
        # Memory of graphs that were evicted is there for this one.
        lane.reap(wait=True)
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
def as_if_capturing() -> Iterator[None]:
    """Inside, modules that ask PyTorch whether this thread captures are told that it does, though it runs eagerly.

    Some take another path then: Transformers do not look into attention masks, since the host cannot read them. The
    graph gives the answers of that path, so that these are the eager answers that it is held against.
    """
    _pretending.depth = getattr(_pretending, "depth", 0) + 1
    with _patch_lock:
        _users.append(None)
        torch_graphs._cuda_isCurrentStreamCapturing = _is_capturing  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _pretending.depth -= 1
        with _patch_lock:
            _users.pop()
            if not _users:
                torch_graphs._cuda_isCurrentStreamCapturing = _ask_driver  # type: ignore[attr-defined]


_ask_driver: Callable[[], bool] = torch_graphs._cuda_isCurrentStreamCapturing  # type: ignore[attr-defined]
_pretending = threading.local()
_patch_lock = threading.Lock()
_users: list[None] = []
"""One for each block of :func:`as_if_capturing` that is entered, in any thread."""


def _is_capturing() -> bool:
    return bool(getattr(_pretending, "depth", 0)) or _ask_driver()


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Inside, in any thread, no garbage is collected: that may destroy CUDA objects of anybody, which a capture in the
    collecting thread does not survive."""
    with _collector_lock:
        if not _quiet:
            _quiet.append(gc.isenabled())
            gc.disable()
        _quiet.append(True)
    try:
        yield
    finally:
        with _collector_lock:
            _quiet.pop()
            if len(_quiet) == 1 and _quiet.pop():
                gc.enable()


_collector_lock = threading.Lock()
_quiet: list[bool] = []
"""Whether the collector was enabled before, then one element for each block that is entered."""
