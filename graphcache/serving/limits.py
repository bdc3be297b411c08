"""Request limits of the server, and how many requests are in it and run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from graphcache.errors import ConfigError, UnavailableError, shown


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a server takes at once, and how long it waits.

    Memory for requests stays below ``(max_concurrency + max_queue) * max_request_bytes``.

    Args:
        max_request_bytes: The largest body, as sent and after decompression; more is answered with 413.
        max_concurrency: Requests that models run at once.
        max_queue: Requests that wait beyond these, those that are still being received among them; one more is
            answered with 503 before its body is read.
        request_seconds: From the end of a request's body to its answer. Where it passes while the request waits, the
            answer is 503, since nothing was run; where the model is running, it is 504.
        body_seconds: For receiving a body; then the answer is 408.

    Raises:
        ConfigError: For what is no such number.

    Example:
        >>> Limits(max_queue=0).max_queue
        0
    """

    max_request_bytes: int = 64 * 2**20
    max_concurrency: int = 32
    max_queue: int = 128
    request_seconds: float = 30.0
    body_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (("max_request_bytes", 1), ("max_concurrency", 1), ("max_queue", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={shown(value)}: expected a whole number, {least} or more")
        for name in ("request_seconds", "body_seconds"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # The comparison comes first: a whole number may be too large to be asked whether it is finite.
            if not number or not 0 < value < 1e9 or not math.isfinite(value):
                raise ConfigError(f"{name}={shown(value)}: expected seconds, more than 0 and less than 1e9")


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
