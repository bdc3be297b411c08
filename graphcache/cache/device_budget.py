"""One budget in bytes for the graphs of all modules on a device.

Each module's cache has a budget of its own, and knows nothing of the others. What they own together is bounded here:
whoever is about to capture reserves, and the coldest graphs of any cache go first.

Locks. A budget's lock is held only to look and to count: under it no cache is changed, no graph closed, no other
lock taken and no foreign code called. Evictions come after it was given back, one by one; a cache's lock is held while
the graph is taken out of it, and given back before its ``on_evict`` is told and the graph closed. So no thread ever
waits for one of these locks while it holds another, whatever else it holds: a module's own lock, say, under which it
captures. Two modules that evict from each other can wait for each other only through what ``on_evict`` or ``close()``
waits for: that must not be a lock that somebody holds while reserving. (A capture reserves before it takes the lock of
the device's lane, which closing a graph needs.)
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Hashable
from typing import Any

import torch

from graphcache.cache.graph_cache import Entry, GraphCache
from graphcache.cache.reservation import Reservation
from graphcache.errors import ConfigError, Reason, Refusal, shown

VARIABLE = "GRAPHCACHE_PROCESS_MAX_BYTES"

_DEVICE = re.compile(r"cpu|[a-z]+:\d{1,4}")

_Victim = tuple[GraphCache[Any], Hashable, Entry[Any]]


class _Claim(Reservation):
    """A reservation with what is still leaving for its sake: until that is gone it may hold more than it wants."""

    victims: tuple[_Victim, ...] = ()

    @property
    def held(self) -> int:
        return max(self.nbytes, sum(entry.nbytes for _, _, entry in self.victims))


class DeviceBudget:
    """A budget in bytes that several caches share.

    Caches are held weakly: one that is collected is gone from the account. What is not reserved before it is allocated
    is counted when it is in a cache, and may until then exceed the budget.

    Args:
        max_bytes: How many bytes all graphs may own together; ``None`` for no bound.

    Raises:
        ConfigError: If ``max_bytes`` is neither.

    Example:
        >>> class Graph:
        ...     nbytes = 8
        ...     def close(self, *, wait=True): print("closed")
        >>> budget, one, other = DeviceBudget(10), GraphCache(max_graphs=9), GraphCache(max_graphs=9)
        >>> budget.register(one)
        >>> budget.register(other)
        >>> entry = one.put("a", Graph())
        >>> with budget.reserve(8):
        ...     entry = other.put("b", Graph())
        closed
        >>> len(one), budget.nbytes
        (0, 8)
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = checked_budget(max_bytes, "max_bytes")
        self._caches: list[weakref.ref[GraphCache[Any]]] = []
        self._claims: list[_Claim] = []
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int | None:
        """The budget in bytes, ``None`` for no bound."""
        return self._max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes owned by the graphs of all caches, with what they share and what is reserved."""
        with self._lock:
            return self._held()

    def register(self, cache: GraphCache[Any]) -> None:
        """Count a cache from now on, and evict from it when room is needed; twice does nothing."""
        with self._lock:
            self._caches = [each for each in self._caches if each() is not None]
            if all(each() is not cache for each in self._caches):
                self._caches.append(weakref.ref(cache))

    def set_budget(self, max_bytes: int | None) -> None:
        """Change the budget. What it no longer holds goes now, but for pinned graphs."""
        max_bytes = checked_budget(max_bytes, "max_bytes")
        with self._lock:
            self._max_bytes = max_bytes
            claim = self._claim(0, self._victims(0))
        self._clear(claim)
        claim.release()

    def reserve(self, nbytes: int) -> Reservation:
        """Evict the coldest graphs of all caches until ``nbytes`` more fit, and keep that room until it is released.

        Raises a ``Refusal``, having evicted nothing, if they cannot fit beside what is pinned, shared and reserved.
        """
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0:
            raise ConfigError(f"nbytes={shown(nbytes)}: expected a whole number of bytes, 0 or more")
        with self._lock:
            victims = self._victims(nbytes)
            held = self._held() - sum(entry.nbytes for _, _, entry in victims)
            if not self._fits(held + nbytes):
                raise Refusal(
                    Reason.OVER_BUDGET,
                    detail=f"{nbytes} bytes wanted; {held} bytes of all modules are pinned, shared or reserved, the "
                    f"budget of the process is {self._max_bytes} bytes",
                )
            claim = self._claim(nbytes, victims)
        try:
            self._clear(claim)
        except BaseException:
            claim.release()
            raise
        return claim

    def _claim(self, nbytes: int, victims: list[_Victim]) -> _Claim:
        claim = _Claim(nbytes, self._release)
        claim.victims = tuple(victims)
        self._claims.append(claim)
        return claim

    def _clear(self, claim: _Claim) -> None:
        """Evict what the claim wants to go, which counts until it is closed."""
        try:
            while claim.victims:
                cache, key, entry = claim.victims[0]
                cache.evict(key, only=entry, wait=True)
                with self._lock:
                    claim.victims = claim.victims[1:]
        finally:
            with self._lock:
                claim.victims = ()

    def _victims(self, nbytes: int) -> list[_Victim]:
        """The coldest graphs that have to go; all there are, if that is not enough."""
        taken = self._taken()
        free = [
            (cache, key, entry)
            for cache in self._alive()
            for key, entry in list(cache.entries.items())
            if not entry.pinned and id(entry) not in taken
        ]
        found: list[_Victim] = []
        total = self._held() + nbytes
        for victim in sorted(free, key=lambda each: each[2].used):
            if self._fits(total):
                break
            found.append(victim)
            total -= victim[2].nbytes
        return found

    def _held(self) -> int:
        # An entry that is leaving for a claim is in the claim.
        taken = self._taken()
        return sum(each.nbytes_without(taken) for each in self._alive()) + sum(claim.held for claim in self._claims)

    def _taken(self) -> set[int]:
        return {id(entry) for claim in self._claims for _, _, entry in claim.victims}

    def _alive(self) -> list[GraphCache[Any]]:
        return [cache for each in self._caches if (cache := each()) is not None]

    def _release(self, claim: Reservation) -> None:
        with self._lock:
            self._claims = [each for each in self._claims if each is not claim]

    def _fits(self, nbytes: int) -> bool:
        return self._max_bytes is None or nbytes <= self._max_bytes


_budgets: dict[str, DeviceBudget] = {}
_default: list[int | None] = []
_lock = threading.Lock()


def budget_of(device: object) -> DeviceBudget:
    """The one budget of a device in this process.

    Example:
        >>> budget_of("cuda:0") is budget_of("cuda:0")
        True
    """
    name = _name_of(device)
    with _lock:
        found = _budgets.get(name)
        if found is None:
            found = _budgets[name] = DeviceBudget(_default[0] if _default else _budget_from_environment())
        return found


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
    max_bytes = checked_budget(max_bytes, "max_bytes")
    if device is not None:
        budget_of(device).set_budget(max_bytes)
        return
    with _lock:
        _default[:] = [max_bytes]
        found = list(_budgets.values())
    for each in found:
        each.set_budget(max_bytes)


def checked_budget(max_bytes: object, what: str) -> int | None:
    """A budget in bytes as it can be.

    Example:
        >>> checked_budget(1, "max_bytes")
        1
    """
    if max_bytes is None:
        return None
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise ConfigError(f"{what}={shown(max_bytes)}: expected a whole number of bytes, 1 or more, or None")
    return max_bytes


def _name_of(device: object) -> str:
    name = str(device) if isinstance(device, (str, torch.device)) else ""
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"device={shown(device)}: expected 'cpu' or a device with its index, such as 'cuda:0'")
    return name


def _budget_from_environment() -> int | None:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal() or len(text) > 30 or int(text) < 1:
        raise ConfigError(f"{VARIABLE}={shown(text)}: expected a whole number of bytes, 1 or more")
    return int(text)
