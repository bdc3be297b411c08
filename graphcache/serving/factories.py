"""Functions that make a module, named by text: ``package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from graphcache.errors import ConfigError


def is_factory(text: Any) -> bool:
    """Whether text names a function, and not a file that is there.

    Example:
        >>> is_factory("nets.py:mlp"), is_factory("package.nets:mlp"), is_factory("model.engine")
        (True, True, False)
    """
    if not isinstance(text, str):
        return False
    _, colon, attribute = text.rpartition(":")
    return bool(colon) and attribute.replace(".", "").isidentifier() and not Path(text).exists()


def named_object(text: str) -> Any:
    """What text names; its module is imported, from the current directory too.

    Raises:
        ConfigError: If there is no such module, or it raises, or has nothing of that name.

    Example:
        >>> named_object("torch.nn:ReLU")
        <class 'torch.nn.modules.activation.ReLU'>
    """
    source, _, attribute = text.rpartition(":")
    found: Any = _imported(source)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ConfigError(f"{source} has no {attribute!r}; expected a function that returns an nn.Module")
        found = getattr(found, name)
    return found


def raised(error: Exception) -> str:
    """An exception of the user's code in one line: its type, what it says, and the line it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


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
            raise ConfigError(f"there is no file {source}; expected the path of a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{source} cannot be imported: {raised(error)}") from error
