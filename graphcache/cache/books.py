"""What is known of every signature of one module, and what its graphs have cost and saved.

Time, in here, is what eager execution of all calls would have taken so far, in seconds and without stalls: it stands
still while nothing is called, and runs alike however many calls are hits.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

from graphcache.cache.estimates import LARGEST, Estimate, Mean
from graphcache.cache.lru import Entry
from graphcache.errors import Cause, Reason

COLD = Cause(Reason.COLD)
OVERHEAD = 0.02
"""What of the time of eager execution may be spent on captures that never pay."""
_HALF_LIFE = 6.0
_SILENT, _SILENT_SHARE, _SILENT_POWER = 6.0, 0.53, 1.2
"""How many calls in a row a graph has to have missed, at its usual rate, to be worth less than it was: 6 (by chance one
in 400 does), and as many as save half of what a capture takes. Then how fast it falls."""
_PRIOR_CAPTURE = 50.0
_PRIOR_SHARE = 0.3
_LARGEST_SHARE = 0.9
_LARGEST_FACTOR = 2.0**20


class Record:
    """The books of one signature.

    ``owed`` counts its eager calls since it last had a graph, ``settled`` the hits of its graph that are booked,
    ``look`` the number of owed calls at which to judge it anew; until then ``cause`` is the answer. ``heat`` counts
    recent calls, as of the time ``at``; ``last`` is when one was booked. ``factor`` is how many times the cost of a
    capture it has to owe.
    """

    __slots__ = (
        "at",
        "born",
        "calls",
        "capture",
        "cause",
        "eager",
        "earned",
        "factor",
        "heat",
        "hits",
        "last",
        "look",
        "nbytes",
        "owed",
        "replay",
        "settled",
    )

    def __init__(self, now: float) -> None:
        self.eager, self.replay, self.capture = Estimate(), Estimate(), Estimate()
        self.calls = self.hits = self.owed = self.settled = self.nbytes = 0
        self.cause = COLD
        self.factor = 1.0
        self.heat = self.earned = 0.0
        self.at = self.born = self.last = now
        self.begin()

    def begin(self) -> None:
        """Owe nothing. One call is never enough to judge by: the first of a signature takes longer than the others."""
        self.owed, self.look, self.earned = 0, 2.0, 0.0


class Books:
    """The records of signatures with a graph and, up to a number, of those without; not for several threads at once.

    Args:
        entries: The cache's, where hits are counted.
        remembered: How many signatures without a graph are remembered; the longest uncalled is forgotten first.

    Example:
        >>> books = Books({}, remembered=2)
        >>> for key in "abca":
        ...     _ = books.ran(key, 0.001)
        >>> list(books.seen)
        ['c', 'a']
    """

    def __init__(self, entries: Mapping[Hashable, Entry[Any]], remembered: int) -> None:
        self.seen: OrderedDict[Hashable, Record] = OrderedDict()
        self.kept: dict[Hashable, Record] = {}
        self.now = 0.0
        self.eager = self.saved = self.spent = 0.0
        """What eager execution of all calls would have taken, what replays saved of it, what captures took."""
        self.credit = 0.0
        """What may still be spent; a capture begins only while it is not negative."""
        self.captures = 0
        self._entries = entries
        self._remembered = remembered
        # Over all signatures, for those that were not measured. Of several captures, the first takes longest.
        self._eager, self._share = Mean(0.0), Mean(_PRIOR_SHARE)
        self._capture, self._nbytes = Estimate(), Mean(0.0)
        self._settled_at = 0.0
        self._half_life = 1e-9
        self._lately_saved = self._lately_spent = 0.0

    def find(self, key: Hashable) -> Record:
        """The record of a signature, which is the youngest without a graph from now on if it has none."""
        record = self.kept.get(key)
        if record is None:
            record = self.seen.get(key)
            if record is not None:
                self.seen.move_to_end(key)
            else:
                record = self._remember(key, Record(self.now))
        return record

    def ran(self, key: Hashable, seconds: float) -> int:
        """Book an eager call; how many the signature owes now."""
        record = self.find(key)
        record.eager.add(seconds)
        record.calls += 1
        record.owed += 1
        if record.eager.count > 1:
            self._eager.add(record.eager.value)
        # Stalls and first calls buy nothing, and cool nothing down.
        elapsed = min(seconds, LARGEST * self._eager.value) if self._eager.count else seconds
        self.now += elapsed
        self.eager += seconds
        self.credit += OVERHEAD * elapsed
        if not self._capture.count:
            self._measure_half_life()
        self._cool(record)
        record.heat += 1.0
        record.last = self.now
        return record.owed

    def charge(self, key: Hashable, seconds: float, *, free: bool = False) -> Record:
        """Book what a capture took, whatever came of it; the signature owes nothing afterwards.

        A ``free`` one costs no credit, and makes no other capture dearer.
        """
        self.settle()
        self.spent += seconds
        if not free:
            self._lately_spent += seconds
            self.credit -= seconds
            self.captures += 1
        if key in self.kept:
            self.let_go(key)
        record = self.find(key)
        record.begin()
        return record

    def keep(self, key: Hashable, record: Record, entry: Entry[Any], seconds: float) -> None:
        """Book a graph that is in the cache."""
        record.nbytes = entry.nbytes
        record.settled = entry.hits
        self._nbytes.add(entry.nbytes)
        record.capture.add(seconds)
        self._capture.add(seconds)
        self._measure_half_life()
        self.seen.pop(key, None)
        self.kept[key] = record

    def let_go(self, key: Hashable) -> None:
        """Book that a graph is gone: a capture is dearer next time, unless this one has paid for itself."""
        record = self.kept.pop(key)
        paid = record.earned >= self.capture_seconds(record) * record.factor
        self.raise_price(record, 0.5 if paid else 2.0)
        record.begin()
        self._remember(key, record)

    def raise_price(self, record: Record, times: float) -> None:
        """Change what a signature has to owe, never to less than a capture costs."""
        record.factor = min(max(record.factor * times, 1.0), _LARGEST_FACTOR)

    def pay(self, seconds: float) -> None:
        """Book time that was spent for graphs, and not on a capture."""
        self.settle()
        self.spent += seconds
        self._lately_spent += seconds
        self.credit -= seconds

    def replayed(self, record: Record, seconds: float) -> bool:
        """Book what a replay took; whether replays are no faster than eager calls, where both were measured."""
        record.replay.add(seconds)
        # One eager call may have been slow because it was the first.
        if record.eager.count < 2:
            return False
        if record.eager.value > 0.0:
            self._share.add(min(record.replay.value / record.eager.value, _LARGEST_SHARE))
        return record.replay.value >= record.eager.value

    def learn(self, record: Record, eager: float, replay: float, capture: float) -> None:
        """Book times that were measured elsewhere, as if measured twice."""
        for _ in range(2):
            record.eager.add(eager)
            record.capture.add(capture)
        self._eager.add(eager)
        self._capture.add(capture)
        self.replayed(record, replay)
        self._measure_half_life()

    def settle(self, leaving: Mapping[Hashable, Entry[Any]] | None = None) -> None:
        """Read from the entries what was replayed since the last time.

        Args:
            leaving: Entries that have just left the cache.
        """
        fresh: list[tuple[Record, int]] = []
        gone: list[Hashable] = []
        saved = elapsed = 0.0
        for key, record in self.kept.items():
            entry = (leaving or self._entries).get(key) or self._entries.get(key)
            if entry is None:
                gone.append(key)
                continue
            hits, record.settled = entry.hits - record.settled, entry.hits
            if hits > 0:
                fresh.append((record, hits))
                gained = hits * self.saving(record)
                saved += gained
                elapsed += hits * self._eager_seconds(record)
                record.earned += gained
                record.hits += hits
        self.now += elapsed
        self.eager += elapsed
        left, mean = _decay((self.now - self._settled_at) / self._half_life)
        for record, hits in fresh:
            # As if they had come evenly: when they did was not written down.
            self._cool(record)
            record.heat += hits * mean
            record.last = self.now
        self._settled_at = self.now
        self.saved += saved
        self._lately_saved = self._lately_saved * left + saved * mean
        self._lately_spent *= left
        bank = (len(self._entries) + 1) * self._typical_capture()
        self.credit = min(self.credit + saved + OVERHEAD * elapsed, bank)
        for key in gone:
            self.let_go(key)

    def saving(self, record: Record) -> float:
        """How much faster a replay is than an eager call, in seconds; from other signatures where not measured."""
        eager = self._eager_seconds(record)
        return eager - (record.replay.value if record.replay.count else eager * self._share.value)

    def capture_seconds(self, record: Record) -> float:
        """What a capture takes: this one's, else what captures do on average, else fifty eager calls."""
        return record.capture.value if record.capture.count else self._typical_capture()

    def expected_nbytes(self, record: Record | None) -> int:
        """What a graph of the signature will own: what its last one did, else what graphs do on average."""
        return record.nbytes if record is not None and record.nbytes else math.ceil(self._nbytes.value)

    def worth(self, record: Record, unsettled: int = 0) -> float:
        """What replays lately saved, or would have, in seconds; for comparison with others of this module only.

        A young signature is as hot as its rate says: its few calls are taken for a part of a long past.
        """
        heat = record.heat * math.exp2((record.at - self.now) / self._half_life) + max(unsettled, 0)
        known = 1.0 - math.exp2((record.born - self.now) / self._half_life)
        heat /= max(known, 1e-6)
        saving = max(self.saving(record), 0.0)
        if not unsettled and saving:
            # Silent for many times as long as it used to be: what is hot has changed. The half-life takes its time.
            usual = record.heat / max(known, 1e-6) * math.log(2.0) / self._half_life
            missed = usual * (self.now - record.last)
            again = min(self.capture_seconds(record), self._typical_capture())
            many = max(_SILENT, _SILENT_SHARE * again / saving)
            if missed > many:
                heat *= (many / missed) ** _SILENT_POWER
        return heat * saving

    def lately_returned(self) -> float:
        """How many times captures have lately paid for themselves; 0 before two captures."""
        if self.captures < 2 or self._lately_spent <= 0.0:
            return 0.0
        return max(self._lately_saved, 0.0) / self._lately_spent

    def _remember(self, key: Hashable, record: Record) -> Record:
        self.seen[key] = record
        if len(self.seen) > self._remembered:
            self.seen.popitem(last=False)
        return record

    def _cool(self, record: Record) -> None:
        record.heat *= math.exp2((record.at - self.now) / self._half_life)
        record.at = self.now

    def _eager_seconds(self, record: Record) -> float:
        if record.eager.count:
            return record.eager.value
        if record.replay.count and self._share.value > 0.0:
            return record.replay.value / self._share.value
        return self._eager.value

    def _typical_capture(self) -> float:
        return self._capture.value if self._capture.count else _PRIOR_CAPTURE * self._eager.value

    def _measure_half_life(self) -> None:
        # The floor is for times that are all zero.
        self._half_life = max(_HALF_LIFE * (len(self._entries) + 1) * self._typical_capture(), 1e-9)


def _decay(half_lives: float) -> tuple[float, float]:
    """What is left of something after some half-lives, and of something that came evenly all that time."""
    left = math.exp2(-half_lives)
    exponent = half_lives * math.log(2.0)
    return left, (1.0 - left) / exponent if exponent > 1e-9 else 1.0
