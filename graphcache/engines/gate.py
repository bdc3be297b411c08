"""An engine is enqueued into a capture only while no other thread enqueues one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class Gate:
    """Lets any number of threads in at once, or one alone.

    TensorRT documents that threads may use different execution contexts at once. TensorRT-RTX 1.5.0.114 crashes when
    one of them enqueues into a capture, even of another engine: in 12 of 14 processes within seconds (H100), and in
    none of 12 in which captures were alone.

    Whoever wants to be alone goes first, so that those who do not cannot keep it waiting for ever.

    Example:
        >>> gate = Gate()
        >>> with gate.among_others():
        ...     with gate.among_others():
        ...         pass
        >>> with gate.alone():
        ...     pass
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._among = 0
        self._waiting = 0
        self._alone: int | None = None
        self._held = threading.local()
        self._entrance = _Among(self)

    def among_others(self) -> AbstractContextManager[None]:
        """Inside, nobody is alone but, at most, this very thread."""
        return self._entrance

    def enter(self) -> None:
        """What entering :meth:`among_others` does: every eager call does, so that it is no generator's business."""
        depth = getattr(self._held, "depth", 0)
        with self._condition:
            if self._alone is not None or self._waiting:
                self._wait(depth)
            self._among += 1
        self._held.depth = depth + 1

    def leave(self) -> None:
        """What leaving it does."""
        with self._condition:
            self._among -= 1
            if self._waiting:
                self._condition.notify_all()
        self._held.depth -= 1

    def _wait(self, depth: int) -> None:
        if self._alone != threading.get_ident():
            # A thread that is inside already must not wait for one that waits for it.
            while self._alone is not None or (self._waiting and not depth):
                self._condition.wait()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other thread is.

        Raises:
            RuntimeError: In a thread that is among others: it would wait for itself.
        """
        if self._alone == threading.get_ident():
            yield
            return
        if getattr(self._held, "depth", 0):
            raise RuntimeError("this thread is among others already; it cannot be alone before it has left")
        with self._condition:
            self._waiting += 1
            try:
                while self._alone is not None or self._among:
                    self._condition.wait()
            finally:
                self._waiting -= 1
                self._condition.notify_all()
            self._alone = threading.get_ident()
        try:
            yield
        finally:
            with self._condition:
                self._alone = None
                self._condition.notify_all()


class _Among:
    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate.enter()

    def __exit__(self, *_: object) -> None:
        self._gate.leave()


enqueues = Gate()
"""Of the whole process, as the crash is."""
if hasattr(os, "register_at_fork"):
    # Whoever was inside is not in the child.
    os.register_at_fork(after_in_child=enqueues.__init__)  # type: ignore[misc]
