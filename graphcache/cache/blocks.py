"""Signatures that could not be captured, and when another try is due."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from graphcache.errors import Cause, Reason

_TRANSIENT = frozenset(
    {Reason.CAPTURE_FAILED, Reason.OUT_OF_MEMORY, Reason.OVER_BUDGET, Reason.MISMATCH, Reason.ALIASES_STATE}
)
_EFFECTS = frozenset({Reason.MUTATES, Reason.RANDOM, Reason.UNOBSERVED})
_FIRST_WAIT = 16


@dataclass(slots=True)
class _Denial:
    """Why a key has no graph, and the calls that it has had since."""

    cause: Cause
    version: int
    times: int
    calls: int = 0

    def left(self, version: int) -> int | None:
        """How many calls run eagerly before a capture is tried again; ``None`` for all of them."""
        # Lazy tables and caches are filled by the first calls: it is looked at again at once, then after 2, 4, 8 calls.
        soon = 0 if self.times == 1 else 1 << min(self.times - 1, _MAX_DOUBLINGS)
        if self.cause.reason in _EFFECTS or version != self.version:
            return max(0, soon - self.calls)
        if self.cause.reason in _TRANSIENT:
            return max(0, (_FIRST_WAIT << min(self.times - 1, _MAX_DOUBLINGS)) - self.calls)
        return None


_MAX_DOUBLINGS = 20


class Blocks:
    """Remembers failures, so that a failed capture is not paid for at every call.

    What lies in the module (a host read, a layer that forbids capture) is denied until the state of the module changes.
    An effect of the call (it counts, fills a table) is looked for again at the next call, then after 2, 4, 8 calls and
    so on. What may pass (no memory, no room, a failed capture) is tried again after 16 calls, then 32, 64 and so on.
    Any thread may ask and tell.

    Args:
        size: How many keys are remembered; beyond that the longest unused is forgotten.

    Example:
        >>> blocks = Blocks()
        >>> blocks.block("key", Cause(Reason.HOST_READ))
        >>> blocks.cause("key").reason
        <Reason.HOST_READ: 'host_read'>
    """

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._found: OrderedDict[Hashable, _Denial] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def block(self, key: Hashable, cause: Cause, version: int = 0) -> None:
        """Remember that ``key`` could not be captured; doubles the wait if it is known already.

        Args:
            key: The key.
            cause: Why.
            version: That of the module's guard.
        """
        with self._lock:
            known = self._found.pop(key, None)
            self._found[key] = _Denial(cause, version, 1 if known is None else known.times + 1)
            while len(self._found) > self._size:
                self._found.popitem(last=False)

    def cause(self, key: Hashable, version: int = 0) -> Cause | None:
        """Why ``key`` must run eagerly this time, or ``None`` if capturing may be tried.

        Args:
            key: The key.
            version: That of the module's guard now.
        """
        with self._lock:
            found = self._found.get(key)
            if found is None or found.left(version) == 0:
                return None
            found.calls += 1
            self._found.move_to_end(key)
            return found.cause

    def look(self, key: Hashable, version: int = 0) -> tuple[Cause, int | None] | None:
        """What is known of a key, without counting a call of it.

        Returns:
            Why it has no graph, and after how many calls another capture is tried, ``None`` for never; or ``None`` if
            nothing is known.
        """
        with self._lock:
            found = self._found.get(key)
            return None if found is None else (found.cause, found.left(version))

    def forget(self, key: Hashable) -> None:
        """Forget what is known of a key."""
        with self._lock:
            self._found.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._found.clear()
