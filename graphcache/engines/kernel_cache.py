"""Kernels that TensorRT-RTX compiles where an engine runs, shared by engines and kept for later processes."""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from graphcache.engines.library import Library
from graphcache.engines.store import user_store
from graphcache.errors import ConfigError, shown
from graphcache.events import log
from graphcache.files import replacing

KIND = "kernels"
_LOCK_SECONDS = 5.0
"""How long saving waits for the store's lock: a process that ends does not wait for another one's build."""


class RuntimeCache:
    """Compiled kernels of TensorRT-RTX (an ``IRuntimeCache``), which any number of engines may share.

    Kernels hold for one version of TensorRT-RTX, one kind of GPU and one driver. TensorRT refuses others, which is
    logged, and compiles again. The other flavours of TensorRT compile nothing at run time and leave it empty. It holds
    no CUDA graphs.

    Args:
        path: A file to load from and to save to; empty for none.

    Raises:
        ConfigError: For a path that is none.

    Example:
        >>> import io
        >>> cache = RuntimeCache()
        >>> cache.has_cache(), cache.save_to_stream(io.BytesIO())
        (False, 0)
    """

    def __init__(self, path: str | os.PathLike[str] = "") -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"path={shown(path)}: expected the path of a file, or an empty text for none")
        self.path = os.fspath(path)
        self._source = f" in {self.path}" if self.path else ""
        self._cache: Any = None
        self._pending = b""
        self._lock = threading.Lock()

    def has_cache(self) -> bool:
        """Whether an engine has begun to use it."""
        return self._cache is not None

    def made_for(self, config: Any) -> Any:
        """TensorRT's own object, made with the runtime configuration of the first engine that asks."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._take_in()
            return self._cache

    def load_from_stream(self, stream: Any) -> int:
        """Take in what a file-like object gives; the number of bytes."""
        data = stream.read()
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise ConfigError(f"a stream of {type(data).__name__} cannot be loaded; expected one of bytes")
        with self._lock:
            self._pending = bytes(data)
            if self._cache is not None:
                self._take_in()
        return len(data)

    def save_to_stream(self, stream: Any) -> int:
        """Write what was compiled so far into a file-like object; the number of bytes, 0 if there is nothing."""
        if data := self._serialized():
            stream.write(data)
        return len(data)

    def load(self, path: str | os.PathLike[str] | None = None) -> None:
        """Take in a file; does nothing where there is none."""
        target = self.path if path is None else os.fspath(path)
        if target and os.path.exists(target):
            self.load_from_stream(io.BytesIO(Path(target).read_bytes()))

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write the file in one step, so that a reader sees the old one or the new one; nothing without kernels."""
        target = self.path if path is None else os.fspath(path)
        if not target or self._cache is None:
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if data := self._serialized():
            with replacing(target) as file:
                file.write(data)

    def _serialized(self) -> bytes:
        """The kernels as TensorRT writes them; empty if there are none."""
        with self._lock:
            # TensorRT-RTX 1.4 has runtime caches that cannot be written.
            write = getattr(self._cache, "serialize", None)
            memory = None if write is None else write()
            return b"" if memory is None else bytes(memoryview(memory))

    def _take_in(self) -> None:
        """Give TensorRT the bytes that were loaded."""
        data, self._pending = self._pending, b""
        if data and not self._cache.deserialize(data):
            log.warning(
                "%d bytes of compiled kernels%s were refused by TensorRT (another version, GPU or driver made them, or "
                "they are damaged); kernels are compiled again",
                len(data),
                self._source,
            )


class StoredRuntimeCache(RuntimeCache):
    """The kernels of one engine, kept in the user's store. Of processes that save at once the one with more wins."""

    def __init__(self, serialized: bytes, found: Library, name: str) -> None:
        super().__init__()
        self._store = user_store()
        device = _device()
        parts = (hashlib.sha256(serialized).hexdigest(), found.flavour, found.version, device)
        self.key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self._note = {"name": name, found.flavour: found.version, "device": device}
        self._source = f" that were kept for {name}"
        try:
            self._pending = self._store.get(KIND, self.key) or b""
        except OSError as error:
            log.warning("kernels cannot be read: %s", error)
        self._digest = hashlib.sha256(self._pending).digest()
        _stored.add(self)

    def keep(self) -> bool:
        """Write the kernels that were compiled since; whether there were any."""
        data = self._serialized()
        digest = hashlib.sha256(data).digest()
        if not data or digest == self._digest:
            return False
        try:
            with self._store.lock(self.key, timeout=_LOCK_SECONDS):
                kept = self._store.get(KIND, self.key)
                if kept is None or len(kept) <= len(data):
                    self._store.put(KIND, self.key, data, self._note)
        except OSError as error:
            log.warning("kernels cannot be kept: %s", error)
            return False
        self._digest = digest
        return True

    def close(self) -> None:
        """Keep the kernels, and release TensorRT's object; twice does nothing."""
        try:
            self.keep()
        finally:
            self._cache = None


_stored: WeakSet[StoredRuntimeCache] = WeakSet()


@atexit.register
def _keep_all() -> None:
    """Keep the kernels of engines that were not closed."""
    for each in list(_stored):
        # A process that ends must end, and TensorRT may have ended before.
        with suppress(Exception):
            each.keep()


def _device() -> str:
    """The name of the current device; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
