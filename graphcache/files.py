"""Files that are there as a whole or not at all, and where this user's caches lie."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TEMPORARY = ".graphcache-"
"""What the names of files begin with that are not complete yet."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` once the block has ended well; else what was there stays as it was.

    Readers see the old file or the new one, whoever else writes; the last one wins. A process that is killed leaves at
    most a file whose name begins with ``.graphcache-``, which nobody reads. Of a symbolic link the target is replaced.
    ``OSError`` for a device, a pipe or a folder.
    """
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        # Root could put a file in the place of /dev/null.
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    directory = os.path.dirname(target)
    temporary = os.path.join(directory, f"{TEMPORARY}{secrets.token_hex(8)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # Not tempfile, whose files nobody else may read.
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    # The name is durable once the directory is; some systems open no directories.
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """A regular file, to be read; a pipe without a writer would be waited for. ``ValueError`` for anything else."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("no regular file")
    return open(descriptor, "rb")


def check_owner(path: str | os.PathLike[str] | int) -> None:
    """Raise ``PermissionError`` unless a file, folder or open file is this user's, and nobody else may write it.

    What is loaded from it is trusted. A symbolic link is followed.
    """
    found = os.stat(path)
    if os.name != "posix":
        # Elsewhere there are no such modes; the folder is the user's own.
        return
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} may be written by others")


def user_cache() -> Path:
    """The folder of this user's caches: ``GRAPHCACHE_CACHE_DIR``, or ``graphcache`` where the system keeps caches.

    That is ``XDG_CACHE_HOME`` or ``~/.cache``, on macOS ``~/Library/Caches``, on Windows ``LOCALAPPDATA``. It may not
    exist yet.
    """
    if given := os.environ.get("GRAPHCACHE_CACHE_DIR", "").strip():
        return Path(given).expanduser().absolute()
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "graphcache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "graphcache"
