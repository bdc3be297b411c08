"""What TensorRT-RTX compiles at run time, shared by engines and kept in a file."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

from graphcache.errors import ConfigError, shown
from graphcache.events import log
from graphcache.files import replacing


class RuntimeCache:
    """Compiled kernels of TensorRT-RTX (an ``IRuntimeCache``), which any number of engines may share.

    Kernels hold for one version of TensorRT-RTX, one kind of GPU and one driver; TensorRT refuses others, which is
    logged, and compiles anew. The other flavours of TensorRT compile nothing at run time and leave it empty. It is no
    cache of graphs.

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
        with self._lock:
            memory = self._cache.serialize() if self._cache is not None else None
            data = b"" if memory is None else bytes(memoryview(memory))
        if data:
            stream.write(data)
        return len(data)

    def load(self, path: str | os.PathLike[str] | None = None) -> None:
        """Take in a file; does nothing where there is none.

        Raises:
            OSError: If it cannot be read.
        """
        target = self.path if path is None else os.fspath(path)
        if target and os.path.exists(target):
            with open(target, "rb") as stream:
                self.load_from_stream(stream)

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write the file in one step, so that a reader sees the old one or the new one; nothing without kernels.

        Raises:
            OSError: If it cannot be written; what was there stays.
        """
        target = self.path if path is None else os.fspath(path)
        if not target or self._cache is None:
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        if self.save_to_stream(data):
            with replacing(target) as file:
                file.write(data.getbuffer())

    def _take_in(self) -> None:
        data, self._pending = self._pending, b""
        if data and not self._cache.deserialize(data):
            log.warning(
                "%d bytes of compiled kernels%s were refused by TensorRT (another version, GPU or driver made them, or "
                "they are damaged); kernels are compiled anew",
                len(data),
                f" in {self.path}" if self.path else "",
            )
