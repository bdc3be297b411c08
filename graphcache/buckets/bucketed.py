"""Calls that lie between buckets: padded to the next one, answered by its graph, cropped.

A call comes here when no graph of its own key has answered it. Before the first padded answer of a bucket is given, it
is tried whether the module bears padding.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from graphcache.buckets.independence import Run, proven_padder
from graphcache.buckets.padder import Arguments, Fit, Padder, engine_buckets
from graphcache.buckets.spec import Buckets
from graphcache.cache.key_table import Denial
from graphcache.capture.effects import Effects
from graphcache.capture.engine_like import EngineLike
from graphcache.capture.recording import CaptureRequest, Recording
from graphcache.config import graphs_off
from graphcache.dispatch.background import PENDING, CallSnapshot
from graphcache.dispatch.dispatcher import STALE, Dispatcher
from graphcache.dispatch.targets import ModuleTarget, arguments_of
from graphcache.errors import Cause, ConfigError, GraphCacheError, InputError, Reason, Refusal, shown
from graphcache.events import log
from graphcache.features import NO_ANSWER
from graphcache.graphs.capture import refusal_of
from graphcache.keys.call_key import CallKey, KeyedCall

_MAX_PLANS = 4096
_MAX_BUCKETS = 1024
"""Beyond these the oldest is forgotten; a bucket is tried again then."""
_WAITING = (Reason.UNSETTLED, Reason.COLD, Reason.PENDING)
"""Reasons of calls whose bucket will be captured later."""

Value = TypeVar("Value")


@dataclass(slots=True, eq=False)
class _Bucket:
    """What is known of the padded calls of one key."""

    key: CallKey
    padder: Padder | None = None
    """Crops the answers; ``None`` until it was proven that calls may be padded."""
    version: int = 0
    """The module's, under which that was proven."""
    denial: Denial | None = None
    """Why calls are not padded."""
    is_tried: bool = False
    """Whether that is found out in the background now."""

    def is_denied(self, version: int) -> bool:
        """Whether calls are not to be padded for now."""
        return self.denial is not None and self.denial.wait(version) != 0

    def deny(self, cause: Cause, version: int) -> Cause:
        """Remember why calls are not padded."""
        self.denial = Denial(cause, version, 1 if self.denial is None else self.denial.times + 1)
        return cause


@dataclass(slots=True, eq=False)
class _Plan:
    """What the calls of one key are padded to, if they are; ``cause`` is to be told once."""

    fit: Fit
    bucket: _Bucket | None = None
    cause: Cause | None = None


class Bucketed:
    """Pads the calls of one module to its buckets; a ``ConfigError`` names what the module cannot have."""

    def __init__(self, option: Any, dispatcher: Dispatcher) -> None:
        module = dispatcher.target.module
        buckets = Buckets.of(option)
        self._engine = module if isinstance(module, EngineLike) else None
        if self._engine is not None:
            buckets = engine_buckets(buckets, self._engine)
        # Weakly, since the dispatcher has this: graphs go with a module that nobody holds.
        proxy: Any = weakref.proxy(dispatcher)
        self._dispatcher: Dispatcher = proxy
        self._captures = dispatcher.captures
        self._padder = Padder(buckets, arguments_of(module))
        self._in_background = dispatcher.config.capture_in == "background"
        self._plans: OrderedDict[Hashable, _Plan] = OrderedDict()
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()
        """Both by a key and the generation: when all denials are forgotten, these are too."""
        self._lock = threading.Lock()
        self.padded = 0
        """Hits of calls that were padded."""

    def answer(self, call: KeyedCall) -> Any:
        """Answer a call through its bucket, or ``NO_ANSWER``. Its arguments stay as they are.

        The module is open, and nothing turns graphs off.
        """
        plan, captures = self._plan(call), self._captures
        bucket = plan.bucket
        if bucket is not None and captures.is_current(bucket.key) and self._is_proven(bucket):
            padder = bucket.padder
            answer = self._replayed(self._padded(plan.fit, call))
            if padder is not None and answer is not NO_ANSWER:
                return padder.crop(plan.fit, answer)
        with captures.lock:
            answer, otherwise = self._decide(call)
        return answer if otherwise is None else otherwise()

    def _decide(self, call: KeyedCall) -> tuple[Any, Callable[[], Any] | None]:
        """The answer of a call whose bucket has no graph or no proof, or what answers it without the lock."""
        nothing = NO_ANSWER, None
        if self._captures.needs_grad(call.tensors) is not None:
            return nothing
        self._dispatcher.refresh()
        # The plan that was seen before may be that of a module that was another one.
        plan = self._plan(call)
        if (cause := plan.cause) is not None:
            plan.cause = None
            return None, partial(self._dispatcher.eager, cause, call)
        bucket = plan.bucket
        if bucket is None or self._is_refused(bucket):
            return nothing
        target = self._padded(plan.fit, call)
        has_graph, is_proven = self._captures.is_current(bucket.key), self._is_proven(bucket)
        if not has_graph:
            cause = self._dispatcher.admit(target)
        elif self._in_background and not is_proven and (bucket.is_tried or self._engine is not None):
            cause = self._prove_later(plan, bucket, call, Effects(None))
        if cause is not None and cause.reason not in _WAITING:
            return nothing
        if cause is not None:
            # What it takes counts in favour of a graph of the bucket.
            return None, partial(self._dispatcher.eager, cause, call._replace(key=bucket.key))
        if self._in_background and self._engine is None and not (has_graph and is_proven):
            then = partial(self._capture_later, plan, bucket, call, target)
            return None, partial(self._dispatcher.run_observed, call, then)
        return self._captured(plan, bucket, call, target), None

    def target(self, call: KeyedCall) -> CallKey | None:
        """The key that a call is padded to; ``None`` if it is not padded, or that was refused."""
        bucket = self._plan(call).bucket
        return None if bucket is None or bucket.is_denied(self._captures.version) else bucket.key

    # ---- the bucket of a call

    def _plan(self, call: KeyedCall) -> _Plan:
        """What the calls of this key are padded to; an engine raises ``InputError`` for what it does not take."""
        at = self._captures.keys.generation, call.key
        return self._plans.get(at) or self._kept(self._plans, _MAX_PLANS, at, self._new_plan(call))

    def _new_plan(self, call: KeyedCall) -> _Plan:
        """Fit a call to its buckets."""
        generation = self._captures.keys.generation
        if self._engine is not None:
            self._engine.checked(self._engine.bind(call.args, call.kwargs))
        try:
            fit = self._padder.fit(call.args, call.kwargs)
            if isinstance(fit, str) or fit.is_exact or 0 in fit.real.values():
                return _Plan(Fit({}, {}))
            target = self._padded(fit, call)
            if self._engine is not None:
                self._engine.checked(target.args)
        except (ConfigError, InputError) as error:
            return _Plan(Fit({}, {}), cause=Cause(Reason.PADDING, detail=str(error)))
        bucket = self._kept(self._buckets, _MAX_BUCKETS, (generation, target.key), _Bucket(target.key))
        return _Plan(fit, bucket)

    def _kept(self, table: OrderedDict[Hashable, Value], size: int, key: Hashable, value: Value) -> Value:
        """What a table has for a key, which is ``value`` if it had nothing."""
        with self._lock:
            found = table.setdefault(key, value)
            if len(table) > size:
                table.popitem(last=False)
        return found

    def _padded(self, fit: Fit, call: KeyedCall) -> KeyedCall:
        """The padded call."""
        return self._dispatcher.target.describe(*self._padder.pad(fit, call.args, call.kwargs))

    def _is_proven(self, bucket: _Bucket) -> bool:
        """Whether calls may be padded to a bucket, by a proof under the module's version of now."""
        return bucket.padder is not None and bucket.version == self._captures.version

    def _is_refused(self, bucket: _Bucket) -> bool:
        """Whether a call is not padded, or its bucket not captured, because of what came of earlier calls."""
        version = self._captures.version
        if bucket.denial is not None and bucket.is_denied(version):
            bucket.denial.calls += 1
            return True
        return self._captures.keys.denial(bucket.key, version) is not None

    # ---- captures

    def _replayed(self, target: KeyedCall) -> Any:
        """The answer of the bucket's graph to the padded call, or ``NO_ANSWER``."""
        entry = self._dispatcher.entry_of(target)
        answer = STALE if entry is None else self._dispatcher.replay(entry, target)
        if answer is STALE:
            return NO_ANSWER
        self.padded += 1
        # The caller's call was noted by its own sizes.
        self._captures.keys.note(target.key, -1)
        return answer

    def _captured(self, plan: _Plan, bucket: _Bucket, call: KeyedCall, target: KeyedCall) -> Any:
        """Answer a call and capture its bucket, after it was tried whether that may be padded to. The lock is held."""
        padder, own = bucket.padder if self._is_proven(bucket) else None, None
        if padder is None:
            own, effects = self._observe(call)
            outcome = self._prove(plan, bucket, call, effects)
            if isinstance(outcome, Cause):
                self._dispatcher.tell(outcome)
                return own
        answer = self._replayed(target)
        if answer is NO_ANSWER:
            answer = self._dispatcher.answer(target, admitted=True)
        return own if padder is None else padder.crop(plan.fit, answer)

    def _capture_later(
        self, plan: _Plan, bucket: _Bucket, call: KeyedCall, target: KeyedCall, effects: Effects
    ) -> None:
        """Have the bucket of a call that was observed captured or tried in the background, if it has no effects."""
        if effects.cause is not None:
            bucket.deny(effects.cause, self._captures.version)
        elif not self._captures.is_current(target.key):
            self._dispatcher.queue.capture(target, partial(self._record, effects.version))
        else:
            self._prove_later(plan, bucket, call, effects)

    def _record(self, version: int, request: CaptureRequest) -> Recording | Cause:
        """Capture a padded call, which no caller has made; the one it was made of had no effects under a version."""
        target, gate = self._dispatcher.target, self._dispatcher.gate
        assert isinstance(target, ModuleTarget)
        with gate.exclusive():
            target.recorder.check_unchanged(version)
            effects = target.recorder.observe(request.call)
        if effects.cause is not None:
            # Not to be tried again and again, for no caller has asked for these effects.
            return Cause(Reason.PADDING, detail=f"a call of the padded sizes has effects: {effects.cause}")
        return target.recorder.record(request, effects)

    def _observe(self, call: KeyedCall) -> tuple[Any, Effects]:
        """Answer a call eagerly, and see what it does besides; an engine does nothing."""
        if self._engine is not None:
            with graphs_off():
                return self._dispatcher.run(call), Effects(None)
        return self._dispatcher.observe(call)

    # ---- proof

    def _prove_later(self, plan: _Plan, bucket: _Bucket, call: KeyedCall, effects: Effects) -> Cause | None:
        """Try in the background whether a bucket may be padded to; ``None`` if the call cannot be copied."""
        if bucket.is_tried:
            return PENDING

        def work(snapshot: CallSnapshot) -> None:
            try:
                if snapshot.cancelled:
                    return
                outcome = snapshot.run(lambda: self._prove(plan, bucket, snapshot.call, effects, alone=True))
                if isinstance(outcome, Cause) and effects.version == self._captures.version:
                    plan.cause = outcome
            except Exception as error:
                # The module refuses such arguments; whoever gives them again will see it.
                log.debug("a call was not tried with padding: %s", error)
            finally:
                bucket.is_tried = False

        bucket.is_tried = True
        cause = self._dispatcher.queue.submit(call, work)
        if cause is None:
            bucket.is_tried = False
        return cause

    def _prove(
        self, plan: _Plan, bucket: _Bucket, call: KeyedCall, effects: Effects, *, alone: bool = False
    ) -> Padder | Cause:
        """Find out whether a call that was answered may be padded; after a call with effects nothing is run again."""
        version, start = self._captures.version, time.perf_counter()
        if effects.cause is not None:
            return bucket.deny(effects.cause, version)
        try:
            with graphs_off(), torch.no_grad():
                padder = proven_padder(self._runner(effects, alone), call, plan.fit, self._padder, self._takes)
        except Refusal as refusal:
            return bucket.deny(refusal.cause, version)
        except Exception as error:
            cause = refusal_of(error, "").cause
            if cause.reason is Reason.CAPTURE_FAILED:
                text = str(error) if isinstance(error, GraphCacheError) else f"{type(error).__name__}: {error}"
                cause = Cause(Reason.PADDING, detail=f"a call of other sizes raised {shown(text)}")
            return bucket.deny(cause, version)
        finally:
            self._captures.admission.charge(time.perf_counter() - start)
        bucket.padder, bucket.version = padder, effects.version
        return padder

    def _runner(self, effects: Effects, alone: bool) -> Run:
        """What runs the module again after a call without effects; it raises ``Refusal`` when a run has effects.

        With ``alone``, no caller runs the module at the same time.
        """
        target, gate = self._dispatcher.target, self._dispatcher.gate
        if not isinstance(target, ModuleTarget):
            return target.run
        recorder = target.recorder
        again = recorder.again(effects.version, gate.exclusive if alone else nullcontext)
        running: Callable[[], Any] = nullcontext if alone else gate.shared

        def run(*args: Any, **kwargs: Any) -> Any:
            with running():
                answer = again(*args, **kwargs)
            recorder.check_unchanged(effects.version)
            return answer

        return run

    def _takes(self, arguments: Arguments) -> bool:
        """Whether the module takes arguments: an engine only what a profile has."""
        try:
            if self._engine is not None:
                self._engine.checked(arguments[0])
        except InputError:
            return False
        return True
