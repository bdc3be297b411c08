"""Whether a call that no graph answered is worth a capture, and which graphs are worth the room they take.

Each signature is a rent-or-buy problem: eager calls are rent, a capture buys. Buying when the rent paid equals the
price costs at most twice what an oracle would have paid (ski rental). Around that:

- The price is what a capture takes. It falls, to an eighth at most, where a capture promises to pay for itself: as
  often as captures lately did, times how much hotter the signature is than graphs are on average. With a promise of
  once it is a third. It doubles for a signature whose graph had to go before it had paid.
- A graph goes only for a signature that is clearly hotter: one that has lately lost, by running eagerly, twice what
  the graph has saved. Lately means a half-life of six times what capturing the whole cache takes. A graph that has been
  silent for many times as long as it used to be is worth less at once.
- An account of the module bounds it all. Captures are charged to it; what replays save is credited, and so are 2 % of
  the time that eager execution would have taken. Nothing is captured while it is overdrawn. So the total is never more
  than 1.02 times always-eager plus one capture, whatever the traffic and whenever one looks, as far as times are what
  they were measured to be. What can be saved up is limited to capturing the whole cache once, so that a good year does
  not pay for a bad hour.

Ski rental alone is bounded against the oracle, not against always-eager: on signatures that are never called again
once they are captured it takes nearly twice as long. The constants were chosen with ``python -m bench.policy``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from graphcache.cache.books import COLD, Books, Record
from graphcache.cache.estimates import checked_seconds
from graphcache.cache.lru import Entry, GraphCache, clock
from graphcache.errors import Cause, ConfigError, Reason, Refusal, shown

Policy = Literal["first", "worthwhile", "prepared"]

_HOTTER = 2.0
_TRUST = 3.0
_LEAST_PRICE = 0.125
_LOOKS = 16

_OVERDRAWN = Cause(Reason.COLD, detail="the captures so far have yet to pay for themselves")
_CROWDED = Cause(Reason.COLD, detail="the budget is full of graphs that are about as hot")
_NOT_WORTH_IT = Cause(Reason.NOT_WORTH_IT)
_NOT_PREPARED = Cause(Reason.NOT_PREPARED)


@dataclass(frozen=True, slots=True)
class Account:
    """What the graphs of a module have cost and saved, in the seconds that were fed.

    Args:
        eager_seconds: What all calls would have taken eagerly.
        saved_seconds: By how much replays were faster; negative if they were slower.
        capture_seconds: What captures took, failed ones too.
        crowded: Calls that ran eagerly because the budget was full of graphs about as hot.
    """

    eager_seconds: float
    saved_seconds: float
    capture_seconds: float
    crowded: int


class Known(NamedTuple):
    """What is known of a signature: counts, and typical times in seconds, ``None`` where nothing was measured."""

    calls: int
    hits: int
    eager: float | None
    replay: float | None
    capture: float | None


class Admission:
    """Decides which calls of one module are captured, from what its calls were measured to take.

    A hit costs nothing: how often graphs were replayed is read from the cache's entries when something else has to be
    decided. An eager call costs a few microseconds. Any thread may call it, also with the cache's lock held, which it
    never takes.

    Times are seconds of whatever is to be saved, as long as eager calls, replays and captures are measured alike. CPU
    time of the call is the cheapest to measure; on a device it leaves out the device's own time, which a graph hardly
    changes. Times between events leave out nothing, and may be sampled. What a capture takes is what it added to the
    call that it belongs to.

    Args:
        cache: The graphs. Its ``rank`` is set, unless the policy keeps to recency.
        policy: ``"worthwhile"`` captures what pays for itself, ``"first"`` every signature at once (and keeps graphs
            whatever they save), ``"prepared"`` only what is prepared.
        remembered: How many signatures without a graph are remembered; beyond that the longest uncalled is forgotten.

    Raises:
        ConfigError: For another policy, or a count below 1.

    Example:
        >>> class Graph:
        ...     nbytes = 0
        ...     def close(self, *, wait=True): pass
        >>> cache = GraphCache(max_graphs=8)
        >>> admission = Admission(cache)
        >>> admission.learn("8x64", eager=180e-6, replay=50e-6, capture=5e-3)
        >>> while admission.ask("8x64") is not None:
        ...     calls = admission.ran("8x64", 180e-6)
        >>> calls  # lose as much as a capture takes
        39
        >>> entry = cache.put("8x64", Graph())
        >>> admission.captured("8x64", 5e-3, replay=50e-6)
    """

    def __init__(self, cache: GraphCache[Any], policy: Policy = "worthwhile", *, remembered: int = 1024) -> None:
        if not isinstance(policy, str) or policy not in get_args(Policy):
            raise ConfigError(
                f"capture={shown(policy)} is not an option; expected one of {', '.join(map(repr, get_args(Policy)))}"
            )
        if isinstance(remembered, bool) or not isinstance(remembered, int) or remembered < 1:
            raise ConfigError(f"remembered={shown(remembered)}: expected a whole number, 1 or more")
        self.policy = policy
        self._cache = cache
        self._books = Books(cache.entries, remembered)
        self._crowded = 0
        # As of when it last looked around: the worth of graphs, of those that would go for another, and the time.
        self._usual = self._coldest = 0.0
        self._judged = self._looked_at = 0
        self._lock = threading.Lock()
        if policy == "worthwhile":
            cache.rank = self.worth

    def __len__(self) -> int:
        return len(self._books.seen) + len(self._books.kept)

    def ask(self, key: Hashable, *, preparing: bool = False) -> Cause | None:
        """Why a call that no graph answered is to run eagerly, or ``None`` if it is to be captured.

        Args:
            key: Its signature.
            preparing: Whether this graph was asked for before serving; then it is captured.

        Returns:
            A cause with the reason ``COLD``, ``NOT_WORTH_IT``, ``NOT_PREPARED`` or ``OVER_BUDGET``. After ``None``,
            :meth:`captured` or :meth:`failed` is to be called.
        """
        if preparing or self.policy == "first":
            return None
        if self.policy == "prepared":
            return _NOT_PREPARED
        with self._lock:
            record = self._books.seen.get(key)
            if record is None:
                return COLD
            if record.owed >= record.look:
                cause = self._judge(record)
                if cause is None:
                    record.cause = COLD
                    return None
                record.cause = cause
            self._crowded += record.cause is _CROWDED
            return record.cause

    def outlook(self, key: Hashable) -> Cause | None:
        """What :meth:`ask` would say as things stand, without noting that it was asked."""
        if self.policy == "first":
            return None
        if self.policy == "prepared":
            return _NOT_PREPARED
        with self._lock:
            record = self._books.seen.get(key)
            return COLD if record is None else record.cause

    def ran(self, key: Hashable, seconds: float) -> int:
        """Note an eager call, and what it took.

        Returns:
            How many eager calls of the signature are remembered since it last had a graph, this one included.

        Raises:
            ConfigError: If ``seconds`` cannot be a time.
        """
        seconds = checked_seconds(seconds, "seconds")
        with self._lock:
            return self._books.ran(key, seconds)

    def captured(
        self,
        key: Hashable,
        seconds: float,
        *,
        replay: float | None = None,
        preparing: bool = False,
    ) -> Cause | None:
        """Note that a graph is in the cache, and what capturing it took.

        Args:
            key: Its signature.
            seconds: What the capture added to the call.
            replay: What a replay takes, typically; ``None`` if that was not measured.
            preparing: Whether no call waited for it; then serving does not have to earn it.

        Returns:
            ``None``, or why the caller should evict the graph: it is no faster than eager execution.

        Raises:
            ConfigError: If ``seconds`` or ``replay`` cannot be a time.
        """
        seconds = checked_seconds(seconds, "seconds")
        replay = None if replay is None else checked_seconds(replay, "replay")
        with self._lock:
            record = self._books.charge(key, seconds, free=preparing)
            record.cause = COLD
            entry = self._cache.entries.get(key)
            if entry is None:
                # Evicted by another thread since it was put there.
                return None
            self._books.keep(key, record, entry, seconds)
            return None if replay is None else self._replayed(record, replay)

    def replayed(self, key: Hashable, seconds: float) -> Cause | None:
        """Note what a replay took; a sample now and then will do.

        Returns:
            As :meth:`captured`.

        Raises:
            ConfigError: If ``seconds`` cannot be a time.
        """
        seconds = checked_seconds(seconds, "seconds")
        with self._lock:
            record = self._books.kept.get(key)
            return None if record is None else self._replayed(record, seconds)

    def failed(self, key: Hashable, seconds: float, *, preparing: bool = False) -> None:
        """Note that a capture was tried and gave no graph; the price of the next one doubles.

        Args:
            key: Its signature.
            seconds: What the attempt added to the call.
            preparing: As for :meth:`captured`.

        Raises:
            ConfigError: If ``seconds`` cannot be a time.
        """
        seconds = checked_seconds(seconds, "seconds")
        with self._lock:
            record = self._books.charge(key, seconds, free=preparing)
            record.cause = COLD
            self._books.raise_price(record, 2.0)

    def charge(self, seconds: float) -> None:
        """Note time that was spent for graphs, beside what captures took.

        Raises:
            ConfigError: If ``seconds`` cannot be a time.
        """
        seconds = checked_seconds(seconds, "seconds")
        with self._lock:
            self._books.pay(seconds)

    def evicted(self, key: Hashable, entry: Entry[Any]) -> None:
        """Note that a graph has left the cache; for its ``on_evict``."""
        with self._lock:
            if key in self._books.kept and self._cache.entries.get(key, entry) is entry:
                self._books.settle({key: entry})
                self._books.let_go(key)

    def learn(self, key: Hashable, *, eager: float, replay: float, capture: float) -> None:
        """Take over what was measured elsewhere, in seconds.

        Raises:
            ConfigError: If one of them cannot be a time.
        """
        eager, replay = checked_seconds(eager, "eager"), checked_seconds(replay, "replay")
        capture = checked_seconds(capture, "capture")
        with self._lock:
            self._books.learn(self._books.find(key), eager, replay, capture)

    def known(self) -> dict[Hashable, Known]:
        """What is known of every signature that is remembered, those with a graph first."""
        with self._lock:
            self._books.settle()
            return {
                key: Known(
                    record.calls + record.hits,
                    record.hits,
                    *(each.value if each.count else None for each in (record.eager, record.replay, record.capture)),
                )
                for key, record in [*self._books.kept.items(), *self._books.seen.items()]
            }

    def expected_nbytes(self, key: Hashable) -> int:
        """How many bytes a graph of the signature will own: what its last one did, or what graphs do on average."""
        with self._lock:
            return self._books.expected_nbytes(self._books.kept.get(key) or self._books.seen.get(key))

    def account(self) -> Account:
        """What graphs have cost and saved so far."""
        with self._lock:
            self._books.settle()
            return Account(self._books.eager, self._books.saved, self._books.spent, self._crowded)

    def worth(self, key: Hashable, entry: Entry[Any]) -> float:
        """What a graph has lately saved, to rank it by; for each byte where bytes are bounded. It takes no lock."""
        record = self._books.kept.get(key)
        if record is None:
            return 0.0
        worth = self._books.worth(record, entry.hits - record.settled)
        return worth if self._cache.max_bytes is None else worth / max(entry.nbytes, 1)

    def forget(self) -> None:
        """Forget every signature without a graph; the account stays."""
        with self._lock:
            self._books.seen.clear()

    def _judge(self, record: Record) -> Cause | None:
        """Look at a signature, and say when to look again."""
        books = self._books
        self._look_around()
        saving = books.saving(record)
        if saving <= 0.0:
            record.look = 2.0 * record.owed + 16.0
            return _NOT_WORTH_IT if record.replay.count else COLD
        calls = books.capture_seconds(record) / saving
        worth = books.worth(record)
        promise = _TRUST * books.lately_returned() * worth
        price = 1.0 if promise <= self._usual else max(self._usual / promise, _LEAST_PRICE)
        due = calls * record.factor * price
        if record.owed < due:
            record.look = record.owed + min(max(calls / _LOOKS, 1.0), math.ceil(due - record.owed))
            return COLD
        record.look = record.owed + max(calls / _LOOKS, 4.0)
        if books.credit < 0.0:
            return _OVERDRAWN
        if worth < _HOTTER * self._coldest:
            return _CROWDED
        # So far by what was known the last time; now for certain.
        books.settle()
        if books.credit < 0.0:
            return _OVERDRAWN
        try:
            self._coldest = self._worth_of_victims(books.expected_nbytes(record))
        except Refusal as refusal:
            return refusal.cause
        return _CROWDED if books.worth(record) < _HOTTER * self._coldest else None

    def _look_around(self) -> None:
        """See how hot the graphs are, unless too little has happened since the last time to pay for that."""
        self._judged += 1
        graphs = len(self._books.kept)
        ticks = clock()
        if self._judged * 4 < graphs or self._judged + ticks - self._looked_at < 2 * graphs + 16:
            return
        self._judged, self._looked_at = 0, ticks
        self._books.settle()
        worths = [self._books.worth(record) for record in self._books.kept.values()]
        self._usual = sum(worths) / len(worths) if worths else 0.0
        try:
            self._coldest = self._worth_of_victims(self._books.expected_nbytes(None))
        except Refusal:
            # Every graph is pinned, say; whoever asks for room is told.
            self._coldest = 0.0

    def _worth_of_victims(self, nbytes: int) -> float:
        kept = self._books.kept
        return sum(self._books.worth(kept[key]) for key, _ in self._cache.victims(nbytes) if key in kept)

    def _replayed(self, record: Record, seconds: float) -> Cause | None:
        slower = self._books.replayed(record, seconds)
        if self.policy != "worthwhile" or not slower:
            return None
        record.cause = _NOT_WORTH_IT
        return _NOT_WORTH_IT
