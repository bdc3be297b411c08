"""Whether this context prepares graphs before serving, as the slow way of a call sees it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from graphcache.cache.graph_cache import Entry


class Preparation:
    """The graphs that one preparation has made or found; nothing evicts them until it is over.

    Example:
        >>> class Graph:
        ...     nbytes = 8
        >>> entries = {"8x64": Entry(Graph())}
        >>> with prepared_together(Preparation()) as preparation:
        ...     preparation.keep(entries, "8x64")
        ...     entries["8x64"].pinned
        True
        >>> entries["8x64"].pinned, len(preparation)
        (False, 1)
    """

    def __init__(self, *, pin: bool = False) -> None:
        self._pin = pin
        self._kept: dict[Entry[Any], tuple[Mapping[Hashable, Entry[Any]], Hashable, bool]] = {}

    @property
    def nbytes(self) -> int:
        """Memory that the graphs own, in bytes."""
        return sum(entry.nbytes for entry in self._there())

    def __len__(self) -> int:
        return len(self._there())

    def keep(self, entries: Mapping[Hashable, Entry[Any]], key: Hashable) -> None:
        """Let nothing evict a graph from now on, if it is there."""
        entry = entries.get(key)
        if entry is not None:
            self._kept.setdefault(entry, (entries, key, entry.pinned))
            entry.pinned = True

    def end(self) -> None:
        """Pin the graphs for good if that was asked for, otherwise leave them as they were."""
        for entry, (_, _, before) in self._kept.items():
            entry.pinned = self._pin or before

    def _there(self) -> list[Entry[Any]]:
        # One that was pinned may have been dropped all the same, with all the others.
        return [entry for entry, (entries, key, _) in self._kept.items() if entries.get(key) is entry]


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
