"""How TensorRT-RTX compiles kernels at run time, and where it keeps them."""

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
from graphcache.events import log
from graphcache.modules.engine import EngineModule
from graphcache.runtime.engines import check_bool, engines_of_all, swapped

CudaGraphStrategy = Literal["disabled", "whole_graph_capture"]


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """Settings of an engine's execution contexts. They are not part of an engine file.

    Args:
        dynamic_shapes_kernel_specialization_strategy: ``"lazy"`` compiles kernels for a shape in the background,
            ``"eager"`` during the first call, ``"none"`` never. ``None`` means ``"eager"``, but ``"none"`` with
            TensorRT-RTX 1.4, whose specialised kernels are wrong. A graph keeps the kernels it was captured with.
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
        if (strategy := self.dynamic_shapes_kernel_specialization_strategy) is not None:
            _check("dynamic_shapes_kernel_specialization_strategy", strategy, get_args(Specialization))
        _check("cuda_graph_strategy", self.cuda_graph_strategy, get_args(CudaGraphStrategy))
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
    """Run all engines of some modules with other settings, for the length of a ``with`` block.

    If a setting changes, the graphs and contexts of the engine are dropped at the start and at the end.

    Args:
        target_or_targets: An engine or a module with engines at any depth, or several.
        **overrides: Fields of :class:`RuntimeSettings`; all others stay as they are.

    Yields:
        The first argument.

    Raises:
        ConfigError: For an unknown setting, a bad value, or modules without an engine.
    """
    wanted = RuntimeSettings().merge(**overrides)
    engines = engines_of_all("runtime_config", target_or_targets)
    changes: dict[str, Any] = {}
    if "dynamic_shapes_kernel_specialization_strategy" in overrides:
        changes["specialization"] = wanted.dynamic_shapes_kernel_specialization_strategy
    with ExitStack() as undo:
        if "runtime_cache" in overrides:
            cache = wanted.runtime_cache
            if isinstance(cache, (str, os.PathLike)):
                cache = RuntimeCache(cache)
                cache.load()
                undo.callback(cache.save)
            changes["kernels"] = cache
        if wanted.cuda_graph_strategy != "disabled" and modes.get().graphs is None:
            undo.callback(modes.reset, modes.set(replace(modes.get(), graphs="subgraph")))
        undo.enter_context(swapped(engines, _swap_runtime, changes))
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
    for engine in engines_of_all("set_dynamic_shapes_kernel_strategy", target_or_targets):
        _swap_runtime(engine, {"specialization": strategy})


@contextmanager
def runtime_cache(
    target_or_targets: nn.Module | Sequence[nn.Module],
    path: str | os.PathLike[str] | Any = "",
    autosave: bool = True,
) -> Iterator[RuntimeCache]:
    """Share what TensorRT-RTX compiles among all engines of some modules, for the length of a ``with`` block.

    Args:
        target_or_targets: An engine or a module with engines at any depth, or several.
        path: A file, loaded at the start if it exists; or an open file-like object with ``read`` and ``write``, which
            the caller opens, positions and closes. Empty for neither.
        autosave: Save there at the end. An error is logged then, and not raised.

    Yields:
        The cache.

    Raises:
        ConfigError: For modules without an engine, or a ``path`` that is neither a path nor such an object.
        OSError: If the file exists and cannot be read.
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


def _swap_runtime(engine: EngineModule, changes: dict[str, Any]) -> dict[str, Any]:
    """Change some parameters of ``configure_runtime`` and return all of them as they were."""
    before = dict(zip(("specialization", "kernels"), engine.runtime_choice, strict=True))
    engine.configure_runtime(**before | changes)
    return before


def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise for anything but one of the allowed values."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={shown(value)} is not an option; expected one of {', '.join(map(repr, allowed))}")
