"""The graphs of one module: the coldest first out, under a budget in graphs and in bytes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Container, Hashable, Iterator
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar

from graphcache.cache.reservation import Reservation
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


def recency(key: Hashable, entry: Entry[Any]) -> float:
    """When an entry was last used: the rank that makes the least recently used the coldest."""
    return entry.used


class GraphCache(Generic[G]):
    """A bounded mapping from keys to graphs. It owns the graphs: what leaves it is closed.

    ``entries`` may be read without the lock (a dictionary look-up is atomic); everything that changes the cache takes
    it. It never holds more than ``max_graphs`` graphs, nor graphs of more than ``max_bytes`` bytes. What leaves is
    closed without the lock, so that a thread that only wants to evict waits for nobody's ``on_evict``; until it is
    closed its bytes count too. Whoever wants the peak in the budget reserves before the graph is captured.

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
        self.rank: Callable[[Hashable, Entry[G]], float] = recency
        """What goes first: the lowest. It is asked with the lock held, and must not ask the cache for anything."""
        self.shared = 0
        """Bytes that the graphs use together and no eviction frees, such as scratch memory; they count."""
        self._on_evict = on_evict
        self._reserved: list[Reservation] = []
        self._leaving = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(list(self.entries))

    def __contains__(self, key: Hashable) -> bool:
        return key in self.entries

    @property
    def nbytes(self) -> int:
        """Bytes owned by all graphs together, with what they share and what is just being closed."""
        return self.nbytes_without(())

    def nbytes_without(self, entries: Container[int]) -> int:
        """The same without some entries, by ``id``. Read while others change the cache, never too little."""
        # What leaves is counted as leaving before it is taken out.
        held = sum(entry.nbytes for entry in list(self.entries.values()) if id(entry) not in entries)
        return held + self._leaving + self.shared

    def victims(self, nbytes: int = 0, *, instead_of: Hashable = None) -> list[tuple[Hashable, Entry[G]]]:
        """What would have to go so that one more graph of ``nbytes`` bytes fits, coldest first; nothing goes.

        Args:
            nbytes: What the graph owns.
            instead_of: A key whose graph would go in any case; it is not among the victims.

        Raises:
            Refusal: With :attr:`Reason.OVER_BUDGET`, if it could not fit whatever went.
        """
        others = [(key, entry) for key, entry in list(self.entries.items()) if key != instead_of]
        reserved = list(self._reserved)
        pinned = [entry for _, entry in others if entry.pinned]
        held = sum(entry.nbytes for entry in pinned)
        besides = self.shared + self._leaving + sum(each.nbytes for each in reserved)
        graphs = self.max_graphs - len(reserved)
        if len(pinned) >= graphs or not self._fits(held + besides + nbytes):
            taken = f" and {besides} are shared or reserved" if besides else ""
            raise Refusal(
                Reason.OVER_BUDGET,
                detail=f"{nbytes} bytes wanted; {len(pinned)} pinned graphs hold {held} bytes{taken}, the budget is "
                f"max_graphs={self.max_graphs}, max_bytes={self.max_bytes}",
            )
        count, total = len(others), sum(entry.nbytes for _, entry in others) + besides + nbytes
        found: list[tuple[Hashable, Entry[G]]] = []
        if count < graphs and self._fits(total):
            return found
        for key, entry in sorted((item for item in others if not item[1].pinned), key=lambda item: self.rank(*item)):
            found.append((key, entry))
            count -= 1
            total -= entry.nbytes
            if count < graphs and self._fits(total):
                break
        return found

    def reserve(self, nbytes: int, *, instead_of: Hashable = None) -> Reservation:
        """Make room for a graph that is still to be captured, and keep it: the peak stays in the budget too.

        Args:
            nbytes: What the graph will own, as far as one knows.
            instead_of: A key whose graph goes in any case.

        Returns:
            The room, for :meth:`put` or until its ``release()``.

        Raises:
            Refusal: With :attr:`Reason.OVER_BUDGET`, if it cannot be had; then nothing was evicted.

        Example:
            >>> class Graph:
            ...     nbytes = 8
            ...     def close(self, *, wait=True): print("closed")
            >>> cache = GraphCache(max_graphs=9, max_bytes=10)
            >>> entry = cache.put("a", Graph())
            >>> with cache.reserve(8) as room:
            ...     entry = cache.put("b", Graph(), reservation=room)
            closed
        """
        reservation = Reservation(nbytes, self._release)
        with self._lock:
            leaving = self._make_room(nbytes, instead_of)
            self._reserved.append(reservation)
        try:
            self._close(leaving)
        except BaseException:
            reservation.release()
            raise
        return reservation

    def put(self, key: Hashable, graph: G, *, pinned: bool = False, reservation: Reservation | None = None) -> Entry[G]:
        """Store a graph in place of what must go, such as a graph that is stored under ``key``.

        Without room, raises a ``Refusal``: the graph is closed and the cache unchanged. If what goes cannot be closed,
        raises why; the graph is closed and not in the cache.
        """
        try:
            with self._lock:
                if reservation in self._reserved:
                    self._reserved.remove(reservation)
                leaving = self._make_room(graph.nbytes, key)
                entry = self.entries[key] = Entry(graph, pinned=pinned)
        except BaseException:
            graph.close()
            raise
        try:
            self._close(leaving)
        except BaseException:
            entry.pinned = False
            self.evict(key, only=entry)
            raise
        return entry

    def evict(self, key: Hashable, *, only: Entry[G] | None = None, wait: bool = False) -> bool:
        """Drop and close one graph; whether there was one."""
        with self._lock:
            entry = self.entries.get(key)
            if entry is None or (only is not None and (entry is not only or entry.pinned)):
                return False
            self._take([(key, entry)])
        self._close([(key, entry)], wait=wait)
        return True

    def clear(self, *, wait: bool = True) -> None:
        """Drop and close every graph, pinned ones too, even if closing one of them raises."""
        with ExitStack() as each:
            for key in reversed(list(self.entries)):
                each.callback(self.evict, key, wait=wait)

    def _make_room(self, nbytes: int, instead_of: Hashable) -> list[tuple[Hashable, Entry[G]]]:
        """Take out what has to go, to be closed when the lock was given back."""
        leaving = self.victims(nbytes, instead_of=instead_of)
        if instead_of in self.entries:
            leaving.insert(0, (instead_of, self.entries[instead_of]))
        self._take(leaving)
        return leaving

    def _take(self, items: list[tuple[Hashable, Entry[G]]]) -> None:
        for key, entry in items:
            self._leaving += entry.nbytes
            del self.entries[key]

    def _close(self, items: list[tuple[Hashable, Entry[G]]], *, wait: bool = False) -> None:
        """Close what was taken, in order, all of it even if one raises."""
        with ExitStack() as each:
            for key, entry in reversed(items):
                each.callback(self._left, entry)
                each.callback(entry.graph.close, wait=wait)
                if self._on_evict is not None:
                    each.callback(self._on_evict, key, entry)

    def _left(self, entry: Entry[G]) -> None:
        with self._lock:
            self._leaving -= entry.nbytes

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation in self._reserved:
                self._reserved.remove(reservation)

    def _fits(self, nbytes: int) -> bool:
        return self.max_bytes is None or nbytes <= self.max_bytes
