"""What processes of tests share: a folder that outlives them, and locks for what only one of them may use."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def folder() -> Path:
    """``GRAPHCACHE_TEST_CACHE``, or a folder of this user in the temporary folder.

    Raises:
        PermissionError: If others can write to the folder in the temporary folder.
    """
    given = os.environ.get("GRAPHCACHE_TEST_CACHE")
    if given or os.name != "posix":
        named = Path(given or Path(tempfile.gettempdir()) / "graphcache-tests")
        named.mkdir(parents=True, exist_ok=True)
        return named
    own = Path(tempfile.gettempdir()) / f"graphcache-tests-{os.geteuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{own} is not a folder of this user alone; remove it or set GRAPHCACHE_TEST_CACHE")
    return own


@contextmanager
def alone(name: str) -> Iterator[None]:
    """No two blocks of one name run at once, in all processes of this user's tests."""
    with FileLock(folder() / f"{name}.lock"):
        yield
