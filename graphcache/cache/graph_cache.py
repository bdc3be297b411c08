"""Which graphs are kept: the cache of one module, within its own budget and that of its device.

A graph that is to be captured reserves its bytes first, and one that is stored takes their place; the coldest graphs
go, of the module or of all modules on the device. So the peak stays within the budgets too.

One lock serves all caches and budgets. It is never held while a graph is closed or ``on_evict`` is called, and no other
lock is taken under it; what was taken out counts until it is closed. So modules that evict from each other can wait for
each other only through what ``on_evict`` or ``close()`` waits for: that must not be a lock that somebody holds while
reserving or storing. (A capture reserves before it takes the lock of the device's order, which closing a graph needs.)
``entries`` may be read without the lock.
"""

from __future__ import annotations

import itertools
import re
import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

from graphcache.config import number_in_environment
from graphcache.errors import ConfigError, Reason, Refusal, shown

PROCESS_BYTES = "GRAPHCACHE_PROCESS_MAX_BYTES"


class Owner(Protocol):
    """Something that owns memory until it is closed."""

    @property
    def nbytes(self) -> int: ...

    def close(self, *, wait: bool = True) -> None:
        """Release it: with ``wait`` before it returns, otherwise when nobody uses it; a second time does nothing."""


G = TypeVar("G", bound=Owner)

ticks = itertools.count(1)
clock = ticks.__next__

# Re-entrant, since the collector may close a module in the midst of counting.
_lock = threading.RLock()


class Entry(Generic[G]):
    """A graph in the cache. Whoever replays it sets ``used = clock()`` and adds one to ``hits``."""

    __slots__ = ("counted", "graph", "hits", "nbytes", "pinned", "used")

    def __init__(self, graph: G) -> None:
        self.graph = graph
        self.nbytes = graph.nbytes
        self.pinned = False
        """Whether it is not evicted to make room."""
        self.hits = 0
        self.counted = 0
        """Hits that are part of the key's state (:class:`~graphcache.cache.key_table.KeyState`)."""
        self.used = clock()


_Item = tuple["GraphCache[Any]", Hashable, Entry[Any]]


def weakly(method: Callable[..., Any], gone: Any = None) -> Callable[..., Any]:
    """A method that does not keep its object alive; it returns ``gone`` once that is gone."""
    found = weakref.WeakMethod(method)
    return lambda *args: gone if (call := found()) is None else call(*args)


def recency(key: Hashable, entry: Entry[Any]) -> float:
    """When an entry was last used: the least recently used is the coldest."""
    return entry.used


class GraphCache(Generic[G]):
    """The graphs of one module by key. It owns them: what leaves it is closed, after ``on_evict(key, entry)``."""

    def __init__(
        self,
        *,
        max_graphs: int,
        max_bytes: int | None = None,
        on_evict: Callable[[Hashable, Entry[G]], object] = lambda key, entry: None,
    ) -> None:
        self.entries: dict[Hashable, Entry[G]] = {}
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self.on_evict = on_evict
        self.budget = DeviceBudget()
        """Of the device of the last capture; one without a bound before."""
        self.rank: Callable[[Hashable, Entry[G]], float] = recency
        """What goes first: the lowest. It is asked with the lock held, and may take no other."""
        self.shared = 0
        """Bytes that no eviction frees, such as scratch memory."""
        self.open_nbytes = 0
        """Bytes of graphs that are not closed yet."""
        self.reservations: set[Reservation] = set()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes owned by all graphs together, with what they share and what is just being closed."""
        return self.open_nbytes + self.shared

    def victims(self, nbytes: int = 0, *, graphs: int = 1) -> list[tuple[Hashable, Entry[G]]]:
        """What would have to go for a graph of so many bytes, coldest first; a ``Refusal`` if there is no room then.

        With ``graphs=0`` only bytes are wanted, and no place among ``max_graphs``. Nothing goes, and no lock is taken.
        """
        items = list(self.entries.items())
        held = self.open_nbytes + self.shared + sum(each.nbytes for each in list(self.reservations))
        surplus = len(items) + graphs - self.max_graphs
        excess = 0 if self.max_bytes is None else held + nbytes - self.max_bytes
        if surplus <= 0 and excess <= 0:
            return []
        free = sorted((item for item in items if not item[1].pinned), key=lambda item: self.rank(*item))
        for count, (_, entry) in enumerate(free, 1):
            excess -= entry.nbytes
            if count >= surplus and excess <= 0:
                return free[:count]
        pinned = [entry.nbytes for _, entry in items if entry.pinned]
        rest = held - sum(entry.nbytes for _, entry in items)
        raise Refusal(
            Reason.OVER_BUDGET,
            detail=f"{nbytes} bytes wanted; {len(pinned)} pinned graphs hold {sum(pinned)} bytes and {rest} are shared "
            f"or reserved, the budget is max_graphs={self.max_graphs}, max_bytes={self.max_bytes}",
        )

    def put(self, key: Hashable, graph: G, reservation: Reservation | None = None) -> Entry[G]:
        """Store a graph in place of the one of its key and of what has to go; its reservation ends.

        Without room, raises a ``Refusal``; if what goes cannot be closed, raises why. The graph is closed then.
        """
        entry = Entry(graph)
        try:
            if key in self.entries:
                self.evict(key)
            with _lock:
                if reservation is not None:
                    self.reservations.discard(reservation)
                leaving = self.make_room(entry.nbytes, graphs=1)
                if key in self.entries:
                    # Another thread has stored it meanwhile.
                    leaving.append((self, key, self.entries.pop(key)))
                self.entries[key] = entry
                self.open_nbytes += entry.nbytes
            if leaving:
                _close(leaving, wait=False)
        except BaseException:
            if not self.evict(key, only=entry):
                graph.close()
            raise
        return entry

    def evict(self, key: Hashable, *, only: Entry[G] | None = None) -> bool:
        """Drop and close one graph; whether there was one."""
        with _lock:
            entry = self.entries.get(key)
            if entry is None or (only is not None and entry is not only):
                return False
            del self.entries[key]
        _close([(self, key, entry)], wait=False)
        return True

    def clear(self, *, wait: bool = True) -> None:
        """Drop and close every graph, pinned ones too, even if closing one of them raises."""
        with _lock:
            leaving: list[_Item] = [(self, key, entry) for key, entry in self.entries.items()]
            self.entries.clear()
        _close(leaving, wait=wait)

    def make_room(self, nbytes: int, *, graphs: int) -> list[_Item]:
        """Take out what has to go for a graph, here and on the device, to be closed without the lock."""
        leaving: list[_Item] = [(self, key, entry) for key, entry in self.victims(nbytes, graphs=graphs)]
        if self.budget.max_bytes is not None:
            found, excess = self.budget.coldest(nbytes, leaving)
            if excess > 0:
                raise Refusal(
                    Reason.OVER_BUDGET,
                    detail=f"{nbytes} bytes wanted; {self.budget.max_bytes + excess - nbytes} bytes of all modules are "
                    f"pinned, shared or reserved, the budget of the process is {self.budget.max_bytes} bytes",
                )
            leaving += found
        for cache, key, _ in leaving:
            del cache.entries[key]
        return leaving


class DeviceBudget:
    """A budget in bytes that the caches of all modules on a device share; ``None`` is no bound. It holds no cache."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._caches: weakref.WeakSet[GraphCache[Any]] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes owned by the graphs of all caches, with what they share and what is reserved."""
        with _lock:
            # A reservation has what is leaving for its sake until that is closed, and not both.
            return sum(
                cache.nbytes + sum(max(each.nbytes - each.leaving, 0) for each in cache.reservations)
                for cache in self._caches
            )

    def register(self, cache: GraphCache[Any]) -> None:
        """Count a cache from now on, and evict from it when room is needed; twice does nothing."""
        with _lock:
            self._caches.add(cache)
            cache.budget = self

    def set_budget(self, max_bytes: int | None) -> None:
        """Change the budget. What it no longer holds goes now, but for pinned graphs."""
        with _lock:
            self.max_bytes = max_bytes
            leaving = self.coldest(0, [])[0]
            for cache, key, _ in leaving:
                del cache.entries[key]
        _close(leaving, wait=True)

    def coldest(self, nbytes: int, leaving: list[_Item]) -> tuple[list[_Item], int]:
        """What has to go besides what is leaving, or as much as may go, and the bytes that are too many then."""
        if self.max_bytes is None:
            return [], 0
        gone = {entry for _, _, entry in leaving}
        excess = self.nbytes + nbytes - sum(entry.nbytes for entry in gone) - self.max_bytes
        free = [(cache, *item) for cache in self._caches for item in cache.entries.items()]
        found: list[_Item] = []
        for item in sorted(free, key=lambda item: item[2].used):
            if excess > 0 and not item[2].pinned and item[2] not in gone:
                found.append(item)
                excess -= item[2].nbytes
        return found, excess


class Reservation:
    """Bytes of a cache and its device that are kept for one graph, until it is stored or the ``with`` block ends."""

    def __init__(self, cache: GraphCache[Any]) -> None:
        self._cache = cache
        self.nbytes = 0
        self.leaving = 0
        """Bytes of what goes for its sake and is not closed yet."""

    def take(self, nbytes: int) -> None:
        """Keep so many bytes; if they are short graphs go, and are closed before it returns. A ``Refusal`` evicts none.

        Where only the number of graphs is short, nothing goes before the new graph is there: the capture may fail.
        """
        with _lock:
            leaving = self._cache.make_room(nbytes, graphs=0)
            self.nbytes, self.leaving = nbytes, sum(entry.nbytes for _, _, entry in leaving)
            self._cache.reservations.add(self)
        try:
            if leaving:
                _close(leaving, wait=True, reservation=self)
        except BaseException:
            self.release()
            raise

    def release(self, *_: object) -> None:
        """Give the bytes back; a second time does nothing."""
        with _lock:
            self._cache.reservations.discard(self)

    def __enter__(self) -> Self:
        return self

    __exit__ = release


def _close(items: list[_Item], *, wait: bool, reservation: Reservation | None = None) -> None:
    """Tell of graphs that were taken out and close them, in order, all of them even if one raises; without the lock."""

    def count(cache: GraphCache[Any], entry: Entry[Any]) -> None:
        with _lock:
            cache.open_nbytes -= entry.nbytes
            if reservation is not None:
                reservation.leaving -= entry.nbytes

    with ExitStack() as each:
        for cache, key, entry in reversed(items):
            each.callback(count, cache, entry)
            each.callback(entry.graph.close, wait=wait)
            each.callback(cache.on_evict, key, entry)


# ---- the budgets of this process

_DEVICE = re.compile(r"cpu|[a-z]+:\d{1,4}")

_budgets: dict[str, DeviceBudget] = {}
_default: list[int | None] = []


def budget_of(device: object) -> DeviceBudget:
    """The one budget of a device in this process.

    Example:
        >>> budget_of("cuda:0") is budget_of("cuda:0")
        True
    """
    name = str(device) if isinstance(device, (str, torch.device)) else ""
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"device={shown(device)}: expected 'cpu' or a device with its index, such as 'cuda:0'")
    with _lock:
        if name not in _budgets:
            _budgets[name] = DeviceBudget(_default[0] if _default else number_in_environment(PROCESS_BYTES))
        return _budgets[name]


def set_process_budget(max_bytes: int | None, *, device: object = None) -> None:
    """Bound what the graphs of all modules on a device may own together.

    Args:
        max_bytes: Bytes; ``None`` for no bound. Where it was never called, ``GRAPHCACHE_PROCESS_MAX_BYTES`` counts.
        device: Which device; ``None`` for each of them, those not used yet included.

    Raises:
        ConfigError: If ``max_bytes`` is not a whole number, 1 or more, or ``None``, or ``device`` is none.

    Example:
        >>> set_process_budget(256 * 2**20, device="cuda:7")
        >>> budget_of("cuda:7").max_bytes
        268435456
    """
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1):
        raise ConfigError(f"max_bytes={shown(max_bytes)}: expected a whole number of bytes, 1 or more, or None")
    with _lock:
        found = list(_budgets.values()) if device is None else [budget_of(device)]
        if device is None:
            _default[:] = [max_bytes]
    for each in found:
        each.set_budget(max_bytes)
