"""An engine is enqueued into a capture only while no other thread enqueues one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from threading import get_ident
from typing import TypeVar

_T = TypeVar("_T")

_POLL_SECONDS = 1e-4
"""How often an exclusive caller looks whether the others have left. An enqueue takes 20 to 100 us, a capture 4 ms."""


class EnqueueGate:
    """Runs functions of any number of threads at once, or one exclusively, which goes first.

    TensorRT documents that threads may use different execution contexts at once. TensorRT-RTX 1.5.0.114 crashes when
    one of them enqueues into a capture, even of another engine: in 12 of 14 processes within seconds (H100), and in
    none of 12 in which captures were exclusive.

    Ctrl-C cannot leave the gate occupied. Whoever is inside is an element of a set, and removing it is the first
    operation of a ``finally``; removing what was never added does nothing. Nobody is notified, since Ctrl-C could come
    before the notification: an exclusive caller polls.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        self._inside: set[tuple[int, object]] = set()
        self._exclusive: set[int] = set()

    def shared(self, function: Callable[..., _T], *args: object) -> _T:
        """Call a function while no other thread is in :meth:`exclusive`."""
        token = (get_ident(), object())
        try:
            self._inside.add(token)
            if self._exclusive:
                self._give_way(token)
            return function(*args)
        finally:
            self._inside.discard(token)

    def exclusive(self, function: Callable[..., _T], *args: object) -> _T:
        """Call a function while no other thread is inside."""
        thread = get_ident()
        if thread in self._exclusive:
            return function(*args)
        if self._holds(thread):
            raise RuntimeError("this thread shares the gate already; it cannot have it exclusively before it has left")
        with self._mutex:
            try:
                self._exclusive.add(thread)
                while self._inside:
                    time.sleep(_POLL_SECONDS)
                return function(*args)
            finally:
                self._exclusive.discard(thread)

    def _give_way(self, token: tuple[int, object]) -> None:
        """Wait outside until no exclusive caller is there, unless it is this thread or waits for it."""
        if token[0] in self._exclusive or self._holds(token[0], beside=token):
            return
        while self._exclusive:
            self._inside.discard(token)
            with self._mutex:
                pass
            self._inside.add(token)

    def _holds(self, thread: int, beside: object = None) -> bool:
        """Whether a thread is inside, with another token than ``beside``."""
        return any(each[0] == thread and each is not beside for each in list(self._inside))


enqueues = EnqueueGate()
"""Of the whole process, as the crash is."""
if hasattr(os, "register_at_fork"):
    # Whoever was inside is not in the child.
    os.register_at_fork(after_in_child=enqueues.__init__)  # type: ignore[misc]
