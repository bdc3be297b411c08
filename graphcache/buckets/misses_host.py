"""The dispatcher of a module as padding sees it."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from graphcache.buckets.bucketed import Bucketed
from graphcache.buckets.host import Key, Run
from graphcache.cache.lru import Entry
from graphcache.cache.seen import Seen
from graphcache.cache.signature import describe
from graphcache.capture.effects import Effects
from graphcache.config import graphs_off
from graphcache.errors import Cause
from graphcache.events import QuietLock, log
from graphcache.features import NO_ANSWER
from graphcache.keys.call import Call
from graphcache.modules.engine import EngineModule
from graphcache.modules.later import Later
from graphcache.modules.misses import STALE, Hit, Misses
from graphcache.modules.record import Recorded
from graphcache.modules.record_torch import TorchRecorder


class MissesHost:
    """A :class:`~graphcache.buckets.host.Host` made of the parts of a wrapped module.

    Args:
        misses: Captures and runs calls.
        entries: The graphs that are there.
        seen: Counts calls by their shapes.
        hit: A method of the wrapped module that replays a graph; the module is not kept alive.
    """

    def __init__(self, misses: Misses, entries: Mapping[Any, Entry[Recorded]], seen: Seen, hit: Hit) -> None:
        self._misses = misses
        self._entries = entries
        self._seen = seen
        self._hit = weakref.WeakMethod(hit)
        engine = misses.module if isinstance(misses.module, EngineModule) else None
        self._host_values = len(engine.host_inputs) if engine is not None else 0

    @property
    def module(self) -> nn.Module:
        return self._misses.module

    @property
    def lock(self) -> QuietLock:
        return self._misses.lock

    @property
    def version(self) -> int:
        return self._misses.version

    @property
    def generation(self) -> int:
        return self._misses.generation

    @property
    def in_background(self) -> bool:
        return self._misses.captures_beside

    def refuses(self, call: Call) -> Cause | None:
        if (cause := self._misses.needs_grad(call.tensors)) is None:
            self._misses.refresh(call.key[0] is not False)
        return cause

    def alike(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        key, tensors = describe(args, kwargs)
        # The values of host shape tensors follow in the keys of engines.
        return Call((*key, *call.key[len(call.key) - self._host_values :]), tensors, args, kwargs)

    def has_graph(self, key: Key) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.graph.version == self._misses.version

    def replay(self, call: Call) -> Any:
        entry, hit = self._entries.get(call.key), self._hit()
        if entry is None or hit is None or entry.graph.version != self._misses.version:
            return NO_ANSWER
        answer = hit(entry, call.tensors, call.key[0] is not False)
        if answer is STALE:
            return NO_ANSWER
        # The caller's call was noted by its own sizes.
        self._seen.note(call.key, call.args, call.kwargs, -1)
        return answer

    def capture(self, call: Call) -> Any:
        # No caller made it, but hits of such calls are to be known by their sizes.
        self._seen.note(call.key, call.args, call.kwargs, 0)
        return self._misses.answer(*call, self._hit() or _no_hit, admitted=True)

    def denied(self, key: Key) -> Cause | None:
        return self._misses.blocked(key)

    def cold(self, call: Call) -> Cause | None:
        return self._misses.cold_cause(*call)

    def capture_later(self, call: Call, effects: Effects) -> None:
        self._misses.capture_alike(effects, *call)

    def eager(self, call: Call, cause: Cause, owed: Key | None = None) -> Any:
        if owed is None:
            return self._misses.eagerly(cause, call.args, call.kwargs)
        return self._misses.timed(cause, owed, call.args, call.kwargs)

    def tell(self, cause: Cause) -> None:
        self._misses.tell(cause)

    def observe(self, call: Call) -> Effects:
        if not isinstance(self._misses.recorder, TorchRecorder):
            with graphs_off():
                return Effects(self._misses.run(*call.args, **call.kwargs))
        found: list[Effects] = []
        answer, cause = self._misses.observed(call.tensors, call.args, call.kwargs, found.append, _nothing)
        if not found:
            return Effects(answer, cause)
        found[0].value = answer
        return found[0]

    def runner(self, effects: Effects, *, alone: bool) -> Run:
        misses, recorder = self._misses, self._misses.recorder
        if not isinstance(recorder, TorchRecorder):
            return self._charged(misses.run)
        again = recorder.again(effects.version, misses.gate.exclusive if alone else nullcontext)

        def run(*args: Any, **kwargs: Any) -> Any:
            answer = again(*args, **kwargs) if alone else misses.gate.run(again, *args, **kwargs)
            recorder.check_unchanged(effects.version)
            return answer

        return self._charged(run)

    def submit(self, call: Call, job: Callable[[Call], None], done: Callable[[], None]) -> Cause | None:
        misses = self._misses

        def work(later: Later) -> None:
            try:
                if not later.cancelled:
                    later.thread = threading.current_thread()
                    later.run(lambda: job(Call(later.signature, later.inputs, later.args, later.kwargs)))
            except Exception as error:
                # The module refuses such arguments; whoever gives them again will see it.
                log.debug("a call was not tried with padding: %s", error)
            finally:
                done()
                misses.drop(later)

        cause = misses.beside(work, *call, dropped=done)
        if cause is None:
            done()
        return cause

    def _charged(self, run: Run) -> Run:
        """Runs that count as time spent for graphs."""

        def charged(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self._misses.admission.charge(time.perf_counter() - start)

        return charged


def padding_of(option: Any, misses: Misses, entries: Mapping[Any, Entry[Recorded]], seen: Seen, hit: Hit) -> Bucketed:
    """What pads the calls of one module.

    Raises:
        ConfigError: Naming the field, for buckets that the module cannot have.
    """
    return Bucketed(option, MissesHost(misses, entries, seen, hit))


def _no_hit(entry: Entry[Recorded], inputs: Any, grad: bool) -> Any:
    """Stands for the method of a wrapped module that is gone."""
    return STALE


def _nothing(cause: Cause) -> None:
    """Whoever observes a call refuses its bucket."""
