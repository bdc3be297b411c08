"""Whether a cache throws away graphs only to make them again."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from graphcache.cache.lru import GraphCache

WINDOW = 32
"""Captures that are looked at."""
AGAIN = 24
"""How many of them are of signatures that had a graph before: three quarters."""
HITS = 50
"""Hits for each capture, below which captures do not pay: a capture takes as long as some 50 eager calls."""
RECALL_HITS = 1
"""The same for graphs that are had back without a capture, which takes somewhat longer than an eager call (H200: 354 µs
and 267 for a small network, where a hit takes 47)."""
_REMEMBERED = 1024
_FEW = 4


@dataclass(frozen=True, slots=True)
class Thrashing:
    """What was seen over the last captures.

    Args:
        again: How many of them were of signatures that had been captured before.
        hits: Calls that replays answered meanwhile.
        shapes: How many signatures they were of.
        recalled: Whether these were no captures: the graphs were had back from their templates.
    """

    again: int
    hits: int
    shapes: int
    recalled: bool = False

    def advice(self, cache: GraphCache[Any], capture: str) -> str:
        """What was seen, and what would help here.

        Args:
            cache: Where the graphs are.
            capture: The policy by which they came there.
        """
        known = cache.max_graphs
        if len(cache) >= known:
            bound = f"max_graphs (now {known}"
        elif cache.max_bytes is not None:
            bound = f"max_bytes (now {cache.max_bytes}"
        else:
            bound = f"the budget of the process with set_process_budget ({cache.nbytes} bytes are held here"
        ways = [f"raise {bound}; {self.shapes} signatures take turns)"]
        if capture == "first":
            ways.append("capture only what pays for itself with capture='worthwhile'")
        if self.shapes > _FEW:
            ways.append("pad shapes to a few sizes with buckets")
        done, what = ("had back", "recalls") if self.recalled else ("captured", "captures")
        return (
            f"graphs are evicted and {done} again: {self.again} of the last {WINDOW} {what} were of signatures that "
            f"had a graph before, and only {self.hits} calls were answered by graphs meanwhile. To change that: "
            f"{', or '.join(ways)}. (Said once.)"
        )


class Thrash:
    """Watches the captures of one module, or its recalls, and says once that they are in vain.

    Of the last 32 captures at least 24 were of signatures that had been captured before, and fewer than 50 calls were
    answered by graphs for each of the 32; of recalls, fewer than one. A signature is remembered for 1024 others.

    Args:
        recalls: Whether it watches recalls.

    Example:
        >>> thrash = Thrash()
        >>> found = [thrash.captured(index % 9, hits=0) for index in range(100)]
        >>> [(index, seen) for index, seen in enumerate(found) if seen]
        [(32, Thrashing(again=24, hits=0, shapes=9))]
    """

    def __init__(self, *, recalls: bool = False) -> None:
        self._recalls = recalls
        self._wanted = WINDOW * (RECALL_HITS if recalls else HITS)
        self._before: OrderedDict[int, None] = OrderedDict()
        self._last: deque[tuple[int, bool]] = deque(maxlen=WINDOW)
        self._hits: deque[int] = deque(maxlen=WINDOW)
        self._said = False

    def captured(self, key: Hashable, hits: int) -> Thrashing | None:
        """Note a capture, or a recall.

        Args:
            key: Its signature.
            hits: How many calls graphs have answered so far, all of them together.

        Returns:
            What was seen, the first time that it is thrashing.
        """
        if self._said:
            return None
        # Not the signature itself, which may be large; two of one hash would be counted as one.
        number = hash(key)
        self._last.append((number, number in self._before))
        self._hits.append(hits)
        self._before[number] = None
        self._before.move_to_end(number)
        if len(self._before) > _REMEMBERED:
            self._before.popitem(last=False)
        again, gained = sum(was for _, was in self._last), hits - self._hits[0]
        if len(self._last) < WINDOW or again < AGAIN or gained >= self._wanted:
            return None
        self._said = True
        return Thrashing(again, gained, len({number for number, _ in self._last}), self._recalls)

    def forget(self) -> None:
        """Begin anew: the graphs were dropped for another reason."""
        self._before.clear()
        self._last.clear()
        self._hits.clear()
