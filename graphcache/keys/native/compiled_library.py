"""Libraries that are compiled on this machine: how they are made, where they are kept, and which may be loaded.

A library is named after its own contents, and a small file beside it, replaced as a whole, says which one is meant for
a key: source, Python, and what else it has to agree with. So a process reads either the old pair or the new one,
however many compile at once. Before a library reaches the linker its owner, mode and contents are checked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

from graphcache.config import switch_in_environment
from graphcache.errors import CompileError
from graphcache.files import check_owner, user_cache

_TIMEOUT = 600
_SHOWN = 2000
_COMPILERS = {"C": ("CC", ("cc", "gcc", "clang")), "C++": ("CXX", ("c++", "g++", "clang++"))}
"""For each language the variable that names its compiler, and the programs to look for if it is not set."""


class NotUsable(Exception):
    """Why no library can be loaded; never reaches the user."""


def wanted() -> bool:
    """Whether ``GRAPHCACHE_NATIVE`` allows compiled code; it does unless it is ``0`` or ``false``."""
    return switch_in_environment("GRAPHCACHE_NATIVE", unset=True)


def folder() -> Path:
    """The folder of this user's libraries."""
    return user_cache() / "native"


def key_of(sources: Iterable[Path], *parts: str) -> str:
    """What a library has to agree with: its sources, Python, the machine and ``parts``; 16 hex digits."""
    told = (
        *(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources),
        str(sysconfig.get_config_var("SOABI")),
        platform.machine(),
        *parts,
    )
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def find(key: str) -> Path:
    """The library of a key, unchanged since it was compiled; ``NotUsable`` says what was found instead."""
    if os.name != "posix":
        raise NotUsable("there is no compiled library on this system")
    note = folder() / f"{key}.json"
    try:
        text = note.read_bytes()
    except OSError as error:
        raise NotUsable(f"no compiled library for this torch and Python in {note.parent}") from error
    try:
        told = json.loads(text)
        name, digest = told["file"], told["sha256"]
        path: Path = note.parent / name
        if path.parent != note.parent:
            raise NotUsable(f"{note} names {name}, which is elsewhere")
        for each in (note.parent, note, path):
            check_owner(each)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except PermissionError as error:
        raise NotUsable(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotUsable(f"{note} does not describe a library ({type(error).__name__}: {error})") from error
    if found != digest:
        raise NotUsable(f"{path} is not what was compiled")
    return path


def keep(library: Path, key: str) -> Path:
    """Put a library, compiled in :func:`folder`, in its place, and say that it is the one to load; where it is now."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    path = library.with_name(f"{key}-{digest[:16]}.so")
    os.replace(library, path)
    descriptor, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump({"file": path.name, "sha256": digest}, file)
    os.replace(temporary, path.with_name(f"{key}.json"))
    return path


def compiler(language: str) -> list[str]:
    """The compiler of ``"C"`` or ``"C++"``: what ``CC`` or ``CXX`` names, with options, or the first found."""
    variable, names = _COMPILERS[language]
    if given := shlex.split(os.environ.get(variable, "")):
        if shutil.which(given[0]) is None:
            told = os.environ[variable]
            raise CompileError(f"{variable}={told!r}: there is no such program; unset {variable}, or correct it")
        return given
    for name in names:
        if (found := shutil.which(name)) is not None:
            return [found]
    raise CompileError(f"there is no {language} compiler; install {names[1]} or {names[2]}, or name one in {variable}")


def make(key: str, command: Callable[[Path], list[str]], check: Callable[[Path], None] | None = None) -> Path:
    """Compile a library for a key and keep it; several processes may do this at once.

    ``command`` gives the compiler's command line for a target. ``check`` raises if what was compiled is not sound; it
    is then not kept. Raises a ``CompileError`` with the end of what the compiler said.
    """
    place = folder()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(suffix=".so", dir=place)
        os.close(descriptor)
    except OSError as error:
        raise CompileError(f"{place} cannot be written ({error}); set XDG_CACHE_HOME to a folder that can") from error
    made = Path(name)
    try:
        run(command(made), "the compiler failed")
        made.chmod(0o700)
        if check is not None:
            check(made)
        path = keep(made, key)
    finally:
        made.unlink(missing_ok=True)
    try:
        return find(key)
    except NotUsable as why:
        raise CompileError(f"{path} was compiled and will not be loaded: {why}") from why


def run(arguments: list[str], failed: str) -> None:
    """Run a program to its end; otherwise raise a ``CompileError`` that begins with ``failed``."""
    # The package that is running, wherever it was imported from.
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{failed}: {error}") from error
    if done.returncode:
        said = done.stderr.strip()
        raise CompileError(f"{failed} (exit code {done.returncode}): {' '.join(arguments)}\n{said[:_SHOWN]}")


def load(path: Path, name: str) -> Any:
    """The extension module in a library file, which must have been checked (:func:`find`): others may do anything."""
    loader = ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
