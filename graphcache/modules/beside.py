"""Captures beside the calls, on copies of their tensors, for ``capture_in="background"``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from graphcache.capture.effects import Effects
from graphcache.errors import Cause, Reason
from graphcache.graphs.capture import refusal_of
from graphcache.keys.call_key import Signature
from graphcache.modules.background import nothing, worker_of
from graphcache.modules.captures import Captures
from graphcache.modules.later import Later
from graphcache.modules.record import Recorded
from graphcache.modules.record_torch import TorchRecorder
from graphcache.modules.room import Room

_PATIENCE = 0.05
"""Seconds between two looks at whether a capture beside the calls was cancelled."""
_PENDING = Cause(Reason.PENDING)


class CapturesBeside(Captures):
    """Captures calls of one module within them, or later, beside them.

    Args:
        args: As for :class:`~graphcache.modules.captures.Captures`.
    """

    def __init__(self, *args: Any) -> None:
        self._pending: dict[Signature, Later] = {}
        """What is captured beside the calls, or waits for it."""
        super().__init__(*args)

    def clear(self, *, wait: bool = True) -> None:
        with self.lock:
            for later in self._pending.values():
                later.cancelled = True
            super().clear(wait=wait)

    def cold_cause(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Cause | None:
        """Why a call runs eagerly although it could be captured; ``None`` if it is to be captured now.

        The call of an engine that is to be captured beside the calls is on its way then. The lock is held.
        """
        if self._is_pending(signature):
            return _PENDING
        if (cause := self.admission.ask(signature)) is not None or not self.captures_beside:
            return cause
        if self._engine is None:
            return None
        return self.beside(self._capture_beside, signature, inputs, args, kwargs)

    @property
    def captures_beside(self) -> bool:
        """Whether calls are captured beside the calls."""
        return self._config.capture_in == "background"

    def captured_later(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Cause]:
        """Answer a call of a PyTorch module eagerly, and have it captured beside the calls if it has no effects.

        Returns:
            The answer, and why it was no graph's.
        """

        def begin(effects: Effects) -> object:
            if self._is_pending(signature):
                return None
            return self.beside(lambda later: self._capture_beside(later, effects), signature, inputs, args, kwargs)

        def refuse(cause: Cause) -> None:
            self.blocks.block(signature, cause, self._guard.version)

        return self.observed(inputs, args, kwargs, begin, refuse)

    def capture_alike(
        self,
        effects: Effects,
        signature: Signature,
        inputs: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Have a call captured beside the calls that nobody made; the lock is held.

        Args:
            effects: None, of a call that was made and is like it; otherwise the module would not be run.
            signature: Of the call.
            inputs: The tensors among its arguments.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if not self._is_pending(signature):
            job = partial(self._capture_beside, effects=effects, alike=True)
            self.beside(job, signature, inputs, args, kwargs)

    def observed(
        self,
        inputs: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        begin: Callable[[Effects], object],
        refuse: Callable[[Cause], object],
    ) -> tuple[Any, Cause]:
        """Answer a call of a PyTorch module eagerly, and see what it does.

        Args:
            inputs: The tensors among its arguments.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            begin: Called with the lock held if it has no effects, to have something done beside the calls.
            refuse: Called with the lock held otherwise.

        Returns:
            The answer, and why it was no graph's.
        """
        assert isinstance(self.recorder, TorchRecorder)
        with self._ledger.span("eager"), self.gate.shared():
            effects = self.recorder.observe(args, kwargs, inputs)
        value, cause = effects.value, effects.cause
        with self.lock:
            if cause is not None:
                refuse(cause)
            else:
                # Its answer belongs to the caller from now on.
                effects.value = None
                begin(effects)
        return value, cause or _PENDING

    def beside(
        self,
        job: Callable[[Later], object],
        signature: Signature,
        inputs: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        dropped: Callable[[], object] = nothing,
    ) -> Cause | None:
        """Do something with copies of a call beside the calls, after which the job calls :meth:`drop`.

        Args:
            job: What is done.
            signature: Of the call.
            inputs: The tensors among its arguments.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            dropped: Called instead of the job if it is not done.

        Returns:
            Why the call runs eagerly meanwhile; ``None`` if no copies of it can be made, and nothing will be done.
        """

        def drop() -> None:
            self.drop(later)
            dropped()

        later = Later(signature, inputs, args, kwargs)
        if not later.is_alike:
            return None
        self._pending[signature] = later
        if not worker_of(self._device(inputs)).submit(lambda: job(later), drop, self._answered):
            drop()
        return _PENDING

    def _answered(self) -> int:
        """How many calls were answered so far."""
        hits = sum(entry.hits for entry in list(self._cache.entries.values()))
        return self._ledger.retired_hits + hits + sum(self._ledger.eager.copy().values())

    def _is_pending(self, signature: Signature) -> bool:
        """Whether a call is captured beside the calls, or waits for it, in this process."""
        later = self._pending.get(signature)
        return later is not None and not later.is_lost

    def drop(self, later: Later) -> None:
        """Note that nothing more is done with a call beside the calls."""
        self._pending.pop(later.signature, None)
        later.done.set()

    def _capture_beside(self, later: Later, effects: Effects | None = None, alike: bool = False) -> bool:
        """Capture a call that was answered eagerly; the worker's job.

        Args:
            later: The call.
            effects: What was observed of it; ``None`` for an engine.
            alike: Whether that is true of another call, so that this one is observed first.

        Returns:
            Whether there is a graph of it now.
        """
        signature = later.signature
        try:
            if later.cancelled:
                return False
            later.thread = threading.current_thread()
            start = time.perf_counter()
            with self._ledger.span("capture"), self._room(later.inputs) as room:
                outcome = later.run(lambda: self._recorded(later, effects, alike, room))
                seconds = time.perf_counter() - start
                while not self.lock.acquire(timeout=_PATIENCE):
                    # Whoever cancels may hold the lock until this ends.
                    if later.cancelled:
                        _close(outcome)
                        return False
                try:
                    stale = self._guard.is_stale(signature[0] is not False)
                    if later.cancelled or self.closed or stale:
                        _close(outcome)
                        if isinstance(outcome, Cause) and not later.cancelled and effects is not None:
                            # Otherwise every further call would be captured in vain, and with it its effects repeated.
                            version = self._guard.version if alike else effects.version
                            self.blocks.block(signature, outcome, version)
                        return False
                    return self._finish(signature, outcome, later.inputs, seconds, room, None) is None
                finally:
                    self.lock.release()
        finally:
            self.drop(later)

    def _recorded(self, later: Later, effects: Effects | None, alike: bool, room: Room) -> Recorded | Cause:
        """The graph of a call, or why there is none."""

        def begin() -> None:
            self._take(room, later.signature)

        try:
            if effects is None:
                return self.recorder.attempt(later.args, later.kwargs, later.inputs, apart=True, begin=begin)[1]
            assert isinstance(self.recorder, TorchRecorder)
            if alike:
                with self.gate.exclusive():
                    self.recorder.check_unchanged(effects.version)
                    effects = self.recorder.observe(later.args, later.kwargs, later.inputs)
                if effects.cause is not None:
                    # Not to be tried again and again, for no caller has asked for these effects.
                    return Cause(Reason.PADDING, detail=f"a call of the padded sizes has effects: {effects.cause}")
            return self.recorder.record(
                later.args, later.kwargs, later.inputs, effects, alone=True, begin=begin, running=self.gate.exclusive
            )
        except Exception as error:
            # The module refuses such arguments; whoever gives them again will see it.
            return refusal_of(error, self._ledger.name).cause

    def finish(self) -> None:
        """Wait until nothing that was cancelled is captured beside the calls any more."""
        for later in list(self._pending.values()):
            # A subscriber may ask for it from within.
            if later.cancelled and not later.is_lost and later.thread is not threading.current_thread():
                later.done.wait()


def _close(outcome: Recorded | Cause) -> None:
    if isinstance(outcome, Recorded):
        outcome.close()
