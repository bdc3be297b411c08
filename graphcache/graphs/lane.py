"""Work that must not overlap: everything that shares one scratch memory, one context or one set of static buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.pool import MemoryPool


class Lane:
    """Keeps launches that share memory one after another, whichever streams and threads they come from.

    A thread holds ``lock`` while it enqueues. A launch on the stream of the previous one is ordered by the stream
    itself and costs one comparison; on another stream it waits, on the device, for the previous one.

    Not for streams that were destroyed: a stream that a lane has seen must outlive its next use.

    Args:
        index: The CUDA device.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.lock = threading.RLock()
        self.stream = -1
        self.handle: Any = None
        self._handles: dict[int, Any] = {}
        self._event: Any = None
        self._scratch: Tensor | None = None
        self._pool: MemoryPool | None = None
        self._releases: list[Callable[[], None]] = []

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
            if driver.is_capturing(self.stream):
                raise CudaError(
                    f"stream {self.stream:#x}, where this module ran last, is being captured, so a launch on stream "
                    f"{stream:#x} cannot wait for it; use one stream for both, or call again when the capture has ended"
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

    def release(self, action: Callable[[], None]) -> None:
        """Run ``action``, which gives memory back, once the last launch of the lane has finished.

        That is now, after waiting for it; or, if its stream is being captured and so cannot be waited for, at the next
        release that can wait.
        """
        with self.lock:
            self._releases.append(action)
            if self.handle is not None:
                if driver.is_capturing(self.stream):
                    return
                driver.call("cuStreamSynchronize", self.handle)
            due, self._releases = self._releases, []
            with ExitStack() as each:
                # All of them, even if one raises, and in their order.
                for action in reversed(due):
                    each.callback(action)

    def wait(self) -> None:
        """Wait, on the host, for the last launch of the lane.

        Raises:
            CudaError: If its stream is being captured: nobody can wait for it then.
        """
        with self.lock:
            if self.handle is None:
                return
            if driver.is_capturing(self.stream):
                raise CudaError(
                    f"stream {self.stream:#x}, where this module ran last, is being captured, so nothing can wait for "
                    f"it; do this when the capture has ended"
                )
            driver.call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        """Wait for the last launch and give back event and scratch memory; the lane can be used again."""
        self.release(self._forget)

    def _forget(self) -> None:
        self.stream, self.handle = -1, None
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
        return torch.cuda.ExternalStream(  # type: ignore[no-untyped-call]
            int(driver.new_stream()), device=index
        )
