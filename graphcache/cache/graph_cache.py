"""Which graphs are kept: the cache of one module, within its own budget and that of its device.

A graph that is to be captured reserves its bytes first, and one that is stored takes its place; the coldest graphs go,
of the module or of all modules on the device. So the peak stays within the budgets too.

Locks. One lock serves all caches and budgets. Under it bytes are counted, and graphs are taken out and put in, in one
step. It is never held while a graph is closed or ``on_evict`` is called, and no other lock is taken under it; what was
taken out counts until it is closed. So modules that evict from each other can wait for each other only through what
``on_evict`` or ``close()`` waits for: that must not be a lock that somebody holds while reserving or storing. (A
capture reserves before it takes the lock of the device's order, which closing a graph needs.) A hit takes no lock:
``entries`` may be read without it.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import torch

from graphcache.config import number_in_environment
from graphcache.errors import ConfigError, Reason, Refusal, shown


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

# Re-entrant, since the collector may close a module in the midst of counting.
_lock = threading.RLock()


class Entry(Generic[G]):
    """A graph in the cache, with when it was last used and how often. A pinned one is not evicted to make room.

    Whoever replays ``graph`` sets ``used = clock()`` and adds one to ``hits``: a hit asks the cache for a look-up only.
    """

    __slots__ = ("graph", "hits", "nbytes", "pinned", "used")

    def __init__(self, graph: G) -> None:
        self.graph = graph
        self.nbytes = graph.nbytes
        self.pinned = False
        self.hits = 0
        self.used = clock()


_Item = tuple["GraphCache[Any]", Hashable, Entry[Any]]


def recency(key: Hashable, entry: Entry[Any]) -> float:
    """When an entry was last used: the rank that makes the least recently used the coldest."""
    return entry.used


class GraphCache(Generic[G]):
    """The graphs of one module by key. It owns them: what leaves it is closed, after ``on_evict(key, entry)``."""

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
        self.on_evict = on_evict
        self.budget = DeviceBudget()
        """Of the device of the last capture; one without a bound before."""
        self.rank: Callable[[Hashable, Entry[G]], float] = recency
        """What goes first: the lowest. It is asked with the lock held, and may take no other."""
        self.shared = 0
        """Bytes that the graphs use together and no eviction frees, such as scratch memory."""
        self.held = 0
        """Bytes of graphs that are not closed yet, and of reservations."""
        self.reservations: list[Reservation] = []

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes owned by all graphs together, with what they share and what is just being closed."""
        with _lock:
            return self.held + self.shared - sum(each.nbytes for each in self.reservations)

    def victims(
        self, nbytes: int = 0, *, instead_of: Hashable = None, graphs: int = 1
    ) -> list[tuple[Hashable, Entry[G]]]:
        """What would have to go for a graph of so many bytes, coldest first; a ``Refusal`` if there is no room then.

        Nothing goes, and no lock is taken.

        Args:
            nbytes: What the graph owns.
            instead_of: A key whose graph would go in any case; it is not among the victims.
            graphs: 0 if only its bytes are wanted, and no place among ``max_graphs``.
        """
        others = [(key, entry) for key, entry in list(self.entries.items()) if key != instead_of]
        replaced = self.entries.get(instead_of)
        count, held = len(others), self.held + self.shared - (0 if replaced is None else replaced.nbytes)
        found: list[tuple[Hashable, Entry[G]]] = []
        if self.fits(count + graphs, held + nbytes):
            return found
        for key, entry in sorted((item for item in others if not item[1].pinned), key=lambda item: self.rank(*item)):
            found.append((key, entry))
            count -= 1
            held -= entry.nbytes
            if self.fits(count + graphs, held + nbytes):
                return found
        pinned = sum(entry.nbytes for _, entry in others if entry.pinned)
        besides = f" and {held - pinned} are shared or reserved" if held > pinned else ""
        raise Refusal(
            Reason.OVER_BUDGET,
            detail=f"{nbytes} bytes wanted; {count} pinned graphs hold {pinned} bytes{besides}, the budget is "
            f"max_graphs={self.max_graphs}, max_bytes={self.max_bytes}",
        )

    def put(self, key: Hashable, graph: G, reservation: Reservation | None = None) -> Entry[G]:
        """Store a graph in place of what has to go, such as the graph of its key; its reservation ends.

        Without room, raises a ``Refusal``; if what goes cannot be closed, raises why. The graph is closed then.
        """
        try:
            with _lock:
                if reservation is not None:
                    reservation.release()
                leaving = self.make_room(graph.nbytes, key, graphs=1)
                entry = self.entries[key] = Entry(graph)
                self.held += entry.nbytes
        except BaseException:
            graph.close()
            raise
        try:
            _close(leaving, wait=False)
        except BaseException:
            self.evict(key, only=entry)
            raise
        return entry

    def evict(self, key: Hashable, *, only: Entry[G] | None = None) -> bool:
        """Drop and close one graph; whether there was one."""
        with _lock:
            entry = self.entries.get(key)
            if entry is None or (only is not None and entry is not only):
                return False
            leaving = _take_out([(self, key, entry)])
        _close(leaving, wait=False)
        return True

    def clear(self, *, wait: bool = True) -> None:
        """Drop and close every graph, pinned ones too, even if closing one of them raises."""
        with _lock:
            leaving = _take_out([(self, key, entry) for key, entry in self.entries.items()])
        _close(leaving, wait=wait)

    def make_room(self, nbytes: int, instead_of: Hashable, graphs: int) -> list[_Item]:
        """Take out what has to go for a graph, here and on the device, to be closed without the lock."""
        leaving: list[_Item] = [
            (self, key, entry) for key, entry in self.victims(nbytes, instead_of=instead_of, graphs=graphs)
        ]
        if instead_of in self.entries:
            leaving.insert(0, (self, instead_of, self.entries[instead_of]))
        return _take_out(leaving + self.budget.victims(nbytes, leaving))

    def fits(self, graphs: int, nbytes: int) -> bool:
        """Whether so many graphs of so many bytes together fit."""
        return graphs <= self.max_graphs and (self.max_bytes is None or nbytes <= self.max_bytes)


class DeviceBudget:
    """A budget in bytes that the caches of all modules on a device share; ``None`` is no bound. It holds no cache."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._caches: WeakSet[GraphCache[Any]] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes owned by the graphs of all caches, with what they share and what is reserved."""
        with _lock:
            return self._held()

    def register(self, cache: GraphCache[Any]) -> None:
        """Count a cache from now on, and evict from it when room is needed; twice does nothing."""
        with _lock:
            self._caches.add(cache)
            cache.budget = self

    def set_budget(self, max_bytes: int | None) -> None:
        """Change the budget. What it no longer holds goes now, but for pinned graphs."""
        with _lock:
            self.max_bytes = max_bytes
            leaving = _take_out(self._coldest(0, [])[0])
        _close(leaving, wait=True)

    def fits(self, nbytes: int) -> bool:
        """Whether there is room for so many bytes more. The lock is held."""
        return self.max_bytes is None or self._held() + nbytes <= self.max_bytes

    def victims(self, nbytes: int, leaving: list[_Item]) -> list[_Item]:
        """What has to go, besides what is leaving, for so many bytes more; a ``Refusal`` if there is no room then."""
        if self.max_bytes is None:
            return []
        found, held = self._coldest(nbytes, leaving)
        if held + nbytes > self.max_bytes:
            raise Refusal(
                Reason.OVER_BUDGET,
                detail=f"{nbytes} bytes wanted; {held} bytes of all modules are pinned, shared or reserved, the "
                f"budget of the process is {self.max_bytes} bytes",
            )
        return found

    def _coldest(self, nbytes: int, leaving: list[_Item]) -> tuple[list[_Item], int]:
        """The coldest graphs of all that have to go, or as many as there are, and the bytes that are held then."""
        gone = {entry for _, _, entry in leaving}
        held = self._held() - sum(entry.nbytes for entry in gone)
        free: list[_Item] = [
            (cache, key, entry)
            for cache in self._caches
            for key, entry in cache.entries.items()
            if not entry.pinned and entry not in gone
        ]
        found: list[_Item] = []
        for item in sorted(free, key=lambda item: item[2].used):
            if self.max_bytes is None or held + nbytes <= self.max_bytes:
                break
            found.append(item)
            held -= item[2].nbytes
        return found, held

    def _held(self) -> int:
        # A reservation has what is leaving for its sake until that is closed, and not both.
        return sum(
            cache.held + cache.shared - sum(min(each.nbytes, each.leaving) for each in cache.reservations)
            for cache in self._caches
        )


class Reservation:
    """Bytes of a cache and its device that are kept for one graph, until it is stored or its capture is given up.

    A context manager, which gives them back at the end of its block.
    """

    def __init__(self, cache: GraphCache[Any]) -> None:
        self._cache = cache
        self.nbytes = 0
        """How many bytes are kept."""
        self.leaving = 0
        """Bytes of what goes for its sake and is not closed yet."""

    def take(self, nbytes: int, key: Hashable = None) -> None:
        """Keep so many bytes for the graph of a key; if they are short graphs go, and are closed before it returns.

        Where only the number of graphs is short, nothing goes before the new graph is there: a capture that fails costs
        no graph then. Raises a ``Refusal``, with nothing evicted, if there is no room whatever goes.
        """
        cache = self._cache
        with _lock:
            has_room = cache.fits(0, cache.held + cache.shared + nbytes) and cache.budget.fits(nbytes)
            leaving = [] if has_room else cache.make_room(nbytes, key, graphs=0)
            self.nbytes, self.leaving = nbytes, sum(entry.nbytes for _, _, entry in leaving)
            cache.reservations.append(self)
            cache.held += nbytes
        try:
            _close(leaving, wait=True, reservation=self)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the bytes back; a second time does nothing."""
        with _lock:
            if self in self._cache.reservations:
                self._cache.reservations.remove(self)
                self._cache.held -= self.nbytes

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def _take_out(items: list[_Item]) -> list[_Item]:
    """Take graphs out of their caches; their bytes count until they are closed. The lock is held."""
    for cache, key, _ in items:
        del cache.entries[key]
    return items


def _close(items: list[_Item], *, wait: bool, reservation: Reservation | None = None) -> None:
    """Tell of graphs that were taken out and close them, in order, all of them even if one raises; without the lock."""
    with ExitStack() as each:
        for cache, key, entry in reversed(items):
            each.callback(_closed, cache, entry, reservation)
            each.callback(entry.graph.close, wait=wait)
            if cache.on_evict is not None:
                each.callback(cache.on_evict, key, entry)


def _closed(cache: GraphCache[Any], entry: Entry[Any], reservation: Reservation | None) -> None:
    with _lock:
        cache.held -= entry.nbytes
        if reservation is not None:
            reservation.leaving -= entry.nbytes


# ---- the budgets of this process

PROCESS_BYTES = "GRAPHCACHE_PROCESS_MAX_BYTES"
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
    if device is not None:
        budget_of(device).set_budget(max_bytes)
        return
    with _lock:
        _default[:] = [max_bytes]
        found = list(_budgets.values())
    for each in found:
        each.set_budget(max_bytes)
