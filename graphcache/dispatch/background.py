"""Captures in the background, on copies of the calls' tensors, for ``capture_in="background"``.

A module has a :class:`CaptureQueue`, each waiting call is a :class:`CallSnapshot`, and each device has one
:class:`Worker`: the thread that captures, for all modules, with a rest after each capture.
"""

from __future__ import annotations

import atexit
import contextvars
import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch

from graphcache.cache.graph_cache import Reservation
from graphcache.capture.effects import Effects
from graphcache.capture.recording import CaptureRequest, Recording, Sharing, nothing
from graphcache.dispatch.capture_manager import CaptureManager
from graphcache.dispatch.targets import ModuleTarget
from graphcache.errors import Cause, Reason
from graphcache.events import log
from graphcache.graphs.buffers import static_copies
from graphcache.graphs.capture import refusal_of
from graphcache.graphs.stream_order import own_stream
from graphcache.keys.ambient import has_modes
from graphcache.keys.call_key import KeyedCall, describe, substitute

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
    """What is captured in the background for one module, or waits for it.

    The call of an engine is handed over as it is. That of a PyTorch module runs for its caller first, observed, and is
    handed over with its effects if it has none.
    """

    def __init__(self, captures: CaptureManager) -> None:
        self._captures = captures
        self._pending: dict[Hashable, CallSnapshot] = {}

    def is_pending(self, key: Hashable) -> bool:
        """Whether a call is captured in the background, or waits for it, in this process."""
        snapshot = self._pending.get(key)
        return snapshot is not None and not snapshot.is_lost

    def cancel(self) -> None:
        """Keep nothing of what is pending. The lock of the module is held."""
        for snapshot in list(self._pending.values()):
            snapshot.cancelled = True

    def finish(self) -> None:
        """Wait until nothing that was cancelled is captured any more."""
        for snapshot in list(self._pending.values()):
            # A subscriber may ask for it from within.
            if snapshot.cancelled and not snapshot.is_lost and snapshot.thread is not threading.current_thread():
                snapshot.done.wait()

    def capture(self, call: KeyedCall, effects: Effects | None = None, *, is_made_up: bool = False) -> Cause | None:
        """Have a call captured, unless it is pending. The lock of the module is held.

        ``effects`` are those of a run of a PyTorch module; if ``is_made_up``, of a run of a call like it that somebody
        made. Returns why the call runs eagerly meanwhile; ``None`` if it cannot be copied.
        """
        if self.is_pending(call.key):
            return PENDING
        return self.submit(call, partial(self._capture, effects=effects, is_made_up=is_made_up))

    def submit(
        self, call: KeyedCall, job: Callable[[CallSnapshot], object], dropped: Callable[[], object] = nothing
    ) -> Cause | None:
        """Do a job with a snapshot of a call, or call ``dropped`` if too much waits; returns as :meth:`capture`."""
        snapshot = CallSnapshot(call)
        if not snapshot.is_alike:
            return None

        def run() -> None:
            try:
                if not snapshot.cancelled:
                    snapshot.thread = threading.current_thread()
                    job(snapshot)
            finally:
                end()

        def end() -> None:
            self._pending.pop(call.key, None)
            snapshot.done.set()

        def drop() -> None:
            end()
            dropped()

        self._pending[call.key] = snapshot
        device = self._captures.target.device_of(call.tensors) or "cpu"
        if not worker_of(device).submit(run, drop, lambda: self._captures.answered):
            drop()
        return PENDING

    def _capture(self, snapshot: CallSnapshot, *, effects: Effects | None, is_made_up: bool) -> None:
        """Capture a call that was answered eagerly; in the thread of the worker."""
        captures, call = self._captures, snapshot.call
        start = time.perf_counter()
        with captures.ledger.span("capture") as span, captures.room(call) as room:
            outcome = snapshot.run(lambda: self._record(call, effects, is_made_up, room))
            seconds = time.perf_counter() - start
            while not captures.lock.acquire(timeout=_CANCEL_POLL_SECONDS):
                # Whoever cancels may hold the lock until this ends.
                if snapshot.cancelled:
                    _close(outcome)
                    return
            try:
                stale = captures.target.guard.is_stale(call.records_gradients)
                if not (snapshot.cancelled or captures.closed or stale):
                    span.done = captures.keep(call, outcome, seconds, room) is None
                    return
                _close(outcome)
                if isinstance(outcome, Cause) and not snapshot.cancelled and effects is not None:
                    # Otherwise every further call would be captured in vain, and with it its effects repeated.
                    captures.deny(call.key, outcome, None if is_made_up else effects.version)
            finally:
                captures.lock.release()

    def _record(
        self, call: KeyedCall, effects: Effects | None, is_made_up: bool, room: Reservation
    ) -> Recording | Cause:
        """The graph of a call, or why there is none."""
        captures, target = self._captures, self._captures.target
        begin = partial(captures.reserve, room, call)
        request = CaptureRequest(call, Sharing.NOTHING, begin, running=captures.gate.exclusive)
        try:
            if effects is None or not isinstance(target, ModuleTarget):
                return target.recorder.attempt(request)[1]
            recorder = target.torch_recorder
            if is_made_up:
                with captures.gate.exclusive():
                    recorder.check_unchanged(effects.version)
                    effects = recorder.observe(call)
                if effects.cause is not None:
                    # Not to be tried again and again, for no caller has asked for these effects.
                    return Cause(Reason.PADDING, detail=f"a call of the padded sizes has effects: {effects.cause}")
            return recorder.record(request, effects)
        except Exception as error:
            # The module refuses such arguments; whoever gives them again will see it.
            return refusal_of(error, captures.ledger.name).cause


def _close(outcome: Recording | Cause) -> None:
    if isinstance(outcome, Recording):
        outcome.close()


class CallSnapshot:
    """One call as it was when it was made: copies of its tensors, context variables, torch's modes, and an event."""

    def __init__(self, call: KeyedCall) -> None:
        tensors = static_copies(call.tensors)
        args, kwargs = substitute(call.args, call.kwargs, tensors)
        own = describe(args, kwargs).key
        self.call = KeyedCall(call.key, tensors, args, kwargs)
        """The same call on the copies."""
        # A default device is set for the caller's thread alone.
        self.is_alike = own == call.key._replace(host_values=()) and not has_modes()
        """Whether a graph of the copies is one of the call."""
        self.cancelled = False
        self.thread: threading.Thread | None = None
        """Which captures it, once one does."""
        self.done = threading.Event()
        self._process = os.getpid()
        self._context = contextvars.copy_context()
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), _autocast()
        self._index = next((value.device.index for value in tensors if value.is_cuda), None)
        self._copied: Any = None
        if self._index is not None:
            with torch.cuda.device(self._index):
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record(torch.cuda.current_stream())

    @property
    def is_lost(self) -> bool:
        """Whether this is a fork of the process that would have captured it: no thread of that one is here."""
        return self._process != os.getpid()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` in this thread as if it were the call's own, on a stream of the background's."""
        return self._context.run(self._run, function)

    def _run(self, function: Callable[[], Any]) -> Any:
        inference, grad, autocast = self._modes
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, enabled, dtype in autocast:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
            if self._index is not None:
                stack.enter_context(_background_stream(self._index, self._copied))
            return function()


@contextmanager
def _background_stream(index: int, copied: Any) -> Iterator[None]:
    stream = own_stream(index, "background")
    with torch.cuda.device(index), torch.cuda.stream(stream):
        stream.wait_event(copied)
        yield
        # What was copied belongs to the caller's stream, which does not know of this one.
        stream.synchronize()


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    kinds = ["cpu", "cuda"] if torch.cuda.is_initialized() else ["cpu"]  # type: ignore[no-untyped-call]
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


class Worker:
    """A thread that does one job after another, with a rest between them.

    It starts with the first job and ends with the process. At most ``most`` jobs wait.

    Example:
        >>> worker, done = Worker("example"), threading.Event()
        >>> worker.submit(done.set, nothing, lambda: CALLS_BETWEEN)
        True
        >>> done.wait(60)
        True
        >>> worker.stop()
    """

    def __init__(self, name: str, most: int = MAX_WAITING) -> None:
        self._name = name
        self._jobs: queue.Queue[tuple[Callable[[], object], Callable[[], object], Callable[[], int]] | None]
        self._jobs = queue.Queue(most)
        self._hurry = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object], dropped: Callable[[], object], answered: Callable[[], int]) -> bool:
        """Do a job later; ``False`` if too many wait, and then no function is ever called.

        ``dropped`` is called in place of a job that is never begun. The next job waits until :data:`CALLS_BETWEEN`
        calls were answered after this one, as ``answered`` counts them, or a while.
        """
        with self._lock:
            if self._thread is None:
                # A daemon, as the end of a process must not wait for a queue; stop() ends it in order.
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            try:
                self._jobs.put_nowait((job, dropped, answered))
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
        until = time.perf_counter() + min(_REST * seconds, _MAX_REST_SECONDS)
        enough = answered() + CALLS_BETWEEN
        while answered() < enough and time.perf_counter() < until and not self._hurry.wait(_REST_POLL_SECONDS):
            pass


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


_lock = threading.Lock()
_workers: dict[str, Worker] = {}
# Before the interpreter takes anything down: a capture that is cut off would take the process with it.
atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    # No thread survives a fork.
    os.register_at_fork(after_in_child=_workers.clear)
