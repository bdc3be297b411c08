"""The way of a call: hit, miss, eager.

A call of a wrapped module goes through these functions, from top to bottom::

    CachedModule.__call__            native code first, if it has a graph for this layout (fast_path.py)
      Dispatcher.__call__            describe the arguments: a call with its key (targets.py, keys/)
        replay                       hit: the key has a graph, nothing forbids it, the guard holds
        miss
          eager                      graphs are off here, whatever the arguments
          padding                    the call is padded to a bucket, whose graph answers (optional feature)
          answer
            submodules               the whole is not to be captured: submodules answer with graphs of their own
            eager                    the call needs gradients, or its key is denied; another thread captures
            admit                    "first": capture; "worthwhile": once it pays; "prepared": not now
            CaptureManager.capture   now: reserve bytes, record, verify, insert; or deny the key (capture_manager.py)
            CaptureQueue.capture     later: answer eagerly, record a copy of the call in another thread (background.py)

``docs/architecture.md`` tells what keys, guards, effects, verification and denials are.

Locks: ``CaptureManager.lock`` is held while a call is captured, and by whoever drops graphs. Calls of other threads
that would have to wait for it run eagerly (``pending``). A hit takes no lock but that of the graph's order. Subscribers
are called when this thread holds none.

Whatever raises on the way to a graph, the caller has the answer of eager execution, once per call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from graphcache.cache.graph_cache import Entry, clock
from graphcache.capture.effects import Effects
from graphcache.capture.recording import Recording
from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig, graphs_off, switch_in_environment
from graphcache.dispatch.background import PENDING, CaptureQueue
from graphcache.dispatch.capture_manager import CaptureManager, preparing
from graphcache.dispatch.fast_path import FastPath, current_device, several_devices
from graphcache.dispatch.forward_into import targets_of
from graphcache.dispatch.targets import EngineTarget, ModuleTarget, Target
from graphcache.errors import EXPECTED, GRAPHS_OFF, NOT_YET, CaptureError, Cause, ClosedError, Reason, Refusal
from graphcache.events import Ledger
from graphcache.features import NO_ANSWER
from graphcache.keys.call_key import NO_KEY, CallKey, KeyedCall, forbidden

_AS_IT_IS: AbstractContextManager[object] = nullcontext()
STALE: Any = object()
"""Stands for an answer that a graph could not give, or should not have given."""


class Dispatcher:
    """Answers the calls of one wrapped module. ``publish`` is as :class:`FastPath` takes it."""

    def __init__(
        self, target: Target, config: GraphConfig, ledger: Ledger, gate: RunGate, publish: Callable[[Any], object]
    ) -> None:
        self.target = target
        self.config = config
        self.ledger = ledger
        self.gate = gate
        self.captures = CaptureManager(target, config, ledger, gate)
        self.queue = CaptureQueue(self.captures)
        self.fast_path = FastPath(target, publish)
        self.captures.on_evict = self.fast_path.clear
        self.captures.on_alone = self.fast_path.paused
        ledger.observers.on_change.add(self.fast_path)
        self.fast_path.observed(bool(ledger.observers.active))
        self.submodules: Any
        """What is captured one by one. Set by whoever makes the dispatcher: they have dispatchers of their own."""
        self.padding: Any = None
        """Pads calls to buckets (:mod:`graphcache.buckets`), where the module has some."""
        self.entries: Mapping[Hashable, Entry[Recording]] = self.captures.graphs.entries
        self._guard = target.guard
        self._in_background = config.capture_in == "background"
        self._off = switch_in_environment("GRAPHCACHE_DISABLE")

    # ---- a call

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            call = self.target.describe(args, kwargs)
        except Refusal as refusal:
            return self._undescribed(refusal.cause, KeyedCall(NO_KEY, (), args, kwargs))
        with self.on_device(call):
            entry = self.entry_of(call)
            if call.state:
                return self._with_state(call, entry)
            if entry is None or (answer := self.replay(entry, call)) is STALE:
                return self.miss(call)
            self.fast_path.remember(call, entry)
            return answer

    def _with_state(self, call: KeyedCall, entry: Entry[Recording] | None) -> Any:
        """Answer a call whose state is an argument and a part of the answer."""
        assert isinstance(self.target, ModuleTarget)
        try:
            answer = STALE if entry is None else self.replay(entry, call)
        except Exception:
            if self.captures.on_cuda or entry is None or entry.graph.updates_state:
                raise
            # What the module raises: it raises as it does eagerly, and leaves the state that it has left by then.
            answer = self.run(call)
        return self.target.finish(call, self.miss(call) if answer is STALE else answer)

    def into(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a graph has written the answer of a call straight into tensors of the caller's."""
        try:
            call = self.target.describe(args, kwargs)
        except Refusal:
            return False
        with self.on_device(call):
            if call.state or (entry := self.entry_of(call)) is None:
                return False
            targets = targets_of(out, entry.graph, self.target.graph_inputs(call.tensors))
            if targets is None or self.replay(entry, call, targets) is STALE:
                return False
            self.fast_path.remember(call, entry)
            return True

    def entry_of(self, call: KeyedCall) -> Entry[Recording] | None:
        """The graph that may answer a call, if there is one."""
        entry = self.entries.get(call.key)
        if entry is None or entry.graph.version != self._guard.version or self._off:
            return None
        return entry if forbidden(cuda=self.captures.on_cuda) is None else None

    def replay(self, entry: Entry[Recording], call: KeyedCall, out: list[torch.Tensor] | None = None) -> Any:
        """The hit: replay a graph, into ``out`` if given, or ``STALE``. What a stale graph wrote is dropped."""
        if not self.ledger.observers.active:
            return self._replay(entry, call, out)
        with self.ledger.span("replay", traced=False) as span:
            answer = self._replay(entry, call, out)
            span.done = answer is not STALE
            return answer

    def _replay(self, entry: Entry[Recording], call: KeyedCall, out: list[torch.Tensor] | None) -> Any:
        # State is not updated while another thread records, which puts it back and forth.
        entered = entry.graph.updates_state and self.gate.enter()
        try:
            return self._replay_now(entry, call, out)
        finally:
            if entered:
                self.gate.leave()

    def _replay_now(self, entry: Entry[Recording], call: KeyedCall, out: list[torch.Tensor] | None) -> Any:
        # On a device the guard is asked while the device works, unless the launch cannot be taken back.
        recorded, guard, given = entry.graph, self._guard, self.target.graph_inputs(call.tensors)
        first = out is not None or recorded.updates_state or not self.captures.on_cuda
        # The version last: since the look-up, another thread may have found the module as it is now, under a new one.
        grad = call.key.grad is not False
        if first and (guard.is_stale(grad) or recorded.is_stale() or recorded.version != guard.version):
            return STALE
        if recorded.updates and recorded.copies_state(given):
            return STALE
        try:
            answer = recorded.build(recorded.replay(given, out), given)
        except ClosedError:
            # Evicted by another thread since the look-up.
            return STALE
        if not first and (guard.is_stale(grad) or recorded.is_stale() or recorded.version != guard.version):
            return STALE
        entry.hits += 1
        entry.used = clock()
        return answer

    def miss(self, call: KeyedCall) -> Any:
        """Answer a call that no graph of its key has answered."""
        if not self.captures.on_cuda:
            self.captures.notice_device(call)
        self.captures.keys.note(call.key)
        self.check_open()
        if (cause := self.forbidden()) is not None:
            return self.eager(cause, call)
        if self.padding is not None and (answer := self.padding.answer(call)) is not NO_ANSWER:
            return answer
        return self.answer(call)

    def answer(self, call: KeyedCall, *, admitted: bool = False) -> Any:
        """Answer a call without padding. One that was ``admitted`` already waits for the capture of another one."""
        if not self.submodules.whole:
            with self.submodules.in_use():
                return self.run(call)
        changed = self.target.has_changed()
        if not changed and (cause := self.captures.denial(call)) is not None:
            # Without the lock, which a capture of another call may hold.
            return self.eager(cause, call)
        if not self.captures.lock.acquire(timeout=-1 if admitted else 0):
            # Another thread captures.
            return self.eager(PENDING, call)
        try:
            answer, cause = self._decide(call, admitted, changed)
        finally:
            self.captures.lock.release()
        if answer is STALE:
            if cause is not None:
                return self.eager(cause, call)
            return self.run_observed(call, partial(self._capture_later, call))
        if cause is not None:
            self.tell(cause)
            if preparing.get() is not None:
                self._divide(cause, call)
        return answer

    def _decide(self, call: KeyedCall, admitted: bool, changed: bool) -> tuple[Any, Cause | None]:
        """Answer a call from a graph or by a capture, under the lock: the answer, and why there is no graph.

        The answer is ``STALE`` if the call is to run when the lock is released: eagerly if there is a cause, otherwise
        observed, to be captured in the background.
        """
        self.check_open()
        self.refresh()
        if self.captures.ended:
            self.captures.drop_ended()
        if changed and (cause := self.captures.denial(call)) is not None:
            return STALE, cause
        entry = self.entries.get(call.key)
        if entry is not None and entry.graph.version == self._guard.version:
            if (answer := self.replay(entry, call)) is not STALE:
                return answer, None
        elif entry is not None and not self._in_background:
            # It was captured before something changed, so that its key has been admitted.
            admitted = True
        if (
            (call.key.held or call.key.written)
            and preparing.get() is None
            and (cause := self.captures.unfamiliar(call)) is not None
        ):
            return STALE, cause
        if not admitted and preparing.get() is None:
            if (cause := self.admit(call)) is not None:
                return STALE, cause
            if self._in_background and not self.target.is_engine:
                return STALE, None
        return self.captures.capture(call)

    def admit(self, call: KeyedCall) -> Cause | None:
        """Why a call that could be captured runs eagerly, perhaps for now; ``None`` if it is to be captured."""
        if self._in_background and self.queue.is_pending(call.key):
            return PENDING
        cause = None if self.config.capture == "first" else self.captures.admission.ask(call.key)
        if cause is None and self._in_background and self.target.is_engine:
            return self.queue.capture(call, lambda request: self.target.recorder.attempt(request)[1])
        return cause

    # ---- eager calls

    def run(self, call: KeyedCall) -> Any:
        """Run the module itself for a caller, while no background capture does."""
        with self.captures.running():
            return self.target.call(*call.args, **call.kwargs)

    def eager(self, cause: Cause, call: KeyedCall) -> Any:
        """Answer a call without a graph of the whole."""
        self.check_open()
        self.tell(cause)
        if cause.reason in GRAPHS_OFF:
            with self.ledger.span("eager", traced=False):
                return self.run(call)
        if cause.reason in NOT_YET:
            start = time.perf_counter()
            with self.ledger.span("eager"), graphs_off():
                answer = self.run(call)
            self.captures.admission.ran(call.key, time.perf_counter() - start)
            return answer
        if not self.target.is_engine:
            self.submodules.divide(cause)
        # In subgraph mode an engine would come back here.
        with self.ledger.span("eager"), graphs_off() if self.target.is_engine else self.submodules.in_use():
            return self.run(call)

    def observe(self, call: KeyedCall) -> tuple[Any, Effects]:
        """Answer a call of a PyTorch module eagerly, and see what it does besides."""
        assert isinstance(self.target, ModuleTarget)
        with self.ledger.span("eager"), self.captures.running():
            effects = self.target.recorder.observe(call)
        # The answer belongs to the caller from now on.
        answer, effects.value = effects.value, None
        return answer, effects

    def run_observed(self, call: KeyedCall, then: Callable[[Effects], object]) -> Any:
        """Answer a call of a PyTorch module eagerly; ``then`` is told of its effects, under the lock."""
        assert isinstance(self.target, ModuleTarget)
        if self.target.recorder.observing.locked():
            return self.eager(PENDING, call)
        answer, effects = self.observe(call)
        with self.captures.lock:
            then(effects)
        self.tell(effects.cause or PENDING)
        return answer

    def _capture_later(self, call: KeyedCall, effects: Effects) -> None:
        """Have a call that was observed captured in the background, if it has no effects."""
        target = self.target
        assert isinstance(target, ModuleTarget)
        if effects.cause is not None:
            self.captures.deny(call.key, effects.cause)
        else:
            self.queue.capture(call, lambda request: target.recorder.record(request, effects))

    def _undescribed(self, cause: Cause, call: KeyedCall) -> Any:
        """Answer a call that no key describes."""
        forbidden = self.forbidden()
        if forbidden is None and not self.submodules.whole and not self.captures.closed:
            # The whole was never to be captured, and the submodules may be called with something else.
            with self.submodules.in_use():
                return self.run(call)
        return self.eager(forbidden or cause, call)

    def tell(self, cause: Cause) -> None:
        self.ledger.ran_eagerly(cause)
        if self.config.on_failure == "raise" and cause.reason not in EXPECTED:
            raise CaptureError(f"{self.ledger.name}: {cause}")

    # ---- beside the calls

    def prepare(self, call: KeyedCall) -> Cause | None:
        """Capture a call that nobody waits for, or the submodules that it calls; why the whole has no graph."""
        self.check_open()
        if (cause := self.forbidden()) is not None:
            return cause
        if self.submodules.whole:
            with self.captures.lock:
                cause = self._prepare(call)
        if cause is not None or not self.submodules.whole:
            self._divide(cause, call)
        return cause

    def _prepare(self, call: KeyedCall) -> Cause | None:
        """Capture a call that has no graph that is right; why it has none. Under the lock."""
        self.refresh()
        if self.captures.is_current(call.key):
            if (preparation := preparing.get()) is not None:
                preparation.keep(self.entries, call.key)
            return None
        if (cause := self.captures.denial(call)) is not None:
            return cause
        try:
            # Before anything is captured in vain, and without a denial: there may be room when it is called.
            self.captures.graphs.victims(self.captures.keys.expected_nbytes(call.key))
        except Refusal as refusal:
            return refusal.cause
        return self.captures.capture(call)[1]

    def _divide(self, cause: Cause | None, call: KeyedCall) -> None:
        """Run a call once more for the sake of the submodules that it calls, if there are any."""
        if cause is None or self.submodules.divide(cause):
            with self.submodules.in_use():
                self.run(call)

    # ---- state

    def key_of(self, call: KeyedCall) -> CallKey:
        """The key of the graph that answers a call: that of its bucket if it is padded."""
        padded: CallKey | None = None if self.padding is None else self.padding.target(call)
        return padded or call.key

    def forbidden(self) -> Cause | None:
        """What forbids graphs at this moment, whatever the arguments."""
        reason = Reason.DISABLED if self._off else forbidden(cuda=self.captures.on_cuda)
        return None if reason is None else Cause(reason)

    def on_device(self, call: KeyedCall) -> AbstractContextManager[object]:
        """Inside, the device of a call is the current one: what is said of the current stream is said of its stream."""
        if not (self.captures.on_cuda and several_devices()):
            return _AS_IT_IS
        device = self.target.device_of(call.tensors)
        return _AS_IT_IS if device is None or device.index == current_device() else torch.cuda.device(device)

    def refresh(self) -> None:
        """Drop graphs of an engine that has changed; those of another module are captured again. Under the lock."""
        target = self.target
        if isinstance(target, EngineTarget):
            if target.has_changed():
                self.clear()
                target.guard.renew()
            return
        if not target.guard.holds():
            target.guard.forget()
            self.fast_path.clear()
            self.submodules.look_again()
        if target.trains_differently():
            # What was refused in training may be captured in evaluation.
            self.captures.keys.allow_all()

    def check_open(self) -> None:
        if self.captures.closed:
            raise ClosedError(f"{self.ledger.name} was closed; wrap its .module again")

    def clear(self, *, wait: bool = True) -> None:
        """Drop every graph and forget all denials; captures in the background are not kept."""
        with self.captures.lock:
            self.queue.cancel()
            self.captures.clear(wait=wait)
            self.submodules.look_again()
