"""Modes and context managers, named as in ``torch_tensorrt.runtime``.

A mode belongs to the current context (:mod:`contextvars`): it nests, it is restored on every exit, and it does not leak
into other threads or tasks. That differs from Torch-TensorRT, where a mode is global to the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from graphcache.cache.arbiter import set_process_budget
from graphcache.config import GraphConfig, modes
from graphcache.errors import ConfigError, ModeConflictError, shown
from graphcache.modules.cached import CachedModule
from graphcache.modules.engine import EngineModule


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
    _check_bool("set_cudagraphs_mode", mode)
    modes.set(replace(modes.get(), graphs="subgraph" if mode else "off"))


def get_cudagraphs_mode() -> bool:
    """Whether engines use graphs of their own in this context."""
    return modes.get().graphs == "subgraph"


def get_whole_cudagraphs_mode() -> bool:
    """Whether this context is inside :func:`enable_cudagraphs` of a module that is captured as a whole."""
    return modes.get().graphs == "whole_graph"


@contextmanager
def enable_cudagraphs(module: nn.Module, *, strict: bool = False, **options: Any) -> Iterator[CachedModule]:
    """The module behind graphs, for the length of a ``with`` block; its graphs are closed at the end.

    Args:
        module: An engine, or any module. One that is wrapped already is used with its own graphs, which stay.
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
    _check_bool("enable_cudagraphs(strict=...)", strict)
    if isinstance(module, CachedModule) and options:
        raise ConfigError(f"{module.ledger.name} is wrapped already, so options have no effect; give them to wrap()")
    if strict and (names := [name for name, engine in _engines(module) if engine.uses_output_allocator]):
        raise ModeConflictError(
            f"CUDA graphs and a dynamic output allocator are incompatible, and {', '.join(names)} uses one; leave "
            f"strict=False to run it eagerly, or switch the allocator off"
        )
    fast = module if isinstance(module, CachedModule) else CachedModule(module, GraphConfig.of(options))
    whole = not isinstance(fast.module, EngineModule) and fast.config.strategy != "per_submodule"
    token = modes.set(replace(modes.get(), graphs="whole_graph" if whole else "subgraph"))
    try:
        yield fast
    finally:
        modes.reset(token)
        if fast is not module:
            fast.close()


@contextmanager
def enable_output_allocator(module: nn.Module, *, strict: bool = False) -> Iterator[nn.Module]:
    """Let TensorRT allocate the outputs of every engine in the module, for the length of a ``with`` block.

    Their calls run eagerly meanwhile, with the reason ``output_allocator``.

    Args:
        module: An engine or a module with engines at any depth.
        strict: Refuse while graphs are switched on, as Torch-TensorRT does.

    Yields:
        The module.

    Raises:
        ModeConflictError: If ``strict``, and graphs are on in this context.
    """
    _check_bool("enable_output_allocator(strict=...)", strict)
    if strict and modes.get().graphs in ("subgraph", "whole_graph"):
        raise ModeConflictError(
            "CUDA graphs and a dynamic output allocator are incompatible, and graphs are switched on here; leave "
            "strict=False to run the engines eagerly, or call set_cudagraphs_mode(False) first"
        )
    before = [(engine, engine.set_use_output_allocator(True)) for _, engine in _engines(module)]
    try:
        yield module
    finally:
        for engine, was_on in before:
            engine.set_use_output_allocator(was_on)


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
        _check_bool("set_multi_device_safe_mode", mode)
        self._before = modes.get().multi_device_safe
        modes.set(replace(modes.get(), multi_device_safe=mode))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        modes.set(replace(modes.get(), multi_device_safe=self._before))


def _engines(module: nn.Module) -> list[tuple[str, EngineModule]]:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected an nn.Module, got {type(module).__name__}")
    inner = module.module if isinstance(module, CachedModule) else module
    return [(name or engine.name, engine) for name, engine in inner.named_modules() if isinstance(engine, EngineModule)]


def _check_bool(function: str, mode: object) -> None:
    if not isinstance(mode, bool):
        raise ConfigError(f"{function} takes True or False, not {shown(mode)}")


__all__ = [
    "enable_cudagraphs",
    "enable_output_allocator",
    "get_cudagraphs_mode",
    "get_whole_cudagraphs_mode",
    "set_cudagraphs_mode",
    "set_multi_device_safe_mode",
    "set_process_budget",
]
