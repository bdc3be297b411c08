"""Work that must not overlap: everything that shares one scratch memory, one context or one set of static buffers."""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphcache import native
from graphcache.errors import CudaError, Reason, Refusal
from graphcache.graphs import driver

raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", int)
"""The handle of this thread's current stream on a device."""


class MemoryPool:
    """Where PyTorch allocates while it is captured: a private pool of its allocator, held until this object is gone.

    What is freed in it is used again by later allocations in it alone: the graph still reads and writes there. The
    destructor of ``torch.cuda.MemPool`` frees at once, which aborts the process while any thread allocates into any
    pool (seen with 2.11 on an H100). Giving up a reference, as is done here, is always allowed.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._held = False
        self._release = torch._C._cuda_releasePool
        first, second = torch.cuda.graph_pool_handle()
        self.id = (int(first), int(second))

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Inside, whatever this thread allocates on the device comes from the pool."""
        torch._C._cuda_beginAllocateCurrentThreadToPool(self._index, self.id)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(self._index, self.id)
            # Each beginning takes a reference; the first one is kept.
            if self._held:
                self._release(self._index, self.id)
            self._held = True

    @property
    def nbytes(self) -> int:
        """What the pool has taken from the device, in bytes."""
        # All segments of the process: asked for one pool, torch 2.11 drops references to its id that it does not own,
        # which corrupts Python's memory from the 257th pool on.
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == self.id)

    def __del__(self) -> None:
        if getattr(self, "_held", False) and not sys.is_finalizing():
            self._release(self._index, self.id)


class StreamOrder:
    """Launches on one device that share memory run one after another, whichever streams and threads call.

    A thread holds ``lock`` while it enqueues. A stream must outlive the order's next launch.
    """

    # Native code reads the stream at a fixed offset.
    __slots__ = ("__dict__", "__weakref__", "stream")

    def __init__(self, index: int) -> None:
        self.index = index
        self.lock = native.new_lock()
        # The raw handle of the stream of the last launch; -1 before the first one.
        self.stream = -1
        self._event: Any = None
        self._scratch: Tensor | None = None
        self._pool: MemoryPool | None = None
        # Actions that give memory back, in order, each with an event recorded after it and all before it, if any.
        self._releases: deque[tuple[Callable[[], None], Any]] = deque()

    def enter(self, stream: int) -> None:
        """Make ``stream`` (a raw handle) the stream of the next launch, ordered after the previous one."""
        if stream == self.stream:
            return
        if self.stream != -1:
            with driver.on_device(self.index):
                self._refuse_if_captured(
                    f"a launch on stream {stream:#x} cannot wait for it; use one stream for both, or call again when "
                    f"the capture has ended"
                )
                if self._event is None:
                    self._event = driver.new_event()
                driver.call("cuEventRecord", self._event, self.stream)
                driver.call("cuStreamWaitEvent", stream, self._event, 0)
        self.stream = stream

    def wait(self) -> None:
        """Wait, on the host, for the last launch of the order."""
        with self.lock:
            if self.stream == -1:
                return
            with driver.on_device(self.index):
                self._refuse_if_captured("nothing can wait for it; do this when the capture has ended")
                driver.call("cuStreamSynchronize", self.stream)

    def _refuse_if_captured(self, so: str) -> None:
        """Raise if the stream of the last launch is being captured: nothing can wait for that launch."""
        if driver.is_capturing(self.stream):
            raise CudaError(f"stream {self.stream:#x}, where this module ran last, is being captured, so {so}")

    def scratch(self, nbytes: int) -> Tensor:
        """At least ``nbytes`` bytes for all work of the order, 256-byte aligned; graphs keep a smaller one they use."""
        if self._scratch is None or self._scratch.numel() < nbytes:
            with torch.inference_mode(False):
                self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", self.index))
        return self._scratch

    def pool(self) -> MemoryPool:
        """The memory pool of this order's captures; its graphs never run at once, and outputs are copied out of it."""
        if self._pool is None:
            self._pool = MemoryPool(self.index)
        return self._pool

    def release(self, action: Callable[[], None], *, wait: bool = True) -> None:
        """Run ``action``, which gives memory back, after the last launch: now, or later where the host may not wait."""
        with self.lock:
            self._releases.append((action, None))
            self.reap(wait=wait)

    def reap(self, *, wait: bool = False) -> None:
        """Run the releases that no launch is in the way of, in their order, each even if one raises."""
        with self.lock:
            if not self._releases:
                return
            with driver.on_device(self.index), ExitStack() as each:
                due = [self._releases.popleft() for _ in range(self._due(wait))]
                for action, event in reversed(due):
                    if event is not None:
                        each.callback(driver.call, "cuEventDestroy", event)
                    each.callback(action)

    def _due(self, wait: bool) -> int:
        """How many releases no launch is in the way of."""
        if self.stream == -1:
            return len(self._releases)
        if driver.is_capturing(self.stream) or driver.is_capturing(raw_stream(self.index)):
            # A capturing thread may neither wait nor query.
            return 0
        if wait:
            driver.call("cuStreamSynchronize", self.stream)
        if wait or driver.is_finished("cuStreamQuery", self.stream):
            return len(self._releases)
        action, event = self._releases[-1]
        if event is None:
            # An event that was never recorded would count as finished.
            with ExitStack() as undo:
                event = driver.new_event()
                undo.callback(driver.call, "cuEventDestroy", event)
                driver.call("cuEventRecord", event, self.stream)
                undo.pop_all()
            self._releases[-1] = action, event
        count = 0
        for index, (_, event) in enumerate(self._releases, start=1):
            if event is not None:
                if not driver.is_finished("cuEventQuery", event):
                    break
                count = index
        return count

    def close(self, *, wait: bool = True) -> None:
        """Give back event, pool and scratch memory once the last launch has finished; the order can be used again."""
        self.release(self._forget, wait=wait)

    def _forget(self) -> None:
        self.stream = -1
        self._scratch = self._pool = None
        if self._event is not None:
            driver.call("cuEventDestroy", self._event)
            self._event = None

    def __del__(self) -> None:
        if (getattr(self, "_releases", None) or getattr(self, "_event", None)) and not sys.is_finalizing():
            with suppress(Exception):
                self.close()


@cache
def capture_lock(index: int) -> threading.RLock:
    """One capture at a time per device."""
    return threading.RLock()


@cache
def own_stream(index: int, purpose: str) -> torch.cuda.ExternalStream:
    """A stream that nobody else is handed, never destroyed, and that does not wait for the legacy default stream.

    The purposes are ``"capture"`` (``torch.cuda.Stream()`` hands out 32 in turn: work of others could land in it), and
    ``"side"``, for callers on the legacy default stream, where TensorRT would synchronise the device.
    """
    with torch.cuda.device(index):
        torch.cuda.current_stream()
        # A thread that has not used CUDA yet has no context to make a stream in.
        with driver.on_device(index):
            handle = driver.call("cuStreamCreate", driver.binding().CUstream_flags.CU_STREAM_NON_BLOCKING)
            return torch.cuda.ExternalStream(int(handle), device=index)  # type: ignore[no-untyped-call]


@contextmanager
def capturing(order: StreamOrder) -> Iterator[torch.cuda.ExternalStream]:
    """Hold the device's capture lock and the order; the capture stream is current, and follows the caller's."""
    with capture_lock(order.index), order.lock, torch.cuda.device(order.index):
        before = torch.cuda.current_stream()
        # Memory of graphs that were evicted is there for this one.
        order.reap(wait=True)
        stream = own_stream(order.index, "capture")
        # The last launch, the caller's stream, the capture stream: each follows the one before.
        order.enter(before.cuda_stream)
        stream.wait_stream(before)
        order.stream = stream.cuda_stream
        try:
            with torch.cuda.stream(stream):
                yield stream
        finally:
            order.enter(stream.cuda_stream)
            before.wait_stream(stream)
            order.stream = before.cuda_stream


class ProcessWide:
    """A setting of the process that any number of threads hold: the first makes it, the last undoes it."""

    def __init__(self, make: Callable[[], Callable[[], object]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._undo = self._make()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo()


@ProcessWide
def quiet_collector() -> Callable[[], object]:
    """Inside, no thread collects garbage: that may destroy CUDA objects, which ends a capture in the same thread."""
    enabled = gc.isenabled()
    gc.disable()
    return gc.enable if enabled else gc.disable


Enqueue = Callable[[int], bool]
"""Enqueues work on a stream, a raw handle; whether it was accepted."""


def capture_enqueue(enqueue: Enqueue, order: StreamOrder, where: str, messages: Callable[[], str] = str) -> Any:
    """Capture work that allocates nothing, and ran before with the same shapes; the caller destroys the ``CUgraph``."""
    stream = own_stream(order.index, "capture").cuda_stream
    handle = driver.binding().CUstream(stream)
    # What other threads allocate or copy does not break a capture in this mode.
    mode = driver.binding().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    accepted = False
    with quiet_collector:
        driver.call("cuStreamBeginCapture", handle, mode)
        # A refusal must not be raised before the capture has ended: the stream would stay in it.
        try:
            accepted = enqueue(stream)
        finally:
            captured = driver.end_capture(handle)
            if captured is not None and not accepted:
                driver.call("cuGraphDestroy", captured)
    if captured is None or not accepted:
        raise Refusal(Reason.NOT_CAPTURABLE, where, messages() or "the enqueue was refused or invalidated the capture")
    return captured
