"""How TensorRT-RTX compiles kernels at run time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import nn

from graphcache.config import Specialization, modes
from graphcache.engines.kernel_cache import RuntimeCache
from graphcache.errors import ConfigError, shown
from graphcache.runtime.engines import engines_of_all

CudaGraphStrategy = Literal["disabled", "whole_graph_capture"]


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """What an engine's execution contexts are made with. It is not part of an engine file.

    Args:
        dynamic_shapes_kernel_specialization_strategy: ``"lazy"`` compiles kernels for a shape beside the calls,
            ``"eager"`` within the first one, ``"none"`` not at all. ``None`` for ``"eager"``, or ``"none"`` with
            TensorRT-RTX 1.4, which answers wrongly otherwise. A graph keeps the kernels it was captured with.
        cuda_graph_strategy: ``"whole_graph_capture"`` lets bare engines use graphs, which are graphcache's.
        runtime_cache: Where compiled kernels go: the path of a file, a :class:`RuntimeCache`, or ``None`` for memory.

    Raises:
        ConfigError: For a value outside what is listed here.

    Example:
        >>> RuntimeSettings().merge(cuda_graph_strategy="whole_graph_capture").cuda_graph_strategy
        'whole_graph_capture'
    """

    dynamic_shapes_kernel_specialization_strategy: Specialization | None = None
    cuda_graph_strategy: CudaGraphStrategy = "disabled"
    runtime_cache: str | os.PathLike[str] | RuntimeCache | None = None

    def __post_init__(self) -> None:
        strategy, name = self.dynamic_shapes_kernel_specialization_strategy, "cuda_graph_strategy"
        if strategy is not None:
            _one_of("dynamic_shapes_kernel_specialization_strategy", strategy, get_args(Specialization))
        _one_of(name, self.cuda_graph_strategy, get_args(CudaGraphStrategy))
        if self.runtime_cache is not None and not isinstance(self.runtime_cache, (str, os.PathLike, RuntimeCache)):
            raise ConfigError(f"runtime_cache={shown(self.runtime_cache)}: expected a path, a RuntimeCache or None")

    def merge(self, **overrides: Any) -> RuntimeSettings:
        """The same settings with some exchanged.

        Raises:
            ConfigError: For an unknown name or a bad value.
        """
        known = [each.name for each in fields(self)]
        for name in overrides:
            if name not in known:
                raise ConfigError(f"unknown setting {shown(name)}; the settings are {', '.join(known)}")
        return replace(self, **overrides)


@contextmanager
def runtime_config(
    target_or_targets: nn.Module | Sequence[nn.Module], **overrides: Any
) -> Iterator[nn.Module | Sequence[nn.Module]]:
    """Let all engines of some modules be run with other settings, for the length of a ``with`` block.

    Their graphs and contexts are dropped at the start and at the end, if anything changes.

    Args:
        target_or_targets: An engine or a module with engines at any depth, or several.
        **overrides: Fields of :class:`RuntimeSettings`; what is not given stays as it is.

    Yields:
        What was given.

    Raises:
        ConfigError: For an unknown setting, a bad value, or modules without an engine.
    """
    wanted = RuntimeSettings().merge(**overrides)
    engines = engines_of_all("runtime_config", target_or_targets)
    cache = wanted.runtime_cache
    if isinstance(cache, (str, os.PathLike)):
        cache = RuntimeCache(cache)
        cache.load()
    with ExitStack() as undo:
        if isinstance(wanted.runtime_cache, (str, os.PathLike)) and cache is not None:
            undo.callback(cache.save)
        if "cuda_graph_strategy" in overrides:
            graphs: Literal["subgraph"] | None = None if wanted.cuda_graph_strategy == "disabled" else "subgraph"
            if graphs is not None and modes.get().graphs is None:
                undo.callback(modes.reset, modes.set(replace(modes.get(), graphs=graphs)))
        for _, engine in engines:
            strategy, kernels = engine.runtime_choice
            if "dynamic_shapes_kernel_specialization_strategy" in overrides:
                strategy = wanted.dynamic_shapes_kernel_specialization_strategy
            if "runtime_cache" in overrides:
                kernels = cache
            before = engine.runtime_choice
            engine.configure_runtime(strategy, kernels)
            undo.callback(engine.configure_runtime, *before)
        yield target_or_targets


def set_dynamic_shapes_kernel_strategy(
    target_or_targets: nn.Module | Sequence[nn.Module], strategy: Specialization | None
) -> None:
    """Let all engines of some modules compile kernels in another way from now on.

    Args:
        target_or_targets: An engine or a module with engines at any depth, or several.
        strategy: As in :class:`RuntimeSettings`.

    Raises:
        ConfigError: For a bad value, or modules without an engine.
    """
    RuntimeSettings(dynamic_shapes_kernel_specialization_strategy=strategy)
    for _, engine in engines_of_all("set_dynamic_shapes_kernel_strategy", target_or_targets):
        engine.configure_runtime(strategy, engine.runtime_choice[1])


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={shown(value)} is not an option; expected one of {', '.join(map(repr, allowed))}")
