"""Which misses are captured: all with ``capture="first"``, none with ``"prepared"``, what pays with ``"worthwhile"``.

With ``"worthwhile"`` each key is a rent-or-buy problem. An eager call pays rent: what a replay would have saved. A
capture buys. The rule:

- A key is captured when its eager calls have lost ``PRICE`` times what a capture takes (ski rental).
- The value of a key is what its calls lately saved by replays, or would have saved: its calls, discounted over time
  with a half-life, times the saving of one call. The graph of least value goes first, per byte where bytes are bounded.
  A key replaces graphs only if its value is ``HOTTER`` times theirs.
- An account bounds the loss. Captures are charged to it. It is credited what replays save, and ``OVERHEAD`` of the time
  that eager execution would have taken. Nothing is captured while it is overdrawn. So the total time is at most
  1 + ``OVERHEAD`` times always-eager plus one capture, on any traffic and at any moment, as far as times are as
  measured. Credit is limited to capturing the whole cache once: a good year does not pay for a bad hour.

Time, in here, is what eager execution of all calls would have taken so far, without stalls. It stands still while
nothing is called.

The constants were chosen on traces like those of ``tests/cache/test_worthwhile_traces.py``: 280 of them, under six sets
of measured costs, three seeds, 8 and 16 graphs. The geometric mean of total time over the offline optimum is 1.10.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from graphcache.cache.costs import LARGEST, Estimate, KeyCosts, Known, Mean
from graphcache.cache.graph_cache import Entry, GraphCache
from graphcache.cache.key_table import KeyTable
from graphcache.config import Capture
from graphcache.errors import Cause, Reason, Refusal

OVERHEAD = 0.02
"""Fraction of the time of eager execution that may be spent on captures that never pay."""
PRICE = 0.4
"""Captures: what a key has to lose before it is captured. From 0.3 to 0.6 the mean changes by 0.4 %; at 1 it is 2 %
worse, since keys that stay are captured late."""
HALF_LIFE = 4.0
"""Captures of the whole cache: the time in which the weight of a call halves. From 3 to 9 the mean changes by 0.3 %."""
HOTTER = 2.0
"""Times the value of the graphs that would go. From 1.5 to 3 the mean changes by 0.5 %; with less, graphs replace each
other by chance, with more, changing traffic takes longer."""
_PRIOR_CAPTURE = 50.0
"""Eager calls that a capture is taken to cost before the first one was measured (measured: 14 to 140, engines)."""
_PRIOR_SHARE = 0.3
"""Fraction of an eager call that a replay is taken to last before one was measured (measured: 0.14 to 0.5)."""
_LARGEST_SHARE = 0.9
"""Bound of the mean of that fraction, so that a few slow graphs do not forbid all others."""
_LEAST_LOOKS = 16
"""Misses between two looks at all graphs, at least; with more graphs as many as there are graphs."""

_COLD = Cause(Reason.COLD)
_OVERDRAWN = Cause(Reason.COLD, detail="the captures so far have yet to pay for themselves")
_CROWDED = Cause(Reason.COLD, detail="the budget is full of graphs that are about as hot")
_NOT_WORTH_IT = Cause(Reason.NOT_WORTH_IT)
_NOT_PREPARED = Cause(Reason.NOT_PREPARED)


class Account(NamedTuple):
    """What all measured calls of a module would have taken eagerly, what replays saved of it, and captures took."""

    eager_seconds: float
    saved_seconds: float
    capture_seconds: float


class Admission:
    """Decides what is captured, and keeps the costs of each key, for ``explain`` and manifests too.

    A hit costs nothing: hits are read from the cache's entries when something else has to be decided. Any thread may
    call it, also with the cache's lock held, which it never takes.
    """

    def __init__(self, capture: Capture, cache: GraphCache[Any], keys: KeyTable | None = None) -> None:
        self.measures_replays = capture == "worthwhile"
        """Whether decisions depend on the time of replays, so that :meth:`captured` is to be given one."""
        self._refusal = _NOT_PREPARED if capture == "prepared" else None
        self._cache = cache
        self._keys = KeyTable(cache.entries) if keys is None else keys
        self._lock = self._keys.lock
        self._now = self._counted_at = self._credit = 0.0
        self._eager_seconds = self._saved_seconds = self._capture_seconds = 0.0
        # Over all keys, for those that were not measured.
        self._nbytes, self._typical_eager, self._typical_share = Mean(0.0), Mean(0.0), Mean(_PRIOR_SHARE)
        self._any_capture = Estimate()
        self._victims_value = 0.0
        self._misses = 0
        if self.measures_replays:
            cache.rank = self.worth

    def ask(self, key: Hashable) -> Cause | None:
        """Why a miss is to run eagerly; ``None`` if it is to be captured."""
        if not self.measures_replays:
            return self._refusal
        with self._lock:
            costs = self._costs_of(key)
            if costs is None or costs.eager.count < 2:
                # The first call of a key takes longer than the others: it is no measure.
                return _COLD
            saving = self._saving(costs)
            if saving <= 0.0:
                return _NOT_WORTH_IT if costs.replay.count else _COLD
            self._misses += 1
            if self._misses >= max(_LEAST_LOOKS, len(self._cache)):
                self._look(key)
            if costs.owed * saving < PRICE * self._capture_time(costs):
                return _COLD
            # So far by what was known at the last look, which takes as long as there are graphs.
            return self._refuses(costs) or self._look(key) or self._refuses(costs)

    def ran(self, key: Hashable, seconds: float) -> None:
        """Note an eager call and its time."""
        with self._lock:
            costs, typical = self._find(key), self._typical_eager
            costs.eager.add(seconds)
            costs.calls += 1
            costs.owed += 1
            self._eager_seconds += seconds
            if costs.eager.count > 1:
                typical.add(costs.eager.value)
            # Stalls and first calls buy nothing, and make nothing older.
            elapsed = min(seconds, LARGEST * typical.value) if typical.count else seconds
            self._now += elapsed
            self._credit += OVERHEAD * elapsed
            self._warm(costs, 1)

    def captured(
        self, key: Hashable, seconds: float, *, replay: float | None = None, preparing: bool = False
    ) -> Cause | None:
        """Note that a graph is in the cache; a cause if the caller should evict it, being no faster than eager.

        ``seconds`` is what the capture added to the call, ``replay`` the time of a replay if it was measured. With
        ``preparing`` no call waited for the capture, and serving does not have to earn it.
        """
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
        with self._lock:
            self._find(key).owed = 0
            self._spend(seconds, preparing)

    def charge(self, seconds: float) -> None:
        """Note time that was spent for graphs besides captures."""
        with self._lock:
            self._spend(seconds, False)

    def evicted(self, key: Hashable, entry: Entry[Any]) -> None:
        """Note that a graph has left the cache; for its ``on_evict``."""
        with self._lock:
            if (costs := self._costs_of(key)) is not None:
                self._count_hits([(key, entry)])
                costs.counted = costs.owed = 0

    def learn(self, key: Hashable, *, eager: float, replay: float, capture: float) -> None:
        """Take over times that were measured in another process, in seconds."""
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
        if costs is None:
            return Known()
        hits = costs.hits + max(0 if entry is None else entry.hits - costs.counted, 0)
        return Known(costs.calls + hits, hits, costs.eager.known, costs.replay.known, costs.capture.known)

    def expected_nbytes(self, key: Hashable) -> int:
        """Memory that a graph of the key will own: that of its last one, else the mean of all graphs."""
        costs = self._costs_of(key)
        return costs.nbytes if costs is not None and costs.nbytes else math.ceil(self._nbytes.value)

    def account(self) -> Account:
        """Costs and savings so far, as far as calls were measured."""
        with self._lock:
            self._count_hits(self._cache.entries.items())
            return Account(self._eager_seconds, self._saved_seconds, self._capture_seconds)

    def worth(self, key: Hashable, entry: Entry[Any]) -> float:
        """The value of a graph, to rank it by; for each byte where bytes are bounded. It takes no lock."""
        costs = self._costs_of(key)
        if costs is None:
            return 0.0
        value = self._value(costs, entry.hits - costs.counted)
        return value if self._cache.max_bytes is None else value / max(entry.nbytes, 1)

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

    def _refuses(self, costs: KeyCosts) -> Cause | None:
        """Why a key that has lost enough is not captured, as of the last look."""
        if self._credit < 0.0:
            return _OVERDRAWN
        return _CROWDED if self._value(costs) < HOTTER * self._victims_value else None

    def _look(self, key: Hashable) -> Cause | None:
        """Count all hits, and see what the graphs are worth that would go for one of a key; why there is no room."""
        self._misses = 0
        self._count_hits(self._cache.entries.items())
        self._victims_value = 0.0
        try:
            victims = self._cache.victims(self.expected_nbytes(key))
        except Refusal as refusal:
            return refusal.cause
        found = [self._costs_of(key) for key, _ in victims]
        self._victims_value = sum(self._value(costs) for costs in found if costs is not None)
        return None

    def _count_hits(self, items: Iterable[tuple[Hashable, Entry[Any]]]) -> None:
        """Count the hits of graphs since the last time, and what they saved."""
        fresh = [
            (costs, entry.hits - costs.counted)
            for key, entry in list(items)
            if (costs := self._costs_of(key)) is not None and entry.hits > costs.counted
        ]
        for costs, count in fresh:
            costs.hits += count
            costs.counted += count
        if not self.measures_replays:
            return
        elapsed = sum(count * self._eager_time(costs) for costs, count in fresh)
        saved = sum(count * self._saving(costs) for costs, count in fresh)
        self._now += elapsed
        self._eager_seconds += elapsed
        self._saved_seconds += saved
        self._credit = min(self._credit + saved + OVERHEAD * elapsed, self._cache_time())
        # As if the hits had come evenly since the last time: when they came was not written down.
        age = (self._now - self._counted_at) / self._half_life() * math.log(2.0)
        weight = -math.expm1(-age) / age if age > 1e-9 else 1.0
        for costs, count in fresh:
            self._warm(costs, count * weight)
        self._counted_at = self._now

    def _spend(self, seconds: float, free: bool) -> None:
        """Note time that was spent for graphs; ``free`` if no call waited for it."""
        self._capture_seconds += seconds
        if self.measures_replays:
            # First what replays have saved until now: credit is bounded.
            self._count_hits(self._cache.entries.items())
        if not free:
            self._credit -= seconds

    def _note_times(self, costs: KeyCosts) -> Cause | None:
        """Use the times of a key for others too; the cause if its graph is no faster."""
        if costs.capture.count:
            self._any_capture.add(costs.capture.value)
        # One eager call may have been slow because it was the first.
        if costs.eager.count < 2 or not costs.replay.count or not self.measures_replays:
            return None
        if costs.eager.value > 0.0:
            self._typical_share.add(min(costs.replay.value / costs.eager.value, _LARGEST_SHARE))
        return _NOT_WORTH_IT if costs.replay.value >= costs.eager.value else None

    def _value(self, costs: KeyCosts, uncounted: int = 0) -> float:
        """What replays lately saved, or would have saved, in seconds. It takes no lock."""
        half_life = self._half_life()
        heat = costs.heat * math.exp2((costs.at - self._now) / half_life) + max(uncounted, 0)
        # The few calls of a young key are taken for a part of a long past.
        seen = 1.0 - math.exp2((costs.born - self._now) / half_life)
        return heat / max(seen, 1e-6) * max(self._saving(costs), 0.0)

    def _warm(self, costs: KeyCosts, calls: float) -> None:
        """Add calls to the discounted number of calls."""
        costs.heat = costs.heat * math.exp2((costs.at - self._now) / self._half_life()) + calls
        costs.at = self._now

    def _saving(self, costs: KeyCosts) -> float:
        """Seconds by which a replay is faster than an eager call."""
        eager = self._eager_time(costs)
        return eager - (costs.replay.value if costs.replay.count else eager * self._typical_share.value)

    def _eager_time(self, costs: KeyCosts) -> float:
        """Seconds of an eager call."""
        if costs.eager.count:
            return costs.eager.value
        share = self._typical_share.value
        return costs.replay.value / share if costs.replay.count and share > 0.0 else self._typical_eager.value

    def _capture_time(self, costs: KeyCosts | None = None) -> float:
        """Seconds of a capture: of this key, else of any."""
        if costs is not None and costs.capture.count:
            return costs.capture.value
        return self._any_capture.value if self._any_capture.count else _PRIOR_CAPTURE * self._typical_eager.value

    def _cache_time(self) -> float:
        """Seconds of capturing the whole cache."""
        return (len(self._cache) + 1) * self._capture_time()

    def _half_life(self) -> float:
        """Seconds in which the weight of a call halves. The floor is for times that are all zero."""
        return max(HALF_LIFE * self._cache_time(), 1e-9)
