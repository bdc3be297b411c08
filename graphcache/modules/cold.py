"""Calls that stay cold: run eagerly, some in a row, without asking each time whether a capture is worth it by now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from operator import length_hint

from graphcache.cache.signature import Signature
from graphcache.errors import Cause
from graphcache.modules.shortcuts import Shortcuts

MOST = 32
"""Calls in a row. The way to an eager answer by signature, admission and accounts takes four times as long as the one
through here, and one in 32 goes it."""
_MOST_LAYOUTS = 1024


class Leave:
    """Calls of one signature that need not be looked at before they have been made.

    Args:
        layout: Of their arguments.
        signature: Theirs.
        cause: Why they run eagerly.
        index: The CUDA device that they concern, if any.
        count: How many.
    """

    __slots__ = ("_count", "_told", "calls", "cause", "index", "layout", "signature")

    def __init__(self, layout: Hashable, signature: Signature, cause: Cause, index: int | None, count: int) -> None:
        self.layout, self.signature, self.cause, self.index = layout, signature, cause, index
        # An iterator, since taking the next one is one step, whichever threads do it.
        self.calls = iter(range(count))
        self._count, self._told = count, 0

    def untold(self) -> int:
        """How many calls were made since this was asked the last time; not for several threads at once."""
        made = self._count - length_hint(self.calls)
        found, self._told = made - self._told, made
        return found


class ColdCalls:
    """The leaves of one module, and the account of what was called with them.

    They stand among the module's shortcuts, where a call finds them by its layout, in the place of an entry's.

    Args:
        shortcuts: The module's.
        tell: Hears, later, that some more calls of a signature were made, and why they ran eagerly.

    Example:
        >>> from graphcache.cache.books import COLD
        >>> shortcuts = Shortcuts(None, bool)
        >>> cold = ColdCalls(shortcuts, lambda signature, cause, count: print(signature, count))
        >>> cold.grant(Leave("float32[8]", (8,), COLD, None, 3))
        >>> entry, leave, *_ = shortcuts["float32[8]"]
        >>> next(leave.calls), next(leave.calls)
        (0, 1)
        >>> cold.settle()
        (8,) 2
    """

    def __init__(self, shortcuts: Shortcuts, tell: Callable[[Signature, Cause, int], object]) -> None:
        self._shortcuts = shortcuts
        self._tell = tell
        self._leaves: dict[Hashable, Leave] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._leaves)

    def grant(self, leave: Leave) -> None:
        """Answer calls of a layout without a look from now on."""
        with self._lock:
            if len(self._leaves) >= _MOST_LAYOUTS:
                self._end(list(self._leaves))
            self._end([leave.layout])
            self._leaves[leave.layout] = leave
            self._shortcuts[leave.layout] = (None, leave, None, -1, None)

    def end(self, leave: Leave) -> None:
        """Look at the next call of its layout again."""
        with self._lock:
            if self._leaves.get(leave.layout) is leave:
                self._end([leave.layout])

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
                shortcut = self._shortcuts.get(layout)
                if shortcut is not None and shortcut[1] is leave:
                    # Another thread may have dropped all of them since: an eviction does.
                    self._shortcuts.pop(layout, None)
                self._settle(leave)

    def _settle(self, leave: Leave) -> None:
        if count := leave.untold():
            self._tell(leave.signature, leave.cause, count)
