"""Native code in C: the guard of a graph, and the hit.

``library.c`` is compiled in the background at the first use, in about a second, and kept in the user's cache. Until
then, and where it cannot be compiled, Python does the same, more slowly. The library is used only if it agrees with
Python about tensors, contexts and dictionaries (``probe.py``).
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CellType, FunctionType, MemberDescriptorType
from typing import Any, Protocol

from torch import Tensor

from graphcache.config import switch_in_environment
from graphcache.errors import CompileError
from graphcache.native.compiler import NotUsable, build, load
from graphcache.native.probe import prepare

log = logging.getLogger("graphcache")

OFF = "GRAPHCACHE_NATIVE=0"

_MOMENT = 0.05
"""Seconds that the first call waits for a library that was compiled before; loading one takes 20 ms on an idle CPU."""

_EXIT = 2.0
"""Seconds that the end of the process waits at most for the compiler, so that a short program leaves its library."""


class Guard(Protocol):
    """What must stay as it is. Every ``add_`` method adds one entry and takes references to what it is given.

    Objects are compared by identity: that an entry differs does not mean that its value does. A ``TypeError`` says that
    the guard does not compare such an object.
    """

    def add_dict(self, d: dict[Any, Any], keys: tuple[Any, ...], values: tuple[Any, ...]) -> None:
        """A dictionary holds these keys and values in this order; of an ``OrderedDict`` one entry at most."""

    def add_names(
        self, d: dict[str, Any], names: tuple[str, ...], values: tuple[Any, ...], absent: tuple[str, ...]
    ) -> None:
        """A dictionary holds these values under these names, and nothing under ``absent``; its other keys may change.

        ``holds()`` runs the ``__eq__`` of a key that has the hash of a name and is no string.
        """

    def add_items(self, seq: list[Any] | set[Any] | frozenset[Any], values: tuple[Any, ...]) -> None:
        """A list or set holds these objects in this order of iteration."""

    def add_cell(self, cell: CellType, *value: Any) -> None:
        """A closure's cell holds this object, or is empty if none is given."""

    def add_slot(self, obj: Any, descriptor: MemberDescriptorType, *value: Any) -> None:
        """A slot holds this object, or is unset if none is given."""

    def add_class(self, obj: Any, cls: type) -> None:
        """The type of an object is this class."""

    def add_dict_of(self, obj: Any, d: dict[str, Any]) -> None:
        """``obj.__dict__`` is this dictionary."""

    def add_function(self, function: FunctionType, parts: tuple[Any, Any, Any], /) -> None:
        """A function has this code, these default values and these keyword defaults; ``None`` for none."""

    def add_tensor(self, t: Tensor) -> None:
        """A dense tensor of the CPU or a GPU keeps its memory, offset, sizes, strides, dtype and dispatch keys."""

    def holds(self) -> bool:
        """Whether no entry differs. Runs no Python code."""

    def changed(self) -> int:
        """The first entry that differs, by its number in the order of adding; -1 if none does."""

    def __len__(self) -> int:
        """How many entries there are."""


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
    """Compile the library, unless it was compiled before, and check it. Where it is.

    Raises:
        CompileError: If there is none for this system, or it cannot be compiled or used.
    """
    try:
        path = build()
        with ThreadPoolExecutor(1) as apart:
            apart.submit(prepare, load(path)).result()
    except CompileError:
        raise
    except NotUsable as why:
        raise CompileError(str(why)) from why
    except Exception as error:
        raise CompileError(f"{path} is not used ({type(error).__name__}: {error})") from error
    return path


def guard_type() -> type[Guard] | None:
    """The native guard; ``None`` as :func:`loaded` says."""
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
        return "not used so far" if not _loader.started else "being compiled"
    return _loader.why or "active"


def _wanted() -> bool:
    return switch_in_environment("GRAPHCACHE_NATIVE", unset=True)


class _Loader:
    """Finds or compiles the library, once, in a thread of its own."""

    def __init__(self) -> None:
        self.finished = threading.Event()
        self.why = ""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._library: Any = None
        self._leaving = False

    @property
    def started(self) -> bool:
        """Whether anybody has asked."""
        return self._thread is not None

    def get(self, wait: bool) -> Any:
        """The library, if it is ready."""
        if not self.finished.is_set():
            started = self._start()
            if wait or started:
                self.finished.wait(None if wait else _MOMENT)
        return self._library

    def leave(self) -> None:
        """Let a compiler that is running end; whatever it says is not passed on."""
        self._leaving = True
        if self._thread is not None:
            self._thread.join(_EXIT)

    def _start(self) -> bool:
        """Start the thread unless it was started; says which."""
        with self._lock:
            if self._thread is not None:
                return False
            thread = threading.Thread(target=self._run, name="graphcache native", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._failed(logging.WARNING, f"RuntimeError: {error}")
            else:
                self._thread = thread
            return True

    def _run(self) -> None:
        """Find or compile the library, and prepare it."""
        try:
            library = load(build())
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
