"""How many requests are in the server, and how many of them run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from graphcache.errors import UnavailableError
from graphcache.serving.limits import Limits


class Gate:
    """Lets in as many requests as the limits allow, and lets run as many of them as can.

    It belongs to one event loop.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._turns = asyncio.Semaphore(limits.max_concurrency)
        self._inside = 0
        self.running = 0
        """Requests that a model runs."""

    @property
    def waiting(self) -> int:
        """Requests that are received, or wait for their turn."""
        return self._inside - self.running

    @property
    def full(self) -> bool:
        """Whether the next one has to wait for its turn."""
        return self._turns.locked()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Inside, a request is in the server."""
        if self._inside >= self._limits.max_concurrency + self._limits.max_queue:
            raise UnavailableError(
                f"{self._inside} requests are being answered, which is the limit (max_concurrency="
                f"{self._limits.max_concurrency}, max_queue={self._limits.max_queue}); ask again later"
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Inside, a request that was admitted runs; in the order in which they came."""
        async with self._turns:
            self.running += 1
            try:
                yield
            finally:
                self.running -= 1
