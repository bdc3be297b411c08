"""Signatures that could not be captured, and when another try is due."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from graphcache.errors import Cause, Reason

_TRANSIENT = frozenset(
    {
        Reason.CAPTURE_FAILED,
        Reason.OUT_OF_MEMORY,
        Reason.OVER_BUDGET,
        Reason.MISMATCH,
        Reason.MUTATES,
        Reason.ALIASES_STATE,
    }
)
_FIRST_WAIT = 16


class Blocks:
    """Remembers failures, so that a failed capture is not paid for at every call.

    What lies in the module (a host read, a layer that forbids capture) is blocked for good. What may pass (no memory,
    no room, a failed capture, an attribute that only a first call sets) is tried again after 16 calls, then 32, 64 and
    so on.

    Args:
        size: How many signatures are remembered; beyond that the longest unused is forgotten.

    Example:
        >>> blocks = Blocks()
        >>> blocks.block("key", Cause(Reason.RANDOM))
        >>> blocks.cause("key").reason
        <Reason.RANDOM: 'random'>
    """

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._found: OrderedDict[Hashable, list[int]] = OrderedDict()
        self._causes: dict[Hashable, Cause] = {}

    def __len__(self) -> int:
        return len(self._found)

    def block(self, key: Hashable, cause: Cause) -> None:
        """Remember that ``key`` could not be captured; doubles the wait if it is known already."""
        wait = self._found[key][1] * 2 if key in self._found else _FIRST_WAIT
        self._found[key] = [wait, wait]
        self._found.move_to_end(key)
        self._causes[key] = cause
        while len(self._found) > self._size:
            oldest, _ = self._found.popitem(last=False)
            del self._causes[oldest]

    def cause(self, key: Hashable) -> Cause | None:
        """Why ``key`` must run eagerly this time, or ``None`` if capturing may be tried."""
        found = self._found.get(key)
        if found is None:
            return None
        cause = self._causes[key]
        if cause.reason in _TRANSIENT:
            if found[0] <= 0:
                return None
            found[0] -= 1
        self._found.move_to_end(key)
        return cause

    def look(self, key: Hashable) -> tuple[Cause, int | None] | None:
        """What is known of a signature, without counting a call of it.

        Returns:
            Why it has no graph, and after how many calls another capture is tried, ``None`` for never; or ``None`` if
            nothing is known.
        """
        found, cause = self._found.get(key), self._causes.get(key)
        if found is None or cause is None:
            return None
        return cause, found[0] if cause.reason in _TRANSIENT else None

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()
        self._causes.clear()
