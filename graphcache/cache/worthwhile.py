"""``capture="worthwhile"``: capture what pays for itself, keep the graphs that save most, bound what is lost.

Each key is a rent-or-buy problem. An eager call pays rent: what a replay would have saved. A capture buys. The rule:

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
from typing import Any

from graphcache.cache.admission import Admission
from graphcache.cache.costs import LARGEST, Estimate, KeyCosts, Mean
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


def admission_for(policy: Capture, cache: GraphCache[Any], keys: KeyTable | None = None) -> Admission:
    """The admission policy of a module.

    Example:
        >>> admission_for("prepared", GraphCache(max_graphs=8)).ask("8x64").reason
        <Reason.NOT_PREPARED: 'not_prepared'>
    """
    if policy == "worthwhile":
        return Worthwhile(cache, keys)
    return Admission(cache, keys, _NOT_PREPARED if policy == "prepared" else None)


class Worthwhile(Admission):
    """Captures what pays for itself. The module's docstring states the rule.

    A hit costs nothing: hits are read from the cache's entries when something else has to be decided. A miss costs a
    few microseconds.

    Args:
        cache: The graphs. Its ``rank`` is set to :meth:`worth`.

    Example:
        >>> admission = Worthwhile(GraphCache(max_graphs=8))
        >>> admission.learn("8x64", eager=180e-6, replay=50e-6, capture=5e-3)
        >>> while admission.ask("8x64") is not None:
        ...     calls = admission.ran("8x64", 180e-6)
        >>> calls  # each loses 130 us: 0.4 times 5 ms together
        16
    """

    measures_replays = True

    def __init__(self, cache: GraphCache[Any], keys: KeyTable | None = None) -> None:
        super().__init__(cache, keys)
        # Over all keys, for those that were not measured.
        self._typical_eager, self._typical_share, self._any_capture = Mean(0.0), Mean(_PRIOR_SHARE), Estimate()
        self._credit = 0.0
        self._settled_at = 0.0
        self._victims_value = 0.0
        self._misses = 0
        cache.rank = self.worth

    def ask(self, key: Any) -> Cause | None:
        with self._lock:
            costs = self._costs_of(key)
            if costs is None or costs.eager.count < 2:
                # The first call of a key takes longer than the others: it is no measure.
                return _COLD
            saving = self._saving(costs)
            if saving <= 0.0:
                return _NOT_WORTH_IT if costs.replay.count else _COLD
            self._misses += 1
            if self._misses >= max(_LEAST_LOOKS, len(self._cache.entries)):
                self._look()
            if costs.owed * saving < PRICE * self._capture_time(costs):
                return _COLD
            if (cause := self._refuses(costs)) is not None:
                return cause
            # So far by what was known at the last look.
            try:
                self._look(self.expected_nbytes(key))
            except Refusal as refusal:
                return refusal.cause
            return self._refuses(costs)

    def worth(self, key: Any, entry: Entry[Any]) -> float:
        """The value of a graph, to rank it by; for each byte where bytes are bounded. It takes no lock."""
        costs = self._costs_of(key)
        if costs is None:
            return 0.0
        value = self._value(costs, entry.hits - costs.counted)
        return value if self._cache.max_bytes is None else value / max(entry.nbytes, 1)

    def _refuses(self, costs: KeyCosts) -> Cause | None:
        """Why a key that has lost enough is not captured, as of the last look."""
        if self._credit < 0.0:
            return _OVERDRAWN
        return _CROWDED if self._value(costs) < HOTTER * self._victims_value else None

    def _look(self, nbytes: int | None = None) -> None:
        """Count all hits, and see what the graphs are worth that would go for one more."""
        self._misses = 0
        self._settle()
        try:
            victims = self._cache.victims(math.ceil(self._nbytes.value) if nbytes is None else nbytes)
        except Refusal:
            # Every graph is pinned, say; whoever asks for room is told.
            if nbytes is not None:
                raise
            victims = []
        found = [self._costs_of(key) for key, _ in victims]
        self._victims_value = sum(self._value(costs) for costs in found if costs is not None)

    def _note_eager(self, costs: KeyCosts, seconds: float) -> None:
        if costs.eager.count > 1:
            self._typical_eager.add(costs.eager.value)
        # Stalls and first calls buy nothing, and make nothing older.
        typical = self._typical_eager
        elapsed = min(seconds, LARGEST * typical.value) if typical.count else seconds
        self._now += elapsed
        self._credit += OVERHEAD * elapsed
        self._warm(costs, 1.0)

    def _count_hits(self, fresh: list[tuple[KeyCosts, int]]) -> None:
        counts = [(costs, max(hits - costs.counted, 0)) for costs, hits in fresh]
        super()._count_hits(fresh)
        elapsed = sum(count * self._eager_time(costs) for costs, count in counts)
        saved = sum(count * self._saving(costs) for costs, count in counts)
        self._now += elapsed
        self._eager_seconds += elapsed
        self._saved_seconds += saved
        self._credit = min(self._credit + saved + OVERHEAD * elapsed, self._cache_time())
        # As if the hits had come evenly since the last time: when they came was not written down.
        age = (self._now - self._settled_at) / self._half_life() * math.log(2.0)
        weight = -math.expm1(-age) / age if age > 1e-9 else 1.0
        for costs, count in counts:
            self._warm(costs, count * weight)
        self._settled_at = self._now

    def _spend(self, seconds: float, free: bool) -> None:
        super()._spend(seconds, free)
        # First what replays have saved until now: credit is bounded.
        self._settle()
        if not free:
            self._credit -= seconds

    def _note_times(self, costs: KeyCosts) -> Cause | None:
        """Use the times of a key for others too; the cause if its graph is no faster."""
        if costs.capture.count:
            self._any_capture.add(costs.capture.value)
        # One eager call may have been slow because it was the first.
        if costs.eager.count < 2 or not costs.replay.count:
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
        return (len(self._cache.entries) + 1) * self._capture_time()

    def _half_life(self) -> float:
        """Seconds in which the weight of a call halves. The floor is for times that are all zero."""
        return max(HALF_LIFE * self._cache_time(), 1e-9)
