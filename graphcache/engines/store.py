"""What took long to make, kept in a folder for later processes: engines, and kernels compiled for them.

Each entry is one file, written in one step and named by a key: a digest of all that it was made from. An entry that was
changed, cut short or put there by other means is found out by its own digest, and counts as none; so does one that
belongs to another user, or that others may write. Whoever makes an
entry holds its lock, so that processes that want the same one wait for the first instead of making it too; the system
releases the lock of a process that is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphcache.errors import ConfigError, shown
from graphcache.events import log
from graphcache.files import TEMPORARY, check_owner, open_regular, replacing, user_cache

DEFAULT_MAX_BYTES = 10 * 2**30
_HEAD = struct.Struct("<8s32sI")
_MAGIC = b"gcstore1"
_MOST_NOTE_BYTES = 2**16
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Stored:
    """One entry.

    Args:
        key: Its key.
        kind: What it is, such as ``"engine"``.
        nbytes: Of the file.
        used: When it was last read or written, in seconds since the epoch.
        note: What whoever made it said of it.
        path: Of the file.
    """

    key: str
    kind: str
    nbytes: int
    used: float
    note: Mapping[str, Any]
    path: Path


class Store:
    """A folder of entries, the least recently used of which go first.

    Args:
        folder: Made at the first use.
        max_bytes: What all entries may take together, in bytes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     store = Store(Path(name), max_bytes=1000)
        ...     store.get_or_make("engine", "abc", lambda: b"made", {})
        ...     store.get_or_make("engine", "abc", lambda: b"made again", {})
        b'made'
        b'made'
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def get_or_make(self, kind: str, key: str, make: Callable[[], bytes], note: Mapping[str, Any]) -> bytes:
        """An entry, made here if nobody has; processes that ask for the same one at once make it once.

        Where the folder cannot be used the entry is made and not kept, which is logged.

        Args:
            kind: What it is.
            key: Of hexadecimal digits or other letters that file names may have.
            make: Makes it. What it raises is raised from here, and nothing is kept.
            note: Whatever :meth:`entries` is to tell of it, as JSON has it.
        """
        with ExitStack() as stack:
            try:
                if (found := self.get(kind, key)) is not None:
                    return found
                stack.enter_context(self.lock(key))
                # Whoever held the lock may have made it.
                if (found := self.get(kind, key)) is not None:
                    return found
            except OSError as error:
                log.warning("%s cannot be used as a cache: %s; nothing is kept", self.folder, error)
                return make()
            made = make()
            self.put(kind, key, made, note)
            return made

    def get(self, kind: str, key: str) -> bytes | None:
        """What was kept, if it is there and unchanged."""
        path = self._path(kind, key)
        try:
            with open_regular(path) as file:
                for each in (self.folder, file.fileno()):
                    check_owner(each)
                if os.fstat(file.fileno()).st_size > self.max_bytes:
                    return None
                data = file.read(self.max_bytes + 1)
        except FileNotFoundError:
            return None
        except ValueError:
            return None
        except PermissionError as error:
            log.warning("%s is not used: %s, and engines are trusted; make it yours alone (chmod go-w)", path, error)
            return None
        found = _contents(data)
        if found is None:
            log.warning("%s was changed or cut short after it was written; it is made again", path)
            return None
        with suppress(OSError):
            os.utime(path)
        return found

    def put(self, kind: str, key: str, data: bytes, note: Mapping[str, Any]) -> None:
        """Keep something; what finds no room in the bound, or cannot be written, is not kept, which is logged."""
        told = json.dumps(dict(note)).encode()[:_MOST_NOTE_BYTES]
        body = struct.pack("<I", len(told)) + told + data
        head = _MAGIC + hashlib.sha256(body).digest()
        if len(head) + len(body) > self.max_bytes:
            log.warning("%d bytes are more than the cache's bound of %d; they are not kept", len(data), self.max_bytes)
            return
        try:
            self._make_folder()
            with replacing(self._path(kind, key)) as file:
                if hasattr(os, "fchmod"):
                    # Whatever the user's mask lets: what others may write is not read.
                    os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
                file.write(head)
                file.write(body)
            self.prune(self.max_bytes)
        except OSError as error:
            log.warning("%s cannot be written: %s; nothing is kept", self.folder, error)

    def entries(self) -> list[Stored]:
        """All entries, the most recently used first."""
        found = []
        for path in self._files():
            kind, key = path.suffix[1:], path.stem
            with suppress(OSError, ValueError), open_regular(path) as file:
                status = os.fstat(file.fileno())
                note = _note(file.read(_HEAD.size + _MOST_NOTE_BYTES))
                found.append(Stored(key, kind, status.st_size, status.st_mtime, note, path))
        return sorted(found, key=lambda each: -each.used)

    def prune(self, max_bytes: int) -> tuple[int, int]:
        """Remove the least recently used entries until no more than some bytes are left, and what killed writers left.

        Args:
            max_bytes: 0 removes all of them.

        Returns:
            How many entries, and how many bytes.
        """
        removed = nbytes = total = 0
        for each in self.entries():
            total += each.nbytes
            if total <= max_bytes:
                continue
            with suppress(OSError):
                each.path.unlink()
                removed, nbytes = removed + 1, nbytes + each.nbytes
        with suppress(OSError):
            for path in self.folder.glob(f"{TEMPORARY}*"):
                # Young ones are being written.
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                        path.unlink()
        return removed, nbytes

    @contextmanager
    def lock(self, key: str, timeout: float | None = None) -> Iterator[None]:
        """Inside, nobody else holds the lock of this key. There are 256 of them, so others may wait too.

        Args:
            key: Of the entry.
            timeout: How long to wait for it, in seconds; ``None`` for as long as it takes.

        Raises:
            OSError: If the folder cannot be written, or the time has passed.
        """
        from filelock import FileLock

        self._make_folder()
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        # Never removed: whoever removes a lock that another one waits for makes two of it.
        number = hashlib.sha256(key.encode()).hexdigest()[:2]
        with FileLock(str(locks / f"{number}.lock"), -1 if timeout is None else timeout, thread_local=False):
            yield

    def _make_folder(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o755, exist_ok=True)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{key}.{kind}"

    def _files(self) -> list[Path]:
        try:
            return [each for each in self.folder.iterdir() if not each.name.startswith(TEMPORARY) and each.suffix]
        except OSError:
            return []


def user_store() -> Store:
    """This user's store: ``built`` in :func:`~graphcache.files.user_cache`, within ``GRAPHCACHE_CACHE_MAX_BYTES``.

    Raises:
        ConfigError: If that is no number of bytes.
    """
    text = os.environ.get("GRAPHCACHE_CACHE_MAX_BYTES", "").strip()
    if text and (not text.isdecimal() or len(text) > 30):
        raise ConfigError(f"GRAPHCACHE_CACHE_MAX_BYTES={shown(text)}: expected a whole number of bytes, 0 or more")
    return Store(user_cache() / "built", int(text) if text else DEFAULT_MAX_BYTES)


def _contents(data: bytes) -> bytes | None:
    if len(data) < _HEAD.size:
        return None
    magic, digest, length = _HEAD.unpack_from(data)
    start = _HEAD.size - 4
    if magic != _MAGIC or hashlib.sha256(memoryview(data)[start:]).digest() != digest:
        return None
    return data[_HEAD.size + length :]


def _note(data: bytes) -> Mapping[str, Any]:
    try:
        magic, _, length = _HEAD.unpack_from(data)
        found = json.loads(data[_HEAD.size : _HEAD.size + length]) if magic == _MAGIC else {}
    except (struct.error, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
