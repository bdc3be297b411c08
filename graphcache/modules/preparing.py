"""Whether this context prepares graphs before serving, as the slow way of a call sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from graphcache.cache.lru import Entry


class Preparation:
    """The graphs that one preparation has made or found; nothing evicts them until it is over.

    Example:
        >>> class Graph:
        ...     nbytes = 8
        >>> entry = Entry(Graph())
        >>> with prepared_together(Preparation()) as preparation:
        ...     preparation.keep(entry)
        ...     entry.pinned
        True
        >>> entry.pinned
        False
    """

    def __init__(self, *, pin: bool = False) -> None:
        self._pin = pin
        self._pinned: dict[Entry[Any], bool] = {}

    @property
    def nbytes(self) -> int:
        """Memory that the graphs own, in bytes."""
        return sum(entry.nbytes for entry in self._pinned)

    def __len__(self) -> int:
        return len(self._pinned)

    def keep(self, entry: Entry[Any]) -> None:
        """Let nothing evict a graph from now on."""
        self._pinned.setdefault(entry, entry.pinned)
        entry.pinned = True

    def end(self) -> None:
        """Pin the graphs for good if that was asked for, otherwise leave them as they were."""
        for entry, before in self._pinned.items():
            entry.pinned = self._pin or before


preparing: ContextVar[Preparation | None] = ContextVar("graphcache_preparing", default=None)
"""What captures of this context belong to; ``None`` while serving."""


@contextmanager
def prepared_together(preparation: Preparation) -> Iterator[Preparation]:
    """Inside, whatever this context captures is prepared, admitted as such, and not evicted."""
    token = preparing.set(preparation)
    try:
        yield preparation
    finally:
        preparing.reset(token)
        preparation.end()
