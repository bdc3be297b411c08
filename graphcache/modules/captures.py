"""Captures of one module, each kept in its cache or remembered as one that cannot be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.cache.admission import Admission
from graphcache.cache.arbiter import Arbiter, arbiter
from graphcache.cache.blocks import Blocks
from graphcache.cache.lru import Entry, GraphCache
from graphcache.cache.signature import Signature
from graphcache.cache.templates import Templates
from graphcache.cache.thrash import Thrash
from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig
from graphcache.errors import Cause, Refusal
from graphcache.events import Captured, Ledger, log
from graphcache.graphs.capture import refusal_of
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.background import nothing
from graphcache.modules.cold import ColdCalls
from graphcache.modules.engine import EngineModule
from graphcache.modules.module_guards import EngineGuard
from graphcache.modules.preparing import Preparation, preparing
from graphcache.modules.record import Kept, Recorded, Recorder
from graphcache.modules.record_engine import EngineRecorder
from graphcache.modules.record_torch import TorchRecorder
from graphcache.modules.remembered import Remembered
from graphcache.modules.room import Room

_SAMPLES = 3


class Captures:
    """Captures calls of one module, one at a time, and keeps what came of it.

    Args:
        module: The wrapped module.
        run: What a call calls; ``module`` itself or its ``forward``.
        config: Options.
        ledger: Hears of captures and eager calls.
        cache: Where graphs go.
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
        guard: EngineGuard | ModuleGuard,
        gate: RunGate,
    ) -> None:
        self.module = module
        self._engine = module if isinstance(module, EngineModule) else None
        self._config = config
        self._ledger = ledger
        self._cache = cache
        self._guard = guard
        self.gate = gate
        self.forget_shortcuts: Callable[[], object] = nothing
        """Set by whoever finds graphs in a shorter way than by their key."""
        self._training: list[bool] = []
        self.blocks = Blocks()
        """What could not be captured."""
        self.admission = Admission(cache, config.capture)
        """Decides what is captured; hears of evictions from whoever holds the cache."""
        self.remembered = Remembered(cache.entries, self._engine)
        """What calls were like, for a manifest."""
        self.arbiter: Arbiter | None = None
        """Of the device of the last capture."""
        self.cold: ColdCalls | None = None
        """What need not be asked about for a while; ``None`` where every call has to be looked at."""
        self.templates: Templates[Kept] = Templates(config.templates, self.admission.forgot_template)
        """What evicted graphs can be had back from."""
        self._thrash = {recalls: Thrash(recalls=recalls) for recalls in (False, True)}
        self.lock = threading.RLock()
        """Held while a call is captured, and by whoever drops graphs."""
        self.cuda = self._engine is not None
        """Whether calls concern a CUDA device."""
        self.closed = False
        self.generation = 0
        """Goes up when everything that was found out about the module is forgotten."""
        self.runs(run)

    def runs(self, run: Callable[..., Any]) -> None:
        """Call ``run`` from now on; what was captured of another one must have been dropped."""
        self.run = run
        self.recorder = self._recorder()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module itself for a caller, while no background capture does."""
        if self._engine is not None:
            return self.run(*args, **kwargs)
        with self.gate.shared():
            return self.run(*args, **kwargs)

    def clear(self, *, wait: bool = True) -> None:
        """Drop every graph, and forget what could not be captured.

        Args:
            wait: Wait for the last replays.
        """
        with self.lock:
            self.generation += 1
            self._cache.clear(wait=wait)
            self.templates.clear()
            self._look_at_all()
            for each in self._thrash.values():
                each.forget()
            self.blocks.clear()
            self.recorder.release(wait=wait)
            self._cache.shared = 0

    def refresh(self, grad: bool) -> None:
        """Trust no graph that may no longer be right: those of an engine are dropped, others have to be proven again.

        The lock is held.
        """
        if isinstance(self._guard, EngineGuard):
            if self._guard.is_stale(grad):
                self.clear()
                self._guard.renew()
            return
        if not self._guard.holds():
            self._guard.forget()
            self.forget_shortcuts()
            self._look_at_all()
            self._parts_changed()
        training = [each.training for each in self.module.modules()]
        if training != self._training:
            # What was refused in training may be captured in evaluation, and the other way round.
            self._training = training
            self.blocks.clear()

    def _parts_changed(self) -> None:
        """Note that the structure of the module may have changed."""

    def blocked(self, signature: Signature) -> Cause | None:
        """Why a signature is not to be captured this time, from what came of it before. The lock is held."""
        return self.blocks.cause(signature, self._guard.version)

    def _capture(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Cause | None]:
        preparation = preparing.get()
        start = time.perf_counter()
        with self._ledger.span("capture"), self._room(inputs) as room:
            known = self._cache.entries.get(signature)

            def begin() -> None:
                if known is not None:
                    self._cache.evict(signature)
                self._take(room, signature)

            outcome: Recorded | Cause
            try:
                recalled = self._recall(signature, inputs, begin)
                answer, outcome = recalled or self._attempt(args, kwargs, inputs, begin, known)
            finally:
                self._drop_broken()
            if known is not None and outcome is known.graph:
                # It was captured before the module changed, and is right all the same.
                self.blocks.forget(signature)
                return answer, None
            if known is not None and signature in self._cache.entries:
                self._cache.evict(signature)
            seconds = time.perf_counter() - start
            call, again = (args, kwargs), recalled is not None
            return answer, self._finish(signature, outcome, inputs, call, seconds, room, preparation, recalled=again)

    def _attempt(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: Sequence[Tensor],
        begin: Callable[[], None],
        known: Entry[Recorded] | None,
    ) -> tuple[Any, Recorded | Cause]:
        if not isinstance(self.recorder, TorchRecorder):
            return self.recorder.attempt(args, kwargs, inputs, begin=begin)
        with self.gate.shared():
            graph = None if known is None else known.graph
            return self.recorder.attempt(args, kwargs, inputs, begin=begin, known=graph)

    def leaves(self, signature: Hashable, recorded: Recorded) -> None:
        """Keep what a graph that is about to be closed can be had back from; for the cache's ``on_evict``."""
        kept = self.recorder.keeps(recorded.graph) if self.templates.most else None
        if kept is not None:
            self.templates.put(signature, kept, recorded.generation)
        elif self.templates.most:
            self.admission.forgot_template(signature)

    def _recall(
        self, signature: Signature, inputs: Sequence[Tensor], begin: Callable[[], None]
    ) -> tuple[Any, Recorded] | None:
        """Answer a call by a graph that was evicted, if it can be had back; if not, it is to be captured."""
        if signature not in self.templates:
            return None
        try:
            begin()
        except Refusal:
            # Whoever captures is told the same. There may be room another time.
            return None
        kept = self.templates.take(signature)
        if kept is None:
            return None
        try:
            return kept.recall(inputs)
        except Exception as error:
            # Whatever it was, the capture that follows meets it too, or does without.
            log.debug("%s: an evicted graph is captured anew: %s", self._ledger.name, error)
            self.admission.forgot_template(signature)
            return None
        finally:
            kept.close()

    def _drop_broken(self) -> None:
        """Take out what the recorder has closed: nobody would capture it again as long as it seems to be there."""
        broken = set(map(id, self.recorder.take_broken()))
        if broken:
            for key in [key for key, entry in self._cache.entries.items() if id(entry.graph.graph) in broken]:
                self._cache.evict(key)

    def settle(self) -> None:
        """Bring the accounts up to the calls that were made without a look."""
        if self.cold is not None:
            self.cold.settle()

    def _look_at_all(self) -> None:
        if self.cold is not None:
            self.cold.clear()

    def _recorder(self) -> Recorder:
        if self._engine is not None:
            return EngineRecorder(self._engine, self._config)
        assert isinstance(self._guard, ModuleGuard)
        return TorchRecorder(self.module, self.run, self._ledger.name, self._config, self._guard)

    def _finish(
        self,
        signature: Signature,
        outcome: Recorded | Cause,
        inputs: Sequence[Tensor],
        call: tuple[tuple[Any, ...], dict[str, Any]],
        seconds: float,
        room: Room,
        preparation: Preparation | None,
        *,
        recalled: bool = False,
    ) -> Cause | None:
        """Keep a graph, or remember why there is none, which is returned."""
        if isinstance(outcome, Recorded):
            outcome.generation = self.templates.generation
            try:
                self._cache.shared = self.recorder.shared_nbytes
                room.settle(outcome.nbytes)
                entry = self._cache.put(signature, outcome, reservation=room.own)
                self._look_at_all()
            except Refusal as refusal:
                outcome.close()
                outcome = refusal.cause
            except Exception as error:
                # Closing an evicted graph failed. This call has its answer all the same.
                outcome = refusal_of(error, self._ledger.name).cause
        if isinstance(outcome, Recorded):
            self._ledger.captured(Captured(signature, seconds, entry.graph.graph.nodes, entry.nbytes, recalled))
            self.remembered.note(signature, *call)
            replay = None if recalled else self._replay_seconds(outcome, inputs)
            slower = self.admission.captured(
                signature, seconds, replay=replay, preparing=preparation is not None, recalled=recalled
            )
            if slower is not None:
                self._cache.evict(signature)
            if self.templates.most and getattr(outcome.graph, "template", None) is not None:
                self.admission.has_template(signature)
            if preparation is None:
                self._notice_thrash(signature, recalled)
                return None
            preparation.keep(self._cache.entries, signature)
            return slower
        self.admission.failed(signature, seconds, preparing=preparation is not None)
        self.blocks.block(signature, outcome, self._guard.version)
        return outcome

    def _room(self, inputs: Sequence[Tensor]) -> Room:
        return Room(self._cache, self._arbiter(inputs))

    def _take(self, room: Room, signature: Signature) -> None:
        room.take(self.admission.expected_nbytes(signature) + self.recorder.passing_nbytes, signature)

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

    def _arbiter(self, inputs: Sequence[Tensor]) -> Arbiter:
        """Whoever bounds what all modules of the call's device own together."""
        found = self.arbiter = arbiter(self._device(inputs))
        found.register(self._cache)
        return found

    def _device(self, inputs: Sequence[Tensor]) -> torch.device:
        if self._engine is not None:
            return self._engine.device
        return next((tensor.device for tensor in inputs if tensor.is_cuda), torch.device("cpu"))

    def _notice_thrash(self, signature: Signature, recalled: bool) -> None:
        hits = self._ledger.retired_hits + sum(entry.hits for entry in list(self._cache.entries.values()))
        if (seen := self._thrash[recalled].captured(signature, hits)) is not None:
            log.warning("%s: %s", self._ledger.name, seen.advice(self._cache, self._config.capture))
