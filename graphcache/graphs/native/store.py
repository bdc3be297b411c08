"""Where compiled libraries are kept, and which of them may be loaded.

A library is named after its own contents, and a small file beside it, replaced as a whole, says which one is meant for
this torch, this Python and this source. So a process reads either the old pair or the new one, however many compile at
once, and what is cut short or was put there by somebody else is found out before the linker sees it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sysconfig
import tempfile
from pathlib import Path

import torch

from graphcache.files import user_cache

SOURCE = Path(__file__).with_name("hit.cpp")


class NotUsable(Exception):
    """Why no library can be loaded; never reaches the user."""


def folder() -> Path:
    """The folder of this user's libraries: ``native`` in :func:`~graphcache.files.user_cache`."""
    return user_cache() / "native"


def key() -> str:
    """What a library has to agree with: the source, how it is compiled, torch, Python, the machine; 16 hex digits."""
    parts = (
        *(hashlib.sha256(path.read_bytes()).hexdigest() for path in _sources()),
        torch.__version__,
        str(torch.version.git_version),
        str(sysconfig.get_config_var("SOABI")),
        str(torch.compiled_with_cxx11_abi()),
        platform.machine(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _sources() -> list[Path]:
    return [SOURCE, SOURCE.with_name("build.py"), *sorted(SOURCE.parent.glob("*.h"))]


def find() -> Path:
    """The library for this torch, Python and source, unchanged since it was compiled.

    Raises:
        NotUsable: If there is none, with what was found instead.
    """
    if os.name != "posix":
        raise NotUsable("there is no compiled library on this system")
    note = folder() / f"{key()}.json"
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
            _check_owner(each)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotUsable(f"{note} does not describe a library ({type(error).__name__}: {error})") from error
    if found != digest:
        raise NotUsable(f"{path} is not what was compiled")
    return path


def keep(library: Path) -> Path:
    """Put a library, compiled in :func:`folder`, in its place, and say that it is the one to load.

    Returns:
        Where it is now.
    """
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    path = library.with_name(f"{key()}-{digest[:16]}.so")
    os.replace(library, path)
    descriptor, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump({"file": path.name, "sha256": digest}, file)
    os.replace(temporary, path.with_name(f"{key()}.json"))
    return path


def _check_owner(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise NotUsable(f"{path} belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotUsable(f"{path} may be written by others")
