"""From what names a model to a module, in whatever process serves it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from graphcache.config import GraphConfig
from graphcache.errors import ConfigError, GraphCacheError, ServingError, is_a, shown
from graphcache.modules.cached_module import CachedModule
from graphcache.persist.loading import load
from graphcache.serving.factories import is_factory, named_object

Source = str | os.PathLike[str] | bytes | Callable[[], nn.Module]


def module_of(source: Any, *, into: Any = None, device: str | None = None) -> tuple[nn.Module, GraphConfig | None]:
    """The module that a source stands for, without graphs, and the options that it was saved with."""
    if is_factory(source) or (callable(source) and not isinstance(source, (str, bytes))):
        made = _made(source)
        module, config = (made.module, made.config) if isinstance(made, CachedModule) else (made, None)
        return (module if device is None else module.to(device)), config
    if not is_a(source, str, bytes, os.PathLike):
        raise ServingError(f"{shown(source)} is no model; expected an engine, a package, or a function of a module")
    loaded = load(source, into=None if into is None else _made(into))
    if isinstance(loaded, CachedModule):
        return loaded.module, loaded.config
    return loaded, None


def named(source: Any) -> str:
    """What a model is called where nobody gave a name."""
    if is_factory(source):
        return str(source).rpartition(":")[2].rpartition(".")[2]
    if isinstance(source, (str, os.PathLike)):
        return Path(source).stem or "model"
    return getattr(source, "__name__", "model").strip("<>") or "model"


def _made(source: Any) -> nn.Module:
    what, found = shown(source), source
    if isinstance(source, str):
        try:
            found = named_object(source)
        except ConfigError as error:
            raise ServingError(str(error)) from error
    if is_a(found, nn.Module):
        return found  # type: ignore[no-any-return]
    try:
        made = found()
    except GraphCacheError:
        raise
    except Exception as error:
        raise ServingError(f"{what} raised {type(error).__name__}: {error}; expected an nn.Module") from error
    if not is_a(made, nn.Module):
        raise ServingError(f"{what} gave an object of type {type(made).__name__}; expected an nn.Module")
    return made  # type: ignore[no-any-return]
