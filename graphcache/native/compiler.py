"""Finds the library: in the wheel, in the user's cache, or compiled now.

A library in the cache is named after what it has to agree with (``recipe.key``) and after its own contents, and is put
in its place as a whole, however many processes compile at once. Before it reaches the linker, its owner, mode and
contents are checked. One in the wheel is trusted as the Python files beside it are.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from contextlib import suppress
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

from graphcache.errors import CompileError
from graphcache.files import check_owner, user_cache
from graphcache.native import recipe
from graphcache.native.recipe import NotCompiled, digest, key

_NAME = "_graphcache"


class NotUsable(Exception):
    """Why no library can be loaded; never reaches the user."""


def folder() -> Path:
    """The folder of this user's libraries."""
    return user_cache() / "native"


def packaged() -> Path:
    """Where the library is that came with the wheel, if one did for this source, Python and machine."""
    return recipe.SOURCE.with_name(f"{key()}.so")


def obtain() -> tuple[Path, Any]:
    """The library and its file; compiled now, unless it came with the wheel or was compiled before.

    Raises:
        NotUsable: On a system for which there is none.
        CompileError: As :func:`build`.
    """
    # One that was linked to newer system libraries cannot be loaded; one that is compiled here can.
    with suppress(ImportError):
        return packaged(), load(packaged())
    path = build()
    return path, load(path)


def find() -> Path:
    """The library in the user's cache, unchanged since it was compiled; ``NotUsable`` says what was found."""
    place = folder()
    why = f"no compiled library for this Python in {place}"
    for path in sorted(place.glob(f"{key()}-*.so")):
        try:
            check_owner(place)
            check_owner(path)
            if path.stem.endswith(f"-{digest(path)}"):
                return path
            why = f"{path} is not what was compiled"
        except OSError as error:
            why = str(error)
    raise NotUsable(why)


def build() -> Path:
    """The library in the user's cache; compiled now unless it was before. Several processes may do this at once.

    Raises:
        NotUsable: On a system for which there is none.
        CompileError: If it cannot be compiled, with the beginning of what the compiler said, or not be kept.
    """
    if why_not := recipe.unsupported():
        raise NotUsable(why_not)
    try:
        return find()
    except NotUsable:
        path = _compile()
    try:
        return find()
    except NotUsable as why:
        raise CompileError(f"{path} was compiled and will not be loaded: {why}") from why


def _compile() -> Path:
    """Compile a library, and say that it is the one to load."""
    place = folder()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(suffix=".tmp", dir=place)
        os.close(descriptor)
    except OSError as error:
        raise CompileError(f"{place} cannot be written ({error}); set XDG_CACHE_HOME to a folder that can") from error
    made = Path(name)
    try:
        recipe.compile_to(made)
        made.chmod(0o700)
        path = made.with_name(f"{key()}-{digest(made)}.so")
        os.replace(made, path)
    except NotCompiled as why:
        raise CompileError(str(why)) from why
    finally:
        made.unlink(missing_ok=True)
    return path


def load(path: Path) -> Any:
    """The extension module in a library file, which must have been checked (:func:`find`): others may do anything."""
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=ExtensionFileLoader(_NAME, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
