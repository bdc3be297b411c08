"""A module behind graphs for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from graphcache.config import GraphConfig, modes
from graphcache.errors import ConfigError, ModeConflictError
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.controls import controls
from graphcache.modules.engine import EngineModule
from graphcache.modules.foreign import is_foreign
from graphcache.modules.wrapping import wrapped
from graphcache.runtime.engines import check_bool
from graphcache.runtime.settings import RuntimeSettings


@contextmanager
def enable_cudagraphs(
    compiled_module: nn.Module,
    *,
    cuda_graph_strategy: Literal["disabled", "whole_graph_capture"] | None = None,
    strict: bool = False,
    **options: Any,
) -> Iterator[CachedModule]:
    """The module behind graphs, for the length of a ``with`` block; its graphs are closed at the end.

    Args:
        compiled_module: An engine, or any module. One that is wrapped already is used with its own graphs, which stay.
        cuda_graph_strategy: Looked at and not needed: it chooses between Torch-TensorRT's graphs and those of
            TensorRT-RTX, and graphcache's take the place of both.
        strict: Refuse a module with an engine that needs an output allocator, as Torch-TensorRT does, instead of
            running that engine eagerly.
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
    if isinstance(compiled_module, CachedModule) and options:
        name = controls(compiled_module).ledger.name
        raise ConfigError(f"{name} is wrapped already, so options have no effect; give them to wrap()")
    if strict and (names := _allocating(compiled_module)):
        raise ModeConflictError(
            f"CUDA graphs and a dynamic output allocator are incompatible, and {', '.join(names)} uses one; leave "
            f"strict=False to run it eagerly, or switch the allocator off"
        )
    is_wrapped = isinstance(compiled_module, CachedModule)
    fast = (
        compiled_module
        if isinstance(compiled_module, CachedModule)
        else wrapped(compiled_module, GraphConfig.of(options))
    )
    whole = not isinstance(fast._module, EngineModule) and controls(fast).captures_whole
    token = modes.set(replace(modes.get(), graphs="whole_graph" if whole else "subgraph"))
    try:
        yield fast
    finally:
        modes.reset(token)
        if not is_wrapped:
            controls(fast).close()


def _allocating(module: nn.Module) -> list[str]:
    """Names of engines whose outputs TensorRT allocates, in modules of Torch-TensorRT too."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected an nn.Module, got {type(module).__name__}")
    inner = module._module if isinstance(module, CachedModule) else module
    return [
        name or type(each).__name__
        for name, each in inner.named_modules()
        if (isinstance(each, EngineModule) and each.uses_output_allocator)
        or (is_foreign(each) and getattr(each, "requires_output_allocator", False))
    ]
