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
_REMEMBERED = 1024
_FEW = 4


@dataclass(frozen=True, slots=True)
class Thrashing:
    """What was seen over the last captures.

    Args:
        again: How many of them were of signatures that had been captured before.
        hits: Calls that replays answered meanwhile.
        shapes: How many signatures they were of.
    """

    again: int
    hits: int
    shapes: int

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
        return (
            f"graphs are evicted and captured again: {self.again} of the last {WINDOW} captures were of signatures "
            f"that had a graph before, and only {self.hits} calls were answered by graphs meanwhile. To change that: "
            f"{', or '.join(ways)}. (Said once.)"
        )


class Thrash:
    """Watches the captures of one module, and says once that they are in vain.

    Of the last 32 captures at least 24 were of signatures that had been captured before, and fewer than 50 calls were
    answered by graphs for each of the 32. A signature is remembered for 1024 others.

    Example:
        >>> thrash = Thrash()
        >>> found = [thrash.captured(index % 9, hits=0) for index in range(100)]
        >>> [(index, seen) for index, seen in enumerate(found) if seen]
        [(32, Thrashing(again=24, hits=0, shapes=9))]
    """

    def __init__(self) -> None:
        self._before: OrderedDict[int, None] = OrderedDict()
        self._last: deque[tuple[int, bool]] = deque(maxlen=WINDOW)
        self._hits: deque[int] = deque(maxlen=WINDOW)
        self._said = False

    def captured(self, key: Hashable, hits: int) -> Thrashing | None:
        """Note a capture.

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
        if len(self._last) < WINDOW or again < AGAIN or gained >= WINDOW * HITS:
            return None
        self._said = True
        return Thrashing(again, gained, len({number for number, _ in self._last}))

    def forget(self) -> None:
        """Begin anew: the graphs were dropped for another reason."""
        self._before.clear()
        self._last.clear()
        self._hits.clear()
