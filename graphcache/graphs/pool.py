"""Where PyTorch allocates while it is captured: memory that only this lane's graphs use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class MemoryPool:
    """A private pool of PyTorch's allocator, held until this object is gone.

    What is freed in it during a capture is used again by later allocations in it, and by nothing else: the graph still
    reads and writes there. When the pool is gone, the allocator caches its memory like that of any freed tensor.

    The destructor of ``torch.cuda.MemPool`` frees at once, which aborts the process while any thread allocates into any
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
