"""Which shapes a module was called with, and how often: what the bucket advisor goes by."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from graphcache.cache.advisor import Advice, Shape, advise
from graphcache.cache.places import Place
from graphcache.errors import ConfigError, shown


class _Call:
    """The calls of one signature that no graph of it answered, and those that others' graphs answered for it."""

    __slots__ = ("count", "lent", "shapes")

    def __init__(self, shapes: dict[str | int, Shape]) -> None:
        self.shapes = shapes
        self.count = 0
        self.lent = 0


class Seen:
    """The shapes of a module's calls. A hit is not told of: the cache's entries count it.

    Args:
        size: How many signatures are remembered; beyond that the longest unseen is forgotten.

    Example:
        >>> import torch
        >>> seen = Seen()
        >>> for rows in (1, 3, 3):
        ...     seen.note(rows, (torch.zeros(rows, 4),), {})
        >>> seen.counts(Place(0, "x"), {3: 5})
        {(1, 4): 1, (3, 4): 7}
    """

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._calls: OrderedDict[Hashable, _Call] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._calls)

    def note(self, key: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call that no graph of its signature has answered so far."""
        with self._lock:
            call = self._calls.get(key)
            if call is None:
                given: Iterable[tuple[str | int, Any]] = (*enumerate(args), *kwargs.items())
                shapes = {place: tuple(value.shape) for place, value in given if isinstance(value, Tensor)}
                call = self._calls[key] = _Call(shapes)
                if len(self._calls) > self._size:
                    self._calls.popitem(last=False)
            self._calls.move_to_end(key)
            call.count += 1

    def keys(self) -> list[Hashable]:
        """The signatures that are remembered, the longest unseen first."""
        with self._lock:
            return list(self._calls)

    def calls(self, key: Hashable, hits: int = 0) -> int:
        """How many calls of a signature there were.

        Args:
            key: The signature.
            hits: Of its graph, if there is one.
        """
        with self._lock:
            call = self._calls.get(key)
            return hits if call is None else max(call.count + hits - call.lent, 0)

    def lend(self, key: Hashable) -> None:
        """A hit of a signature that stands for a call of other sizes, which was noted."""
        with self._lock:
            if (call := self._calls.get(key)) is not None:
                call.lent += 1

    def retire(self, key: Hashable, hits: int) -> None:
        """The hits of a graph that goes."""
        with self._lock:
            if (call := self._calls.get(key)) is not None:
                call.count += hits

    def counts(self, place: Place, hits: Mapping[Hashable, int]) -> dict[Shape, int]:
        """How often each shape of an argument was seen, in calls where it has as many dimensions as in most.

        Args:
            place: The argument.
            hits: Of the graphs that are there.
        """
        found: Counter[Shape] = Counter()
        with self._lock:
            for key, call in self._calls.items():
                for name in (place.index, place.name):
                    if name is not None and name in call.shapes:
                        found[call.shapes[name]] += max(call.count + hits.get(key, 0) - call.lent, 0)
        ranks: Counter[int] = Counter()
        for shape, count in found.items():
            ranks[len(shape)] += count
        usual = max(ranks, key=lambda rank: ranks[rank], default=0)
        return {shape: count for shape, count in found.items() if count and len(shape) == usual}


def advise_axes(trace: Any, most: Any) -> Advice:
    """Buckets for the axes on which the shapes differ, for those that ``most`` names if it is a mapping.

    Args:
        trace: As :func:`~graphcache.cache.advisor.advise` takes it.
        most: How many buckets each axis may have; or axis -> how many.

    Raises:
        ConfigError: Naming the field.

    Example:
        >>> advise_axes({(1, 4): 9, (2, 4): 9, (3, 4): 1}, 2).option()
        {0: [1, 3]}
    """
    if isinstance(most, Mapping):
        return advise(trace, most)
    if type(most) is not int or most < 1:
        raise ConfigError(f"most={shown(most)}: expected a whole number, 1 or more, or axes with one for each")
    pairs = trace.items() if isinstance(trace, Mapping) else trace
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise ConfigError(f"trace={shown(trace)}: expected shapes with how often each was seen")
    pairs = list(pairs)
    # Whatever else is wrong with them is for the advisor to say.
    shapes = [pair[0] for pair in pairs if isinstance(pair, (tuple, list)) and pair and isinstance(pair[0], tuple)]
    rank = min(map(len, shapes), default=1)
    axes = [axis for axis in range(rank) if len({shape[axis] for shape in shapes}) > 1]
    return advise(pairs, dict.fromkeys(axes or range(rank or 1), most))
