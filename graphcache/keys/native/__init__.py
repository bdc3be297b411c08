"""The guard of a graph in C: what must stay as it is, compared by identity in about a microsecond.

``guard.c`` is compiled in the background at the first use and kept in the user's cache; it takes about half a second.
Until then, and where it cannot be compiled, guards are compared in Python, which gives the same answers and is slower.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from types import CellType, FunctionType, MemberDescriptorType
from typing import Any, Protocol

from torch import Tensor

from graphcache.keys.native.compiled_library import NotUsable, load, wanted
from graphcache.keys.native.compiler import build
from graphcache.keys.native.probe import prepare

log = logging.getLogger("graphcache")

_MODULE = "_graphcache_guard"

_MOMENT = 0.05
"""Seconds that the first call waits for a library that was compiled before; loading one takes 5 ms on an idle CPU."""

_EXIT = 2.0
"""Seconds that the end of the process waits at most for the compiler, so that a short program leaves its library."""


class Guard(Protocol):
    """What must stay as it is. Every ``add_`` method adds one entry and takes references to what it is given.

    Objects are compared by identity: that an entry differs does not mean that its value does.
    """

    def add_dict(self, d: dict[Any, Any], keys: tuple[Any, ...], values: tuple[Any, ...]) -> None:
        """A dictionary holds these keys and values in this order (of an ``OrderedDict``: the order it iterates in)."""

    def add_names(
        self, d: dict[str, Any], names: tuple[str, ...], values: tuple[Any, ...], absent: tuple[str, ...]
    ) -> None:
        """A dictionary holds these values under these names, and nothing under ``absent``; its other keys may change.

        ``holds()`` runs the ``__eq__`` of a key that has the hash of a name and is no string.
        """

    def add_items(self, seq: list[Any] | deque[Any] | set[Any] | frozenset[Any], values: tuple[Any, ...]) -> None:
        """A list, deque or set holds these objects in this order of iteration."""

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
        """A tensor keeps its memory, offset, sizes, strides, dtype and dispatch keys.

        Raises:
            TypeError: For a subclass, and for anything but a dense tensor in the memory of a CPU or GPU.
        """

    def holds(self) -> bool:
        """Whether no entry differs. Runs no Python code."""

    def changed(self) -> int:
        """The first entry that differs, by its number in the order of adding; -1 if none does."""

    def __len__(self) -> int:
        """How many entries there are."""


def guard_type(wait: bool = False) -> type[Guard] | None:
    """The compiled guard; ``None`` until it is ready, where it cannot be had, and with ``GRAPHCACHE_NATIVE=0``.

    The first call starts the compiler in the background, if need be. If that fails, one message of the logger
    ``graphcache`` says what is missing.

    Args:
        wait: Wait until it is ready or has failed.

    Raises:
        ConfigError: If ``GRAPHCACHE_NATIVE`` is none of its values.
    """
    return _loader.get(wait) if wanted() else None


class _Loader:
    """Finds or compiles the library, once, in a thread of its own."""

    def __init__(self) -> None:
        self.finished = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._type: type[Guard] | None = None
        self._leaving = False

    def get(self, wait: bool) -> type[Guard] | None:
        """The type, if it is ready."""
        if not self.finished.is_set():
            started = self._start()
            if wait or started:
                self.finished.wait(None if wait else _MOMENT)
        return self._type

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
            thread = threading.Thread(target=self._run, name="graphcache guard", daemon=True)
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
            library = load(build(), _MODULE)
            prepare(library)
        except NotUsable as why:
            self._failed(logging.INFO, str(why))
        except Exception as error:
            self._failed(logging.WARNING, f"{type(error).__name__}: {error}")
        else:
            self._type = library.Guard
            self.finished.set()

    def _failed(self, level: int, why: str) -> None:
        """Say once why there is no guard."""
        if not self._leaving:
            log.log(level, "guards are compared in Python, which is slower, since there is no compiled guard: %s", why)
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
