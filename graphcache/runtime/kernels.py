"""Compiled kernels of several engines in one place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from graphcache.engines.kernel_cache import RuntimeCache
from graphcache.errors import ConfigError, shown
from graphcache.events import log
from graphcache.runtime.engines import check_bool
from graphcache.runtime.settings import runtime_config


@contextmanager
def runtime_cache(
    target_or_targets: nn.Module | Sequence[nn.Module],
    path: str | os.PathLike[str] | Any = "",
    autosave: bool = True,
) -> Iterator[RuntimeCache]:
    """Let all engines of some modules share what TensorRT-RTX compiles, for the length of a ``with`` block.

    Args:
        target_or_targets: An engine or a module with engines at any depth, or several.
        path: A file, loaded at the start if it is there; or an open file-like object with ``read`` and ``write``, which
            is the caller's to open, position and close. Empty for neither.
        autosave: Save there at the end. What goes wrong then is logged, and raised to nobody.

    Yields:
        The cache.

    Raises:
        ConfigError: For modules without an engine, or what is neither a path nor such an object.
        OSError: If the file is there and cannot be read.
    """
    check_bool("runtime_cache(autosave=...)", autosave)
    is_path = isinstance(path, (str, os.PathLike))
    if not is_path and not (hasattr(path, "read") and hasattr(path, "write")):
        raise ConfigError(f"path={shown(path)}: expected a path, or an object with read and write")
    cache = RuntimeCache(path if is_path else "")
    if is_path:
        cache.load()
    else:
        cache.load_from_stream(path)
    try:
        with runtime_config(target_or_targets, runtime_cache=cache):
            yield cache
    finally:
        if autosave:
            try:
                if is_path:
                    cache.save()
                else:
                    cache.save_to_stream(path)
            except Exception as error:
                log.warning("compiled kernels were not saved: %s: %s", type(error).__name__, error)
