"""The least time that any policy could have taken for a trace, had it known the trace beforehand.

A graph stays in one of a fixed number of slots from its capture to its last use. A call whose graph is there takes a
replay; any other takes an eager call, after which its signature may be captured, at the cost of a capture. That is what
the policies do here, so no policy with as many slots can take less, and this much can be reached: it is a minimum
cost flow, whose optimum is integral.

One unit of flow is one slot. It runs along the time line, one node for each call, while the slot is empty. At a call it
may leave for the graph of that signature, at the cost of a capture; from one call of the signature to the next it
saves the difference between eager and replay (an edge that one unit can take: a second graph saves nothing); after any
of these calls it may return to the time line. The cheapest flow is found by shortest paths, one slot at a time
(successive shortest paths, with potentials so that no edge is negative), which also gives the optimum of every smaller
number of slots on the way. Costs are rounded to whole picoseconds, so that no sum depends on its order.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_FAR = float("inf")
_PICO = 10**12


class Times(NamedTuple):
    """What a call of a signature takes, in seconds, and what a capture adds to an eager call."""

    eager: float
    replay: float
    capture: float


def optimum(calls: Sequence[int], times: Mapping[int, Times], slots: int) -> float:
    """The least total time of a trace, in seconds.

    Args:
        calls: The signature of each call.
        times: Of every signature.
        slots: How many graphs fit; they count alike.

    Example:
        >>> times = {0: Times(3.0, 1.0, 5.0), 1: Times(3.0, 1.0, 5.0)}
        >>> optimum([0, 1] * 5, times, slots=1)  # 30 eagerly; a graph saves 4 * 2 and costs 5
        27.0
        >>> optimum([0, 1] * 5, times, slots=2)
        24.0
    """
    counts = Counter(calls)
    eager = sum(count * round(times[signature].eager * _PICO) for signature, count in counts.items())
    # A signature that a graph for itself alone would not pay for is never captured.
    paying = _paying(calls, times)
    kept = [signature for signature in calls if signature in paying]
    saved = _Network(kept, times).most(min(slots, len(paying))) if kept else 0
    return (eager - saved) / _PICO


def _paying(calls: Sequence[int], times: Mapping[int, Times]) -> set[int]:
    """The signatures that a graph for itself alone would pay for."""
    return {
        signature
        for signature, count in Counter(calls).items()
        if (count - 1) * (times[signature].eager - times[signature].replay) > times[signature].capture
    }


class _Network:
    """Nodes 0 to n are the time line; node n + 1 + i is the graph of call i, just after that call."""

    def __init__(self, calls: Sequence[int], times: Mapping[int, Times]) -> None:
        self._last = len(calls)
        self._to: list[int] = []
        self._room: list[int] = []
        self._cost: list[int] = []
        self._edges: list[list[int]] = [[] for _ in range(2 * len(calls) + 1)]
        following: dict[int, int] = {}
        after = [-1] * len(calls)
        for index in range(len(calls) - 1, -1, -1):
            after[index] = following.get(calls[index], -1)
            following[calls[index]] = index
        unlimited = len(calls) + 1
        for index, signature in enumerate(calls):
            graph = self._last + 1 + index
            self._edge(index, index + 1, unlimited, 0)
            if after[index] >= 0:
                saving = round(times[signature].eager * _PICO) - round(times[signature].replay * _PICO)
                self._edge(index, graph, 1, round(times[signature].capture * _PICO))
                self._edge(graph, self._last + 1 + after[index], 1, -saving)
            self._edge(graph, index + 1, 1, 0)

    def most(self, slots: int) -> int:
        """What so many slots save, in picoseconds."""
        height = self._first_heights()
        saved = 0
        for _ in range(slots):
            way = self._shortest(height)
            if height[self._last] >= 0:
                break
            saved -= int(height[self._last])
            node = self._last
            while node:
                edge = way[node]
                self._room[edge] -= 1
                self._room[edge ^ 1] += 1
                node = self._to[edge ^ 1]
        return saved

    def _edge(self, start: int, end: int, room: int, cost: int) -> None:
        for source, target, free, price in ((start, end, room, cost), (end, start, 0, -cost)):
            self._edges[source].append(len(self._to))
            self._to.append(target)
            self._room.append(free)
            self._cost.append(price)

    def _first_heights(self) -> list[float]:
        """Distances from the start: in order of time every edge leads onwards, however negative."""
        height = [_FAR] * len(self._edges)
        height[0] = 0
        for index in range(self._last):
            for node in (index, self._last + 1 + index):
                for edge in self._edges[node]:
                    if self._room[edge] and height[node] + self._cost[edge] < height[self._to[edge]]:
                        height[self._to[edge]] = height[node] + self._cost[edge]
        return height

    def _shortest(self, height: list[float]) -> list[int]:
        """Dijkstra over what room is left, as far as the end: the edge that leads to each node. Raises ``height``."""
        edges, to, room, cost = self._edges, self._to, self._room, self._cost
        distance = [_FAR] * len(edges)
        way = [-1] * len(edges)
        distance[0] = 0
        queue: list[tuple[float, int]] = [(0, 0)]
        while queue:
            far, node = heapq.heappop(queue)
            if far > distance[node]:
                continue
            if node == self._last:
                break
            base = far + height[node]
            for edge in edges[node]:
                if room[edge]:
                    target = to[edge]
                    there = base + cost[edge] - height[target]
                    if there < distance[target]:
                        distance[target] = there
                        way[target] = edge
                        heapq.heappush(queue, (there, target))
        # What was not reached yet is at least as far as the end.
        end = distance[self._last]
        for node, far in enumerate(distance):
            height[node] += min(far, end)
        return way
