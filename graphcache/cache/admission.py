"""Which misses are captured: the interface of an admission policy, and the two policies that decide without measuring.

``capture="first"`` captures every miss, ``capture="prepared"`` none. ``capture="worthwhile"`` is in
:mod:`graphcache.cache.worthwhile`. All of them keep the costs of each key, for ``explain`` and manifests.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from graphcache.cache.costs import KeyCosts, Known, Mean, checked_seconds
from graphcache.cache.graph_cache import Entry, GraphCache
from graphcache.cache.key_table import KeyTable
from graphcache.errors import Cause


@dataclass(frozen=True, slots=True)
class Account:
    """Costs and savings of the graphs of a module, in seconds.

    Args:
        eager_seconds: Time that all calls would have taken eagerly.
        saved_seconds: Time that replays saved of it; negative if they were slower.
        capture_seconds: Time of captures, failed ones too.
    """

    eager_seconds: float
    saved_seconds: float
    capture_seconds: float


class Admission:
    """Answers every miss alike: captured, or refused for one cause. It keeps costs and decides nothing by them.

    Times are seconds of whatever is to be saved, as long as eager calls, replays and captures are measured alike. The
    time of a capture is what it added to its call. Any thread may call it, also with the cache's lock held, which it
    never takes.

    Args:
        cache: The graphs. A hit is counted in the cache's entry alone, and read from there.
        keys: Where the costs of each key are kept; a table of its own if ``None``.
        refusal: The cause for which misses run eagerly; ``None`` if they are captured.

    Example:
        >>> admission = Admission(GraphCache(max_graphs=8))
        >>> admission.ask("8x64") is None
        True
        >>> admission.ran("8x64", 180e-6)
        1
        >>> admission.known("8x64").eager
        0.00018
    """

    measures_replays = False
    """Whether decisions depend on the time of replays, so that :meth:`captured` is to be given one."""

    def __init__(self, cache: GraphCache[Any], keys: KeyTable | None = None, refusal: Cause | None = None) -> None:
        self._cache = cache
        self._keys = KeyTable(cache.entries) if keys is None else keys
        self._refusal = refusal
        self._nbytes = Mean(0.0)
        self._now = 0.0
        self._eager_seconds = self._saved_seconds = self._capture_seconds = 0.0
        self._lock = self._keys.lock

    def ask(self, key: Hashable) -> Cause | None:
        """Why a miss is to run eagerly; ``None`` if it is to be captured."""
        return self._refusal

    def ran(self, key: Hashable, seconds: float) -> int:
        """Note an eager call and its time; how many eager calls of the key there were."""
        seconds = checked_seconds(seconds, "seconds")
        with self._lock:
            costs = self._find(key)
            costs.eager.add(seconds)
            costs.calls += 1
            costs.owed += 1
            self._eager_seconds += seconds
            self._note_eager(costs, seconds)
            return costs.calls

    def captured(
        self, key: Hashable, seconds: float, *, replay: float | None = None, preparing: bool = False
    ) -> Cause | None:
        """Note that a graph is in the cache; a cause if the caller should evict it, being no faster than eager.

        ``seconds`` is what the capture added to the call, ``replay`` the time of a replay if it was measured. With
        ``preparing`` no call waited for the capture, and serving does not have to earn it.
        """
        seconds = checked_seconds(seconds, "seconds")
        replay = None if replay is None else checked_seconds(replay, "replay")
        with self._lock:
            costs = self._find(key)
            costs.capture.add(seconds)
            costs.owed = 0
            if replay is not None:
                costs.replay.add(replay)
            if (entry := self._cache.entries.get(key)) is not None:
                costs.nbytes = entry.nbytes
                self._nbytes.add(entry.nbytes)
            self._spend(seconds, preparing)
            return self._note_times(costs)

    def failed(self, key: Hashable, seconds: float, *, preparing: bool = False) -> None:
        """Note that a capture gave no graph; the key has to earn the next attempt from the beginning."""
        seconds = checked_seconds(seconds, "seconds")
        with self._lock:
            self._find(key).owed = 0
            self._spend(seconds, preparing)

    def charge(self, seconds: float) -> None:
        """Note time that was spent for graphs besides captures."""
        seconds = checked_seconds(seconds, "seconds")
        with self._lock:
            self._spend(seconds, False)

    def evicted(self, key: Hashable, entry: Entry[Any]) -> None:
        """Note that a graph has left the cache; for its ``on_evict``."""
        with self._lock:
            if (costs := self._costs_of(key)) is not None:
                self._count_hits([(costs, entry.hits)])
                costs.counted = costs.owed = 0

    def learn(self, key: Hashable, *, eager: float, replay: float, capture: float) -> None:
        """Take over times that were measured in another process, in seconds."""
        eager, replay = checked_seconds(eager, "eager"), checked_seconds(replay, "replay")
        capture = checked_seconds(capture, "capture")
        with self._lock:
            costs = self._find(key)
            # Twice, since a single measurement of an eager call is not trusted.
            for _ in range(2):
                costs.eager.add(eager)
            costs.replay.add(replay)
            costs.capture.add(capture)
            self._note_times(costs)

    def known(self, key: Hashable) -> Known:
        """Counts and times of a key; nothing but zeros and ``None`` if it was never called or has been forgotten."""
        costs, entry = self._costs_of(key), self._cache.entries.get(key)
        return Known() if costs is None else costs.known(entry.hits if entry is not None else 0)

    def expected_nbytes(self, key: Hashable) -> int:
        """Memory that a graph of the key will own: that of its last one, else the mean of all graphs."""
        costs = self._costs_of(key)
        return costs.nbytes if costs is not None and costs.nbytes else math.ceil(self._nbytes.value)

    def account(self) -> Account:
        """Costs and savings so far, as far as calls were measured."""
        with self._lock:
            self._settle()
            return Account(self._eager_seconds, self._saved_seconds, self._capture_seconds)

    def _costs_of(self, key: Hashable) -> KeyCosts | None:
        """The costs of a key, if it is remembered. It takes no lock."""
        state = self._keys.get(key)
        return None if state is None else state.costs

    def _find(self, key: Hashable) -> KeyCosts:
        """The costs of a key, which is the last to be forgotten from now on. The lock is held."""
        state = self._keys.used(key)
        if state.costs is None:
            state.costs = KeyCosts(self._now)
        return state.costs

    def _settle(self) -> None:
        """Count the hits of all graphs since the last time."""
        self._count_hits(
            [
                (costs, entry.hits)
                for key, entry in list(self._cache.entries.items())
                if (costs := self._costs_of(key)) is not None and entry.hits != costs.counted
            ]
        )

    def _count_hits(self, fresh: list[tuple[KeyCosts, int]]) -> None:
        """Count hits of graphs, given as their entries say."""
        for costs, hits in fresh:
            costs.hits += max(hits - costs.counted, 0)
            costs.counted = hits

    def _spend(self, seconds: float, free: bool) -> None:
        """Note time that was spent for graphs; ``free`` if no call waited for it."""
        self._capture_seconds += seconds

    def _note_eager(self, costs: KeyCosts, seconds: float) -> None:
        """Use the time of an eager call."""

    def _note_times(self, costs: KeyCosts) -> Cause | None:
        """Use the times of a key; the cause if its graph should go."""
        return None
