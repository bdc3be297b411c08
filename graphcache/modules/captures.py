"""Captures of one module, each kept in its cache or remembered as one that cannot be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.cache.arbiter import Arbiter, arbiter
from graphcache.cache.blocks import Blocks
from graphcache.cache.churn import ChurnWatch
from graphcache.cache.lru import Entry, GraphCache, clock
from graphcache.cache.signature import Signature
from graphcache.cache.worthwhile import admission_for
from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig
from graphcache.errors import Cause, Refusal
from graphcache.events import Captured, Ledger, QuietLock, log
from graphcache.graphs import driver
from graphcache.graphs.capture import refusal_of
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.arguments import arguments_of
from graphcache.modules.background import nothing
from graphcache.modules.engine import EngineModule
from graphcache.modules.module_guards import EngineGuard
from graphcache.modules.preparing import Preparation, preparing
from graphcache.modules.record import Recorded, Recorder
from graphcache.modules.record_engine import EngineRecorder
from graphcache.modules.record_torch import TorchRecorder
from graphcache.modules.remembered import Remembered
from graphcache.modules.room import Room
from graphcache.modules.standin import is_training

_SAMPLES = 3
_SHARE = 0.25
"""Of a device's memory: what the graphs of one module may own unless ``max_bytes`` says otherwise. The rest is for
weights, eager execution and other modules."""


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
        self.admission = admission_for(config.capture, cache)
        """Decides what is captured; hears of evictions from whoever holds the cache."""
        self.remembered = Remembered(cache.entries, self._engine)
        """What calls were like, for a manifest."""
        self.arbiter: Arbiter | None = None
        """Of the device of the last capture."""
        self._churn = ChurnWatch()
        self.lock = QuietLock()
        """Held while a call is captured, and by whoever drops graphs."""
        self.cuda = self._engine is not None
        """Whether calls concern a CUDA device."""
        self.closed = False
        self.generation = 0
        """Goes up when everything that calls were refused for is forgotten."""
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
            self._churn.forget()
            self.blocks.clear()
            if isinstance(self._guard, ModuleGuard):
                # It keeps what the module held when it was looked at, such as weights that were replaced since.
                self._guard.forget()
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
            self._parts_changed()
        if self.training_changed():
            # What was refused in training may be captured in evaluation, and the other way round.
            self._training = self._training_now()
            self.generation += 1
            self.blocks.clear()

    @property
    def version(self) -> int:
        """That of the guard: what was found out of the module under another one may no longer be so."""
        return self._guard.version

    def training_changed(self) -> bool:
        """Whether a training flag was set since it was looked at, so that denials may be of the past."""
        return self._engine is None and self._training_now() != self._training

    def _training_now(self) -> list[bool]:
        return [is_training(each) for each in self.module.modules()]

    def _parts_changed(self) -> None:
        """Note that the structure of the module may have changed."""

    def blocked(self, signature: Signature) -> Cause | None:
        """Why a signature is not to be captured this time, from what came of it before. Any thread may ask."""
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
                answer, outcome = self._attempt(args, kwargs, inputs, begin, known)
            finally:
                self._drop_broken()
            if known is not None and outcome is known.graph:
                # It was captured before the module changed, and is right all the same: its replay gave this answer too.
                self.blocks.forget(signature)
                known.hits += 1
                known.used = clock()
                return answer, None
            if known is not None and signature in self._cache.entries:
                self._cache.evict(signature)
            seconds = time.perf_counter() - start
            return answer, self._finish(signature, outcome, inputs, (args, kwargs), seconds, room, preparation)

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

    def _drop_broken(self) -> None:
        """Take out what the recorder has closed: nobody would capture it again as long as it seems to be there."""
        broken = set(map(id, self.recorder.take_broken()))
        if broken:
            for key in [key for key, entry in self._cache.entries.items() if id(entry.graph.graph) in broken]:
                self._cache.evict(key)

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
    ) -> Cause | None:
        """Keep a graph, or remember why there is none, which is returned."""
        if isinstance(outcome, Recorded):
            try:
                self._cache.shared = self.recorder.shared_nbytes
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
                self._notice_churn(signature)
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
        if not self.admission.measures_replays:
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
        device = self._device(inputs)
        if self._config.max_bytes == "auto" and self._cache.max_bytes is None and self.cuda:
            self._cache.max_bytes = int(driver.total_memory(device.index) * _SHARE)
        found = self.arbiter = arbiter(device)
        found.register(self._cache)
        return found

    def _device(self, inputs: Sequence[Tensor]) -> torch.device:
        if self._engine is not None:
            return self._engine.device
        return next((tensor.device for tensor in inputs if tensor.is_cuda), torch.device("cpu"))

    def _notice_churn(self, signature: Signature) -> None:
        hits = self._ledger.retired_hits + sum(entry.hits for entry in list(self._cache.entries.values()))
        if (seen := self._churn.captured(signature, hits)) is not None:
            log.warning(
                "%s: %s", self._ledger.name, seen.advice(self._cache, self._config.capture, arguments_of(self.module))
            )
