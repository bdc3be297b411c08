"""Captures beside the calls, on copies of their tensors, for ``capture_in="background"``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from graphcache.cache.signature import Signature
from graphcache.errors import Cause, Reason
from graphcache.graphs.capture import refusal_of
from graphcache.modules.background import nothing, worker_of
from graphcache.modules.captures import Captures
from graphcache.modules.later import Later
from graphcache.modules.record import Recorded

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

        What is to be captured beside the calls is on its way then. The lock is held.
        """
        if (later := self._pending.get(signature)) is not None and not later.is_lost:
            return _PENDING
        if (cause := self.admission.ask(signature)) is not None or self._config.capture_in == "foreground":
            return cause
        return self.beside(self._capture_beside, signature, inputs, args, kwargs)

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

    def drop(self, later: Later) -> None:
        """Note that nothing more is done with a call beside the calls."""
        self._pending.pop(later.signature, None)
        later.done.set()

    def _capture_beside(self, later: Later) -> bool:
        """Capture a call that was answered eagerly; the worker's job.

        Returns:
            Whether there is a graph of it now.
        """
        signature = later.signature
        outcome: Recorded | Cause
        try:
            if later.cancelled:
                return False
            later.thread = threading.current_thread()
            start = time.perf_counter()
            recorder = self.recorder
            with self._ledger.span("capture"), self._room(later.inputs) as room:
                try:
                    _, outcome = later.run(
                        lambda: recorder.attempt(
                            later.args,
                            later.kwargs,
                            later.inputs,
                            apart=True,
                            begin=lambda: self._take(room, signature),
                        )
                    )
                except Exception as error:
                    # The module refuses such arguments; whoever gives them again will see it.
                    outcome = refusal_of(error, self._ledger.name).cause
                seconds = time.perf_counter() - start
                while not self.lock.acquire(timeout=_PATIENCE):
                    # Whoever cancels may hold the lock until this ends.
                    if later.cancelled:
                        _close(outcome)
                        return False
                try:
                    if later.cancelled or self.closed or self._guard.is_stale(signature[0] is not False):
                        _close(outcome)
                        return False
                    call = later.args, later.kwargs
                    return self._finish(signature, outcome, later.inputs, call, seconds, room, None) is None
                finally:
                    self.lock.release()
        finally:
            self.drop(later)

    def finish(self) -> None:
        """Wait until nothing that was cancelled is captured beside the calls any more."""
        for later in list(self._pending.values()):
            # A subscriber may ask for it from within.
            if later.cancelled and not later.is_lost and later.thread is not threading.current_thread():
                later.done.wait()


def _close(outcome: Recorded | Cause) -> None:
    if isinstance(outcome, Recorded):
        outcome.close()
