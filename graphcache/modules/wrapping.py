"""Wrapping a module. Engines of Torch-TensorRT in it are adopted, and given back when it is closed."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphcache.config import GraphConfig
from graphcache.features import features
from graphcache.modules.cached_module import CachedModule


def wrap(module: nn.Module, **options: Any) -> CachedModule:
    """Put a module, which is left as it was, behind a cache of CUDA graphs.

    Args:
        module: An engine from :func:`graphcache.load`, or any ``nn.Module``, on CUDA or on the CPU. Engines in a module
            that Torch-TensorRT compiled are adopted until this one is closed, see ``runtime``.
        **options: See :class:`~graphcache.config.GraphConfig`.

    Raises:
        ConfigError: For an unknown option, a bad value, or a module that is wrapped already.
        EngineError: With ``runtime="graphcache"``, for an engine of Torch-TensorRT that cannot be run here.

    Example:
        >>> import torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.Linear(4, 2).requires_grad_(False), max_graphs=8)
        >>> fast(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """
    return wrapped(module, GraphConfig.of(options))


def wrapped(module: nn.Module, config: GraphConfig) -> CachedModule:
    """What :func:`wrap` does, for options that are checked."""
    adoption = features.adopt(module, config.runtime)
    try:
        return CachedModule(adoption.module, config, on_close=adoption.end if adoption else None)
    except BaseException:
        adoption.end()
        raise
