"""The slow way of a call, when no graph answers it: it is captured, or runs eagerly and says why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphcache.cache.admission import Admission
from graphcache.cache.arbiter import Arbiter, arbiter
from graphcache.cache.blocks import Blocks
from graphcache.cache.lru import Entry, GraphCache
from graphcache.cache.signature import Signature
from graphcache.cache.thrash import Thrash
from graphcache.config import GraphConfig, disabled_by_environment, graphs_off
from graphcache.errors import CaptureError, Cause, ClosedError, Reason, Refusal
from graphcache.events import Captured, Ledger, log
from graphcache.graphs.capture import refusal_of
from graphcache.modules.background import nothing, worker_of
from graphcache.modules.conditions import forbidden
from graphcache.modules.engine import EngineModule
from graphcache.modules.freshness import Freshness
from graphcache.modules.later import Later
from graphcache.modules.preparing import Preparation, preparing
from graphcache.modules.record import Recorded, Recorder
from graphcache.modules.record_engine import EngineRecorder
from graphcache.modules.record_torch import TorchRecorder
from graphcache.modules.remembered import OFTEN, Remembered
from graphcache.modules.room import Room
from graphcache.modules.strategy import Routes
from graphcache.modules.views import Views

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule

STALE: Any = object()
"""Stands for an answer that a graph could not give, or should not have given."""

Hit = Callable[[Entry[Recorded], Sequence[Tensor], bool], Any]
"""Replays an entry on some inputs, while gradients are recorded or not; an answer, or ``STALE``."""


class Misses:
    """Captures the calls of one module that can be captured, one at a time, and answers every one of them.

    Args:
        module: The wrapped module.
        run: What a call calls; ``module`` itself or its ``forward``.
        config: Options.
        ledger: Hears of captures and eager calls.
        cache: Where graphs go.
        parts: The parts that are captured one by one where the whole is not.
        freshness: Tells when the graphs are no longer right.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        config: GraphConfig,
        ledger: Ledger,
        cache: GraphCache[Recorded],
        parts: Mapping[str, CachedModule],
        freshness: Freshness,
    ) -> None:
        self.module = module
        self._engine = module if isinstance(module, EngineModule) else None
        self._config = config
        self._ledger = ledger
        self._cache = cache
        self._routes = Routes(parts)
        self._freshness = freshness
        self._blocks = Blocks()
        self.admission = Admission(cache, config.capture)
        """Decides what is captured; hears of evictions from whoever holds the cache."""
        self.remembered = Remembered(cache.entries, self._engine)
        """What calls were like, for a manifest."""
        self.arbiter: Arbiter | None = None
        """Of the device of the last capture."""
        self._thrash = Thrash()
        self._off = disabled_by_environment()
        self.lock = threading.RLock()
        """Held while a call is captured, and by whoever drops graphs."""
        self.cuda = self._engine is not None
        """Whether calls concern a CUDA device."""
        self.closed = False
        self.generation = 0
        """Goes up when everything that was found out about the module is forgotten."""
        self._pending: dict[Signature, Later] = {}
        """What is captured beside the calls, or waits for it."""
        self.runs(run)

    def runs(self, run: Callable[..., Any]) -> None:
        """Call ``run`` from now on; what was captured of another one must have been dropped."""
        self.run = run
        self.recorder = self._recorder()

    def forbidden(self) -> Reason | None:
        """What forbids graphs at this moment, whatever the arguments."""
        return Reason.DISABLED if self._off else forbidden(cuda=self.cuda)

    def answer(
        self,
        signature: Signature,
        inputs: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hit: Hit,
        *,
        admitted: bool = False,
    ) -> Any:
        """Answer a call that no graph has answered.

        Args:
            signature: Of the call.
            inputs: The tensors among its arguments, as the signature orders them.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            hit: What to do if another thread has captured it meanwhile.
            admitted: Whether it was admitted already, so that it is captured if it can be.

        Raises:
            CaptureError: If the call cannot be captured and ``on_failure="raise"``.
            ClosedError: If the module was closed.
            Exception: Whatever the module raises for these arguments.
        """
        self.check_open()
        if (reason := self.forbidden()) is not None:
            return self.eagerly(Cause(reason), args, kwargs)
        if self._config.strategy == "per_submodule":
            with self._routes.active():
                return self.run(*args, **kwargs)
        with self.lock:
            grad = signature[0] is not False
            self.refresh(grad)
            cause = self.needs_grad(inputs) or self.blocked(signature)
            entry = self._cache.entries.get(signature)
            if cause is None and entry is not None and (answer := hit(entry, inputs, grad)) is not STALE:
                return answer
            wanted = cause is None and not admitted and preparing.get() is None
            cold = self.cold_cause(signature, inputs, args, kwargs) if wanted else None
            if cause is None and cold is None:
                answer, cause = self._capture(signature, inputs, args, kwargs)
                if cause is not None:
                    self.tell(cause)
                return answer
        if cold is not None:
            return self.timed(cold, signature, args, kwargs)
        assert cause is not None
        return self.eagerly(cause, args, kwargs)

    def prepare(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Cause | None:
        """Capture a call that nobody waits for, or where the whole cannot be captured, the parts that it calls.

        Args:
            signature: Of the call.
            inputs: The tensors among its arguments, as the signature orders them.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            Why the whole has no graph; ``None`` if it has one, or was not to have one.

        Raises:
            CaptureError: If a part cannot be captured and ``on_failure="raise"``.
            ClosedError: If the module was closed.
            Exception: Whatever the module raises for these arguments.
        """
        self.check_open()
        if (reason := self.forbidden()) is not None:
            return Cause(reason)
        cause = None
        if self._config.strategy != "per_submodule":
            with self.lock:
                cause = self._prepare(signature, inputs, args, kwargs)
        if self._routes and (cause is not None or self._config.strategy == "per_submodule"):
            with self._routes.active():
                self.run(*args, **kwargs)
        return cause

    def undescribed(self, cause: Cause, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call whose arguments no signature describes.

        Raises:
            Exception: As :meth:`answer`.
        """
        reason = self.forbidden()
        if reason is None and self._config.strategy == "per_submodule" and not self.closed:
            # The whole was never to be captured, and the parts may be called with something else.
            with self._routes.active():
                return self.run(*args, **kwargs)
        return self.eagerly(cause if reason is None else Cause(reason), args, kwargs)

    def alone(self, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
        """A graph of a call that shares no memory with others and is in no cache.

        Raises:
            CaptureError: If the call cannot be captured, with the cause.
            Exception: Whatever the module raises for these arguments.
        """
        reason = self.forbidden()
        cause = Cause(reason) if reason is not None else self.needs_grad(inputs)
        if cause is None:
            with self.lock:
                _, outcome = self.recorder.attempt(args, kwargs, inputs, alone=True)
            if isinstance(outcome, Recorded):
                return outcome
            cause = outcome
        raise CaptureError(f"{self._ledger.name}: {cause}")

    def check_open(self) -> None:
        """Raise if the module was closed.

        Raises:
            ClosedError: Then.
        """
        if self.closed:
            raise ClosedError(f"{self._ledger.name} was closed; wrap its .module again")

    def clear(self, *, wait: bool = True) -> None:
        """Drop every graph, and forget what could not be captured.

        Args:
            wait: Wait for the last replays.
        """
        with self.lock:
            self.generation += 1
            for later in self._pending.values():
                later.cancelled = True
            self._cache.clear(wait=wait)
            self._thrash.forget()
            self._blocks.clear()
            self.recorder.release()

    def refresh(self, grad: bool) -> None:
        """Drop every graph if they are no longer right. The lock is held."""
        if self._freshness.is_stale(grad):
            self.clear()
            self._freshness.look_again()

    def blocked(self, signature: Signature) -> Cause | None:
        """Why a signature is not to be captured this time, from what came of it before. The lock is held."""
        return self._blocks.cause(signature)

    def _recorder(self) -> Recorder:
        if self._engine is not None:
            return EngineRecorder(self._engine, self._config)
        return TorchRecorder(self.module, self.run, self._ledger.name, verified=self._config.verify)

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
        if not worker_of(self._device(inputs)).submit(lambda: job(later), drop):
            drop()
        return _PENDING

    def drop(self, later: Later) -> None:
        """Note that nothing more is done with a call beside the calls."""
        self._pending.pop(later.signature, None)
        later.done.set()

    def _capture_beside(self, later: Later) -> None:
        """Capture a call that was answered eagerly; the worker's job."""
        signature = later.signature
        outcome: Recorded | Cause
        try:
            if later.cancelled:
                return
            later.thread = threading.current_thread()
            start = time.perf_counter()
            recorder = self.recorder
            with self._room(later.inputs) as room:
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
                        return
                try:
                    if later.cancelled or self.closed or self._freshness.is_stale(signature[0] is not False):
                        _close(outcome)
                    else:
                        call = later.args, later.kwargs
                        self._finish(signature, outcome, later.inputs, call, seconds, room, None)
                finally:
                    self.lock.release()
        finally:
            self.drop(later)

    def _prepare(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Cause | None:
        self.refresh(signature[0] is not False)
        if signature in self._cache.entries:
            if (preparation := preparing.get()) is not None:
                preparation.keep(self._cache.entries, signature)
            return None
        if (cause := self.needs_grad(inputs) or self.blocked(signature)) is not None:
            return cause
        try:
            # Before anything is captured in vain, and without a block: there may be room when it is called.
            self._cache.victims(self.admission.expected_nbytes(signature))
        except Refusal as refusal:
            return refusal.cause
        return self._capture(signature, inputs, args, kwargs)[1]

    def _capture(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Cause | None]:
        preparation = preparing.get()
        start = time.perf_counter()
        with self._room(inputs) as room:
            answer, outcome = self.recorder.attempt(args, kwargs, inputs, begin=lambda: self._take(room, signature))
            seconds = time.perf_counter() - start
            return answer, self._finish(signature, outcome, inputs, (args, kwargs), seconds, room, preparation)

    def _finish(
        self,
        signature: Signature,
        outcome: Recorded | Cause,
        inputs: Sequence[Tensor],
        call: tuple[tuple[Any, ...], dict[str, Any]],
        seconds: float,
        room: Room,
        preparation: Preparation | None,
    ) -> Cause | None:
        """Keep a graph, or remember why there is none, which is returned."""
        if isinstance(outcome, Recorded):
            if self._config.outputs == "view":
                outcome.replay, outcome.single = Views(outcome.graph, self._ledger.name).replay, None
            try:
                room.settle(outcome.nbytes)
                entry = self._cache.put(signature, outcome, reservation=room.own)
            except Refusal as refusal:
                outcome.close()
                outcome = refusal.cause
            except Exception as error:
                # Closing an evicted graph failed. This call has its answer all the same.
                outcome = refusal_of(error, self._ledger.name).cause
        if isinstance(outcome, Recorded):
            self._ledger.captured(Captured(signature, seconds, entry.graph.graph.nodes, entry.nbytes))
            self.remembered.note(signature, *call)
            replay = self._replay_seconds(outcome, inputs)
            slower = self.admission.captured(signature, seconds, replay=replay, preparing=preparation is not None)
            if slower is not None:
                self._cache.evict(signature)
            if preparation is None:
                self._notice_thrash(signature)
                return None
            preparation.keep(self._cache.entries, signature)
            return slower
        self.admission.failed(signature, seconds, preparing=preparation is not None)
        self._blocks.block(signature, outcome)
        return outcome

    def _room(self, inputs: Sequence[Tensor]) -> Room:
        return Room(self._cache, self._arbiter(inputs))

    def _take(self, room: Room, signature: Signature) -> None:
        room.take(self.admission.expected_nbytes(signature), signature)

    def finish(self) -> None:
        """Wait until nothing that was cancelled is captured beside the calls any more."""
        for later in list(self._pending.values()):
            # A subscriber may ask for it from within.
            if later.cancelled and not later.is_lost and later.thread is not threading.current_thread():
                later.done.wait()

    def _replay_seconds(self, recorded: Recorded, inputs: Sequence[Tensor]) -> float | None:
        """What a replay takes the host, which is what an eager call is measured by too."""
        if self.admission.policy != "worthwhile":
            return None
        hosts = self._engine.host_inputs if self._engine is not None else ()
        given = [value for index, value in enumerate(inputs) if index not in hosts]
        taken = []
        for _ in range(_SAMPLES):
            start = time.perf_counter()
            recorded.replay(given)
            taken.append(time.perf_counter() - start)
        return min(taken)

    def timed(self, cause: Cause, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call whose signature may be captured some day; parts of it are left alone until then."""
        self.check_open()
        self.tell(cause)
        start = time.perf_counter()
        with graphs_off():
            answer = self.run(*args, **kwargs)
        if self.admission.ran(signature, time.perf_counter() - start) == OFTEN:
            self.remembered.note(signature, args, kwargs)
        return answer

    def _arbiter(self, inputs: Sequence[Tensor]) -> Arbiter:
        """Whoever bounds what all modules of the call's device own together."""
        found = self.arbiter = arbiter(self._device(inputs))
        found.register(self._cache)
        return found

    def _device(self, inputs: Sequence[Tensor]) -> torch.device:
        if self._engine is not None:
            return self._engine.device
        return next((tensor.device for tensor in inputs if tensor.is_cuda), torch.device("cpu"))

    def _notice_thrash(self, signature: Signature) -> None:
        hits = self._ledger.retired_hits + sum(entry.hits for entry in list(self._cache.entries.values()))
        if (seen := self._thrash.captured(signature, hits)) is not None:
            log.warning("%s: %s", self._ledger.name, seen.advice(self._cache, self._config.capture))

    def tell(self, cause: Cause) -> None:
        """Count an eager call.

        Raises:
            CaptureError: With ``on_failure="raise"``, unless it was asked for.
        """
        self._ledger.ran_eagerly(cause)
        if self._config.on_failure == "raise" and cause.reason not in _NO_FAILURES:
            raise CaptureError(f"{self._ledger.name}: {cause}")

    def eagerly(self, cause: Cause, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call that is not to be captured; parts of it may be."""
        self.check_open()
        self.tell(cause)
        if cause.reason in _ALWAYS_EAGER:
            return self.run(*args, **kwargs)
        if self._engine is not None:
            # In subgraph mode the engine would come back here.
            with graphs_off():
                return self.run(*args, **kwargs)
        with self._routes.active():
            return self.run(*args, **kwargs)

    def needs_grad(self, inputs: Sequence[Tensor]) -> Cause | None:
        """Why the call's modes forbid a graph, if they do."""
        if not torch.is_grad_enabled():
            return None
        if any(tensor.requires_grad for tensor in inputs):
            return Cause(Reason.GRAD, detail="an input requires gradients")
        if self._freshness.requires_grad():
            return Cause(Reason.GRAD, detail="a parameter requires gradients")
        return None


def _close(outcome: Recorded | Cause) -> None:
    if isinstance(outcome, Recorded):
        outcome.close()


_PATIENCE = 0.05
"""Seconds between two looks at whether a capture beside the calls was cancelled."""
_ALWAYS_EAGER = frozenset({Reason.DISABLED, Reason.TRACING, Reason.OUTER_CAPTURE})
_NO_FAILURES = _ALWAYS_EAGER | {
    Reason.COLD,
    Reason.PENDING,
    Reason.NOT_WORTH_IT,
    Reason.NOT_PREPARED,
}
_PENDING = Cause(Reason.PENDING)
_SAMPLES = 3
