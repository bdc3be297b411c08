"""Everything that is known of the keys of one module, besides their graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from graphcache.errors import Cause, Reason

MAX_KEYS = 4096
"""Keys without a graph that are remembered. The longest unused is forgotten first."""

Shapes = dict[str | int, tuple[int, ...]]
"""Position or name of an argument -> its shape."""

_TRANSIENT = frozenset(
    {Reason.CAPTURE_FAILED, Reason.OUT_OF_MEMORY, Reason.OVER_BUDGET, Reason.MISMATCH, Reason.ALIASES_STATE}
)
_EFFECTS = frozenset({Reason.MUTATES, Reason.RANDOM, Reason.UNOBSERVED})
_FIRST_WAIT = 16
"""Calls before a transient failure is tried again for the first time."""
_MAX_DOUBLINGS = 20

MEMORY = 16
"""Measurements that a running mean goes back to. An estimate follows a lasting change within about as many."""
LARGEST = 4.0
"""Times the typical time: a single measurement counts for at most this much, so that a stall is not a slow call."""


@dataclass(slots=True)
class Denial:
    """Why a key has no graph: the cause, the guard's version, how often it was denied, and calls since the last time.

    What lies in the module (a host read, a layer that forbids capture) is denied until the state of the module changes.
    An effect of the call (it counts, fills a table) is looked for again at the next call, then after 2, 4, 8 calls and
    so on: lazy tables and caches are filled by the first calls. What may pass (no memory, no room, a failed capture) is
    tried again after 16 calls, then 32, 64 and so on.
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


class Estimate:
    """A running estimate of a time: the lesser of the first two measurements, then a mean over about 16.

    The first calls of a key load kernels and allocate memory, and take up to a thousand times as long as later ones. So
    a measurement below half the estimate replaces it, and one above four times the estimate counts for four times.
    """

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    @property
    def known(self) -> float | None:
        """The estimate, or ``None`` before the first measurement."""
        return self.value if self.count else None

    def add(self, seconds: float) -> None:
        """Take a measurement into account."""
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
    """When it was noted, by the time of the policy."""
    shapes: Shapes | None = None
    """Of the tensors among the arguments of its calls."""
    calls: int = 0
    """Calls that its present graph has not answered."""
    denial: Denial | None = None
    """Why it has no graph; ``None`` if it has one, or none was tried."""
    eager: Estimate = field(default_factory=Estimate)
    replay: Estimate = field(default_factory=Estimate)
    capture: Estimate = field(default_factory=Estimate)
    """What a capture adds to its call."""
    ran: int = 0
    """Eager calls that were measured."""
    owed: int = 0
    """Eager calls since the last capture was tried, or the last graph was evicted."""
    hits: int = 0
    """Replays that were counted, of all graphs that the key has had."""
    counted: int = 0
    """Hits of its present graph that are part of ``hits``."""
    nbytes: int = 0
    """Memory of its last graph; 0 before the first."""
    heat: float = 0.0
    """Calls, discounted over time, as of the time ``at``."""
    at: float = 0.0


class KeyTable:
    """The states of the keys of one module; ``captured`` are those that have a graph, and are not forgotten."""

    def __init__(self, captured: Collection[Hashable] = ()) -> None:
        self._captured = captured
        self._states: OrderedDict[Hashable, KeyState] = OrderedDict()
        self.now = 0.0
        """The time of the admission policy."""
        self.lock = threading.Lock()
        """Held for a look or a change, never for a capture; no other lock is taken under it."""

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Hashable) -> KeyState | None:
        """The state of a key, if it is remembered."""
        return self._states.get(key)

    def used(self, key: Hashable) -> KeyState:
        """The state of a key, which is the last to be forgotten from now on. The lock is held."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
            return state
        state = self._states[key] = KeyState(self.now)
        while len(self._states) > MAX_KEYS + len(self._captured):
            oldest, forgotten = self._states.popitem(last=False)
            if oldest in self._captured:
                self._states[oldest] = forgotten
        return state

    def keys(self) -> list[Hashable]:
        """The keys that are remembered, the longest unused first."""
        with self.lock:
            return list(self._states)

    # ---- calls

    def note(self, key: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any], count: int = 1) -> None:
        """Count a call that no graph of its key has answered so far.

        ``count`` is -1 for a hit that answered a padded call, which was noted under its own key; 0 for no call at all.
        """
        with self.lock:
            state = self.used(key)
            if state.shapes is None:
                given: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
                state.shapes = {name: tuple(value.shape) for name, value in given if isinstance(value, Tensor)}
            state.calls += count

    def retire(self, key: Hashable, hits: int) -> None:
        """Count the hits of a graph that goes."""
        with self.lock:
            if (state := self._states.get(key)) is not None:
                state.calls += hits

    def calls(self, key: Hashable, hits: int = 0) -> int:
        """How many calls of a key there were, with the hits of its graph if there is one."""
        state = self._states.get(key)
        return hits if state is None else max(state.calls + hits, 0)

    def shapes(self, hits: Mapping[Hashable, int]) -> list[tuple[Shapes, int]]:
        """The shapes of the calls of each key, and how many there were."""
        with self.lock:
            return [
                (state.shapes, max(state.calls + hits.get(key, 0), 0))
                for key, state in self._states.items()
                if state.shapes is not None
            ]

    # ---- denials

    def deny(self, key: Hashable, cause: Cause, version: int = 0) -> None:
        """Remember that a key could not be captured; doubles the wait if it was denied before."""
        with self.lock:
            state = self.used(key)
            state.denial = Denial(cause, version, 1 if state.denial is None else state.denial.times + 1)

    def denial(self, key: Hashable, version: int = 0) -> Cause | None:
        """Why a call of a key runs eagerly, which counts it; ``None`` if a capture may be tried."""
        with self.lock:
            state = self._states.get(key)
            if state is None or state.denial is None or state.denial.wait(version) == 0:
                return None
            self._states.move_to_end(key)
            state.denial.calls += 1
            return state.denial.cause

    def look(self, key: Hashable, version: int = 0) -> tuple[Cause, int | None] | None:
        """Why a key is denied, and after how many calls a capture is tried again (``None``: never). Counts no call."""
        with self.lock:
            state = self._states.get(key)
            return None if state is None or state.denial is None else (state.denial.cause, state.denial.wait(version))

    def allow(self, key: Hashable) -> None:
        """Forget the denial of a key."""
        with self.lock:
            if (state := self._states.get(key)) is not None:
                state.denial = None

    def allow_all(self) -> None:
        """Forget all denials."""
        with self.lock:
            for state in self._states.values():
                state.denial = None
