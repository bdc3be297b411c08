"""What evicted graphs can be had back from, up to a number: the longest unused goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    """Something that holds what it does not need to hold for ever."""

    def close(self) -> None:
        """Let go of it."""


T = TypeVar("T", bound=Closable)


class Templates(Generic[T]):
    """A bounded mapping of what is left of evicted graphs. It owns that: what leaves it is closed.

    What is put there after :meth:`clear`, but is of before, does not stay: an eviction may be under way in another
    thread, and what it leaves behind is not right any more.

    Args:
        most: How many there may be; 0 for none.
        forgotten: Called with the key of what has left and was not taken.

    Example:
        >>> class Nothing:
        ...     def close(self): print("closed")
        >>> templates = Templates(1)
        >>> templates.put("a", Nothing(), templates.generation), templates.put("b", Nothing(), templates.generation)
        closed
        (True, True)
        >>> templates.take("a"), len(templates)
        (None, 1)
    """

    def __init__(self, most: int, forgotten: Callable[[Hashable], object] = lambda key: None) -> None:
        self.most = most
        self.generation = 0
        """Goes up when all of them are forgotten."""
        self._forgotten = forgotten
        self._items: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def put(self, key: Hashable, item: T, generation: int) -> bool:
        """Keep what is left of a graph.

        Args:
            key: Of the graph.
            item: What is left; closed one day, at once if it does not stay.
            generation: As it was when the graph was captured.

        Returns:
            Whether it stays.
        """
        with self._lock:
            stays = self.most > 0 and generation == self.generation
            leaving = [] if stays else [(key, item)]
            if stays:
                if key in self._items:
                    leaving.append((key, self._items.pop(key)))
                self._items[key] = item
                if len(self._items) > self.most:
                    leaving.append(self._items.popitem(last=False))
        self._close(leaving)
        return stays

    def take(self, key: Hashable) -> T | None:
        """Take it out, if it is there; the caller closes it."""
        with self._lock:
            return self._items.pop(key, None)

    def clear(self) -> None:
        """Close all of them, and whatever is still to come of what they are of."""
        with self._lock:
            self.generation += 1
            leaving = list(self._items.items())
            self._items.clear()
        self._close(leaving)

    def _close(self, items: list[tuple[Hashable, T]]) -> None:
        """All of it even if one raises."""
        with ExitStack() as each:
            for key, item in reversed(items):
                each.callback(item.close)
                if key not in self._items:
                    each.callback(self._forgotten, key)
