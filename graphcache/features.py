"""Optional features that methods of the core call. ``import graphcache`` fills them in; the core imports none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphcache.errors import ExtraNotFoundError


def _absent(feature: str) -> Callable[..., Any]:
    """Stands for a feature that is not there."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ExtraNotFoundError(f"{feature} is not there; import graphcache, not a part of it")

    return refuse


@dataclass
class Features:
    """What is there."""

    padding: Callable[..., Any] = _absent("graphcache.buckets")
    advise_buckets: Callable[..., Any] = _absent("graphcache.buckets")
    manifest_of: Callable[..., Any] = _absent("graphcache.persist")
    save: Callable[..., Any] = _absent("graphcache.persist")


features = Features()
"""The features of this process."""
