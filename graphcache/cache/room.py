"""Room for a graph before it is captured, in its module's budget and in that of the process."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from typing import Any

from graphcache.cache.device_budget import DeviceBudget
from graphcache.cache.graph_cache import GraphCache
from graphcache.cache.reservation import Reservation


class Room:
    """Reservations for one capture, given back at the end of a ``with`` block.

    Where bytes are short, graphs go before another is captured, so that the peak stays in the budget. Where only
    their number is, they go when it is there: a capture that fails costs no graph then.

    Args:
        cache: Where the graph will go.
        budget: Of its device.
    """

    def __init__(self, cache: GraphCache[Any], budget: DeviceBudget) -> None:
        self._cache = cache
        self._budget = budget
        self._held = ExitStack()
        self._shared: Reservation | None = None
        self.own: Reservation | None = None
        """What was reserved in the cache itself, if anything."""

    def take(self, nbytes: int, key: Hashable) -> None:
        """Make room, as far as one knows what the graph will own; twice does nothing."""
        most = self._cache.max_bytes
        if most is not None and self._cache.nbytes + nbytes > most and self.own is None:
            self.own = self._held.enter_context(self._cache.reserve(nbytes, instead_of=key))
        if self._budget.max_bytes is not None and self._shared is None:
            self._shared = self._held.enter_context(self._budget.reserve(nbytes))

    def settle(self, nbytes: int) -> None:
        """Reserve what the graph really owns, now that it is there."""
        if self._budget.max_bytes is not None:
            if self._shared is not None:
                self._shared.release()
            self._shared = self._held.enter_context(self._budget.reserve(nbytes))

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.close()
