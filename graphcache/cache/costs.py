"""What calls of one key take: estimates from few and noisy measurements, in seconds."""

from __future__ import annotations

from typing import NamedTuple

MEMORY = 16
"""Measurements that a running mean goes back to. An estimate follows a lasting change within about as many."""
LARGEST = 4.0
"""Times the typical time: a single measurement counts for at most this much, so that a stall is not a slow call."""


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


class Mean:
    """The running mean of figures that differ from key to key; the value before the first one has no weight."""

    __slots__ = ("count", "value")

    def __init__(self, before: float) -> None:
        self.value = before
        self.count = 0

    def add(self, figure: float) -> None:
        """Take a figure into account."""
        self.count += 1
        self.value += (figure - self.value) / min(self.count, MEMORY)


class Known(NamedTuple):
    """What is known of a key: counts, and typical times in seconds, ``None`` where nothing was measured."""

    calls: int = 0
    hits: int = 0
    eager: float | None = None
    replay: float | None = None
    capture: float | None = None


class KeyCosts:
    """What the admission policy keeps about one key.

    Attributes:
        eager: Time of an eager call.
        replay: Time of a replay.
        capture: Time that a capture adds to a call.
        calls: Eager calls.
        owed: Eager calls since the last capture was tried, or the last graph was evicted.
        hits: Replays that were counted, of all graphs that the key has had.
        counted: Hits of its present graph that are part of ``hits``.
        nbytes: Memory of its last graph; 0 before the first.
        heat: Calls, discounted over time, as of the time ``at``.
        born: Time of the first call.
        at: Time of the last change of ``heat``.
    """

    __slots__ = ("at", "born", "calls", "capture", "counted", "eager", "heat", "hits", "nbytes", "owed", "replay")

    def __init__(self, now: float) -> None:
        self.eager, self.replay, self.capture = Estimate(), Estimate(), Estimate()
        self.calls = self.owed = self.hits = self.counted = self.nbytes = 0
        self.heat = 0.0
        self.at = self.born = now
