"""Modes of the current context: whether graphs are used, and what happens to inputs on another device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal, Self

from torch import nn

from graphcache.capture.engine_like import is_foreign
from graphcache.config import GraphConfig, modes
from graphcache.errors import ConfigError, ModeConflictError
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.engine import EngineModule
from graphcache.modules.transparent import controls
from graphcache.modules.wrapping import wrapped
from graphcache.runtime.engines import check_bool, unwrapped
from graphcache.runtime.settings import RuntimeSettings


@contextmanager
def enable_cudagraphs(
    compiled_module: nn.Module,
    *,
    cuda_graph_strategy: Literal["disabled", "whole_graph_capture"] | None = None,
    strict: bool = False,
    **options: Any,
) -> Iterator[CachedModule]:
    """Wrap a module for the length of a ``with`` block; its graphs are closed at the end.

    Args:
        compiled_module: An engine, or any module. A module that is wrapped already keeps its own graphs.
        cuda_graph_strategy: Checked and ignored: graphcache's graphs replace those of Torch-TensorRT and of
            TensorRT-RTX, between which it chooses.
        strict: Refuse a module with an engine that needs an output allocator, as Torch-TensorRT does. Otherwise that
            engine runs eagerly.
        **options: See :class:`~graphcache.config.GraphConfig`.

    Yields:
        The module to call inside the block.

    Raises:
        ModeConflictError: If ``strict``, and an engine uses an output allocator.
        ConfigError: For a bad option, or options for a module that is wrapped already.

    Example:
        >>> import torch
        >>> with enable_cudagraphs(nn.Linear(4, 2).requires_grad_(False)) as fast:
        ...     y = fast(torch.zeros(1, 4))
    """
    check_bool("enable_cudagraphs(strict=...)", strict)
    if cuda_graph_strategy is not None:
        RuntimeSettings(cuda_graph_strategy=cuda_graph_strategy)
    known = compiled_module if isinstance(compiled_module, CachedModule) else None
    if known is not None and options:
        name = controls(known).ledger.name
        raise ConfigError(f"{name} is wrapped already, so options have no effect; give them to wrap()")
    if strict and (names := _names_with_allocator(compiled_module)):
        raise ModeConflictError(
            f"CUDA graphs and a dynamic output allocator are incompatible, and {', '.join(names)} uses one; leave "
            f"strict=False to run it eagerly, or switch the allocator off"
        )
    fast = wrapped(compiled_module, GraphConfig.of(options)) if known is None else known
    whole = not isinstance(unwrapped(fast), EngineModule) and controls(fast).captures_whole
    token = modes.set(replace(modes.get(), graphs="whole_graph" if whole else "subgraph"))
    try:
        yield fast
    finally:
        if known is None:
            controls(fast).close()
        # In another context, such as that of an asynchronous generator's end, there is nothing to undo.
        with suppress(ValueError):
            modes.reset(token)


def _names_with_allocator(module: nn.Module) -> list[str]:
    """Names of engines whose outputs TensorRT allocates, in modules of Torch-TensorRT too."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected an nn.Module, got {type(module).__name__}")
    return [
        name or type(each).__name__
        for name, each in unwrapped(module).named_modules()
        if (isinstance(each, EngineModule) and each.uses_output_allocator)
        or (is_foreign(each) and getattr(each, "requires_output_allocator", False))
    ]


def set_cudagraphs_mode(mode: bool) -> None:
    """Let engines use graphs (``True``), or run everything eagerly, wrapped modules too (``False``), in this context.

    Without a call of it, wrapped modules use graphs and bare engines do not.

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
    """Move inputs on another device to the engine's (``True``), or refuse them (``False``, the default).

    It takes effect at once; as a context manager it is undone at the end of the block.

    Raises:
        ConfigError: If ``mode`` is not a ``bool``.

    Example:
        >>> with set_multi_device_safe_mode(True):
        ...     pass
    """

    def __init__(self, mode: bool) -> None:
        check_bool("set_multi_device_safe_mode", mode)
        self.old_mode = modes.get().multi_device_safe
        """The mode before."""
        modes.set(replace(modes.get(), multi_device_safe=mode))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        modes.set(replace(modes.get(), multi_device_safe=self.old_mode))
