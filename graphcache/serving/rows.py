"""Axis 0 of every input: the rows, which have buckets whether anybody named them or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphcache.buckets.spec import Axis, Buckets, Mask
from graphcache.errors import ConfigError, shown


def with_rows(given: Any, sizes: Any, inputs: Sequence[str]) -> Buckets:
    """Buckets in which every input has rows."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"buckets={shown(given)}: expected sizes of the rows, or arguments with axes")
    rows = Axis(sizes, name="rows")
    found: dict[Any, Any] = {}
    for name in dict.fromkeys([*inputs, *given]):
        axes = given.get(name, {})
        if isinstance(axes, Mask) or not isinstance(axes, Mapping) or 0 in axes:
            found[name] = axes
        else:
            found[name] = {0: rows, **axes}
    return Buckets(found)
