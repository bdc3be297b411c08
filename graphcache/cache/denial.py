"""Why a key has no graph, and when another capture is due."""

from __future__ import annotations

from dataclasses import dataclass

from graphcache.errors import Cause, Reason

_TRANSIENT = frozenset(
    {Reason.CAPTURE_FAILED, Reason.OUT_OF_MEMORY, Reason.OVER_BUDGET, Reason.MISMATCH, Reason.ALIASES_STATE}
)
_EFFECTS = frozenset({Reason.MUTATES, Reason.RANDOM, Reason.UNOBSERVED})
_FIRST_WAIT = 16
"""Calls before a transient failure is tried again for the first time."""
_MAX_DOUBLINGS = 20


@dataclass(slots=True)
class Denial:
    """Why a key has no graph, and the calls that it has had since.

    What lies in the module (a host read, a layer that forbids capture) is denied until the state of the module changes.
    An effect of the call (it counts, fills a table) is looked for again at the next call, then after 2, 4, 8 calls and
    so on: lazy tables and caches are filled by the first calls. What may pass (no memory, no room, a failed capture) is
    tried again after 16 calls, then 32, 64 and so on.

    Args:
        cause: Why.
        version: That of the module's guard.
        times: How often the key was denied.
        calls: Calls since the last time.

    Example:
        >>> Denial(Cause(Reason.CAPTURE_FAILED), version=0).wait(0), Denial(Cause(Reason.HOST_READ), version=0).wait(0)
        (16, None)
    """

    cause: Cause
    version: int
    times: int = 1
    calls: int = 0

    def wait(self, version: int) -> int | None:
        """How many calls run eagerly before a capture is tried again; ``None`` for all of them."""
        doublings = min(self.times - 1, _MAX_DOUBLINGS)
        if self.cause.reason in _EFFECTS or version != self.version:
            return max(0, (1 << doublings if doublings else 0) - self.calls)
        if self.cause.reason in _TRANSIENT:
            return max(0, (_FIRST_WAIT << doublings) - self.calls)
        return None
