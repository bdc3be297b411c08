"""Work that must not overlap: everything that shares one scratch memory, one context or one set of static buffers."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import CudaError
from graphcache.graphs import driver, native
from graphcache.graphs.pool import MemoryPool

_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", int)


class StreamOrder:
    """Keeps launches that share memory one after another, whichever streams and threads they come from.

    A thread holds ``lock`` while it enqueues. A launch on the stream of the previous one is ordered by the stream
    itself and costs one comparison; on another stream it waits, on the device, for the previous one.

    Not for streams that were destroyed: a stream that a lane has seen must outlive its next use.

    Args:
        index: The CUDA device.
    """

    # What the compiled short way reads too stands at a fixed place.
    __slots__ = ("__dict__", "__weakref__", "last", "stream")

    def __init__(self, index: int) -> None:
        self.index = index
        self.lock = native.new_lock()
        self.stream = -1
        # Of the executables that were launched last, their table: what they are known by.
        self.last: object = None
        self.handle: Any = None
        self._handles: dict[int, Any] = {}
        self._event: Any = None
        self._scratch: Tensor | None = None
        self._pool: MemoryPool | None = None
        # What gives memory back, in order, each with an event that stands behind it and all before it, if any.
        self._releases: deque[tuple[Callable[[], None], Any]] = deque()

    def enter(self, stream: int) -> None:
        """Make ``stream`` (a raw handle) the stream of the next launch, ordered after the previous one.

        Raises:
            CudaError: If the previous stream is being captured: nothing can be ordered after what it ran before.
        """
        if stream == self.stream:
            return
        handle = self._handles.get(stream)
        if handle is None:
            handle = self._handles[stream] = driver.binding().CUstream(stream)
        if self.handle is not None:
            with driver.on_device(self.index):
                if driver.is_capturing(self.stream):
                    raise CudaError(
                        f"stream {self.stream:#x}, where this module ran last, is being captured, so a launch on "
                        f"stream {stream:#x} cannot wait for it; use one stream for both, or call again when the "
                        f"capture has ended"
                    )
                if self._event is None:
                    self._event = driver.new_event()
                driver.order(self._event, self.handle, handle)
        self.stream, self.handle = stream, handle

    def scratch(self, nbytes: int) -> Tensor:
        """Memory shared by all work of the lane, at least 256-byte aligned.

        It grows by being replaced: a graph that baked the address of a smaller one keeps that one alive.

        Returns:
            A ``uint8`` tensor of at least ``nbytes`` elements.
        """
        if self._scratch is None or self._scratch.numel() < nbytes:
            with torch.inference_mode(False):
                self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", self.index))
        return self._scratch

    def pool(self) -> MemoryPool:
        """The memory pool of what PyTorch allocates in this lane's captures.

        The lane's graphs share it: one graph's temporaries may lie where another's outputs are. That is right as long
        as they never run at once, and as outputs are copied out before the next launch, which the lane sees to.
        """
        if self._pool is None:
            self._pool = MemoryPool(self.index)
        return self._pool

    @property
    def pool_nbytes(self) -> int:
        """What the pool has taken from the device, in bytes."""
        return 0 if self._pool is None else self._pool.nbytes

    def release(self, action: Callable[[], None], *, wait: bool = True) -> None:
        """Run ``action``, which gives memory back, once the last launch of the lane has finished.

        That is now, after waiting for it. Where the host may not wait (``wait=False``, or a capture is under way on the
        lane's stream or on the caller's) it is at the next release or :meth:`reap` that may, or that finds it finished.
        """
        with self.lock:
            self._releases.append((action, None))
            self.reap(wait=wait)

    def reap(self, *, wait: bool = False) -> None:
        """Run what was released and is due: each of them, even if one raises, and in their order.

        Args:
            wait: Wait for the last launch first, so that all is due.
        """
        with self.lock:
            if not self._releases:
                return
            with driver.on_device(self.index), ExitStack() as each:
                count = self._due(wait)
                for action, event in reversed([self._releases.popleft() for _ in range(count)]):
                    if event is not None:
                        each.callback(driver.call, "cuEventDestroy", event)
                    each.callback(action)

    def _due(self, wait: bool) -> int:
        """How many releases no launch is in the way of."""
        if self.handle is None:
            return len(self._releases)
        if driver.is_capturing(self.stream) or driver.is_capturing(_raw_stream(self.index)):
            # A capturing thread may neither wait nor ask.
            return 0
        if wait:
            driver.call("cuStreamSynchronize", self.handle)
            return len(self._releases)
        if driver.is_idle(self.handle):
            return len(self._releases)
        action, event = self._releases[-1]
        if event is None:
            # One that was never recorded would count as passed.
            with ExitStack() as undo:
                event = driver.new_event()
                undo.callback(driver.call, "cuEventDestroy", event)
                driver.call("cuEventRecord", event, self.handle)
                undo.pop_all()
            self._releases[-1] = action, event
        count = 0
        for index, (_, event) in enumerate(self._releases, start=1):
            if event is not None:
                if not driver.has_passed(event):
                    break
                count = index
        return count

    def wait(self) -> None:
        """Wait, on the host, for the last launch of the lane.

        Raises:
            CudaError: If its stream is being captured: nobody can wait for it then.
        """
        with self.lock:
            if self.handle is None:
                return
            with driver.on_device(self.index):
                if driver.is_capturing(self.stream):
                    raise CudaError(
                        f"stream {self.stream:#x}, where this module ran last, is being captured, so nothing can wait "
                        f"for it; do this when the capture has ended"
                    )
                driver.call("cuStreamSynchronize", self.handle)

    def close(self, *, wait: bool = True) -> None:
        """Give back event and scratch memory once the last launch has finished; the lane can be used again.

        Args:
            wait: As in :meth:`release`.
        """
        self.release(self._forget, wait=wait)

    def __del__(self) -> None:
        # What was put off must not stay behind with nobody to run it, unless the process is going down anyway.
        if (getattr(self, "_releases", None) or getattr(self, "_event", None)) and not sys.is_finalizing():
            with suppress(Exception):
                self.close()

    def _forget(self) -> None:
        self.stream, self.handle, self.last = -1, None, None
        self._handles.clear()
        self._scratch = self._pool = None
        if self._event is not None:
            driver.call("cuEventDestroy", self._event)
            self._event = None


@cache
def capture_lock(index: int) -> threading.RLock:
    """One capture at a time per device."""
    return threading.RLock()


@cache
def own_stream(index: int, purpose: str) -> torch.cuda.ExternalStream:
    """A stream of this process that nobody else is handed, never destroyed; one per device and purpose.

    ``torch.cuda.Stream()`` hands out 32 streams in turn, so that work of another library could land in a capture.

    Args:
        index: The CUDA device.
        purpose: ``"capture"``, or ``"side"`` for callers on the legacy default stream, where TensorRT would
            synchronise the device.
    """
    with torch.cuda.device(index):
        torch.cuda.current_stream()
        # A thread that has not used CUDA yet has no context to make a stream in.
        with driver.on_device(index):
            return torch.cuda.ExternalStream(  # type: ignore[no-untyped-call]
                int(driver.new_stream()), device=index
            )
