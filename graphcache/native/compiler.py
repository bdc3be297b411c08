"""Compiles the library on this machine, keeps it, and says which one may be loaded.

A library is named after what it has to agree with (source, Python, machine) and after its own contents, and is put in
its place as a whole, however many processes compile at once. Before it reaches the linker, its owner, mode and contents
are checked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

from graphcache.errors import CompileError
from graphcache.files import check_owner, user_cache

SOURCE = Path(__file__).with_name("library.c")
_NAME = "_graphcache"
_TIMEOUT = 600
_SHOWN = 2000


class NotUsable(Exception):
    """Why no library can be loaded; never reaches the user."""


def folder() -> Path:
    """The folder of this user's libraries."""
    return user_cache() / "native"


def key() -> str:
    """What a library has to agree with: source, how it is compiled, Python, machine; no version of torch. 16 digits."""
    sources = [SOURCE, SOURCE.with_name("compiler.py"), *sorted(SOURCE.parent.glob("*.h"))]
    told = [_digest(path) for path in sources]
    told += [str(sysconfig.get_config_var("SOABI")), platform.machine()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def find() -> Path:
    """The library of this source and Python, unchanged since it was compiled; ``NotUsable`` says what was found."""
    place = folder()
    why = f"no compiled library for this Python in {place}"
    for path in sorted(place.glob(f"{key()}-*.so")):
        try:
            check_owner(place)
            check_owner(path)
            if path.stem.endswith(f"-{_digest(path)}"):
                return path
            why = f"{path} is not what was compiled"
        except OSError as error:
            why = str(error)
    raise NotUsable(why)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compiler() -> list[str]:
    """The C compiler: what ``CC`` names, with options, or the first that is found."""
    if given := shlex.split(os.environ.get("CC", "")):
        if shutil.which(given[0]) is None:
            raise CompileError(f"CC={os.environ['CC']!r}: there is no such program; unset CC, or correct it")
        return given
    for name in ("cc", "gcc", "clang"):
        if (found := shutil.which(name)) is not None:
            return [found]
    raise CompileError("there is no C compiler; install gcc or clang, or name one in CC")


def command(target: Path) -> list[str]:
    """What compiles the source into a library; a ``CompileError`` says what is missing."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise CompileError(f"{include} has no Python.h; install Python's headers (python{version}-dev on Debian)")
    # What is missing is said when it is loaded, and not by the death of a process later on.
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wl,-z,now"]
    return [*compiler(), *flags, "-isystem", str(include), str(SOURCE), "-o", str(target), "-ldl"]


def build() -> Path:
    """The compiled library of this user; compiled now unless it was before. Several processes may do this at once.

    Raises:
        NotUsable: On a system for which there is none.
        CompileError: If it cannot be compiled, with the beginning of what the compiler said, or not be kept.
    """
    if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32:
        raise NotUsable("native code is for Linux on 64-bit little-endian machines")
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NotUsable("native code is for CPython with its global lock")
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
        _run(command(made))
        made.chmod(0o700)
        path = made.with_name(f"{key()}-{_digest(made)}.so")
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)
    return path


def _run(arguments: list[str]) -> None:
    """Run the compiler to its end; raise a ``CompileError`` if it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"the compiler failed: {error}") from error
    if done.returncode:
        said = f"{' '.join(arguments)}\n{done.stderr.strip()[:_SHOWN]}"
        raise CompileError(f"the compiler failed (exit code {done.returncode}): {said}")


def load(path: Path) -> Any:
    """The extension module in a library file, which must have been checked (:func:`find`): others may do anything."""
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=ExtensionFileLoader(_NAME, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
