"""From what names a model to a module, in whatever process serves it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from graphcache.config import GraphConfig
from graphcache.errors import GraphCacheError, ServingError, is_a, shown
from graphcache.modules.cached import CachedModule
from graphcache.modules.loading import load

Source = str | os.PathLike[str] | bytes | Callable[[], nn.Module]


def is_factory(source: Any) -> bool:
    """Whether text names a function that makes a module, and not a file.

    Example:
        >>> is_factory("nets.py:mlp"), is_factory("package.nets:mlp"), is_factory("model.engine")
        (True, True, False)
    """
    if not isinstance(source, str):
        return False
    _, colon, attribute = source.rpartition(":")
    return bool(colon) and attribute.replace(".", "").isidentifier() and not Path(source).exists()


def module_of(source: Any, *, into: Any = None, device: str | None = None) -> tuple[nn.Module, GraphConfig | None]:
    """The module that a source stands for, without graphs, and the options that it was saved with.

    Args:
        source: An engine file, its bytes, a package, a function that makes a module, or such a function as
            ``"package.module:function"`` or ``"file.py:function"``.
        into: For a package of a model: what makes the model, a function or the text of one.
        device: Where a module that a function made goes; ``None`` leaves it there.

    Raises:
        ServingError: If there is no such function, or it raised, or made no module.
        GraphCacheError: As :func:`graphcache.load`.
    """
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
    """What a model is called where nobody gave a name.

    Example:
        >>> named("models/policy.engine"), named("nets.py:mlp"), named(b"...")
        ('policy', 'mlp', 'model')
    """
    if is_factory(source):
        return str(source).rpartition(":")[2].rpartition(".")[2]
    if isinstance(source, (str, os.PathLike)):
        return Path(source).stem or "model"
    return getattr(source, "__name__", "model").strip("<>") or "model"


def _made(source: Any) -> nn.Module:
    what, found = shown(source), source
    if isinstance(source, str):
        file, _, attribute = source.rpartition(":")
        found = _imported(file)
        for name in attribute.split("."):
            if not hasattr(found, name):
                raise ServingError(f"{file} has no {attribute!r}; expected a function that returns an nn.Module")
            found = getattr(found, name)
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


def _imported(source: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            sys.path.insert(0, "")
            try:
                return importlib.import_module(source)
            finally:
                sys.path.remove("")
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        if spec is None or spec.loader is None or not Path(source).is_file():
            raise ServingError(f"there is no file {source}; expected the path of a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except ServingError:
        raise
    except Exception as error:
        raise ServingError(f"{source} cannot be imported ({type(error).__name__}: {error})") from error
