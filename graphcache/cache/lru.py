"""The graphs of one module: least recently used first out, under a budget in graphs and in bytes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack
from typing import Generic, Protocol, TypeVar

from graphcache.errors import Reason, Refusal


class Owner(Protocol):
    """Something that owns memory until it is closed."""

    @property
    def nbytes(self) -> int:
        """Memory owned, in bytes."""

    def close(self, *, wait: bool = True) -> None:
        """Release it, after waiting for whoever still uses it or as soon as nobody does; a second time does nothing."""


G = TypeVar("G", bound=Owner)

ticks = itertools.count(1)
clock = ticks.__next__


class Entry(Generic[G]):
    """A graph in the cache, with when it was last used and how often.

    Whoever replays ``graph`` sets ``used = clock()`` and adds one to ``hits``: the cache is asked for nothing on a hit
    but one dictionary look-up, and still knows which graph is cold. (A cache that learns of uses only through ``get``
    evicts what replays hardest.)
    """

    __slots__ = ("graph", "hits", "nbytes", "pinned", "used")

    def __init__(self, graph: G, *, pinned: bool = False) -> None:
        self.graph = graph
        self.nbytes = graph.nbytes
        self.pinned = pinned
        self.hits = 0
        self.used = clock()


class GraphCache(Generic[G]):
    """A bounded mapping from keys to graphs. It owns the graphs: what leaves it is closed.

    ``entries`` may be read without the lock (a dictionary look-up is atomic); everything that changes the cache takes
    it. The cache never holds more than ``max_graphs`` graphs or ``max_bytes`` bytes, not even while inserting.

    Args:
        max_graphs: How many graphs fit, at least 1.
        max_bytes: How many bytes they may own together; ``None`` for no bound.
        on_evict: Called with key and entry before the graph is closed.

    Example:
        >>> class Nothing:
        ...     nbytes = 0
        ...     def close(self, *, wait=True): print("closed")
        >>> cache = GraphCache(max_graphs=1)
        >>> entry = cache.put("a", Nothing())
        >>> entry = cache.put("b", Nothing())
        closed
        >>> list(cache)
        ['b']
    """

    def __init__(
        self,
        *,
        max_graphs: int,
        max_bytes: int | None = None,
        on_evict: Callable[[Hashable, Entry[G]], None] | None = None,
    ) -> None:
        self.entries: dict[Hashable, Entry[G]] = {}
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self._on_evict = on_evict
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(list(self.entries))

    def __contains__(self, key: Hashable) -> bool:
        return key in self.entries

    @property
    def nbytes(self) -> int:
        """Bytes owned by all graphs together."""
        return sum(entry.nbytes for entry in list(self.entries.values()))

    def make_room(self, nbytes: int = 0, *, instead_of: Hashable = None) -> None:
        """Evict until one more graph of ``nbytes`` bytes fits.

        Args:
            nbytes: What the graph owns.
            instead_of: A key whose graph goes in any case.

        Raises:
            Refusal: With :attr:`Reason.OVER_BUDGET`, if it cannot; then nothing was evicted.
        """
        with self._lock:
            others = [(key, entry) for key, entry in self.entries.items() if key != instead_of]
            pinned = [entry for _, entry in others if entry.pinned]
            held = sum(entry.nbytes for entry in pinned)
            if len(pinned) >= self.max_graphs or not self._fits(held + nbytes):
                raise Refusal(
                    Reason.OVER_BUDGET,
                    detail=f"{nbytes} bytes wanted; {len(pinned)} pinned graphs hold {held} bytes, the budget is "
                    f"max_graphs={self.max_graphs}, max_bytes={self.max_bytes}",
                )
            self.evict(instead_of)
            oldest_first = sorted((item for item in others if not item[1].pinned), key=lambda item: item[1].used)
            for key, _ in oldest_first:
                if len(self.entries) < self.max_graphs and self._fits(self.nbytes + nbytes):
                    return
                self.evict(key)

    def put(self, key: Hashable, graph: G, *, pinned: bool = False) -> Entry[G]:
        """Store a graph, evicting first what must go; a graph already stored under ``key`` is replaced.

        Raises:
            Refusal: If there is no room to be made. The graph was closed, the cache is unchanged.
        """
        with self._lock:
            try:
                self.make_room(graph.nbytes, instead_of=key)
            except BaseException:
                graph.close()
                raise
            entry = self.entries[key] = Entry(graph, pinned=pinned)
            return entry

    def evict(self, key: Hashable, *, wait: bool = False) -> bool:
        """Drop and close one graph; whether there was one.

        Args:
            key: Its key.
            wait: As in :meth:`Owner.close`.
        """
        with self._lock:
            entry = self.entries.pop(key, None)
            if entry is None:
                return False
            try:
                if self._on_evict is not None:
                    self._on_evict(key, entry)
            finally:
                entry.graph.close(wait=wait)
            return True

    def clear(self, *, wait: bool = True) -> None:
        """Drop and close every graph, pinned ones too, even if closing one of them raises.

        Args:
            wait: As in :meth:`Owner.close`.
        """
        with self._lock, ExitStack() as each:
            for key in list(self.entries):
                each.callback(self.evict, key, wait=wait)

    def _fits(self, nbytes: int) -> bool:
        return self.max_bytes is None or nbytes <= self.max_bytes
