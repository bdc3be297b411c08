"""Where PyTorch allocates while it is captured: memory that only this lane's graphs use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class MemoryPool:
    """A private pool of PyTorch's allocator, held until this object is gone.

    What is freed in it during a capture is used again by later allocations in it, and by nothing else: the graph still
    reads and writes there. When the pool is gone, its memory is cached by the allocator like that of any freed tensor,
    and goes back to the driver with ``torch.cuda.empty_cache()`` or when memory runs short.

    ``torch.cuda.MemPool`` is the same pool with a destructor that frees at once, which torch does not allow while any
    thread allocates into any pool: a garbage collection at such a moment aborts the process (seen with 2.11 on an
    H100). Giving up a reference, as is done here, is allowed always.

    Args:
        index: The CUDA device.
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
        # All segments of the process: asked for one pool, torch 2.11 drops references to its id that it does not own.
        # From the 257th pool on, whose number is no immortal object any more, that corrupts Python's memory.
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == self.id)

    def __del__(self) -> None:
        if getattr(self, "_held", False) and not sys.is_finalizing():
            self._release(self._index, self.id)
