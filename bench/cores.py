"""Which core to measure on: on a machine shared with others, some run at half the speed of others for a while."""

from __future__ import annotations

import os
import statistics
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TURNS = 7
_STEPS = 10_000


def spin() -> int:
    """Nanoseconds that some work takes which needs nothing but a core (some 0.2 ms)."""
    start = perf_counter_ns()
    for _ in range(_STEPS):
        pass
    return perf_counter_ns() - start


@contextmanager
def quietest(work: Callable[[], int] = spin) -> Iterator[int | None]:
    """Keep the calling thread on the core that is fastest now, for the length of a block.

    Threads that are started inside inherit that, so start them before. Where threads cannot be bound to cores, nothing
    happens.

    Args:
        work: Takes its time on the core that it is called on, and returns that.

    Yields:
        The core's number; ``None`` if there is no choice.
    """
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(before) < 2:
        yield None
        return
    times: dict[int, list[int]] = {core: [] for core in sorted(before)}
    try:
        # In turns, so that what comes and goes meets all of them alike.
        for _ in range(_TURNS):
            for core, taken in times.items():
                os.sched_setaffinity(0, {core})
                taken.append(work())
        best = min(times, key=lambda core: statistics.median(times[core]))
        os.sched_setaffinity(0, {best})
        yield best
    finally:
        os.sched_setaffinity(0, before)
