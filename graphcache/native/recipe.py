"""How the library is compiled, and for what. Imports nothing of the package: the build of a wheel runs it as well."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).with_name("library.c")
_TIMEOUT = 600
_SHOWN = 2000


class NotCompiled(Exception):
    """What is missing on this machine, or what the compiler said."""


def unsupported() -> str:
    """Why there is no native code for this system; empty where there is."""
    if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32:
        return "native code is for Linux on 64-bit little-endian machines"
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "native code is for CPython with its global lock"
    return ""


def key() -> str:
    """What a library has to agree with: source, how it is compiled, Python, machine; no version of torch. 16 digits."""
    sources = [SOURCE, SOURCE.with_name("recipe.py"), *sorted(SOURCE.parent.glob("*.h"))]
    told = [digest(path) for path in sources]
    told += [str(sysconfig.get_config_var("SOABI")), platform.machine()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compiler() -> list[str]:
    """The C compiler: what ``CC`` names, with options, or the first that is found."""
    if given := shlex.split(os.environ.get("CC", "")):
        if shutil.which(given[0]) is None:
            raise NotCompiled(f"CC={os.environ['CC']!r}: there is no such program; unset CC, or correct it")
        return given
    for name in ("cc", "gcc", "clang"):
        if (found := shutil.which(name)) is not None:
            return [found]
    raise NotCompiled("there is no C compiler; install gcc or clang, or name one in CC")


def command(target: Path) -> list[str]:
    """What compiles the source into a library."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise NotCompiled(f"{include} has no Python.h; install Python's headers (python{version}-dev on Debian)")
    # What is missing is said when it is loaded, and not by the death of a process later on.
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wl,-z,now"]
    return [*compiler(), *flags, "-isystem", str(include), str(SOURCE), "-o", str(target), "-ldl"]


def compile_to(target: Path) -> None:
    """Compile the library.

    Raises:
        NotCompiled: If something is missing or the compiler fails, with the beginning of what it said.
    """
    arguments = command(target)
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiled(f"the compiler failed: {error}") from error
    if done.returncode:
        said = f"{' '.join(arguments)}\n{done.stderr.strip()[:_SHOWN]}"
        raise NotCompiled(f"the compiler failed (exit code {done.returncode}): {said}")
