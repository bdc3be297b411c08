"""Everything that is known of the keys of one module, besides their graphs."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphcache.cache.graph_cache import Entry
from graphcache.errors import Cause, Reason

MAX_KEYS = 4096
"""Keys without a graph that are remembered. The longest unused is forgotten first."""

_TRANSIENT = frozenset(
    {Reason.CAPTURE_FAILED, Reason.OUT_OF_MEMORY, Reason.OVER_BUDGET, Reason.MISMATCH, Reason.ALIASES_STATE}
)
_EFFECTS = frozenset({Reason.MUTATES, Reason.RANDOM, Reason.UNOBSERVED, Reason.UNSETTLED})
_FIRST_WAIT = 16
"""Calls before a transient failure is tried again for the first time."""
_MAX_DOUBLINGS = 20
ENOUGH_HITS = 64
"""Replays that make up for a capture, which takes as long as 14 to 140 eager calls (measured, engines)."""
_FREE_CHANGES = 8
"""Changes soon after a capture that cost no wait: a module is set up while it is already called."""
_MOST_TIMES = 8
"""Changes after the free ones that the wait grows with: at most 128 calls run eagerly before the next capture."""
_CHANGES_OFTEN = Cause(Reason.UNSETTLED, detail="it changed soon after each of the last captures")

MEMORY = 16
"""Measurements that a running mean goes back to. An estimate follows a lasting change within about as many."""
LARGEST = 4.0
"""Times the typical time: a single measurement counts for at most this much, so that a stall is not a slow call."""


@dataclass(slots=True)
class Denial:
    """Why a key has no graph: the cause, the guard's version, how often it was denied, and calls since the last time.

    What lies in the module (a host read, a layer that forbids capture) is denied until the state of the module changes.
    An effect of the call, which may be the filling of a lazy table, is looked for again at the next call, then after 2,
    4, 8 calls and so on. So is a module that changes soon after its captures (``unsettled``). What may pass (no memory,
    no room, a failed capture) is tried again after 16 calls, then 32, 64 and on.
    """

    cause: Cause
    version: int
    times: int
    calls: int = 0

    def wait(self, version: int) -> int | None:
        """How many calls run eagerly before a capture is tried again; ``None`` for all of them."""
        doublings = min(self.times - 1, _MAX_DOUBLINGS)
        if self.cause.reason in _EFFECTS or version != self.version:
            return max(0, (1 << doublings if doublings else 0) - self.calls)
        if self.cause.reason in _TRANSIENT:
            return max(0, (_FIRST_WAIT << doublings) - self.calls)
        return None


@dataclass(slots=True)
class Estimate:
    """A running estimate of a time: the lesser of the first two measurements, then a mean over about 16.

    The first calls of a key load kernels and allocate memory, and take up to a thousand times as long as later ones. So
    a measurement below half the estimate replaces it, and one above four times the estimate counts for four times.
    """

    value: float = 0.0
    count: int = 0

    @property
    def known(self) -> float | None:
        """The estimate, or ``None`` before the first measurement."""
        return self.value if self.count else None

    def add(self, seconds: float) -> None:
        if self.count < 2:
            self.value = min(self.value, seconds) if self.count else seconds
        elif 2.0 * seconds < self.value:
            self.value = seconds
        else:
            # The last term lets an estimate leave zero, which a coarse clock may have given.
            most = LARGEST * self.value + 1e-9
            self.value += (min(seconds, most) - self.value) / min(self.count + 1, MEMORY)
        self.count += 1


@dataclass(slots=True, eq=False)
class KeyState:
    """What is known of one key; what follows the denial is kept by the admission policy."""

    born: float
    """When it was noted, by :attr:`KeyTable.now`."""
    misses: int = 0
    """Calls that no graph of the key has answered, less the hits that answered padded calls of other keys."""
    denial: Denial | None = None
    """Why it is not captured, or not again after the next change of the module."""
    changes: int = 0
    """Captures in a row that a change of the module has ended soon."""
    captures: int = 0
    """Graphs that it has had since all graphs of the module were dropped the last time."""
    eager: Estimate = field(default_factory=Estimate)
    replay: Estimate = field(default_factory=Estimate)
    capture: Estimate = field(default_factory=Estimate)
    """What a capture adds to its call."""
    ran: int = 0
    """Eager calls that were measured."""
    hits: int = 0
    """Replays that were counted (``Entry.counted``), of all graphs that the key has had."""
    owed: int = 0
    """Eager calls since the last capture was tried, or the last graph was evicted."""
    nbytes: int = 0
    """Memory of its last graph; 0 before the first."""
    heat: float = 0.0
    """Calls, discounted over time, as of the time ``at``."""
    at: float = 0.0


@dataclass(slots=True)
class Mean:
    """The running mean of figures that differ from key to key; the value before the first one has no weight."""

    value: float = 0.0
    count: int = 0

    def add(self, figure: float) -> None:
        self.count += 1
        self.value += (figure - self.value) / min(self.count, MEMORY)


class KeyTable:
    """The states of the keys of one module, whose graphs are ``entries``: a key with a graph is not forgotten."""

    def __init__(self, entries: Mapping[Hashable, Entry[Any]]) -> None:
        self.entries = entries
        self.states: OrderedDict[Hashable, KeyState] = OrderedDict()
        """The longest unused first."""
        self.now = 0.0
        """The time of the admission policy."""
        self._nbytes = Mean()
        self.generation = 0
        """Goes up when all denials are forgotten."""
        self.lock = threading.Lock()
        """Held for a look or a change, never for a capture; no other lock is taken under it."""

    def used(self, key: Hashable) -> KeyState:
        """The state of a key, which is the last to be forgotten from now on. The lock is held."""
        state = self.states.get(key)
        if state is not None:
            self.states.move_to_end(key)
            return state
        state = self.states[key] = KeyState(self.now)
        while len(self.states) > MAX_KEYS + len(self.entries):
            oldest, forgotten = self.states.popitem(last=False)
            if oldest in self.entries:
                self.states[oldest] = forgotten
        return state

    def known(self) -> list[Any]:
        """The keys, the longest unused first."""
        with self.lock:
            return list(self.states)

    def note(self, key: Hashable, count: int = 1) -> None:
        """Count a call that no graph of its key has answered; -1 for a hit that answered a padded call of another."""
        with self.lock:
            self.used(key).misses += count

    def rename(self, key: Hashable, new: Hashable) -> None:
        """Go on with what is known of a key under another one, which its calls have from now on."""
        with self.lock:
            if key != new and (state := self.states.pop(key, None)) is not None:
                self.states[new] = state

    def hits(self, key: Hashable) -> int:
        """Replays of all graphs that a key has had."""
        state, entry = self.states.get(key), self.entries.get(key)
        return (0 if state is None else state.hits) + (0 if entry is None else entry.hits - entry.counted)

    def calls(self, key: Hashable) -> int:
        """How many calls of a key there were, as far as is remembered."""
        state = self.states.get(key)
        return max(self.hits(key) + (0 if state is None else state.misses), 0)

    def captured(self, key: Hashable, seconds: float, nbytes: int) -> bool:
        """Note a capture, what it took, and the bytes of its graph; whether the key had one before."""
        with self.lock:
            state = self.used(key)
            state.denial = None
            state.captures += 1
            state.capture.add(seconds)
            state.nbytes = nbytes
            self._nbytes.add(nbytes)
            return state.captures > 1

    def expected_nbytes(self, key: Hashable) -> int:
        """Memory that a graph of the key will own: that of its last one, else the mean of all graphs."""
        state = self.states.get(key)
        return state.nbytes if state is not None and state.nbytes else math.ceil(self._nbytes.value)

    def deny(self, key: Hashable, cause: Cause, version: int = 0) -> None:
        """Remember that a key could not be captured; doubles the wait if it was denied before."""
        with self.lock:
            state = self.used(key)
            state.denial = Denial(cause, version, 1 if state.denial is None else state.denial.times + 1)

    def denial(self, key: Hashable, version: int = 0) -> Cause | None:
        """Why a call of a key runs eagerly, which counts it; ``None`` if a capture may be tried."""
        with self.lock:
            state = self.states.get(key)
            if state is None or state.denial is None or state.denial.wait(version) == 0:
                return None
            self.states.move_to_end(key)
            state.denial.calls += 1
            return state.denial.cause

    def replaced(self, key: Hashable, hits: int, version: int) -> None:
        """Note that a key was captured again, after a change of the module. If that came soon, the next time waits."""
        with self.lock:
            state = self.used(key)
            state.changes = state.changes + 1 if hits < ENOUGH_HITS else 0
            times = min(state.changes - _FREE_CHANGES, _MOST_TIMES)
            state.denial = Denial(_CHANGES_OFTEN, version, times) if times > 0 else None

    def allow_all(self) -> None:
        with self.lock:
            self.generation += 1
            for state in self.states.values():
                state.denial = None

    def forget_captures(self) -> None:
        with self.lock:
            for state in self.states.values():
                state.captures = 0
