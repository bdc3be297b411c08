"""Compiles the guard: one call of the C compiler, with Python's headers and without torch's; it takes half a second."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from graphcache.errors import CompileError
from graphcache.keys.native.compiled_library import NotUsable, compiler, find, key_of, make

SOURCE = Path(__file__).with_name("guard.c")


def key() -> str:
    """What the library has to agree with: the source, how it is compiled, Python, the machine; no version of torch."""
    return key_of([SOURCE, SOURCE.with_name("compiler.py"), *sorted(SOURCE.parent.glob("*.h"))])


def command(target: Path) -> list[str]:
    """What compiles the source into a library.

    Args:
        target: Where it goes.

    Raises:
        CompileError: If there is no compiler, or Python's headers are missing.
    """
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise CompileError(f"{include} has no Python.h; install Python's headers (python{version}-dev on Debian)")
    flags = ["-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,now"]
    return [*compiler("C"), *flags, "-isystem", str(include), str(SOURCE), "-o", str(target)]


def build() -> Path:
    """The compiled guard of this user; compiled now unless it was before.

    Raises:
        NotUsable: On a system for which there is none.
        CompileError: If it cannot be compiled, or not be kept.
    """
    if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32:
        raise NotUsable("the compiled guard is for Linux on 64-bit little-endian machines")
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NotUsable("the compiled guard is for CPython with its global lock")
    try:
        return find(key())
    except NotUsable:
        return make(key(), command)
