"""One warning where a module keeps capturing calls that its graphs then do not answer: whether, and what helps."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from inspect import Signature
from typing import Any

from graphcache.cache.graph_cache import GraphCache
from graphcache.keys.call_key import CallKey
from graphcache.keys.call_spec import CallSpec, TensorSpec

WINDOW = 32
"""Captures that are looked at."""
MOST_OF_THEM = 24
"""How many of them are of keys that had a graph before, for hits to have to pay for captures: three quarters."""
HITS = 50
"""Hits for each capture, below which captures of evicted graphs do not pay: a capture takes as long as some 50 eager
calls. Of new keys less is asked, one hit for each: a module that is warming up captures too."""
_REMEMBERED = 1024


class ChurnWatch:
    """Watches the captures of one module, and tells once that they are in vain.

    Over the last 32 captures, fewer than one call was answered by graphs for each: some part of the key is new at each
    call. Or at least 24 of them were of keys that had been captured before, and fewer than 50 calls were answered for
    each: graphs are evicted only to be captured again.
    """

    def __init__(self) -> None:
        self._before: set[int] = set()
        self._last: deque[tuple[Hashable, bool, int]] = deque(maxlen=WINDOW)
        self._told = False
        self.again = self.gained = 0
        """How many of the last captures were of keys that had a graph before, and the hits meanwhile."""

    def captured(self, key: Hashable, hits: int) -> bool:
        """Note a capture; whether this is the first time that captures are in vain."""
        if self._told:
            return False
        # Not the key itself, which may be large; two of one hash count as one.
        self._last.append((key, hash(key) in self._before, hits))
        if len(self._before) >= _REMEMBERED:
            self._before.clear()
        self._before.add(hash(key))
        self.again, self.gained = sum(was for _, was, _ in self._last), hits - self._last[0][2]
        enough = WINDOW * (HITS if self.again >= MOST_OF_THEM else 1)
        self._told = len(self._last) == WINDOW and self.gained < enough
        return self._told

    def forget(self) -> None:
        """Begin anew: the graphs were dropped for another reason."""
        self._before.clear()
        self._last.clear()

    def advice(self, cache: GraphCache[Any], capture: str, names: Signature | Sequence[str] = ()) -> str:
        """What was seen, and what would help here."""
        keys = dict.fromkeys(key for key, _, _ in self._last)
        path, axis, values = varies_most(CallSpec(key, names) for key in keys if isinstance(key, CallKey))
        where = f"`{path}`" if axis is None else f"`{path}` dim {axis}"
        few = ", ".join(map(str, values[:4]))
        new = f"{WINDOW - self.again} of the last {WINDOW} captures were of calls that were new"
        each = f"{new}, each of which needs a graph of its own: {where} had {len(values)} values ({few}, …)"
        if 2 * self.again >= WINDOW:
            seen = (
                f"graphs are evicted and captured again: {self.again} of the last {WINDOW} captures were of signatures "
                f"that had a graph before"
            )
            way = (
                f"raise max_graphs (now {cache.max_graphs}), max_bytes (now {cache.max_bytes}) or the budget of the "
                f"process ({len(keys)} signatures take turns), or pad shapes to a few sizes with buckets"
            )
        elif len(values) < 2:
            seen, way = new, "give arguments of the same kinds each time; explain() shows the signatures"
        elif axis is None:
            seen, way = each, f"pass `{path}` as a tensor, whose value no graph depends on"
        else:
            seen = each
            way = (
                f"pad to a few sizes with buckets={{{path!r}: {{{axis}: [{values[0]}, …]}}}} (advise_buckets tells "
                f"which), or capture the sizes that will come with prepare()"
            )
        if capture == "first":
            way += ", or capture only what pays for itself with capture='worthwhile'"
        hits = f"only {self.gained} calls were answered by graphs meanwhile"
        return f"{seen}, and {hits}. To change that: {way}. (Said once.)"


def varies_most(specs: Iterable[CallSpec]) -> tuple[str, int | None, list[Any]]:
    """The constant, or the axis of a tensor, that differs most between some calls; and its values, in order."""
    found: dict[tuple[str, int | None], dict[Any, None]] = {}
    for spec in specs:
        for path, value in spec.values.items():
            parts = enumerate(value.shape) if isinstance(value, TensorSpec) else [(None, value)]
            for axis, part in parts:
                found.setdefault((path, axis), {})[part] = None
    (path, axis), values = max(found.items(), key=lambda each: len(each[1]), default=(("", None), {}))
    return path, axis, list(values)
