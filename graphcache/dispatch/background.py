"""Captures in the background, on copies of the calls' tensors, for ``capture_in="background"``.

A module has a :class:`CaptureQueue`, each waiting call is a :class:`CallSnapshot`, and each device has one
:class:`Worker`: the thread that captures, for all modules, with a rest after each capture.
"""

from __future__ import annotations

import atexit
import contextvars
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from graphcache.capture.recording import CaptureRequest, Recording, Sharing
from graphcache.dispatch.capture_manager import CaptureManager
from graphcache.errors import Cause, Reason
from graphcache.events import log
from graphcache.graphs.buffers import static_copies
from graphcache.graphs.capture import refusal_of
from graphcache.graphs.stream_order import own_stream
from graphcache.keys.call_key import KeyedCall, describe, function_modes

PENDING = Cause(Reason.PENDING)
MAX_WAITING = 32
"""Captures that may wait for one device. A call that finds no place is captured when it is made again."""
CALLS_BETWEEN = 512
"""Calls between two captures. A capture delays some four calls beside it (H100, MLP): fewer than one in a hundred."""
_REST = 10.0
"""Where calls are rare, a rest is this many times as long as the capture before it, but not longer than:"""
_MAX_REST_SECONDS = 0.5
_REST_POLL_SECONDS = 0.005
_CANCEL_POLL_SECONDS = 0.05


class CaptureQueue:
    """What is captured in the background for one module, or waits for it."""

    def __init__(self, captures: CaptureManager) -> None:
        self._captures = captures
        self._pending: dict[Hashable, CallSnapshot] = {}

    def is_pending(self, key: Hashable) -> bool:
        """Whether a call is captured in the background, or waits for it."""
        snapshot = self._pending.get(key)
        return snapshot is not None and not snapshot.is_lost

    def cancel(self) -> None:
        """Keep nothing of what is pending. The lock of the module is held."""
        for snapshot in list(self._pending.values()):
            snapshot.cancelled = True

    def finish(self) -> None:
        """Wait until nothing that was cancelled is captured any more; a subscriber in a worker's thread does not."""
        if isinstance(threading.current_thread(), _WorkerThread):
            return
        for snapshot in list(self._pending.values()):
            if snapshot.cancelled and not snapshot.is_lost:
                snapshot.done.wait()

    def capture(self, call: KeyedCall, record: Callable[[CaptureRequest], Recording | Cause]) -> Cause | None:
        """Have a call captured by ``record``, unless it is pending; it returns what :meth:`submit` does."""
        if self.is_pending(call.key):
            return PENDING
        return self.submit(call, partial(self._capture, record))

    def submit(self, call: KeyedCall, job: Callable[[CallSnapshot], object]) -> Cause | None:
        """Call ``job`` later with a snapshot of a call, which is cancelled if too much waits.

        Returns why the call runs eagerly meanwhile; ``None`` if it cannot be copied.
        """
        try:
            snapshot = CallSnapshot(call)
        except RuntimeError as error:
            return refusal_of(error, self._captures.ledger.name).cause
        if not snapshot.is_alike:
            return None

        def run(wanted: bool) -> None:
            snapshot.cancelled |= not wanted
            try:
                job(snapshot)
            finally:
                self._pending.pop(call.key, None)
                snapshot.done.set()

        self._pending[call.key] = snapshot
        device = self._captures.target.device_of(call.tensors) or "cpu"
        worker_of(device).submit(run, self._answered)
        return PENDING

    def _answered(self) -> int:
        """Calls of the module that were answered, but for those that were captured."""
        return self._captures.hits + sum(self._captures.ledger.eager.copy().values())

    def _capture(self, record: Callable[[CaptureRequest], Recording | Cause], snapshot: CallSnapshot) -> None:
        """Capture a call that was answered eagerly; in the thread of the worker."""
        captures, call = self._captures, snapshot.call
        if snapshot.cancelled:
            return
        start = time.perf_counter()
        with captures.ledger.span("capture") as span, captures.room(call) as room:
            begin = partial(captures.reserve, room, call)
            request = CaptureRequest(call, Sharing.NOTHING, begin, running=captures.gate.exclusive)
            outcome: Recording | Cause
            try:
                outcome = snapshot.run(partial(record, request))
            except BaseException as error:
                # The module refuses such arguments; whoever gives them again will see it.
                outcome = refusal_of(error, captures.ledger.name).cause
            seconds = time.perf_counter() - start
            while not (locked := captures.lock.acquire(timeout=_CANCEL_POLL_SECONDS)) and not snapshot.cancelled:
                # Whoever cancels may hold the lock until this ends.
                pass
            guard, grad = captures.target.guard, call.key.grad is not False
            try:
                if locked and not (snapshot.cancelled or captures.closed or guard.is_stale(grad)):
                    span.done = captures.keep(call, outcome, seconds, room) is None
                elif isinstance(outcome, Recording):
                    outcome.close()
                elif not snapshot.cancelled:
                    # Otherwise every further call would be captured in vain, and with it its effects repeated.
                    captures.deny(call.key, outcome)
            finally:
                if locked:
                    captures.lock.release()


class CallSnapshot:
    """One call as it was when it was made: copies of its tensors, context variables, torch's modes, and an event."""

    def __init__(self, call: KeyedCall) -> None:
        tensors = static_copies(call.tensors)
        args, kwargs = call.key.arguments(tensors)
        own = describe(args, kwargs).key
        self.call = KeyedCall(call.key, tensors, args, kwargs)
        """The same call on the copies."""
        # A default device is set for the caller's thread alone.
        self.is_alike = own == call.key._replace(host_values=()) and not function_modes()
        """Whether a graph of the copies is one of the call."""
        self.cancelled = False
        self.done = threading.Event()
        self._process = os.getpid()
        self._context = contextvars.copy_context()
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        kinds = ["cpu", "cuda"] if torch.cuda.is_initialized() else ["cpu"]  # type: ignore[no-untyped-call]
        self._autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self._index = next((value.device.index for value in tensors if value.is_cuda), None)
        if self._index is not None:
            with torch.cuda.device(self._index):
                self._copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record(torch.cuda.current_stream())

    @property
    def is_lost(self) -> bool:
        """Whether this is a fork of the process that would have captured it."""
        return self._process != os.getpid()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` in this thread as if it were the call's own, on a stream of the background's."""
        return self._context.run(self._run, function)

    def _run(self, function: Callable[[], Any]) -> Any:
        inference, grad = self._modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
            if self._index is None:
                return function()
            stream = own_stream(self._index, "background")
            with torch.cuda.device(self._index), torch.cuda.stream(stream):
                stream.wait_event(self._copied)
                answer = function()
                # What was copied belongs to the caller's stream, which does not know of this one.
                stream.synchronize()
                return answer


class _WorkerThread(threading.Thread):
    pass


class Worker:
    """Does one job after another in a thread of its own, with a rest between them; at most ``most`` jobs wait."""

    def __init__(self, name: str, most: int = MAX_WAITING) -> None:
        self._name = name
        self._most = most
        self._jobs: deque[tuple[Callable[[bool], object], Callable[[], int]]] = deque()
        self._hurry = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        """Ends when no job waits."""

    def submit(self, job: Callable[[bool], object], answered: Callable[[], int]) -> None:
        """Call ``job(True)`` later, or ``job(False)`` if it is dropped, because too many wait or at the end.

        The next job waits until :data:`CALLS_BETWEEN` calls were answered after this one, as ``answered`` counts them,
        or a while.
        """
        with self._lock:
            # At the end of the process a thread that is started never begins.
            if len(self._jobs) >= self._most or _ended.is_set():
                job(False)
                return
            self._jobs.append((job, answered))
            if self._thread is not None:
                return
            self._hurry.clear()
            # A daemon, as the end of a process must not wait for all jobs; stop() ends it in order.
            thread = _WorkerThread(target=self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                # No more threads are allowed.
                log.warning("%s: %s", self._name, error)
                self._jobs.pop()[0](False)
            else:
                self._thread = thread

    def stop(self) -> None:
        """Drop what waits, and wait for the job under way."""
        with self._lock:
            while self._jobs:
                self._jobs.popleft()[0](False)
            self._hurry.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job, answered = self._jobs.popleft()
            start = time.perf_counter()
            try:
                job(True)
            except BaseException:
                # This thread is that of all modules, whatever one of them raises.
                log.exception("a job of %s failed", self._name)
            # It holds tensors, which must not wait for the next one.
            del job
            # Calls go on undisturbed, so that few of them meet a capture; not while somebody waits for the end.
            now = time.perf_counter()
            until, enough = now + min(_REST * (now - start), _MAX_REST_SECONDS), answered() + CALLS_BETWEEN
            while answered() < enough and time.perf_counter() < until and not self._hurry.wait(_REST_POLL_SECONDS):
                pass
            del answered


def worker_of(device: object) -> Worker:
    name = str(device)
    return _workers.get(name) or _workers.setdefault(name, Worker(f"graphcache captures on {name}"))


def _end() -> None:
    _ended.set()
    _stop_all()


def _stop_all() -> None:
    for worker in list(_workers.values()):
        worker.stop()


_ended = threading.Event()
"""Set when the process ends."""
_workers: dict[str, Worker] = {}
"""By device."""
# Before the interpreter takes anything down: a capture that is cut off would take the process with it.
atexit.register(_end)
if hasattr(os, "register_at_fork"):
    # No thread survives a fork.
    os.register_at_fork(after_in_child=_workers.clear)
