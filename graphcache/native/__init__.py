"""Native code in C: the guard of a graph, and the hit.

The library comes with the wheel. Otherwise ``library.c`` is compiled in the background at the first use, in about a
second, and kept in the user's cache. Until then, and where it cannot be compiled, Python does the same, more slowly.
The library is used only if it agrees with Python about tensors, contexts and dictionaries (``probe.py``).
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from graphcache.config import switch_in_environment
from graphcache.errors import CompileError
from graphcache.native.compiler import NotUsable, obtain
from graphcache.native.probe import prepare

log = logging.getLogger("graphcache")

OFF = "GRAPHCACHE_NATIVE=0"

_MOMENT = 0.05
"""Seconds that the first call waits for a library that was compiled before; loading one takes 20 ms on an idle CPU."""

_EXIT = 2.0
"""Seconds that the end of the process waits at most for the compiler, so that a short program leaves its library."""


def loaded(wait: bool = False) -> Any:
    """The library; ``None`` until it is ready, where it cannot be had, and with ``GRAPHCACHE_NATIVE=0``.

    The first call starts the compiler in the background, if need be. If that fails, one message of the logger
    ``graphcache`` says what is missing.

    Args:
        wait: Wait until it is ready or has failed.

    Raises:
        ConfigError: If ``GRAPHCACHE_NATIVE`` is none of its values.
    """
    return _loader.get(wait) if _wanted() else None


def compile_now() -> Path:
    """Compile the library, unless it came with the wheel or was compiled before, and check it. Where it is.

    Raises:
        CompileError: If there is none for this system, or it cannot be compiled or used.
    """
    try:
        path, library = obtain()
        with ThreadPoolExecutor(1) as apart:
            apart.submit(prepare, library).result()
    except CompileError:
        raise
    except NotUsable as why:
        raise CompileError(str(why)) from why
    except Exception as error:
        raise CompileError(f"native code is not used ({type(error).__name__}: {error})") from error
    return path


def guard_type() -> Any:
    """The native guard (``guard.h``); ``None`` as :func:`loaded` says."""
    library = loaded()
    return None if library is None else library.Guard


def new_lock() -> Any:
    """A lock that its owner may take again: the library's, which costs nothing while it is free, or Python's."""
    library = loaded()
    return threading.RLock() if library is None else library.Lock()


def is_pending() -> bool:
    """Whether the library may still come."""
    return _wanted() and not _loader.finished.is_set()


def status() -> str:
    """``"active"``, or why Python does the work, such as :data:`OFF`."""
    if not _wanted():
        return OFF
    if is_pending():
        return "being compiled" if _loader.started else "not used so far"
    return _loader.why or "active"


def _wanted() -> bool:
    return switch_in_environment("GRAPHCACHE_NATIVE", unset=True)


class _Loader:
    """Finds or compiles the library, once, in a thread of its own."""

    def __init__(self) -> None:
        self.finished = threading.Event()
        self.why = ""
        self._lock = threading.Lock()
        self.started = False
        self._thread = threading.Thread(target=self._run, name="graphcache native", daemon=True)
        self._library: Any = None
        self._leaving = False

    def get(self, wait: bool) -> Any:
        """The library, if it is ready; starts the thread unless it was started."""
        if not self.finished.is_set():
            with self._lock:
                first, self.started = not self.started, True
                if first:
                    try:
                        self._thread.start()
                    except RuntimeError as error:
                        self._failed(logging.WARNING, f"RuntimeError: {error}")
            if wait or first:
                self.finished.wait(None if wait else _MOMENT)
        return self._library

    def leave(self) -> None:
        """Let a compiler that is running end; whatever it says is not passed on."""
        self._leaving = True
        if self._thread.is_alive():
            self._thread.join(_EXIT)

    def _run(self) -> None:
        """Find or compile the library, and prepare it."""
        try:
            _, library = obtain()
            prepare(library)
        except NotUsable as why:
            self._failed(logging.INFO, str(why))
        except Exception as error:
            self._failed(logging.WARNING, f"{type(error).__name__}: {error}")
        else:
            self._library = library
            self.finished.set()

    def _failed(self, level: int, why: str) -> None:
        """Say once why there is no library."""
        self.why = why
        if not self._leaving:
            log.log(level, "hits take longer, since there is no native code: %s", why)
        self.finished.set()


_loader = _Loader()


def _after_fork() -> None:
    """A thread does not live on in a child process, which starts again."""
    global _loader
    if not _loader.finished.is_set():
        _loader = _Loader()


atexit.register(lambda: _loader.leave())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
