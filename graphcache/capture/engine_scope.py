"""A capture in progress, as the engines inside the captured module see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from graphcache.capture.engine_like import EngineLike
from graphcache.engines.context import Context
from graphcache.errors import Cause, Refusal
from graphcache.graphs.stream_order import StreamOrder


class EngineScope:
    """Gives every engine call of a captured module a context of its own, which lives as long as the graph.

    The calls are counted, so that the warm-up, the capture and the run on other values find the same context for the
    same call, with its shapes set and its kernels compiled.
    """

    def __init__(self, lane: StreamOrder) -> None:
        self._lane = lane
        self._contexts: list[tuple[EngineLike, Context]] = []
        self._calls = 0
        self.refused: Cause | None = None
        self.in_order = False
        """Whether the graph was found right, so that its contexts may serve others when it is gone."""

    def context_of(self, module: EngineLike) -> Context:
        """The context of the engine call that comes next."""
        index = self._calls
        self._calls += 1
        if index < len(self._contexts) and self._contexts[index][0] is module:
            return self._contexts[index][1]
        scratch: Tensor = self._lane.scratch(module.engine.scratch_bytes)
        context = module.contexts.take(scratch)
        del self._contexts[index:]
        self._contexts.append((module, context))
        return context

    def refusal(self, cause: Cause) -> Refusal:
        """Remember the first cause: the module between may catch the exception, or torch may wrap it."""
        self.refused = self.refused or cause
        return Refusal(cause.reason, cause.where, cause.detail)

    def close(self) -> None:
        """Let other graphs have the contexts: the graph that they were for is gone."""
        contexts, self._contexts = self._contexts, []
        for module, context in contexts if self.in_order else ():
            module.contexts.give_back(context)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Inside, engines find this scope; at the end the first cause that one of them gave is raised."""
        self._calls = 0
        token = current.set(self)
        try:
            yield
        finally:
            current.reset(token)
            if self.refused is not None:
                raise Refusal(self.refused.reason, self.refused.where, self.refused.detail)


current: ContextVar[EngineScope | None] = ContextVar("graphcache_recording", default=None)
