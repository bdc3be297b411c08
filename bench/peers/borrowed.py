"""Importing parts of packages that ask for more than the part needs.

Two peers import ``tensorrt`` by that name, where this machine may have TensorRT-RTX, whose classes are the same; and
their packages import dozens of others before the one file in which their graph cache is.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from contextlib import contextmanager
from importlib import util
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def not_installed(package: str, *more: str) -> str | None:
    """A reason that names what cannot be found, without importing any of it; ``None`` if all is there."""
    missing = [name for name in (package, *more) if not _is_there(name)]
    return f"not installed: {', '.join(missing)}" if missing else None


@contextmanager
def as_tensorrt(module: ModuleType) -> Iterator[None]:
    """Inside, ``import tensorrt`` gives this module; afterwards what it gave before."""
    before = sys.modules.get("tensorrt")
    sys.modules["tensorrt"] = module
    try:
        yield
    finally:
        if before is None:
            sys.modules.pop("tensorrt", None)
        else:
            sys.modules["tensorrt"] = before


@contextmanager
def stand_in(*names: str) -> Iterator[None]:
    """Inside, modules that cannot be found are empty ones, for files that import and do not use them."""
    made = [name for name in names if name not in sys.modules and not _is_there(name)]
    for name in made:
        module = ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)


def without_init(module: str, *packages: str) -> Any:
    """Import a module of a package without running the ``__init__`` of some of the packages that it lies in.

    Args:
        module: Its full name.
        packages: Those whose ``__init__`` is left out, outermost first. They stay empty in this process.

    Raises:
        ImportError: If the module, or anything that it imports, is not there.
    """
    for name in packages:
        if name in sys.modules:
            continue
        parent, _, child = name.rpartition(".")
        path = list(sys.modules[parent].__path__) if parent in sys.modules else None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        made = ModuleType(name)
        made.__path__ = list(spec.submodule_search_locations)
        made.__spec__ = spec
        sys.modules[name] = made
        if parent in sys.modules:
            setattr(sys.modules[parent], child, made)
    return importlib.import_module(module)


def _is_there(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
