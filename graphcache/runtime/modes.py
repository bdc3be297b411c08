"""What a context says of all modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from graphcache.config import modes
from graphcache.runtime.engines import check_bool


def set_cudagraphs_mode(mode: bool) -> None:
    """Let engines use graphs (``True``), or run everything eagerly, wrapped modules too (``False``), in this context.

    Where it was never called, wrapped modules use graphs and bare engines don't.

    Raises:
        ConfigError: If ``mode`` is not a ``bool``.

    Example:
        >>> set_cudagraphs_mode(True)
        >>> get_cudagraphs_mode()
        True
    """
    check_bool("set_cudagraphs_mode", mode)
    modes.set(replace(modes.get(), graphs="subgraph" if mode else "off"))


def get_cudagraphs_mode() -> bool:
    """Whether engines use graphs of their own in this context."""
    return modes.get().graphs == "subgraph"


def get_whole_cudagraphs_mode() -> bool:
    """Whether this context is inside :func:`enable_cudagraphs` of a module that is captured as a whole."""
    return modes.get().graphs == "whole_graph"


class set_multi_device_safe_mode:
    """Move inputs that lie on another device than the engine (``True``), or refuse them (``False``, the default).

    Takes effect at once; as a context manager it is undone at the end of the block.

    Raises:
        ConfigError: If ``mode`` is not a ``bool``.

    Example:
        >>> with set_multi_device_safe_mode(True):
        ...     pass
    """

    def __init__(self, mode: bool) -> None:
        check_bool("set_multi_device_safe_mode", mode)
        self.old_mode = modes.get().multi_device_safe
        """What was set before."""
        modes.set(replace(modes.get(), multi_device_safe=mode))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        modes.set(replace(modes.get(), multi_device_safe=self.old_mode))
