"""The account of a wrapped module."""

from __future__ import annotations

from dataclasses import dataclass, field

from graphcache.errors import Reason


@dataclass(frozen=True)
class CacheInfo:
    """The account of a wrapped module and of the parts it captured one by one.

    Args:
        hits: Calls answered by a replay, or eagerly with the very answer of one, which proves that a graph from before
            a change of the module is still right.
        captures: Graphs made.
        evictions: Graphs closed, whatever the cause.
        eager: Calls answered without a graph, by reason.
        graphs: Graphs held now.
        nbytes: Device memory that they own, in bytes; an estimate where the driver does not tell.
        capture_seconds: Time spent capturing, in seconds.
        padded: Of the hits, those of calls that were padded to a bucket.
        eager_seconds: What eager execution of all calls that were measured would have taken, in seconds; they are with
            ``capture="worthwhile"``.
        saved_seconds: What replays have saved of that.
        budget: Bytes that the graphs may own, ``None`` for no bound; with ``max_bytes="auto"`` it is known from the
            first capture on.
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
        return CacheInfo(
            self.hits + other.hits,
            self.captures + other.captures,
            self.evictions + other.evictions,
            eager,
            self.graphs + other.graphs,
            self.nbytes + other.nbytes,
            self.capture_seconds + other.capture_seconds,
            self.padded + other.padded,
            self.eager_seconds + other.eager_seconds,
            self.saved_seconds + other.saved_seconds,
            None if self.budget is None or other.budget is None else self.budget + other.budget,
            # What follows is of the whole, which both are parts of.
            max(self.process_nbytes, other.process_nbytes),
            max(self.waits, other.waits),
            max(self.wait_seconds, other.wait_seconds),
        )
