"""Calls that stay cold: run eagerly, some in a row, without asking each time whether a capture is worth it by now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from operator import length_hint
from typing import Any

from graphcache.cache.signature import Signature
from graphcache.errors import Cause

MOST = 32
"""Calls in a row. The way to an eager answer by signature, admission and accounts takes three times as long as the one
through here, and one in 32 goes it."""
_MOST_LAYOUTS = 1024


class Leave:
    """Calls of one signature that need not be looked at before they have been made.

    Args:
        signature: Theirs.
        cause: Why they run eagerly.
        index: The CUDA device that they concern, if any.
        count: How many.
    """

    __slots__ = ("_count", "_told", "calls", "cause", "index", "signature")

    def __init__(self, signature: Signature, cause: Cause, index: int | None, count: int) -> None:
        self.signature, self.cause, self.index = signature, cause, index
        # An iterator, since taking the next one is one step, whichever threads do it.
        self.calls = iter(range(count))
        self._count, self._told = count, 0

    def untold(self) -> int:
        """How many calls were made since this was asked the last time; not for several threads at once."""
        made = self._count - length_hint(self.calls)
        found, self._told = made - self._told, made
        return found


class ColdCalls:
    """The leaves of one module by the layout of the arguments, and the account of what was called with them.

    Args:
        tell: Hears, later, that some more calls of a signature were made, and why they ran eagerly.

    Example:
        >>> from graphcache.cache.books import COLD
        >>> cold = ColdCalls(lambda signature, cause, count: print(signature, count))
        >>> cold.grant("float32[8]", Leave((8,), COLD, None, 3))
        >>> leave = cold.get("float32[8]")
        >>> next(leave.calls), next(leave.calls)
        (0, 1)
        >>> cold.settle()
        (8,) 2
    """

    def __init__(self, tell: Callable[[Signature, Cause, int], object]) -> None:
        self._tell = tell
        self._leaves: dict[Hashable, Leave] = {}
        self._lock = threading.Lock()
        self.get: Callable[[Hashable], Any] = self._leaves.get
        """The leave of a layout, if there is one."""

    def grant(self, layout: Hashable, leave: Leave) -> None:
        """Answer calls of a layout without a look from now on."""
        with self._lock:
            if len(self._leaves) >= _MOST_LAYOUTS:
                self._end(list(self._leaves))
            self._end([layout])
            self._leaves[layout] = leave

    def end(self, layout: Hashable) -> None:
        """Look at the next call of a layout again."""
        with self._lock:
            self._end([layout])

    def clear(self) -> None:
        """Look at every next call again."""
        with self._lock:
            self._end(list(self._leaves))

    def settle(self) -> None:
        """Tell of all calls that were made so far."""
        with self._lock:
            for leave in self._leaves.values():
                self._settle(leave)

    def _end(self, layouts: list[Hashable]) -> None:
        for layout in layouts:
            if (leave := self._leaves.pop(layout, None)) is not None:
                self._settle(leave)

    def _settle(self, leave: Leave) -> None:
        if count := leave.untold():
            self._tell(leave.signature, leave.cause, count)
