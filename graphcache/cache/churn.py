"""One warning where a module keeps capturing calls that its graphs then do not answer: whether, and what helps."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from inspect import Signature
from typing import Any, NamedTuple

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
_FEW = 4


class Churn(NamedTuple):
    """The last captures: how many were of keys that had a graph before, the hits meanwhile, and each key once."""

    again: int
    hits: int
    keys: tuple[Hashable, ...]

    def advice(self, cache: GraphCache[Any], capture: str, names: Signature | Sequence[str] = ()) -> str:
        """What was seen, and what would help here."""
        seen, ways = self._evictions(cache) if 2 * self.again >= WINDOW else self._new_keys(names)
        if capture == "first":
            ways.append("capture only what pays for itself with capture='worthwhile'")
        return (
            f"{seen}, and only {self.hits} calls were answered by graphs meanwhile. To change that: "
            f"{', or '.join(ways)}. (Said once.)"
        )

    def _evictions(self, cache: GraphCache[Any]) -> tuple[str, list[str]]:
        """What is said of graphs that are captured again."""
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

    def _new_keys(self, names: Signature | Sequence[str]) -> tuple[str, list[str]]:
        """What is said of keys that are new at each call."""
        new = f"{WINDOW - self.again} of the last {WINDOW} captures were of calls that were new"
        path, axis, values = varies_most(CallSpec(key, names) for key in self.keys if isinstance(key, CallKey))
        if len(values) < 2:
            return new, ["give arguments of the same kinds each time; explain() shows the signatures"]
        where = f"`{path}`" if axis is None else f"`{path}` dim {axis}"
        some = ", ".join(str(value) for value in values[:_FEW])
        seen = f"{new}, each of which needs a graph of its own: {where} had {len(values)} values ({some}, …)"
        if axis is None:
            return seen, [f"pass `{path}` as a tensor, whose value no graph depends on"]
        option = f"buckets={{{path!r}: {{{axis}: [{values[0]}, …]}}}}"
        return seen, [
            f"pad to a few sizes with {option} (advise_buckets tells which)",
            "capture the sizes that will come with prepare()",
        ]


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


class ChurnWatch:
    """Watches the captures of one module, and says once that they are in vain.

    Over the last 32 captures, fewer than one call was answered by graphs for each: some part of the key is new at each
    call. Or at least 24 of them were of keys that had been captured before, and fewer than 50 calls were answered for
    each: graphs are evicted only to be captured again.
    """

    def __init__(self) -> None:
        self._before: set[int] = set()
        self._last: deque[tuple[Hashable, bool, int]] = deque(maxlen=WINDOW)
        self._said = False

    def captured(self, key: Hashable, hits: int) -> Churn | None:
        """Note a capture; what was seen, the first time that captures are in vain."""
        if self._said:
            return None
        # Not the key itself, which may be large; two of one hash count as one.
        self._last.append((key, hash(key) in self._before, hits))
        if len(self._before) >= _REMEMBERED:
            self._before.clear()
        self._before.add(hash(key))
        again, gained = sum(was for _, was, _ in self._last), hits - self._last[0][2]
        if len(self._last) < WINDOW or gained >= WINDOW * (HITS if again >= MOST_OF_THEM else 1):
            return None
        self._said = True
        seen = Churn(again, gained, tuple(dict.fromkeys(key for key, _, _ in self._last)))
        self._last.clear()
        return seen

    def forget(self) -> None:
        """Begin anew: the graphs were dropped for another reason."""
        self._before.clear()
        self._last.clear()
