"""Engines and compiled kernels, kept in a folder for later processes.

Each entry is one file, written in one step and named by a key: a digest of all that it was made from. It begins with a
digest of its own, so that a changed or truncated one is not used; nor is one of another user, or that others may write.
Processes that want the same entry make it once: whoever makes it holds its lock, which the system releases if the
process is killed.
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
"""Bound of all entries of a user together, unless ``GRAPHCACHE_CACHE_MAX_BYTES`` says otherwise."""
_HEAD = struct.Struct("<8s32sI")
"""Magic, digest of everything that follows, length of the note."""
_DIGESTED = 8 + 32
"""Where the digested part begins."""
_MAGIC = b"gcstore1"
_MAX_NOTE_BYTES = 2**16
_ABANDONED_SECONDS = 24 * 3600
"""Age of a temporary file from which its writer is taken for dead."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One entry: its file, when that was last used (seconds since the epoch), and the note that it was made with."""

    key: str
    kind: str
    nbytes: int
    used: float
    note: Mapping[str, Any]
    path: Path


class Store:
    """A folder of entries, made at the first use. Beyond ``max_bytes`` the least recently used ones are removed."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def get_or_make(self, kind: str, key: str, make: Callable[[], bytes], note: Mapping[str, Any]) -> bytes:
        """An entry, made here if it is not there. If the folder cannot be used, it is not kept, which is logged."""
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
        """An entry, if it is there and unchanged."""
        path = self._path(kind, key)
        try:
            with open_regular(path) as file:
                for each in (self.folder, file.fileno()):
                    check_owner(each)
                if os.fstat(file.fileno()).st_size > self.max_bytes:
                    return None
                data = file.read(self.max_bytes + 1)
        except (FileNotFoundError, ValueError):
            return None
        except PermissionError as error:
            log.warning("%s is not used: %s, and engines are trusted; make it yours alone (chmod go-w)", path, error)
            return None
        magic, digest, length = _HEAD.unpack_from(data.ljust(_HEAD.size, b"\0"))
        if magic != _MAGIC or hashlib.sha256(memoryview(data)[_DIGESTED:]).digest() != digest:
            log.warning("%s was changed or cut short after it was written; it is made again", path)
            return None
        with suppress(OSError):
            os.utime(path)
        return data[_HEAD.size + length :]

    def put(self, kind: str, key: str, data: bytes, note: Mapping[str, Any]) -> None:
        """Keep an entry. One that exceeds the bound or cannot be written is not kept, which is logged."""
        text = json.dumps(dict(note)).encode()[:_MAX_NOTE_BYTES]
        body = struct.pack("<I", len(text)) + text + data
        head = _MAGIC + hashlib.sha256(body).digest()
        if len(head) + len(body) > self.max_bytes:
            log.warning("%d bytes are more than the cache's bound of %d; they are not kept", len(data), self.max_bytes)
            return
        try:
            self._make_folder()
            with replacing(self._path(kind, key)) as file:
                if hasattr(os, "fchmod"):
                    # Whatever the user's umask is: an entry that others may write is not read.
                    os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
                file.write(head)
                file.write(body)
            self.prune(self.max_bytes)
        except OSError as error:
            log.warning("%s cannot be written: %s; nothing is kept", self.folder, error)

    def entries(self) -> list[Stored]:
        """All entries, the most recently used first."""
        found: list[Stored] = []
        try:
            paths = [each for each in self.folder.iterdir() if not each.name.startswith(TEMPORARY) and each.suffix]
        except OSError:
            return found
        for path in paths:
            with suppress(OSError, ValueError), open_regular(path) as file:
                status = os.fstat(file.fileno())
                note = _note(file.read(_HEAD.size + _MAX_NOTE_BYTES))
                found.append(Stored(path.stem, path.suffix[1:], status.st_size, status.st_mtime, note, path))
        return sorted(found, key=lambda each: -each.used)

    def prune(self, max_bytes: int) -> tuple[int, int]:
        """Remove the least recently used entries until ``max_bytes`` are left: how many entries, how many bytes."""
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
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                        path.unlink()
        return removed, nbytes

    @contextmanager
    def lock(self, key: str, timeout: float | None = None) -> Iterator[None]:
        """Holds the lock of a key, or raises ``OSError`` after ``timeout`` seconds. Two keys may have the same lock."""
        from filelock import FileLock

        self._make_folder()
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        # Never removed: removing a lock file that somebody waits for would make two locks.
        number = hashlib.sha256(key.encode()).hexdigest()[:2]
        with FileLock(str(locks / f"{number}.lock"), -1 if timeout is None else timeout, thread_local=False):
            yield

    def _make_folder(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o755, exist_ok=True)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{key}.{kind}"


def user_store() -> Store:
    """This user's store: ``built`` in :func:`~graphcache.files.user_cache`, within ``GRAPHCACHE_CACHE_MAX_BYTES``."""
    text = os.environ.get("GRAPHCACHE_CACHE_MAX_BYTES", "").strip()
    if text and (not text.isdecimal() or len(text) > 30):
        raise ConfigError(f"GRAPHCACHE_CACHE_MAX_BYTES={shown(text)}: expected a whole number of bytes, 0 or more")
    return Store(user_cache() / "built", int(text) if text else DEFAULT_MAX_BYTES)


def _note(data: bytes) -> Mapping[str, Any]:
    """The note at the beginning of an entry; empty if there is none that can be read."""
    try:
        magic, _, length = _HEAD.unpack_from(data)
        found = json.loads(data[_HEAD.size : _HEAD.size + length]) if magic == _MAGIC else {}
    except (struct.error, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
