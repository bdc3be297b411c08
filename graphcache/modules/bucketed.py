"""Calls that lie between buckets: padded to the next one, answered by its graph, cropped.

A call comes here when no graph of its own signature has answered it, so that a hit costs the same with buckets and
without. What fills its bucket already, fits none, or must not be padded, goes on as if there were no buckets.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from graphcache.cache.buckets import Buckets
from graphcache.cache.lru import Entry
from graphcache.cache.padder import Call, Fit, Padder
from graphcache.cache.seen import Seen
from graphcache.cache.signature import Signature, describe
from graphcache.capture.effects import Effects
from graphcache.errors import Cause, ConfigError, InputError, Reason
from graphcache.events import log
from graphcache.modules.arguments import arguments_of
from graphcache.modules.engine import EngineModule
from graphcache.modules.engine_buckets import engine_buckets
from graphcache.modules.later import Later
from graphcache.modules.misses import STALE, Hit, Misses
from graphcache.modules.plan import Plan
from graphcache.modules.record import Recorded
from graphcache.modules.trials import Trials

UNPADDED: Any = object()
"""Stands for the answer of a call that is not padded."""

_MOST_PLANS = 4096
_PATIENCE = 16
"""With ``capture="worthwhile"``, calls that go to a bucket before it is tried whether they may: trying takes some 10 to
40 eager calls."""
_WAITING, _PENDING = Cause(Reason.COLD), Cause(Reason.PENDING)
_MEASURING = Cause(Reason.COLD, detail="to measure what padding it would save")


class Bucketed:
    """Pads the calls of one module to its buckets.

    Args:
        buckets: The option.
        misses: Captures and runs what is padded.
        entries: The graphs that are there.
        seen: Is told whose hits stand for calls of other sizes.
        beside: Whether captures and trials are done beside the calls.

    Raises:
        ConfigError: Naming the field, for buckets that the module cannot have.
    """

    def __init__(
        self, buckets: Any, misses: Misses, entries: Mapping[Any, Entry[Recorded]], seen: Seen, *, beside: bool = False
    ) -> None:
        checked = Buckets.of(buckets)
        self._engine = misses.module if isinstance(misses.module, EngineModule) else None
        if self._engine is not None:
            checked = engine_buckets(checked, self._engine)
        self._misses = misses
        self._entries = entries
        self._seen = seen
        self._padder = Padder(checked, arguments_of(misses.module))
        self._trials = Trials(misses, self._padder)
        self._plans: OrderedDict[Signature, Plan] = OrderedDict()
        self._wanted: dict[Signature, int] = {}
        # Buckets that are tried beside the calls, and refusals that no call has heard of.
        self._trying: set[Signature] = set()
        self._untold: dict[Signature, Cause] = {}
        self._generation = misses.generation
        self._lock = threading.Lock()
        self._host_values = len(self._engine.host_inputs) if self._engine is not None else 0
        self._measures = misses.admission.measures_replays
        self._beside = beside
        self.padded = 0
        """Hits of calls that were padded."""

    def answer(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], hit: Hit
    ) -> Any:
        """Answer a call through its bucket, or ``UNPADDED``. Its arguments stay as they are.

        Args:
            signature: Of the call.
            inputs: The tensors among its arguments.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            hit: Replays a graph.

        Raises:
            Exception: As :meth:`~graphcache.modules.misses.Misses.answer`.
        """
        misses, cold, beside = self._misses, None, False
        if misses.closed or misses.forbidden() is not None:
            return UNPADDED
        plan = self._plan(signature, args, kwargs)
        fit = plan.fit
        if fit is not None:
            answer = self._replayed(plan, fit, signature, args, kwargs, hit)
            if answer is not STALE:
                return answer
        with misses.lock:
            if misses.needs_grad(inputs) is not None:
                return UNPADDED
            # What is stale may have been found out of a module that was another one.
            misses.refresh(signature[0] is not False)
            plan = self._plan(signature, args, kwargs)
            fit, cause, plan.cause = plan.fit, plan.cause, None
            if fit is not None:
                target, given, call = self._padded(fit, signature, args, kwargs)
                refused = self._trials.refused(target) or misses.blocked(target)
                if refused is not None and refused.reason is Reason.PADDING:
                    # No further call has to be padded to find that out.
                    plan.fit, plan.refused = None, misses.version
                if refused is not None:
                    cause = self._untold.pop(target, None)
                else:
                    cold = self._cold(fit, signature, target, given, call, inputs, args, kwargs)
                    beside = cold is None and self._is_done_beside(target)
                    if cold is None and not beside:
                        return self._made(fit, target, given, call, inputs, args, kwargs, hit)
                    if cold is not None and cold.reason not in (Reason.COLD, Reason.PENDING):
                        return UNPADDED
        if cause is not None:
            return misses.eagerly(cause, args, kwargs)
        if fit is not None and beside:
            return self._observed(fit, signature, inputs, args, kwargs)
        return UNPADDED if cold is None else self._timed(plan, cold, target, args, kwargs)

    def target(self, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature | None:
        """The signature to which a call is padded, ``None`` if it is not, or if that was refused. It is not made."""
        fit = self._plan(signature, args, kwargs).fit
        if fit is None:
            return None
        target, _, _ = self._padded(fit, signature, args, kwargs)
        return None if self._trials.is_refused(target) else target

    def _replayed(
        self,
        plan: Plan,
        fit: Fit,
        signature: Signature,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hit: Hit,
    ) -> Any:
        """The answer of the bucket's graph; ``STALE`` if there is none, ``UNPADDED`` if it is no faster."""
        if plan.is_settled:
            plan.calls += 1
            return UNPADDED
        start = time.perf_counter() if self._measures else 0.0
        target, given, _ = self._padded(fit, signature, args, kwargs)
        padder, entry = self._trials.found(target), self._entries.get(target)
        if padder is None or entry is None:
            return STALE
        if not self._measures:
            answer = hit(entry, given, target[0] is not False)
            if answer is STALE:
                return STALE
            answer = padder.crop(fit, answer)
        else:
            plan.calls += 1
            if plan.is_to_measure:
                return self._timed(plan, _MEASURING, target, args, kwargs)
            if not plan.pays(self._misses.admission, target, signature):
                return UNPADDED
            before = time.perf_counter()
            answer = hit(entry, given, target[0] is not False)
            if answer is STALE:
                return STALE
            after = time.perf_counter()
            answer = padder.crop(fit, answer)
            plan.padding.add(before - start + time.perf_counter() - after)
        self._seen.lend(target)
        self.padded += 1
        return answer

    def _made(
        self,
        fit: Fit,
        target: Signature,
        given: Sequence[Tensor],
        call: Call,
        inputs: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hit: Hit,
    ) -> Any:
        """The answer of a call that captures its bucket, after it was tried whether that may be padded to."""
        padder = self._trials.found(target)
        if padder is not None:
            return padder.crop(fit, self._captured(target, given, call, hit))
        start = time.perf_counter()
        exact, outcome = self._trials.attempt(target, fit, inputs, args, kwargs)
        seconds = time.perf_counter() - start
        try:
            if isinstance(outcome, Cause):
                self._misses.tell(outcome)
            else:
                self._captured(target, given, call, hit)
        finally:
            # Not before: the capture was admitted without it.
            self._misses.admission.charge(seconds)
        return exact

    def _captured(self, target: Signature, given: Sequence[Tensor], call: Call, hit: Hit) -> Any:
        # A call of the padded sizes that was none, so that hits of such calls are known by their sizes.
        self._seen.note(target, *call)
        self._seen.lend(target)
        return self._misses.answer(target, given, *call, self._counted(hit, target), admitted=True)

    def _counted(self, hit: Hit, target: Signature) -> Callable[[Entry[Recorded], Sequence[Tensor], bool], Any]:
        def counted(entry: Entry[Recorded], inputs: Sequence[Tensor], grad: bool) -> Any:
            answer = hit(entry, inputs, grad)
            if answer is not STALE:
                self._seen.lend(target)
                self.padded += 1
            return answer

        return counted

    def _cold(
        self,
        fit: Fit,
        signature: Signature,
        target: Signature,
        given: Sequence[Tensor],
        call: Call,
        inputs: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Cause | None:
        """Why the bucket is not to be captured or tried because of this call.

        For an engine that is done beside the calls, it is on its way then.
        """
        misses = self._misses
        if not self._is_captured(target):
            return misses.cold_cause(target, given, *call)
        if self._trials.found(target) is not None:
            return None
        if self._measures:
            # A graph that calls of this very size have paid for.
            self._wanted[target] = self._wanted.get(target, 0) + 1
            if self._wanted[target] < _PATIENCE:
                return _WAITING
        if not self._beside:
            return None
        if target in self._trying:
            return _PENDING
        return self._try_later(fit, target, signature, inputs, args, kwargs) if self._engine is not None else None

    def _is_captured(self, target: Signature) -> bool:
        entry = self._entries.get(target)
        return entry is not None and entry.graph.version == self._misses.version

    def _is_done_beside(self, target: Signature) -> bool:
        """Whether a PyTorch module's bucket is to be captured or tried beside the calls."""
        if not self._beside or self._engine is not None:
            return False
        return not self._is_captured(target) or self._trials.found(target) is None

    def _observed(
        self, fit: Fit, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answer a call as it is; if it has no effects, its bucket is captured or tried beside the calls."""
        target, given, call = self._padded(fit, signature, args, kwargs)

        def begin(effects: Effects) -> None:
            if not self._is_captured(target):
                self._misses.capture_alike(effects, target, given, *call)
            elif target not in self._trying:
                self._try_later(fit, target, signature, inputs, args, kwargs, effects)

        answer, cause = self._misses.observed(inputs, args, kwargs, begin, lambda why: self._trials.refuse(target, why))
        self._misses.tell(cause)
        return answer

    def _try_later(
        self,
        fit: Fit,
        target: Signature,
        signature: Signature,
        inputs: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        effects: Effects | None = None,
    ) -> Cause | None:
        self._trying.add(target)
        cause = self._misses.beside(
            lambda later: self._tried_beside(later, fit, target, effects),
            signature,
            inputs,
            args,
            kwargs,
            dropped=lambda: self._trying.discard(target),
        )
        if cause is None:
            self._trying.discard(target)
        return cause

    def _tried_beside(self, later: Later, fit: Fit, target: Signature, effects: Effects | None) -> None:
        """Find out whether a call that was answered may be padded; the worker's job."""
        trials, call = self._trials, (later.args, later.kwargs)

        def attempt() -> Padder | Cause:
            if effects is None:
                return trials.attempt(target, fit, later.inputs, *call)[1]
            return trials.tried(target, fit, *call, version=effects.version, running=self._misses.gate.exclusive)

        try:
            if later.cancelled:
                return
            later.thread = threading.current_thread()
            start = time.perf_counter()
            outcome = later.run(attempt)
            if isinstance(outcome, Cause) and (effects is None or effects.version == self._misses.version):
                self._untold[target] = outcome
            self._misses.admission.charge(time.perf_counter() - start)
        except Exception as error:
            # The module refuses such arguments; whoever gives them again will see it.
            log.debug("a call was not tried with padding: %s", error)
        finally:
            self._trying.discard(target)
            self._misses.drop(later)

    def _timed(self, plan: Plan, cause: Cause, target: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call as it is; its bucket is owed what it took."""
        start = time.perf_counter()
        answer = self._misses.timed(cause, target, args, kwargs)
        plan.eager.add(time.perf_counter() - start)
        return answer

    def _padded(
        self, fit: Fit, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Signature, Sequence[Tensor], Call]:
        call = self._padder.pad(fit, args, kwargs)
        target, given = describe(*call)
        if self._host_values:
            target = (*target, *signature[-self._host_values :])
        return target, given, call

    def _plan(self, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        if self._generation != self._misses.generation:
            with self._lock:
                self._generation = self._misses.generation
                self._plans.clear()
                self._wanted.clear()
                self._untold.clear()
                self._trials.clear()
        plan = self._plans.get(signature)
        if plan is None or plan.refused not in (None, self._misses.version):
            plan = self._new_plan(args, kwargs)
            with self._lock:
                self._plans[signature] = plan
                if len(self._plans) > _MOST_PLANS:
                    self._plans.popitem(last=False)
        return plan

    def _new_plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        if self._engine is not None:
            # What it would refuse as it is, it refuses.
            self._engine.checked(self._engine.bind(args, kwargs))
        try:
            fit = self._padder.fit(args, kwargs)
            if isinstance(fit, str) or fit.is_exact or 0 in fit.real.values():
                return Plan(None)
            padded, _ = self._padder.pad(fit, args, kwargs)
            if self._engine is not None:
                self._engine.checked(padded)
        except (ConfigError, InputError) as error:
            return Plan(None, Cause(Reason.PADDING, detail=str(error)))
        return Plan(fit)
