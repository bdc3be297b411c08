"""Which misses are captured: all with ``capture="first"``, none with ``"prepared"``, what pays with ``"worthwhile"``.

With ``"worthwhile"`` each key is a rent-or-buy problem. An eager call pays rent: what a replay would have saved. A
capture buys, once a key has lost ``PRICE`` times what it takes (ski rental). The value of a key is what replays of its
calls lately saved, or would have saved: its calls, discounted over time, times the saving of one. The graph of least
value goes first, per byte where bytes are bounded. A key replaces graphs only if its value is ``HOTTER`` times theirs.

Captures are charged to an account, which is credited what replays save, and ``OVERHEAD`` of the time that eager
execution would have taken. Nothing is captured while it is overdrawn. So the total time is at most 1 + ``OVERHEAD``
times always-eager plus one capture, on any traffic and at any moment, as far as times are as measured. Credit is
limited to capturing the whole cache once: a good year does not pay for a bad hour.

Time, in here, is what eager execution of all calls would have taken so far, without stalls.

The constants were chosen on traces like those of ``tests/cache/test_worthwhile_traces.py``: 280 of them, under six sets
of measured state, three seeds, 8 and 16 graphs. The geometric mean of total time over the offline optimum is 1.10.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from graphcache.cache.graph_cache import Entry, GraphCache, weakly
from graphcache.cache.key_table import LARGEST, Estimate, KeyState, KeyTable, Mean
from graphcache.config import Capture
from graphcache.errors import Cause, Reason, Refusal

OVERHEAD = 0.02
"""Fraction of the time of eager execution that may be spent on captures that never pay."""
PRICE = 0.4
"""Captures: what a key has to lose before it is captured. From 0.3 to 0.6 the mean changes by 0.4 %, at 1 by 2 %."""
HALF_LIFE = 4.0
"""Captures of the whole cache: the time in which the weight of a call halves. From 3 to 9 the mean changes by 0.3 %."""
HOTTER = 2.0
"""Times the value of the graphs that would go. From 1.5 to 3 the mean changes by 0.5 %."""
_PRIOR_CAPTURE = 50.0
"""Eager calls that a capture is taken to cost before the first one was measured (measured: 14 to 140, engines)."""
_PRIOR_SHARE = 0.3
"""Fraction of an eager call that a replay is taken to last before one was measured (measured: 0.14 to 0.5)."""
_SHARES = (0.01, 0.9)
"""Bounds of that fraction in the mean over keys, so that a few slow graphs do not forbid all others."""
_LEAST_LOOKS = 16
"""Misses between two looks at all graphs, at least; with more graphs as many as there are graphs."""

_COLD = Cause(Reason.COLD)
_OVERDRAWN = Cause(Reason.COLD, detail="the captures so far have yet to pay for themselves")
_CROWDED = Cause(Reason.COLD, detail="the budget is full of graphs that are about as hot")
_NOT_WORTH_IT = Cause(Reason.NOT_WORTH_IT)
_NOT_PREPARED = Cause(Reason.NOT_PREPARED)


@dataclass
class Account:
    """What all measured calls of a module would have taken eagerly, what replays saved of it, and captures took."""

    eager_seconds: float = 0.0
    saved_seconds: float = 0.0
    capture_seconds: float = 0.0


class Admission:
    """Decides what is captured, and keeps the costs of each key, for ``explain`` and manifests too.

    A hit costs nothing: hits are counted when something else has to be decided. The cache's lock is never taken.
    """

    def __init__(self, capture: Capture, cache: GraphCache[Any], keys: KeyTable) -> None:
        self.measures_replays = capture == "worthwhile"
        """Whether decisions depend on the time of replays, so that :meth:`captured` is to be given one."""
        self._refusal = _NOT_PREPARED if capture == "prepared" else None
        self._cache = cache
        self._keys = keys
        self._lock = keys.lock
        self._counted_at = self._credit = 0.0
        self._account = Account()
        # Over all keys, for those that were not measured.
        self._eager, self._share, self._capture = Mean(), Mean(_PRIOR_SHARE), Estimate()
        self._victims_value = 0.0
        self._misses = 0
        if self.measures_replays:
            cache.rank = weakly(self.worth, 0.0)

    def ask(self, key: Hashable) -> Cause | None:
        """Why a miss is to run eagerly; ``None`` if it is to be captured."""
        if not self.measures_replays:
            return self._refusal
        with self._lock:
            state = self._keys.states.get(key)
            if state is None or state.eager.count < 2:
                # The first call of a key takes longer than the others: it is no measure.
                return _COLD
            saving = self._saving(state)
            if saving <= 0.0:
                return _NOT_WORTH_IT if state.replay.count else _COLD
            self._misses += 1
            if self._misses >= max(_LEAST_LOOKS, len(self._cache)):
                self._look(key)
            if state.owed * saving < PRICE * self._capture_time():
                return _COLD
            # So far by what was known at the last look, which takes as long as there are graphs.
            return self._refuses(state) or self._look(key) or self._refuses(state)

    def ran(self, key: Hashable, seconds: float) -> None:
        """Note an eager call."""
        with self._lock:
            state = self._keys.used(key)
            state.eager.add(seconds)
            state.ran += 1
            state.owed += 1
            self._account.eager_seconds += seconds
            if state.eager.count > 1:
                self._eager.add(state.eager.value)
            # Stalls and first calls buy nothing, and make nothing older.
            elapsed = min(seconds, LARGEST * self._eager.value) if self._eager.count else seconds
            self._keys.now += elapsed
            self._credit += OVERHEAD * elapsed
            self._warm(state, 1)

    def captured(self, key: Hashable, seconds: float, replay: float, *, preparing: bool = False) -> Cause | None:
        """Note what a capture took, and a replay; a cause if the graph should go, being no faster than eager.

        With ``preparing`` no call waited for the capture, and serving does not have to earn it.
        """
        with self._lock:
            state = self._keys.used(key)
            state.owed = 0
            state.replay.add(replay)
            self._spend(seconds, preparing)
            return self._compared(state, seconds)

    def charge(self, seconds: float, key: Hashable = None, *, preparing: bool = False) -> None:
        """Note time that was spent for graphs besides. A key has to earn its next capture from the beginning."""
        with self._lock:
            if key is not None:
                self._keys.used(key).owed = 0
            self._spend(seconds, preparing)

    def evicted(self, key: Hashable, entry: Entry[Any]) -> None:
        """Note that a graph has left the cache."""
        with self._lock:
            self._count_hits([(key, entry)])
            if (state := self._keys.states.get(key)) is not None:
                state.owed = 0

    def learn(self, key: Hashable, *, eager: float, replay: float, capture: float) -> None:
        """Take over times that were measured in another process, in seconds."""
        with self._lock:
            state = self._keys.used(key)
            # A single measurement of an eager call is not trusted.
            state.eager.add(eager)
            state.eager.add(eager)
            state.replay.add(replay)
            state.capture.add(capture)
            self._compared(state, capture)

    def account(self) -> Account:
        """Costs and savings so far, as far as calls were measured."""
        with self._lock:
            self._count_hits(self._cache.entries.items())
            return replace(self._account)

    def worth(self, key: Hashable, entry: Entry[Any]) -> float:
        """The value of a graph, to rank it by; for each byte where bytes are bounded. It takes no lock."""
        state = self._keys.states.get(key)
        value = 0.0 if state is None else self._value(state, entry.hits - entry.counted)
        return value if self._cache.max_bytes is None else value / max(entry.nbytes, 1)

    def _refuses(self, state: KeyState) -> Cause | None:
        """Why a key that has lost enough is not captured, as of the last look."""
        if self._credit < 0.0:
            return _OVERDRAWN
        return _CROWDED if self._value(state) < HOTTER * self._victims_value else None

    def _look(self, key: Hashable) -> Cause | None:
        """Count all hits, and see what the graphs are worth that would go for one of a key; why there is no room."""
        self._misses = 0
        self._count_hits(self._cache.entries.items())
        self._victims_value = 0.0
        try:
            victims = self._cache.victims(self._keys.expected_nbytes(key))
        except Refusal as refusal:
            return refusal.cause
        states = self._keys.states
        self._victims_value = sum(self._value(states[key]) for key, _ in victims if key in states)
        return None

    def _count_hits(self, items: Iterable[tuple[Hashable, Entry[Any]]]) -> None:
        """Count the hits of graphs since the last time, and what they saved."""
        fresh = []
        for key, entry in list(items):
            state, count = self._keys.states.get(key), entry.hits - entry.counted
            if state is not None and count > 0:
                state.hits += count
                entry.counted += count
                fresh.append((state, count))
        if not self.measures_replays:
            return
        elapsed = sum(count * self._eager_time(state) for state, count in fresh)
        saved = sum(count * self._saving(state) for state, count in fresh)
        self._keys.now += elapsed
        self._account.eager_seconds += elapsed
        self._account.saved_seconds += saved
        self._credit = min(self._credit + saved + OVERHEAD * elapsed, self._cache_time())
        # As if they had come in the midst of the time since the last count.
        weight = self._faded((self._counted_at + self._keys.now) / 2.0)
        for state, count in fresh:
            self._warm(state, count * weight)
        self._counted_at = self._keys.now

    def _spend(self, seconds: float, free: bool) -> None:
        """Note time that was spent for graphs."""
        self._account.capture_seconds += seconds
        if self.measures_replays:
            # First what replays have saved until now: credit is bounded.
            self._count_hits(self._cache.entries.items())
        if not free:
            self._credit -= seconds

    def _compared(self, state: KeyState, capture: float) -> Cause | None:
        """Use the times of a key for others too; the cause if its graph is no faster."""
        self._capture.add(capture)
        if not self.measures_replays or state.eager.count < 2:
            return None
        if state.eager.value > 0.0:
            least, most = _SHARES
            self._share.add(min(max(state.replay.value / state.eager.value, least), most))
        return _NOT_WORTH_IT if state.replay.value >= state.eager.value else None

    def _value(self, state: KeyState, uncounted: int = 0) -> float:
        """What replays lately saved, or would have saved, in seconds. It takes no lock."""
        heat = state.heat * self._faded(state.at) + max(uncounted, 0)
        # The few calls of a young key are taken for a part of a long past.
        return heat / max(1.0 - self._faded(state.born), 1e-6) * max(self._saving(state), 0.0)

    def _warm(self, state: KeyState, calls: float) -> None:
        state.heat = state.heat * self._faded(state.at) + calls
        state.at = self._keys.now

    def _faded(self, since: float) -> float:
        """The weight that a call of that time still has. The floor is for times that are all zero."""
        return math.exp2((since - self._keys.now) / max(HALF_LIFE * self._cache_time(), 1e-9))

    def _saving(self, state: KeyState) -> float:
        """Seconds by which a replay is faster than an eager call."""
        eager = self._eager_time(state)
        return eager - (state.replay.value if state.replay.count else eager * self._share.value)

    def _eager_time(self, state: KeyState) -> float:
        """Seconds of an eager call; the first one of a key, which is slower, is no measure."""
        if state.eager.count > 1:
            return state.eager.value
        return state.replay.value / self._share.value if state.replay.count else self._eager.value

    def _capture_time(self) -> float:
        return self._capture.value if self._capture.count else _PRIOR_CAPTURE * self._eager.value

    def _cache_time(self) -> float:
        """Seconds of capturing the whole cache."""
        return (len(self._cache) + 1) * self._capture_time()
