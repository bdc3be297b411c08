"""The slow way of a call, when no graph answers it: it is captured, or runs eagerly and says why."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.cache.lru import Entry, GraphCache
from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig, disabled_by_environment, graphs_off
from graphcache.errors import CaptureError, Cause, ClosedError, Reason, Refusal
from graphcache.events import Ledger
from graphcache.keys.call_key import Signature
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.beside import CapturesBeside
from graphcache.modules.conditions import forbidden
from graphcache.modules.module_guards import EngineGuard
from graphcache.modules.parts import Parts
from graphcache.modules.preparing import preparing
from graphcache.modules.record import Recorded
from graphcache.modules.routes import Routes

STALE: Any = object()
"""Stands for an answer that a graph could not give, or should not have given."""

Hit = Callable[[Entry[Recorded], Sequence[Tensor], bool], Any]
"""Replays an entry on some inputs, while gradients are recorded or not; an answer, or ``STALE``."""


class Misses(CapturesBeside):
    """Captures the calls of one module that can be captured, one at a time, and answers every one of them.

    Args:
        module: The wrapped module.
        run: What a call calls; ``module`` itself or its ``forward``.
        config: Options.
        ledger: Hears of captures and eager calls.
        cache: Where graphs go.
        parts: What is captured one by one where the whole is not.
        guard: Tells when the graphs are no longer right.
        gate: Keeps background captures and callers apart.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        config: GraphConfig,
        ledger: Ledger,
        cache: GraphCache[Recorded],
        parts: Parts,
        guard: EngineGuard | ModuleGuard,
        gate: RunGate,
    ) -> None:
        super().__init__(module, run, config, ledger, cache, guard, gate)
        self._parts = parts
        self._routes = Routes(parts.active)
        self._off = disabled_by_environment()

    def clear(self, *, wait: bool = True) -> None:
        with self.lock:
            super().clear(wait=wait)
            self._parts.look_again()

    def _parts_changed(self) -> None:
        self._parts.look_again()

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
        if not self._parts.whole:
            with self._routes.active():
                return self.call(*args, **kwargs)
        if (cause := self._denied(signature, inputs)) is not None:
            return self.eagerly(cause, args, kwargs)
        refused = later = False
        with self.lock:
            grad = signature[0] is not False
            self.refresh(grad)
            cause = self.needs_grad(inputs) or self.blocked(signature)
            entry = self._cache.entries.get(signature)
            doubted = entry is not None and entry.graph.version != self._guard.version
            if doubted:
                # It was captured before something changed. Whether it is right still is found out below; within the
                # call, whatever the policy, as it has been admitted before.
                entry = None
            if cause is None and entry is not None and (answer := hit(entry, inputs, grad)) is not STALE:
                return answer
            admitted = admitted or (doubted and not self.captures_beside)
            wanted = cause is None and not admitted and preparing.get() is None
            cold = self.cold_cause(signature, inputs, args, kwargs) if wanted else None
            later = wanted and cold is None and self._engine is None and self.captures_beside
            if cause is None and cold is None and not later:
                answer, cause = self._capture(signature, inputs, args, kwargs)
                if cause is not None:
                    self.tell(cause)
                if cause is None or preparing.get() is None:
                    return answer
                refused = True
        if later:
            answer, cause = self.captured_later(signature, inputs, args, kwargs)
            self.tell(cause)
            return answer
        if refused:
            self._run_parts(cause, args, kwargs)
            return answer
        if cold is not None:
            return self.timed(cold, signature, args, kwargs)
        assert cause is not None
        return self.eagerly(cause, args, kwargs)

    def _denied(self, signature: Signature, inputs: Sequence[Tensor]) -> Cause | None:
        """Why a call is known to run eagerly. The lock is not taken: a capture of another call may hold it."""
        if self._guard.has_changed() or self.training_changed():
            return None
        return self.needs_grad(inputs) or self.blocked(signature)

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
        if self._parts.whole:
            with self.lock:
                cause = self._prepare(signature, inputs, args, kwargs)
        if cause is not None or not self._parts.whole:
            self._run_parts(cause, args, kwargs)
        return cause

    def undescribed(self, cause: Cause, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call whose arguments no signature describes.

        Raises:
            Exception: As :meth:`answer`.
        """
        reason = self.forbidden()
        if reason is None and not self._parts.whole and not self.closed:
            # The whole was never to be captured, and the parts may be called with something else.
            with self._routes.active():
                return self.call(*args, **kwargs)
        return self.eagerly(cause if reason is None else Cause(reason), args, kwargs)

    def alone(self, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
        """A graph of a call that shares no memory with others and is in no cache.

        Raises:
            CaptureError: If the call cannot be captured, with the cause.
            Exception: Whatever the module raises for these arguments.
        """
        reason = self.forbidden()
        if reason is None and self._parts.excluded:
            text = ", ".join(self._parts.excluded)
            raise CaptureError(f"{self._ledger.name}: {text} is excluded, so that there is no graph of the whole")
        cause = Cause(reason) if reason is not None else self.needs_grad(inputs)
        if cause is None:
            with self.lock, self.gate.shared():
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

    def _run_parts(self, cause: Cause | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a call once more for the sake of the parts that it calls, if there are any."""
        if cause is not None:
            self._parts.divide(cause)
        if self._routes:
            with self._routes.active():
                self.call(*args, **kwargs)

    def _prepare(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Cause | None:
        self.refresh(signature[0] is not False)
        entry = self._cache.entries.get(signature)
        if entry is not None and entry.graph.version == self._guard.version:
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

    def timed(self, cause: Cause, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call whose signature may be captured some day; parts of it are left alone until then."""
        self.check_open()
        self.tell(cause)
        start = time.perf_counter()
        with self._ledger.span("eager"), graphs_off():
            answer = self.call(*args, **kwargs)
        self.admission.ran(signature, time.perf_counter() - start)
        return answer

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
            return self.call(*args, **kwargs)
        if self._engine is None:
            self._parts.divide(cause)
        # In subgraph mode an engine would come back here.
        with self._ledger.span("eager"), graphs_off() if self._engine is not None else self._routes.active():
            return self.call(*args, **kwargs)

    def needs_grad(self, inputs: Sequence[Tensor]) -> Cause | None:
        """Why the call's modes forbid a graph, if they do."""
        if not torch.is_grad_enabled():
            return None
        if any(tensor.requires_grad for tensor in inputs):
            return Cause(Reason.GRAD, detail="an input requires gradients")
        if self._guard.requires_grad():
            return Cause(Reason.GRAD, detail="a parameter requires gradients")
        return None


_ALWAYS_EAGER = frozenset({Reason.DISABLED, Reason.TRACING, Reason.OUTER_CAPTURE})
_NO_FAILURES = _ALWAYS_EAGER | {
    Reason.COLD,
    Reason.PENDING,
    Reason.NOT_WORTH_IT,
    Reason.NOT_PREPARED,
}
