"""Calls that lie between buckets: padded to the next one, answered by its graph, cropped.

A call comes here when no graph of its own key has answered it, so that a hit costs the same with buckets and without.
What fills its bucket already, fits none, or must not be padded, is left to the dispatcher.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from graphcache.buckets.engine_buckets import engine_buckets
from graphcache.buckets.host import Host, Key
from graphcache.buckets.padder import Fit, Padder
from graphcache.buckets.proof import Proofs
from graphcache.buckets.spec import Buckets
from graphcache.capture.effects import Effects
from graphcache.capture.engine_like import EngineLike
from graphcache.dispatch.argument_names import arguments_of
from graphcache.errors import Cause, ConfigError, InputError, Reason
from graphcache.features import NO_ANSWER
from graphcache.keys.call import KeyedCall

_MAX_PLANS = 4096
_NO_FIT = Fit({}, {})
_PENDING = Cause(Reason.PENDING)
_WAITING = (Reason.COLD, Reason.PENDING)
"""Reasons of calls whose bucket will be captured later."""


@dataclass(slots=True)
class _Plan:
    """What the calls of one key are padded to. Without a ``key`` they are not padded; ``cause`` is to be told once."""

    fit: Fit = _NO_FIT
    key: Key = ()
    cause: Cause | None = None


class Bucketed:
    """Pads the calls of one module to its buckets.

    Args:
        option: The ``buckets`` option.
        host: The dispatcher of the module.

    Raises:
        ConfigError: Naming the field, for buckets that the module cannot have.
    """

    def __init__(self, option: Any, host: Host) -> None:
        buckets = Buckets.of(option)
        self._engine = host.module if isinstance(host.module, EngineLike) else None
        if self._engine is not None:
            buckets = engine_buckets(buckets, self._engine)
        self._host = host
        self._padder = Padder(buckets, arguments_of(host.module))
        self._proofs = Proofs(host, self._padder)
        self._plans: OrderedDict[tuple[int, Key], _Plan] = OrderedDict()
        """By the module's generation and the key of the call."""
        self._lock = threading.Lock()
        self._proving: set[tuple[int, Key]] = set()
        """Buckets that are tried in the background, by the module's generation and the key of the padded call."""
        self.padded = 0
        """Hits of calls that were padded."""

    def answer(self, call: KeyedCall) -> Any:
        """Answer a call through its bucket, or ``NO_ANSWER``. Its arguments stay as they are.

        The module is open, and nothing turns graphs off.
        """
        host, target, owed = self._host, call, None
        plan = self._plan(call)
        padder = self._proofs.found(plan.key)
        if padder is not None and host.has_graph(plan.key):
            answer = self._replayed(self._padded(plan.fit, call))
            if answer is not NO_ANSWER:
                return padder.crop(plan.fit, answer)
        with host.lock:
            if host.refuses(call) is not None:
                return NO_ANSWER
            # What is stale may have been found out of a module that was another one.
            plan = self._plan(call)
            cause, plan.cause = plan.cause, None
            if cause is None:
                if not plan.key or self._proofs.refused(plan.key) or host.denied(plan.key):
                    return NO_ANSWER
                target, owed = self._padded(plan.fit, call), plan.key
                cause = self._cold(plan, call, target)
                if cause is not None and cause.reason not in _WAITING:
                    return NO_ANSWER
                if cause is None and not self._is_for_background(plan.key):
                    return self._captured(plan, call, target)
        return self._observed(plan, call, target) if cause is None else host.eager(call, cause, owed)

    def target(self, call: KeyedCall) -> Key | None:
        """The key that a call is padded to; ``None`` if it is not padded, or that was refused."""
        plan = self._plan(call)
        return plan.key if plan.key and not self._proofs.is_refused(plan.key) else None

    def _replayed(self, target: KeyedCall) -> Any:
        """The answer of the bucket's graph to the padded call, or ``NO_ANSWER``."""
        answer = self._host.replay(target)
        self.padded += answer is not NO_ANSWER
        return answer

    def _cold(self, plan: _Plan, call: KeyedCall, target: KeyedCall) -> Cause | None:
        """Why the bucket is not captured or tried because of this call. The lock is held."""
        if not self._host.has_graph(target.key):
            return self._host.cold(target)
        if not self._host.in_background or self._proofs.found(target.key) is not None:
            return None
        if (self._host.generation, target.key) in self._proving:
            return _PENDING
        return None if self._engine is None else self._prove_later(plan, call, target.key, Effects(None))

    def _is_for_background(self, key: Key) -> bool:
        """Whether the bucket of a PyTorch module is captured or tried in the background."""
        is_ready = self._proofs.found(key) is not None and self._host.has_graph(key)
        return self._host.in_background and self._engine is None and not is_ready

    def _captured(self, plan: _Plan, call: KeyedCall, target: KeyedCall) -> Any:
        """Answer a call and capture its bucket, after it was tried whether that may be padded to. The lock is held."""
        padder = self._proofs.found(target.key)
        if padder is None:
            effects = self._host.observe(call)
            outcome = self._proofs.prove(call, plan.fit, target.key, effects)
            if isinstance(outcome, Cause):
                self._host.tell(outcome)
                return effects.value
        answer = self._replayed(target)
        if answer is NO_ANSWER:
            answer = self._host.capture(target)
        return effects.value if padder is None else padder.crop(plan.fit, answer)

    def _observed(self, plan: _Plan, call: KeyedCall, target: KeyedCall) -> Any:
        """Answer a call as it is; if it has no effects, its bucket is captured or tried in the background."""
        effects = self._host.observe(call)
        # From now on the answer belongs to the caller.
        answer, effects.value = effects.value, None
        with self._host.lock:
            if effects.cause is not None:
                self._proofs.refuse(target.key, effects.cause)
            elif not self._host.has_graph(target.key):
                self._host.capture_later(target, effects)
            else:
                self._prove_later(plan, call, target.key, effects)
        self._host.tell(effects.cause or _PENDING)
        return answer

    def _prove_later(self, plan: _Plan, call: KeyedCall, key: Key, effects: Effects) -> Cause | None:
        """Try in the background whether a bucket may be padded to; ``None`` if the call cannot be copied."""
        at = self._host.generation, key
        if at in self._proving:
            return _PENDING

        def prove(copy: KeyedCall) -> None:
            outcome = self._proofs.prove(copy, plan.fit, key, effects, alone=True)
            if isinstance(outcome, Cause) and effects.version == self._host.version:
                plan.cause = outcome

        self._proving.add(at)
        return self._host.submit(call, prove, lambda: self._proving.discard(at))

    def _padded(self, fit: Fit, call: KeyedCall) -> KeyedCall:
        """The padded call."""
        return self._host.alike(call, *self._padder.pad(fit, call.args, call.kwargs))

    def _plan(self, call: KeyedCall) -> _Plan:
        """What the calls of this key are padded to; an engine raises ``InputError`` for what it does not take."""
        at = self._host.generation, call.key
        plan = self._plans.get(at)
        if plan is None:
            plan = self._new_plan(call)
            with self._lock:
                self._plans[at] = plan
                if len(self._plans) > _MAX_PLANS:
                    self._plans.popitem(last=False)
        return plan

    def _new_plan(self, call: KeyedCall) -> _Plan:
        """Fit a call to its buckets."""
        if self._engine is not None:
            self._engine.checked(self._engine.bind(call.args, call.kwargs))
        try:
            fit = self._padder.fit(call.args, call.kwargs)
            if isinstance(fit, str) or fit.is_exact or 0 in fit.real.values():
                return _Plan()
            target = self._padded(fit, call)
            if self._engine is not None:
                self._engine.checked(target.args)
        except (ConfigError, InputError) as error:
            return _Plan(cause=Cause(Reason.PADDING, detail=str(error)))
        return _Plan(fit, target.key)
