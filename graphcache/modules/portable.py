"""Pickles of version 0.1 call :func:`again` to make a wrapped module."""

from typing import Any

from graphcache.modules.cached import CachedModule


def again(module: Any, config: Any, name: str) -> CachedModule:
    """Wrap a module that was unpickled."""
    return CachedModule(module, config, name=name)
