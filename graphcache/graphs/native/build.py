"""Compiles the library: one call of the C++ compiler, without CUDA's headers, and a probe in a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from graphcache.errors import CompileError
from graphcache.graphs.native import store

_TIMEOUT = 600
_SHOWN = 2000


def compiler() -> list[str]:
    """The C++ compiler: ``CXX``, or the first of ``c++``, ``g++`` and ``clang++`` that there is.

    Raises:
        CompileError: If there is none.
    """
    if given := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(given[0]) is None:
            raise CompileError(f"CXX={os.environ['CXX']!r}: there is no such program; unset CXX, or correct it")
        return given
    for name in ("c++", "g++", "clang++"):
        if (found := shutil.which(name)) is not None:
            return [found]
    raise CompileError("there is no C++ compiler; install g++ or clang++, or name one in CXX")


def command(target: Path) -> list[str]:
    """What compiles the source into a library.

    Args:
        target: Where it goes.

    Raises:
        CompileError: If there is no compiler.
    """
    # As torch.utils.cpp_extension has them, which would ask for setuptools.
    torch_is_in = Path(torch.__file__).parent
    include = torch_is_in / "include"
    headers = [include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"]]
    return [
        *compiler(),
        *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(part for path in headers for part in ("-isystem", str(path))),
        *(str(store.SOURCE), "-o", str(target)),
        *(f"-L{torch_is_in / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"),
        # What is missing is said when it is loaded, as an ImportError, and not by the death of a process later on.
        "-Wl,-z,now",
    ]


def build() -> Path:
    """Compile the library for this user, unless there is one; it takes 15 to 60 seconds.

    Only what agrees with Python, in a process of its own, is put where it will be loaded. Several processes may do this
    at once. A running process goes on with what it has loaded.

    Returns:
        The library.

    Raises:
        CompileError: If there is no compiler, it fails (with the end of what it said), the library disagrees with
            Python, or the folder cannot be written.
    """
    try:
        return store.find()
    except store.NotUsable:
        pass
    if os.name != "posix":
        raise CompileError("the accelerator is for Linux; on this system hits are answered in Python")
    folder = store.folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(descriptor)
    except OSError as error:
        raise CompileError(f"{folder} cannot be written ({error}); set XDG_CACHE_HOME to a folder that can") from error
    made = Path(name)
    try:
        _run(command(made), "the compiler failed")
        made.chmod(0o700)
        _run([sys.executable, "-m", "graphcache.graphs.native", name], "the library that was compiled is not sound")
        path = store.keep(made)
    finally:
        made.unlink(missing_ok=True)
    try:
        return store.find()
    except store.NotUsable as why:
        raise CompileError(f"{path} was compiled and will not be loaded: {why}") from why


def _run(arguments: list[str], failed: str) -> None:
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
