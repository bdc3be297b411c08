"""What is kept for one wrapped module: its graphs, what is known of its keys, and the captures that make both."""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from graphcache.cache.admission import Admission
from graphcache.cache.churn import WINDOW, advice
from graphcache.cache.graph_cache import Entry, GraphCache, Reservation, budget_of, weakly
from graphcache.cache.key_table import KeyTable
from graphcache.capture.recording import CaptureRequest, Recording
from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig
from graphcache.dispatch.targets import ModuleTarget, Target, arguments_of
from graphcache.errors import Cause, Reason, Refusal
from graphcache.events import Captured, Evicted, Ledger, QuietLock, log
from graphcache.graphs import driver
from graphcache.graphs.capture import refusal_of
from graphcache.keys.call_key import KeyedCall

_REPLAY_SAMPLES = 3
_MAX_FAMILIAR = 256
"""Objects and tensors that are remembered: about eight caches of 32 layers."""
_UNFAMILIAR = 3
"""Calls with new ones in a row before it is taken for what the caller always does."""
_DEVICE_SHARE = 0.25
"""Share of a device's memory that the graphs of one module may own with ``max_bytes="auto"``. The rest is for weights,
eager execution and other modules."""


class CaptureManager:
    """Captures calls of one module, one at a time, and keeps what came of it."""

    def __init__(self, target: Target, config: GraphConfig, ledger: Ledger, gate: RunGate) -> None:
        self.target = target
        self.config = config
        self.ledger = ledger
        self.gate = gate
        self.lock = QuietLock()
        """Held while a call is captured, and by whoever drops graphs."""
        # A share of the device's memory is known when the first capture has told which device it is.
        max_bytes = None if config.max_bytes == "auto" else config.max_bytes
        # Weakly: graphs go with a module that nobody holds, without a wait for the collector of cycles.
        evicted = weakly(self._evicted)
        self.graphs = GraphCache[Recording](max_graphs=config.max_graphs, max_bytes=max_bytes, on_evict=evicted)
        self.keys = KeyTable(self.graphs.entries)
        """What is known of every key: its calls, denial and costs."""
        self.admission = Admission(config.capture, self.graphs, self.keys)
        self.on_evict: Callable[[], object] = lambda: None
        """Called whenever a graph goes."""
        self.on_alone: Callable[[bool], object] = lambda active: None
        """Called when hits are to be answered in Python for a while, and when that has ended."""
        self.on_cuda = target.is_engine
        """Whether calls concern a CUDA device."""
        self.closed = False
        self.running: Callable[[], AbstractContextManager[object]] = nullcontext if target.is_engine else gate.shared
        """Makes what is entered around a run for a caller; an engine may run beside a background capture."""
        self._familiar: OrderedDict[Hashable, None] = OrderedDict()
        """Objects and tensors updated in place that calls were given, the last ones."""
        self._unfamiliar = 0
        """Calls in a row that were given others."""
        self.ended: deque[Hashable] = deque()
        """Keys with objects that are no more."""
        self._last: list[tuple[Hashable, bool]] | None = []
        """The last captures, and whether their keys had a graph before; ``None`` once the user was told of churn."""
        self._hits_before = 0

    @property
    def version(self) -> int:
        """What was found out of the module under another version may no longer be so."""
        return self.target.guard.version

    @property
    def hits(self) -> int:
        """Calls that were answered by a replay."""
        return self.ledger.retired_hits + sum(entry.hits for entry in list(self.graphs.entries.values()))

    def clear(self, *, wait: bool = True) -> None:
        """Drop every graph, and forget all denials."""
        with self.lock:
            self.graphs.clear(wait=wait)
            self._last = None if self._last is None else []
            self.keys.forget_captures()
            self.keys.allow_all()
            # It keeps what the module held when it was looked at, such as weights that were replaced since.
            self.target.guard.forget()
            self.target.recorder.release(wait=wait)
            self.graphs.shared = 0

    def notice_device(self, call: KeyedCall) -> None:
        if self.target.device_of(call.tensors) is not None:
            self.on_cuda = True

    # ---- denials

    def denial(self, call: KeyedCall) -> Cause | None:
        """Why a call is not to be captured this time, from its modes and from what came of it before."""
        return self.needs_grad(call.tensors) or self.keys.denial(call.key, self.target.guard.version)

    def deny(self, key: Hashable, cause: Cause) -> None:
        self.keys.deny(key, cause, self.version)

    def needs_grad(self, tensors: Sequence[Tensor]) -> Cause | None:
        """Why the grad mode forbids a graph, if it does."""
        if not torch.is_grad_enabled():
            return None
        given = any(tensor.requires_grad for tensor in tensors)
        if not given and not self.target.guard.requires_grad():
            return None
        return Cause(Reason.GRAD, detail=f"{'an input' if given else 'a parameter'} requires gradients")

    def unfamiliar(self, call: KeyedCall) -> Cause | None:
        """Why a call is not captured yet that was given an object, or a tensor that it updates, for the first time.

        Whoever makes new ones for each call would have a graph for each, and never a hit.
        """
        given = (*call.key.held, *call.key.written)
        if self.config.capture_in == "background":
            return Cause(Reason.ARGUMENT, detail=f"{given[0]}: what calls share is not used in the background")
        new = [each for each in given if each not in self._familiar]
        for each in given:
            self._familiar[each] = None
            self._familiar.move_to_end(each)
        while len(self._familiar) > _MAX_FAMILIAR:
            self._familiar.popitem(last=False)
        self._unfamiliar = self._unfamiliar + 1 if new else 0
        if not new:
            return None
        if self._unfamiliar <= _UNFAMILIAR:
            return Cause(Reason.NEW_STATE)
        if call.key.held:
            return Cause(Reason.ARGUMENT, detail=f"{call.key.held[0]}, another one at each of the last calls")
        return Cause(Reason.MUTATES, detail="tensors of the call, others at each of the last calls")

    # ---- captures

    def drop_ended(self) -> None:
        """Drop the graphs of objects that are no more. Under the lock."""
        while self.ended:
            self.graphs.evict(self.ended.popleft())

    def is_current(self, key: Hashable) -> bool:
        """Whether a key has a graph that was captured under the state of now."""
        entry = self.graphs.entries.get(key)
        return entry is not None and entry.graph.version == self.version

    def capture(self, call: KeyedCall) -> tuple[Any, Cause | None]:
        """Answer a call and keep its graph, or deny its key: the answer, and why there is no graph. Under the lock."""
        start = time.perf_counter()
        stale = self.graphs.entries.get(call.key)
        with self.ledger.span("capture") as span, self.room(call) as room:
            try:
                with self.running():
                    visits = 0 if self.target.is_engine else self.gate.visits()
                    request = CaptureRequest(
                        call,
                        begin=partial(self.reserve, room, call),
                        keeps_state=preparing.get() is None and not self.admission.measures_replays,
                        alone=partial(self._alone, visits),
                    )
                    answer, outcome = self.target.recorder.attempt(request)
            finally:
                # Nobody would capture again what the recorder has closed, as long as it seems to be there.
                broken = self.target.recorder.broken
                for key in [key for key, entry in self.graphs.entries.items() if entry.graph.graph in broken]:
                    self.graphs.evict(key)
                broken.clear()
            if stale is not None:
                self.graphs.evict(call.key)
            if isinstance(outcome, Recording) and isinstance(self.target, ModuleTarget):
                found = self.target.updates(call, outcome)
                self.keys.rename(call.key, found.key)
                call = found
            cause = self.keep(call, outcome, time.perf_counter() - start, room)
            if stale is not None and cause is None:
                self.keys.replaced(call.key, stale.hits, self.version)
                entry = self.graphs.entries.get(call.key)
                if entry is not None and stale.pinned and preparing.get() is None:
                    entry.pinned = True
            span.done = cause is None
            return answer, cause

    @contextmanager
    def _alone(self, visits: int) -> Iterator[bool]:
        """Inside, no other thread uses the module's state, if that can be; hits wait at the gate, in Python."""
        with self.gate.alone(visits) as is_alone:
            self.on_alone(True)
            try:
                yield is_alone
            finally:
                self.on_alone(False)

    def room(self, call: KeyedCall) -> Reservation:
        """The reservation of one capture, with no bytes yet, in the module's budget and in that of the device."""
        device = self.target.device_of(call.tensors)
        if self.config.max_bytes == "auto" and self.graphs.max_bytes is None and device is not None:
            self.graphs.max_bytes = int(driver.total_memory(device.index) * _DEVICE_SHARE)
        budget_of(device or torch.device("cpu")).register(self.graphs)
        return Reservation(self.graphs)

    def reserve(self, room: Reservation, call: KeyedCall) -> None:
        """Make room for the graph of a call, in place of one from before the module changed."""
        entry = self.graphs.entries.get(call.key)
        if entry is not None and entry.graph.version != self.version:
            self.graphs.evict(call.key)
        room.take(self.keys.expected_nbytes(call.key) + self.target.recorder.passing_nbytes)

    def keep(self, call: KeyedCall, outcome: Recording | Cause, seconds: float, room: Reservation) -> Cause | None:
        """Keep the graph of a call, or deny its key; why there is no graph. Under the lock."""
        key, preparation = call.key, preparing.get()
        if isinstance(outcome, Recording) and self.closed:
            # An observer has closed the module.
            outcome.close()
            outcome = Cause(Reason.UNSETTLED, detail="the module was closed meanwhile")
        if isinstance(outcome, Recording):
            try:
                self.graphs.shared = self.target.recorder.shared_nbytes
                entry = self.graphs.put(key, outcome, reservation=room)
            except Refusal as refusal:
                outcome = refusal.cause
            except Exception as error:
                # Closing an evicted graph failed. This call has its answer all the same.
                outcome = refusal_of(error, self.ledger.name).cause
        if not isinstance(outcome, Recording):
            self.admission.charge(seconds, key, preparing=preparation is not None)
            self.deny(key, outcome)
            return outcome
        # No more is done at the end of an object: it may come in any thread, with any lock held.
        append, objects = self.ended.append, [held.ref() for held in key.held]
        outcome.ends = [weakref.ref(each, lambda _: append(key)) for each in objects]
        self.ledger.captured(Captured(key, seconds, entry.graph.graph.nodes, entry.nbytes))
        had_one = self.keys.captured(key, seconds, entry.nbytes)
        slower = None
        if self.admission.measures_replays:
            replay = self._replay_seconds(outcome, call)
            slower = self.admission.captured(key, seconds, replay, preparing=preparation is not None)
            if slower is not None:
                self.graphs.evict(key)
        if preparation is not None:
            preparation.keep(self.graphs.entries, key)
            return slower
        if self._last is not None:
            self._last.append((key, had_one))
            if len(self._last) == WINDOW:
                self._look_for_churn(self._last)
        return None

    def _look_for_churn(self, last: list[tuple[Hashable, bool]]) -> None:
        """Warn, once, if the last captures were in vain."""
        gained, self._hits_before, self._last = self.hits - self._hits_before, self.hits, []
        said = advice(last, gained, self.graphs, self.config.capture, arguments_of(self.target.module))
        if said is not None:
            log.warning("%s: %s", self.ledger.name, said)
            self._last = None

    def _replay_seconds(self, recorded: Recording, call: KeyedCall) -> float:
        """What a replay takes the host, which is what an eager call is measured by too."""
        given = self.target.graph_inputs(call.tensors)
        if recorded.updates_state:
            given = [each.clone() for each in given]
        taken = []
        for _ in range(_REPLAY_SAMPLES):
            start = time.perf_counter()
            recorded.replay(given)
            taken.append(time.perf_counter() - start)
        return min(taken)

    def _evicted(self, key: Hashable, entry: Entry[Recording]) -> None:
        self.on_evict()
        self.admission.evicted(key, entry)
        self.ledger.evicted(Evicted(key, entry.hits))


class Preparation:
    """The graphs that one preparation makes or finds; inside its ``with`` block nothing evicts them."""

    def __init__(self, *, pin: bool = False) -> None:
        self._pin = pin
        self._kept: dict[Entry[Any], tuple[Mapping[Hashable, Entry[Any]], Hashable, bool]] = {}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._there())

    def __len__(self) -> int:
        return len(self._there())

    def __enter__(self) -> Self:
        self._token = preparing.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        preparing.reset(self._token)
        for entry, (_, _, before) in self._kept.items():
            entry.pinned = self._pin or before

    def keep(self, entries: Mapping[Hashable, Entry[Any]], key: Hashable) -> None:
        """Let nothing evict a graph from now on, if it is there."""
        entry = entries.get(key)
        if entry is not None:
            self._kept.setdefault(entry, (entries, key, entry.pinned))
            entry.pinned = True

    def _there(self) -> list[Entry[Any]]:
        # One that was pinned may have been dropped all the same, with all the others.
        return [entry for entry, (entries, key, _) in self._kept.items() if entries.get(key) is entry]


preparing: ContextVar[Preparation | None] = ContextVar("graphcache_preparing", default=None)
"""What captures of this context belong to; ``None`` while serving."""
