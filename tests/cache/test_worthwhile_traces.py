"""``capture="worthwhile"`` on simulated traffic: against always-eager, and against the offline optimum.

Costs are those measured on an H100 (calls at the median, captures at the mean or the first).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from graphcache.cache.admission import OVERHEAD, Admission
from graphcache.cache.graph_cache import GraphCache, clock
from graphcache.cache.key_table import KeyTable
from tests.effort import share

CALLS, SLOTS = share((20_000, 16), (10_000, 8))


class Times(NamedTuple):
    """Seconds of a call, and what a capture adds to an eager one."""

    eager: float
    replay: float
    capture: float


MODELS = {
    "mlp": Times(329e-6, 45e-6, 4.6e-3),
    "mlp, slow captures": Times(329e-6, 45e-6, 44.1e-3),
    "policy": Times(383e-6, 128e-6, 27.3e-3),
    "encoder": Times(2.35e-3, 0.4e-3, 330e-3),
}


def zipf(exponent: float, calls: int, shapes: int = 200, one_offs: float = 0.0, seed: int = 0) -> list[int]:
    """Independent calls; the n-th most frequent key has a probability proportional to ``n ** -exponent``."""
    draw = random.Random(seed)
    keys = draw.sample(range(shapes), shapes)
    found = draw.choices(keys, [(rank + 1) ** -exponent for rank in range(shapes)], k=calls)
    return [shapes + index if draw.random() < one_offs else key for index, key in enumerate(found)]


def phases(calls: int, count: int) -> list[int]:
    """Zipf over 40 other keys in each phase; those of the past never come again."""
    return [40 * phase + key for phase in range(count) for key in zipf(1.0, calls // count, 40, seed=phase)]


def tides(calls: int, count: int) -> list[int]:
    """Two sets of keys in turn, as day and night have them."""
    each = calls // count
    sets = [zipf(1.0, calls // 2, 40, seed=half) for half in range(2)]
    turns = [(turn % 2, turn // 2 * each) for turn in range(count)]
    return [40 * half + key for half, start in turns for key in sets[half][start : start + each]]


TRACES = {
    "zipf 0.7": lambda calls: zipf(0.7, calls),
    "zipf 1.0": lambda calls: zipf(1.0, calls),
    "zipf 1.1, 30 % one-offs": lambda calls: zipf(1.1, calls, 60, one_offs=0.3),
    "4 phases": lambda calls: phases(calls, 4),
    "10 phases": lambda calls: phases(calls, 10),
    "8 tides": lambda calls: tides(calls, 8),
    "loop of 24": lambda calls: [index % 24 for index in range(calls)],
    "loop of 48": lambda calls: [index % 48 for index in range(calls)],
    "uniform": lambda calls: zipf(0.0, calls),
    "all different": lambda calls: list(range(calls)),
}
PAIRS = [(model, trace) for model in MODELS for trace in TRACES]


class Graph:
    nbytes = 0

    def close(self, *, wait: bool = True) -> None:
        pass


def served(calls: Sequence[int], times: Times, noise: float) -> float:
    """Seconds of a trace under the policy, which is told times with ``noise`` and of first calls that are slow."""
    draw = random.Random(0)

    def measured(seconds: float) -> float:
        return seconds * draw.lognormvariate(-noise * noise / 2, noise) if noise else seconds

    cache: GraphCache[Any] = GraphCache(max_graphs=SLOTS, on_evict=lambda *gone: admission.evicted(*gone))
    admission = Admission("worthwhile", cache, KeyTable(cache.entries))
    total, known = 0.0, set()
    for key in calls:
        if (entry := cache.entries.get(key)) is not None:
            entry.hits += 1
            entry.used = clock()
            total += times.replay
            continue
        cause = admission.ask(key)
        total += times.eager
        admission.ran(key, measured(times.eager) * (50.0 if noise and key not in known else 1.0))
        known.add(key)
        if cause is None:
            total += times.capture
            cache.put(key, Graph())
            if admission.captured(key, measured(times.capture), measured(times.replay)) is not None:
                cache.evict(key)
    return total


@cache
def trace_of(model: str, trace: str) -> tuple[list[int], float]:
    """Calls that take ten times what capturing the whole cache takes, and their least time."""
    times = MODELS[model]
    calls = TRACES[trace](max(CALLS, int(10 * SLOTS * times.capture / times.eager)))
    return calls, len(calls) * times.eager - most_saved(calls, times)


def most_saved(calls: Sequence[int], times: Times) -> float:
    """Seconds that the best policy saves that knows the trace: a minimum cost flow, one unit for each slot.

    Nodes 0 to n are the time line; node n + 1 + i is the graph of call i, just after that call.
    """
    last = len(calls)
    to: list[int] = []
    free: list[int] = []
    cost: list[float] = []
    edges: list[list[int]] = [[] for _ in range(2 * last + 1)]

    def edge(start: int, end: int, room: int, price: int) -> None:
        for source, target, units, paid in ((start, end, room, price), (end, start, 0, -price)):
            edges[source].append(len(to))
            to.append(target)
            free.append(units)
            cost.append(paid)

    # Whole picoseconds, so that no sum depends on its order.
    saving, capture = round((times.eager - times.replay) * 1e12), round(times.capture * 1e12)
    following: dict[int, list[int]] = {}
    for index, key in enumerate(calls):
        following.setdefault(key, []).append(index)
    after = {index: later for indices in following.values() for index, later in pairwise(indices)}
    for index in range(last):
        edge(index, index + 1, SLOTS, 0)
        edge(last + 1 + index, index + 1, 1, 0)
        if index in after:
            edge(index, last + 1 + index, 1, capture)
            edge(last + 1 + index, last + 1 + after[index], 1, -saving)
    height = [float("inf")] * len(edges)
    height[0] = 0
    # At first every edge leads onwards in time, however negative.
    for index in range(last):
        for node in (index, last + 1 + index):
            for each in edges[node]:
                if free[each]:
                    height[to[each]] = min(height[to[each]], height[node] + cost[each])
    saved = 0.0
    for _ in range(SLOTS):
        distance, way = [float("inf")] * len(edges), [-1] * len(edges)
        distance[0] = 0
        queue: list[tuple[float, int]] = [(0, 0)]
        while queue:
            far, node = heapq.heappop(queue)
            if far > distance[node]:
                continue
            if node == last:
                break
            for each in edges[node]:
                there = far + height[node] + cost[each] - height[to[each]]
                if free[each] and there < distance[to[each]]:
                    distance[to[each]], way[to[each]] = there, each
                    heapq.heappush(queue, (there, to[each]))
        height = [high + min(far, distance[last]) for high, far in zip(height, distance, strict=True)]
        if height[last] >= 0:
            break
        saved -= height[last]
        node = last
        while node:
            free[way[node]] -= 1
            free[way[node] ^ 1] += 1
            node = to[way[node] ^ 1]
    return saved / 1e12


@pytest.mark.parametrize(("model", "trace"), PAIRS)
def test_it_takes_little_more_than_always_eager_and_one_capture(model: str, trace: str) -> None:
    calls, times = trace_of(model, trace)[0], MODELS[model]
    assert served(calls, times, 0.0) <= (1 + OVERHEAD) * len(calls) * times.eager + times.capture


HARD = {("mlp, slow captures", "4 phases"), ("mlp, slow captures", "loop of 24"), ("encoder", "loop of 24")}
"""Keys come and go, or are rare, and captures take 134 and 140 eager calls. Measured: up to 1.32."""


@pytest.mark.parametrize(("model", "trace"), PAIRS)
def test_it_comes_close_to_the_optimum(model: str, trace: str) -> None:
    calls, least = trace_of(model, trace)
    total = served(calls, MODELS[model], 0.15)
    assert (1 - 1e-9) * least <= total <= (1.35 if (model, trace) in HARD else 1.3) * least


def test_the_optimum_captures_what_pays() -> None:
    times = Times(3.0, 1.0, 5.0)
    # One graph saves 4 * 2 and costs 5; a fresh key saves nothing.
    assert most_saved([0, 1] * 5, times) == pytest.approx(2 * (8 - 5))
    assert most_saved(list(range(10)), times) == 0
