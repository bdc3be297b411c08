"""What a trace takes under each policy, simulated with measured costs.

Every call has its eager answer or a replay, and a capture is added to an eager call, as in the engine. graphcache's own
policy is not modelled: it is the cache and the admission that serve real calls, over graphs that are nothing but keys.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.optimum import Times
from graphcache.cache.admission import Admission, Policy
from graphcache.cache.lru import Entry, GraphCache, clock

FIRST_CALL = 50.0
"""How many times longer the first call of a signature is measured to take; a first enqueue takes up to 2000 times."""


@dataclass(frozen=True)
class Outcome:
    """What a policy made of a trace.

    Args:
        seconds: All calls and captures together.
        captures: How many.
        hits: Calls answered by a replay.
    """

    seconds: float
    captures: int
    hits: int


class Nothing:
    """A graph that owns nothing."""

    nbytes = 0

    def close(self, *, wait: bool = True) -> None:
        """Do nothing."""


def always_eager(calls: Sequence[int], times: Mapping[int, Times]) -> Outcome:
    """No graphs at all."""
    return Outcome(sum(times[signature].eager for signature in calls), 0, 0)


def least_recently_used(calls: Sequence[int], times: Mapping[int, Times], slots: int) -> Outcome:
    """A capture at every miss, in place of the graph that was not used for longest."""
    kept: OrderedDict[int, None] = OrderedDict()
    seconds, captures, hits = 0.0, 0, 0
    for signature in calls:
        if signature in kept:
            kept.move_to_end(signature)
            seconds += times[signature].replay
            hits += 1
            continue
        if len(kept) >= slots:
            kept.popitem(last=False)
        kept[signature] = None
        seconds += times[signature].eager + times[signature].capture
        captures += 1
    return Outcome(seconds, captures, hits)


def graphcache(
    calls: Sequence[int],
    times: Mapping[int, Times],
    slots: int,
    *,
    policy: Policy = "worthwhile",
    noise: float = 0.0,
    seed: int = 0,
    remembered: int = 1024,
) -> Outcome:
    """The cache with its admission, which learns the costs from what it is told of single calls.

    Args:
        calls: The signature of each call.
        times: Of every signature; what the calls take, and what is measured but for ``noise``.
        slots: How many graphs fit.
        policy: As for :class:`~graphcache.cache.admission.Admission`.
        noise: Standard deviation of the logarithm of what is measured. With any, the first call of a signature is
            measured to take 50 times longer.
        seed: Of the noise.
        remembered: As for ``Admission``.
    """
    draw = random.Random(seed)
    measured: Callable[[float], float] = (lambda time: time * draw.lognormvariate(0.0, noise)) if noise else float
    admission: Admission

    def evicted(key: Hashable, entry: Entry[Any]) -> None:
        admission.evicted(key, entry)

    cache: GraphCache[Nothing] = GraphCache(max_graphs=slots, on_evict=evicted)
    admission = Admission(cache, policy, remembered=remembered)
    entries = cache.entries
    seconds, captures, hits = 0.0, 0, 0
    called: set[int] = set()
    for signature in calls:
        entry = entries.get(signature)
        if entry is not None:
            entry.hits += 1
            entry.used = clock()
            seconds += times[signature].replay
            hits += 1
            continue
        cause = admission.ask(signature)
        eager, replay, capture = times[signature]
        seconds += eager
        slow = FIRST_CALL if noise and signature not in called else 1.0
        called.add(signature)
        admission.ran(signature, measured(eager) * slow)
        if cause is not None:
            continue
        seconds += capture
        captures += 1
        cache.put(signature, Nothing())
        typical = sorted(measured(replay) for _ in range(3))[1]
        if admission.captured(signature, measured(capture), replay=typical) is not None:
            cache.evict(signature)
    return Outcome(seconds, captures, hits)
