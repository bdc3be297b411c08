"""One warning where a module keeps capturing calls that its graphs then do not answer: whether, and what helps."""

from __future__ import annotations

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


def advice(
    captures: Sequence[tuple[Hashable, bool]],
    gained: int,
    cache: GraphCache[Any],
    capture: str,
    names: Signature | Sequence[str] = (),
) -> str | None:
    """What was seen, and what would help, where the last :data:`WINDOW` captures were in vain; ``None`` if they pay.

    Given are their keys, whether each had a graph before, and the calls that graphs answered meanwhile: fewer than one
    for each if some part of the key is new at each call, fewer than 50 if graphs are evicted only to be captured again.
    """
    again = sum(had_one for _, had_one in captures)
    if gained >= WINDOW * (HITS if again >= MOST_OF_THEM else 1):
        return None
    keys = dict.fromkeys(key for key, _ in captures)
    path, axis, values = varies_most(CallSpec(key, names) for key in keys if isinstance(key, CallKey))
    where = f"`{path}`" if axis is None else f"`{path}` dim {axis}"
    few = ", ".join(map(str, values[:4]))
    new = f"{WINDOW - again} of the last {WINDOW} captures were of calls that were new"
    each = f"{new}, each of which needs a graph of its own: {where} had {len(values)} values ({few}, …)"
    if 2 * again >= WINDOW:
        seen = (
            f"graphs are evicted and captured again: {again} of the last {WINDOW} captures were of signatures "
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
    hits = f"only {gained} calls were answered by graphs meanwhile"
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
