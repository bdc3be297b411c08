"""How often a module was called with which shapes, also where no graph answered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]
Shapes = dict[str | int, Shape]
"""Position or name of an argument -> its shape."""


class Seen:
    """The shapes and counts of a module's calls. Hits of a graph that is there are counted by its entry.

    Args:
        size: How many keys are remembered; beyond that the longest unseen is forgotten.

    Example:
        >>> import torch
        >>> seen = Seen()
        >>> for rows in (1, 3, 3):
        ...     seen.note(rows, (torch.zeros(rows, 4),), {})
        >>> seen.shapes({3: 5})
        [({0: (1, 4)}, 1), ({0: (3, 4)}, 7)]
    """

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._calls: OrderedDict[Hashable, tuple[Shapes, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._calls)

    def note(self, key: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any], count: int = 1) -> None:
        """Count a call that no graph of its key has answered so far.

        Args:
            key: Its key.
            args: Positional arguments.
            kwargs: Keyword arguments.
            count: -1 for a hit that answered a padded call, which was noted under its own key; 0 for no call at all.
        """
        with self._lock:
            shapes, calls = self._calls.pop(key, ({}, None))
            if calls is None:
                given: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
                shapes = {name: tuple(value.shape) for name, value in given if isinstance(value, Tensor)}
            self._calls[key] = shapes, (calls or 0) + count
            if len(self._calls) > self._size:
                self._calls.popitem(last=False)

    def retire(self, key: Hashable, hits: int) -> None:
        """Count the hits of a graph that goes."""
        with self._lock:
            if (known := self._calls.get(key)) is not None:
                self._calls[key] = known[0], known[1] + hits

    def keys(self) -> list[Hashable]:
        """The keys that are remembered, the longest unseen first."""
        with self._lock:
            return list(self._calls)

    def calls(self, key: Hashable, hits: int = 0) -> int:
        """How many calls of a key there were, with the hits of its graph if there is one."""
        known = self._calls.get(key)
        return hits if known is None else max(known[1] + hits, 0)

    def shapes(self, hits: Mapping[Hashable, int]) -> list[tuple[Shapes, int]]:
        """The shapes of the calls of each key, and how many there were.

        Args:
            hits: Of the graphs that are there.
        """
        with self._lock:
            return [(shapes, max(calls + hits.get(key, 0), 0)) for key, (shapes, calls) in self._calls.items()]
