"""Captures beside the calls: one thread for each device, with a stream of its own."""

from __future__ import annotations

import atexit
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from graphcache.events import log

MOST = 32
"""How many captures may wait. What does not fit is asked for again by a later call."""

CALLS_BETWEEN = 512
"""How many calls are answered between two captures. A capture is in the way of some four calls beside it (H100, MLP),
which are to be fewer than one in a hundred."""

_TIMES_AS_LONG = 10.0
_LONGEST = 0.5
"""Where calls are rare: a rest is ten times as long as the capture before it, and at most so many seconds."""

_LOOKS_EVERY = 0.005
"""Seconds."""

Job = Callable[[], object]


def nothing() -> None:
    """What there is to do about most jobs that are dropped."""


class Worker:
    """A thread that does one job after another, with a rest between them. It starts with the first one, and ends with
    the process.

    Args:
        name: Of the thread.
        most: How many jobs may wait.

    Example:
        >>> worker, done = Worker("example"), threading.Event()
        >>> worker.submit(done.set)
        True
        >>> done.wait(60)
        True
        >>> worker.stop()
    """

    def __init__(self, name: str, most: int = MOST) -> None:
        self._name = name
        self._jobs: queue.Queue[tuple[Job, Job, Callable[[], int]] | None] = queue.Queue(most)
        self._hurry = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job, dropped: Job = nothing, answered: Callable[[], int] | None = None) -> bool:
        """Do a job later; ``False`` if too many wait, and then neither function is ever called.

        ``dropped`` is called in place of a job that is never begun. The next job waits until :data:`CALLS_BETWEEN`
        calls were answered beside this one, as ``answered`` counts them, or a while.
        """
        with self._lock:
            if self._thread is None:
                # A daemon, as the end of a process must not wait for a queue; stop() ends it in order.
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            try:
                self._jobs.put_nowait((job, dropped, answered or _many))
            except queue.Full:
                return False
            return True

    def stop(self) -> None:
        """Drop what waits, wait for the job under way, and end; a later job starts a new thread."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            with suppress(queue.Empty):
                while (waiting := self._jobs.get_nowait()) is not None:
                    waiting[1]()
            self._jobs.put(None)
            self._hurry.set()
            if thread is not threading.current_thread():
                thread.join()

    def _work(self) -> None:
        self._hurry.clear()
        while (next_one := self._jobs.get()) is not None:
            answered, start = next_one[2], time.perf_counter()
            try:
                next_one[0]()
            except Exception:
                log.exception("a job of %s failed", self._name)
            # It holds tensors, which must not wait for the next one.
            del next_one
            self._rest(answered, time.perf_counter() - start)
            del answered

    def _rest(self, answered: Callable[[], int], seconds: float) -> None:
        """Let calls go on undisturbed, so that few of them meet a capture; not while somebody waits for the end."""
        until = time.perf_counter() + min(_TIMES_AS_LONG * seconds, _LONGEST)
        enough = answered() + CALLS_BETWEEN
        while answered() < enough and time.perf_counter() < until and not self._hurry.wait(_LOOKS_EVERY):
            pass


def _many() -> int:
    """For jobs that nobody's calls are beside: each time more than enough."""
    return next(_counter)


def worker_of(device: object) -> Worker:
    """The one worker of a device, in this process."""
    name = str(device)
    with _lock:
        if name not in _workers:
            _workers[name] = Worker(f"graphcache captures on {name}")
        return _workers[name]


def _stop_all() -> None:
    for worker in list(_workers.values()):
        worker.stop()


_counter = itertools.count(step=CALLS_BETWEEN)
_lock = threading.Lock()
_workers: dict[str, Worker] = {}
# Before the interpreter takes anything down: a capture that is cut off would take the process with it.
atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    # No thread survives a fork.
    os.register_at_fork(after_in_child=_workers.clear)
