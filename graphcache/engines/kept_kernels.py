"""Kernels that TensorRT-RTX compiles for an engine where it runs, kept for later processes."""

from __future__ import annotations

import atexit
import hashlib
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch

from graphcache.engines.library import Library
from graphcache.engines.store import Store, user_store
from graphcache.events import log

KIND = "kernels"
_PATIENCE_SECONDS = 5.0


class KeptKernels:
    """The runtime cache of one engine in the user's store.

    TensorRT-RTX compiles the kernels of each new shape when it first runs. What it has compiled goes into a runtime
    cache, which it writes out and reads in again (``IRuntimeCache``). The full TensorRT compiles when it builds, and
    has none.

    Of processes that save at once the one with more kernels wins; they are not merged.

    Args:
        serialized: The engine's bytes.
        found: Which TensorRT runs it.
        name: Of the engine, for people who look at the store.
    """

    def __init__(self, serialized: bytes, found: Library, name: str) -> None:
        self._store: Store = user_store()
        parts = (hashlib.sha256(serialized).hexdigest(), found.flavour, found.version, _device())
        self.key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self._note = {"name": name, found.flavour: found.version, "device": _device()}
        # Of what was kept last.
        self._digest = b""
        self._cache: Any = None
        _keeping.add(self)

    def fill(self, cache: Any) -> None:
        """Give a runtime cache, of which nothing was used yet, what was kept; and save it later."""
        if not hasattr(cache, "serialize"):
            return
        self._cache = cache
        try:
            found = self._store.get(KIND, self.key)
        except OSError as error:
            log.warning("kernels cannot be read: %s", error)
            return
        if found is None:
            return
        if cache.deserialize(found):
            self._digest = hashlib.sha256(found).digest()
        else:
            log.warning(
                "TensorRT refused the kernels that were kept for %s; they are compiled again", self._note["name"]
            )

    def save(self) -> bool:
        """Keep what has been compiled since.

        Returns:
            Whether there was something new.
        """
        if self._cache is None:
            return False
        made = self._cache.serialize()
        data = b"" if made is None else bytes(made)
        digest = hashlib.sha256(data).digest()
        if not data or digest == self._digest:
            return False
        try:
            # A process that ends does not wait for another one's build, which may hold the same lock.
            with self._store.lock(self.key, timeout=_PATIENCE_SECONDS):
                kept = self._store.get(KIND, self.key)
                if kept is None or len(kept) <= len(data):
                    self._store.put(KIND, self.key, data, self._note)
        except OSError as error:
            log.warning("kernels cannot be kept: %s", error)
            return False
        self._digest = digest
        return True

    def close(self) -> None:
        """Save, and let go of the runtime cache; twice does nothing."""
        try:
            self.save()
        finally:
            self._cache = None


_keeping: WeakSet[KeptKernels] = WeakSet()


@atexit.register
def _save_all() -> None:
    for each in list(_keeping):
        # A process that ends must end, and TensorRT may have ended before.
        with suppress(Exception):
            each.save()


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
