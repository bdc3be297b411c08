"""Calls that stay cold: run eagerly, some in a row, without asking each time whether a capture is worth it by now."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from operator import length_hint
from typing import Protocol

from graphcache.cache.signature import Signature
from graphcache.errors import Cause
from graphcache.modules.shortcuts import Shortcuts

MOST = 32
"""Calls in a row before the admission is asked again."""
RENEWALS = 8
"""How often it is asked from here, before a call goes the long way again, by signature, freshness and accounts, and is
measured. That way adds 20 µs to a call, asking from here 8, and a call in between 2; on the CPU of an H100, with caches
that TensorRT has just filled, the first 170 and the last 35."""
_MOST_LAYOUTS = 1024


class Leave:
    """Calls of one signature that need not be looked at before they have been made.

    Args:
        layout: Of their arguments.
        signature: Theirs.
        cause: Why they run eagerly.
        index: The CUDA device that they concern, if any.
        count: How many.
        renewals: How often there may be more.
    """

    __slots__ = ("_count", "_noted", "_untold", "calls", "cause", "index", "layout", "renewals", "signature")

    def __init__(
        self,
        layout: Hashable,
        signature: Signature,
        cause: Cause,
        index: int | None,
        count: int,
        renewals: int = 0,
    ) -> None:
        self.layout, self.signature, self.cause, self.index = layout, signature, cause, index
        self.renewals = renewals
        self._untold = 0
        self.grant(count)

    def grant(self, count: int) -> None:
        """Begin anew, with so many calls; all that were made so far are noted."""
        # An iterator, since taking the next one is one step, whichever threads do it.
        self.calls = iter(range(count))
        self._count, self._noted = count, 0

    def unnoted(self) -> int:
        """How many calls were made since this was asked the last time; not for several threads at once."""
        made = self._count - length_hint(self.calls)
        found, self._noted = made - self._noted, made
        self._untold += found
        return found

    def untold(self) -> int:
        """How many calls were noted since this was asked the last time; not for several threads at once."""
        found, self._untold = self._untold, 0
        return found


class Policy(Protocol):
    """What :class:`~graphcache.cache.admission.Admission` does for calls that nobody looks at."""

    def ran_again(self, key: Signature, count: int) -> None:
        """Note such calls."""

    def renew(self, key: Signature, count: int) -> tuple[Cause | None, float]:
        """Note them, and say why the next one is to run eagerly, and how many may, that one included.

        ``None`` if that one has to be looked at.
        """


class ColdCalls:
    """The leaves of one module, and the account of what was called with them.

    They stand among the module's shortcuts, where a call finds them by its layout, in the place of an entry's.

    Args:
        shortcuts: The module's.
        tell: Hears, later, that some more calls of a signature were made, and why they ran eagerly.
        policy: Notes them as soon as it is asked again.

    Example:
        >>> from graphcache.cache.admission import Admission
        >>> from graphcache.cache.books import COLD
        >>> from graphcache.cache.lru import GraphCache
        >>> shortcuts = Shortcuts(None, bool)
        >>> policy = Admission(GraphCache(max_graphs=1), "prepared")
        >>> cold = ColdCalls(shortcuts, lambda signature, cause, count: print(signature, count), policy)
        >>> cold.grant(Leave("float32[8]", (8,), COLD, None, 3))
        >>> entry, leave, *_ = shortcuts["float32[8]"]
        >>> next(leave.calls), next(leave.calls)
        (0, 1)
        >>> cold.settle()
        (8,) 2
    """

    def __init__(self, shortcuts: Shortcuts, tell: Callable[[Signature, Cause, int], object], policy: Policy) -> None:
        self._shortcuts = shortcuts
        self._tell = tell
        self._policy = policy
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

    def renew(self, leave: Leave) -> bool:
        """Take one call more of a leave that is over; ``False`` if that call has to be looked at."""
        with self._lock:
            if self._leaves.get(leave.layout) is not leave:
                return False
            if next(leave.calls, None) is not None:
                # Another thread was here before.
                return True
            if leave.renewals > 0:
                leave.renewals -= 1
                cause, count = self._policy.renew(leave.signature, leave.unnoted())
                # Another cause is news, which the long way tells.
                if cause is leave.cause and count >= 1.0:
                    leave.grant(math.ceil(min(count, MOST)))
                    next(leave.calls)
                    return True
            self._end([leave.layout])
            return False

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
        if count := leave.unnoted():
            self._policy.ran_again(leave.signature, count)
        if count := leave.untold():
            self._tell(leave.signature, leave.cause, count)
