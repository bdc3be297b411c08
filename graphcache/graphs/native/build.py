"""Compiles the library: one call of the C++ compiler, without CUDA's headers, and a probe in a process of its own."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import torch

from graphcache.errors import CompileError
from graphcache.keys.native import compiled_library
from graphcache.keys.native.compiled_library import NotUsable, compiler, make, run

SOURCE = Path(__file__).with_name("hit.cpp")


def key() -> str:
    """What a library has to agree with: the source, how it is compiled, torch, Python, the machine; 16 hex digits."""
    return compiled_library.key_of(
        [SOURCE, SOURCE.with_name("build.py"), *sorted(SOURCE.parent.glob("*.h"))],
        torch.__version__,
        str(torch.version.git_version),
        str(torch.compiled_with_cxx11_abi()),
    )


def find() -> Path:
    """The library for this torch, Python and source, unchanged since it was compiled.

    Raises:
        NotUsable: If there is none, with what was found instead.
    """
    return compiled_library.find(key())


def command(target: Path) -> list[str]:
    """The command line that compiles the source into ``target``."""
    # As torch.utils.cpp_extension has them, which would ask for setuptools.
    torch_is_in = Path(torch.__file__).parent
    include = torch_is_in / "include"
    headers = [include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"]]
    return [
        *compiler("C++"),
        *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(part for path in headers for part in ("-isystem", str(path))),
        *(str(SOURCE), "-o", str(target)),
        *(f"-L{torch_is_in / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"),
        # What is missing is said when it is loaded, as an ImportError, and not by the death of a process later on.
        "-Wl,-z,now",
    ]


def build() -> Path:
    """Compile the library for this user, unless there is one; it takes 15 to 60 seconds.

    Only what agrees with Python, in a process of its own, is kept. Several processes may do this at once. A running
    process goes on with what it has loaded.

    Raises:
        CompileError: If there is no compiler, it fails (with the end of what it said), the library disagrees with
            Python, or the folder cannot be written.
    """
    try:
        return find()
    except NotUsable:
        pass
    if os.name != "posix":
        raise CompileError("the accelerator is for Linux; on this system hits are answered in Python")
    return make(key(), command, _check)


def _check(made: Path) -> None:
    """Compare the library with Python, in a process of its own."""
    run([sys.executable, "-m", "graphcache.graphs.native", str(made)], "the library that was compiled is not sound")
