"""The dispatcher of a module as padding sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from graphcache.buckets.advisor import Advice, advise_buckets
from graphcache.buckets.bucketed import Bucketed
from graphcache.buckets.host import Key, Run
from graphcache.capture.effects import Effects
from graphcache.config import graphs_off
from graphcache.dispatch.call_snapshot import CallSnapshot
from graphcache.dispatch.dispatcher import STALE, Dispatcher
from graphcache.dispatch.targets import ModuleTarget
from graphcache.errors import Cause
from graphcache.events import QuietLock, log
from graphcache.features import NO_ANSWER
from graphcache.keys.call import KeyedCall


class DispatcherHost:
    """A :class:`~graphcache.buckets.host.Host` made of the dispatcher of a wrapped module.

    Args:
        dispatcher: Captures and runs calls.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._captures = dispatcher.captures

    @property
    def module(self) -> nn.Module:
        return self._dispatcher.target.module

    @property
    def lock(self) -> QuietLock:
        return self._captures.lock

    @property
    def version(self) -> int:
        return self._captures.version

    @property
    def generation(self) -> int:
        return self._captures.generation

    @property
    def in_background(self) -> bool:
        return self._dispatcher.config.capture_in == "background"

    def refuses(self, call: KeyedCall) -> Cause | None:
        if (cause := self._captures.needs_grad(call.tensors)) is None:
            self._dispatcher.refresh()
        return cause

    def alike(self, call: KeyedCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeyedCall:
        return self._dispatcher.target.describe(args, kwargs)

    def has_graph(self, key: Key) -> bool:
        return self._captures.is_current(key)

    def replay(self, call: KeyedCall) -> Any:
        entry = self._dispatcher.entry_of(call)
        answer = STALE if entry is None else self._dispatcher.replay(entry, call)
        if answer is STALE:
            return NO_ANSWER
        # The caller's call was noted by its own sizes.
        self._dispatcher.captures.keys.note(call.key, call.args, call.kwargs, -1)
        return answer

    def capture(self, call: KeyedCall) -> Any:
        # No caller made it, but hits of such calls are to be known by their sizes.
        self._dispatcher.captures.keys.note(call.key, call.args, call.kwargs, 0)
        return self._dispatcher.answer(call, admitted=True)

    def denied(self, key: Key) -> Cause | None:
        return self._captures.keys.denial(key, self.version)

    def cold(self, call: KeyedCall) -> Cause | None:
        return self._dispatcher.admit(call)

    def capture_later(self, call: KeyedCall, effects: Effects) -> None:
        self._dispatcher.queue.submit_like(effects, call)

    def eager(self, call: KeyedCall, cause: Cause, owed: Key | None = None) -> Any:
        if owed is None:
            return self._dispatcher.eager(cause, call.args, call.kwargs)
        return self._dispatcher.not_yet(cause, call._replace(key=owed))

    def tell(self, cause: Cause) -> None:
        self._dispatcher.tell(cause)

    def observe(self, call: KeyedCall) -> Effects:
        if self._dispatcher.target.is_engine:
            with graphs_off():
                return Effects(self._dispatcher.run(*call.args, **call.kwargs))
        found: list[Effects] = []
        answer, cause = self._dispatcher.queue.run_observed(call, found.append, _nothing)
        if not found:
            return Effects(answer, cause)
        found[0].value = answer
        return found[0]

    def runner(self, effects: Effects, *, alone: bool) -> Run:
        target, gate = self._dispatcher.target, self._dispatcher.gate
        if not isinstance(target, ModuleTarget):
            return self._charged(target.run)
        recorder = target.torch_recorder
        again = recorder.again(effects.version, gate.exclusive if alone else nullcontext)

        def run(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if alone else gate.shared():
                answer = again(*args, **kwargs)
            recorder.check_unchanged(effects.version)
            return answer

        return self._charged(run)

    def submit(self, call: KeyedCall, job: Callable[[KeyedCall], None], done: Callable[[], None]) -> Cause | None:
        def work(snapshot: CallSnapshot) -> None:
            try:
                snapshot.run(lambda: job(snapshot.call))
            except Exception as error:
                # The module refuses such arguments; whoever gives them again will see it.
                log.debug("a call was not tried with padding: %s", error)
            finally:
                done()

        cause = self._dispatcher.queue.submit(work, call, dropped=done)
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
                self._captures.admission.charge(time.perf_counter() - start)

        return charged


def padding_of(option: Any, dispatcher: Dispatcher) -> Bucketed:
    """What pads the calls of one module."""
    return Bucketed(option, DispatcherHost(dispatcher))


def advise(dispatcher: Dispatcher, trace: Any, most: Any, *, argument: Any) -> Advice:
    """Buckets for one argument of a wrapped module; see :func:`~graphcache.buckets.advisor.advise_buckets`."""
    hits = {key: entry.hits for key, entry in list(dispatcher.entries.items())}
    shapes = dispatcher.captures.keys.shapes(hits)
    return advise_buckets(dispatcher.target.module, dispatcher.ledger.name, shapes, argument, trace, most)


def _nothing(cause: Cause) -> None:
    """Whoever observes a call refuses its bucket."""
