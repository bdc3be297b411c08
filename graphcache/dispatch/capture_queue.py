"""Captures in the background, on copies of the calls' tensors, for ``capture_in="background"``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from graphcache.cache.room import Room
from graphcache.capture.effects import Effects
from graphcache.capture.recording import Recording, Sharing, nothing
from graphcache.capture.torch_recorder import TorchRecorder
from graphcache.dispatch.call_snapshot import CallSnapshot
from graphcache.dispatch.capture_manager import CaptureManager
from graphcache.dispatch.targets import ModuleTarget
from graphcache.dispatch.worker import worker_of
from graphcache.errors import Cause, Reason
from graphcache.graphs.capture import refusal_of
from graphcache.keys.call import KeyedCall

_LOOKS_EVERY = 0.05
"""Seconds between two looks at whether a capture in the background was cancelled."""
PENDING = Cause(Reason.PENDING)


class CaptureQueue:
    """What is captured in the background for one module, or waits for it.

    The call of an engine is handed over as it is. That of a PyTorch module is observed while it runs for its caller,
    and handed over if it has no effects.

    Args:
        captures: Captures calls of the module and keeps the graphs.
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

    def submit_engine_call(self, call: KeyedCall) -> Cause | None:
        """Have the call of an engine captured; why it runs eagerly meanwhile, ``None`` if it has to be captured now."""
        return self.submit(self._capture, call)

    def run_and_submit(self, call: KeyedCall) -> tuple[Any, Cause]:
        """Answer a call of a PyTorch module eagerly, and have it captured if it has no effects; why it ran eagerly."""

        def begin(effects: Effects) -> None:
            if not self.is_pending(call.key):
                self.submit(partial(self._capture, effects=effects), call)

        return self.run_observed(call, begin, lambda cause: self._captures.deny(call.key, cause))

    def run_observed(
        self, call: KeyedCall, begin: Callable[[Effects], object], refuse: Callable[[Cause], object]
    ) -> tuple[Any, Cause]:
        """Answer a call of a PyTorch module eagerly, and see what it does.

        Args:
            call: The call.
            begin: Called with the lock held if it has no effects, to have something done in the background.
            refuse: Called with the lock held otherwise.

        Returns:
            The answer, and why it is no graph's.
        """
        captures = self._captures
        with captures.ledger.span("eager"), captures.gate.shared():
            effects = self._recorder.observe(call)
        value, cause = effects.value, effects.cause
        with captures.lock:
            if cause is not None:
                refuse(cause)
            else:
                # Its answer belongs to the caller from now on.
                effects.value = None
                begin(effects)
        return value, cause or PENDING

    def submit_like(self, effects: Effects, call: KeyedCall) -> None:
        """Have a call captured that nobody made, after one like it had no effects. The lock is held."""
        if not self.is_pending(call.key):
            self.submit(partial(self._capture, effects=effects, is_made_up=True), call)

    def submit(
        self,
        job: Callable[[CallSnapshot], object],
        call: KeyedCall,
        *,
        dropped: Callable[[], object] = nothing,
    ) -> Cause | None:
        """Do something with a snapshot of a call in the background.

        Args:
            job: What is done.
            call: The call.
            dropped: Called instead of the job if it is not done.

        Returns:
            Why the call runs eagerly meanwhile; ``None`` if it cannot be copied, and nothing will be done.
        """
        snapshot = CallSnapshot(call)

        def drop() -> None:
            self._pending.pop(call.key, None)
            snapshot.done.set()

        def run() -> None:
            try:
                if not snapshot.cancelled:
                    snapshot.thread = threading.current_thread()
                    job(snapshot)
            finally:
                drop()

        def drop_unrun() -> None:
            drop()
            dropped()

        if not snapshot.is_alike:
            return None
        self._pending[call.key] = snapshot
        device = self._captures.target.device_of(call.tensors) or "cpu"
        if not worker_of(device).submit(run, drop_unrun, self._answered):
            drop_unrun()
        return PENDING

    @property
    def _recorder(self) -> TorchRecorder:
        target = self._captures.target
        assert isinstance(target, ModuleTarget)
        return target.torch_recorder

    def _answered(self) -> int:
        """How many calls were answered so far."""
        return self._captures.hits + sum(self._captures.ledger.eager.copy().values())

    def _capture(self, snapshot: CallSnapshot, effects: Effects | None = None, is_made_up: bool = False) -> None:
        """Capture a call that was answered eagerly; in the thread of the worker."""
        captures, call = self._captures, snapshot.call
        start = time.perf_counter()
        with captures.ledger.span("capture") as span, captures.room(call) as room:
            outcome = snapshot.run(lambda: self._record(call, effects, is_made_up, room))
            seconds = time.perf_counter() - start
            while not captures.lock.acquire(timeout=_LOOKS_EVERY):
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

    def _record(self, call: KeyedCall, effects: Effects | None, is_made_up: bool, room: Room) -> Recording | Cause:
        """The graph of a call, or why there is none."""
        captures = self._captures
        begin = partial(captures.reserve, room, call)
        try:
            if effects is None:
                return captures.target.recorder.attempt(call, sharing=Sharing.NOTHING, begin=begin)[1]
            if is_made_up:
                with captures.gate.exclusive():
                    self._recorder.check_unchanged(effects.version)
                    effects = self._recorder.observe(call)
                if effects.cause is not None:
                    # Not to be tried again and again, for no caller has asked for these effects.
                    return Cause(Reason.PADDING, detail=f"a call of the padded sizes has effects: {effects.cause}")
            return self._recorder.record(
                call, effects, sharing=Sharing.NOTHING, begin=begin, running=captures.gate.exclusive
            )
        except Exception as error:
            # The module refuses such arguments; whoever gives them again will see it.
            return refusal_of(error, captures.ledger.name).cause


def _close(outcome: Recording | Cause) -> None:
    if isinstance(outcome, Recording):
        outcome.close()
