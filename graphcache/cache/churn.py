"""Whether a module keeps capturing calls that its graphs then do not answer, and what to do about it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from inspect import Signature as Function
from typing import Any

from graphcache.cache.lru import GraphCache
from graphcache.cache.wording import TensorWords, words_of

WINDOW = 32
"""Captures that are looked at."""
MOST_OF_THEM = 24
"""How many of them are of keys that had a graph before, for hits to have to pay for captures: three quarters."""
HITS = 50
"""Hits for each capture, below which captures of evicted graphs do not pay: a capture takes as long as some 50 eager
calls. Of new keys less is asked, one hit for each: a module that is warming up captures too."""
_REMEMBERED = 1024
_FEW = 4
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Varying:
    """The part of a key that differs most between calls.

    Args:
        path: Of the argument, such as ``x`` or ``batch['ids'][0]``.
        axis: Of a tensor, if its sizes differ; ``None`` for a constant.
        values: Those that came, in order.
    """

    path: str
    axis: int | None
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"`{self.path}`" if self.axis is None else f"`{self.path}` dim {self.axis}"


@dataclass(frozen=True, slots=True)
class Churn:
    """What was seen over the last captures.

    Args:
        again: How many of them were of keys that had a graph before.
        hits: Calls that graphs answered meanwhile.
        keys: Those that were captured, each once.
    """

    again: int
    hits: int
    keys: tuple[Hashable, ...]

    def advice(self, cache: GraphCache[Any], capture: str, names: Function | Sequence[str] = ()) -> str:
        """What was seen, and what would help here.

        Args:
            cache: Where the graphs are.
            capture: The policy by which they came there.
            names: The signature of the function that is called, or the names of its positional arguments.
        """
        seen, ways = self._evictions(cache) if 2 * self.again >= WINDOW else self._new_keys(names)
        if capture == "first":
            ways.append("capture only what pays for itself with capture='worthwhile'")
        return (
            f"{seen}, and only {self.hits} calls were answered by graphs meanwhile. To change that: "
            f"{', or '.join(ways)}. (Said once.)"
        )

    def _evictions(self, cache: GraphCache[Any]) -> tuple[str, list[str]]:
        if len(cache) >= cache.max_graphs:
            bound = f"max_graphs (now {cache.max_graphs}"
        elif cache.max_bytes is not None:
            bound = f"max_bytes (now {cache.max_bytes}"
        else:
            bound = f"the budget of the process with set_process_budget ({cache.nbytes} bytes are held here"
        ways = [f"raise {bound}; {len(self.keys)} signatures take turns)"]
        if len(self.keys) > _FEW:
            ways.append("pad shapes to a few sizes with buckets")
        seen = f"graphs are evicted and captured again: {self.again} of the last {WINDOW} captures were of signatures"
        return f"{seen} that had a graph before", ways

    def _new_keys(self, names: Function | Sequence[str]) -> tuple[str, list[str]]:
        new = f"{WINDOW - self.again} of the last {WINDOW} captures were of calls that were new"
        varying = varies_most(self.keys, names)
        if varying is None:
            return new, ["give arguments of the same kinds each time; explain() shows the signatures"]
        some = ", ".join(str(value) for value in varying.values[:_SHOWN])
        seen = f"{new}, each of which needs a graph of its own: {varying} had {len(varying.values)} values ({some}, …)"
        if varying.axis is None:
            return seen, [f"pass `{varying.path}` as a tensor, whose value no graph depends on"]
        option = f"buckets={{{varying.path!r}: {{{varying.axis}: [{varying.values[0]}, …]}}}}"
        ways = [
            f"pad to a few sizes with {option} (advise_buckets tells which)",
            "capture the sizes that will come with prepare()",
        ]
        return seen, ways


def varies_most(keys: Iterable[Hashable], names: Function | Sequence[str] = ()) -> Varying | None:
    """What differs most between some keys; ``None`` if it is neither the size of a tensor nor a constant.

    Example:
        >>> from graphcache.keys.call_key import describe
        >>> str(varies_most((describe((step,), {})[0] for step in range(9)), ["step"]))
        '`step`'
    """
    found: dict[tuple[str, int | None], dict[Any, None]] = {}
    for key in keys:
        values = words_of(key, names).values if isinstance(key, tuple) else {}
        for path, value in values.items():
            parts = enumerate(value.shape) if isinstance(value, TensorWords) else [(None, value)]
            for axis, part in parts:
                found.setdefault((path, axis), {})[part] = None
    (path, axis), most = max(found.items(), key=lambda each: len(each[1]), default=(("", None), {}))
    return Varying(path, axis, tuple(most)) if len(most) > 1 else None


class ChurnWatch:
    """Watches the captures of one module, and says once that they are in vain.

    Over the last 32 captures, fewer than one call was answered by graphs for each: some part of the key is new at each
    call. Or at least 24 of them were of keys that had been captured before, and fewer than 50 calls were answered for
    each: graphs are evicted only to be captured again.

    Example:
        >>> watch = ChurnWatch()
        >>> found = [watch.captured(index % 9, hits=0) for index in range(100)]
        >>> [(index, seen.again, len(seen.keys)) for index, seen in enumerate(found) if seen]
        [(31, 23, 9)]
    """

    def __init__(self) -> None:
        self._before: OrderedDict[int, None] = OrderedDict()
        self._last: deque[tuple[Hashable, bool]] = deque(maxlen=WINDOW)
        self._hits: deque[int] = deque(maxlen=WINDOW)
        self._said = False

    def captured(self, key: Hashable, hits: int) -> Churn | None:
        """Note a capture.

        Args:
            key: Of the call.
            hits: How many calls graphs have answered so far, all of them together.

        Returns:
            What was seen, the first time that captures are in vain.
        """
        if self._said:
            return None
        # Not the key itself, which may be large; two of one hash would be counted as one.
        number = hash(key)
        self._last.append((key, number in self._before))
        self._hits.append(hits)
        self._before[number] = None
        self._before.move_to_end(number)
        if len(self._before) > _REMEMBERED:
            self._before.popitem(last=False)
        if len(self._last) < WINDOW:
            return None
        again, gained = sum(was for _, was in self._last), hits - self._hits[0]
        if gained >= WINDOW * (HITS if again >= MOST_OF_THEM else 1):
            return None
        self._said = True
        seen = Churn(again, gained, tuple(dict.fromkeys(key for key, _ in self._last)))
        self._last.clear()
        return seen

    def forget(self) -> None:
        """Begin anew: the graphs were dropped for another reason."""
        self._before.clear()
        self._last.clear()
        self._hits.clear()
