"""The engines of a module, for whatever is set on all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from graphcache.errors import ConfigError, shown
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.engine import EngineModule
from graphcache.modules.foreign import is_foreign


def engines_of(module: nn.Module) -> list[tuple[str, EngineModule]]:
    """The engines of a module, wrapped or not, at any depth, each once, with names for messages.

    Raises:
        ConfigError: For what is no module, or one with engines of Torch-TensorRT that nobody has adopted.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected an nn.Module, got {type(module).__name__}")
    found: dict[EngineModule, str] = {}
    inner = module._module if isinstance(module, CachedModule) else module
    for name, each in inner.named_modules():
        engine = each._module if isinstance(each, CachedModule) else each
        if isinstance(engine, EngineModule):
            found.setdefault(engine, name or engine.name)
        elif is_foreign(engine):
            raise ConfigError(
                f"{name or type(engine).__name__} is Torch-TensorRT's and nobody has adopted its engine; give the "
                f"module that graphcache.wrap or enable_cudagraphs returns, or use torch_tensorrt.runtime"
            )
    return [(name, engine) for engine, name in found.items()]


def engines_of_all(function: str, targets: nn.Module | Sequence[nn.Module]) -> list[tuple[str, EngineModule]]:
    """The engines of one module or of several, each once.

    Args:
        function: What asks, for messages.
        targets: The modules.

    Raises:
        ConfigError: For what is no module, or modules without an engine.
    """
    if isinstance(targets, nn.Module):
        targets = [targets]
    if not isinstance(targets, (list, tuple)):
        raise ConfigError(f"{function}: {shown(targets)} is neither a module nor a list or tuple of modules")
    found: dict[EngineModule, str] = {}
    for target in targets:
        for name, engine in engines_of(target):
            found.setdefault(engine, name)
    if not found:
        raise ConfigError(f"{function}: there is no TensorRT engine in what was given; expected one or more")
    return [(name, engine) for engine, name in found.items()]


def check_bool(function: str, mode: object) -> None:
    """Raise for anything but ``True`` and ``False``.

    Raises:
        ConfigError: Then.
    """
    if not isinstance(mode, bool):
        raise ConfigError(f"{function} takes True or False, not {shown(mode)}")
