"""The account of a wrapped module."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from graphcache.errors import Reason

_OF_THE_WHOLE = ("process_nbytes", "waits", "wait_seconds")
"""Fields that a module and its parts have in common."""


@dataclass(frozen=True)
class CacheInfo:
    """The counters of a wrapped module and of the submodules that it captured one by one.

    Args:
        hits: Calls answered by a replay, or by an eager run that proved a graph right after a change of the module.
        captures: Graphs made.
        evictions: Graphs closed, whatever the cause.
        eager: Calls answered without a graph, by reason.
        graphs: Graphs held now.
        nbytes: Device memory that they own, in bytes; an estimate where the driver does not tell.
        capture_seconds: Time spent capturing.
        padded: Of the hits, those of calls that were padded to a bucket.
        eager_seconds: What eager execution of the measured calls would have taken; with ``capture="worthwhile"`` all
            are measured.
        saved_seconds: What replays have saved of that.
        budget: Bytes that the graphs may own, ``None`` for no bound; ``max_bytes="auto"`` is set by the first capture.
        process_nbytes: Bytes that the graphs of all modules of the process on this device own; 0 before a capture.
        waits: Eager calls that waited for a run of a background capture.
        wait_seconds: How long these calls waited, together.
    """

    hits: int = 0
    captures: int = 0
    evictions: int = 0
    eager: dict[Reason, int] = field(default_factory=dict)
    graphs: int = 0
    nbytes: int = 0
    capture_seconds: float = 0.0
    padded: int = 0
    eager_seconds: float = 0.0
    saved_seconds: float = 0.0
    budget: int | None = 0
    process_nbytes: int = 0
    waits: int = 0
    wait_seconds: float = 0.0

    def __add__(self, other: CacheInfo) -> CacheInfo:
        eager = {
            reason: self.eager.get(reason, 0) + other.eager.get(reason, 0) for reason in {**self.eager, **other.eager}
        }
        budget = None if self.budget is None or other.budget is None else self.budget + other.budget
        found: dict[str, Any] = {"eager": eager, "budget": budget}
        for name in (each.name for each in fields(self) if each.name not in found):
            pair = getattr(self, name), getattr(other, name)
            found[name] = max(pair) if name in _OF_THE_WHOLE else sum(pair)
        return CacheInfo(**found)
