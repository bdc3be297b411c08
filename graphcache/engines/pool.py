"""Execution contexts that are used again, as TensorRT does not give back all that one takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from graphcache.engines.context import Context

if TYPE_CHECKING:
    from graphcache.engines.engine import Engine


class ContextPool:
    """The idle execution contexts of one engine. It never holds more than were in use at the same time.

    Each context that TensorRT-RTX 1.5.0.114 destroys leaves 0.35 to 0.65 MB of host memory behind, and making one takes
    20 to 80 ms. So the context of a graph that is gone serves the next graph, of whatever shapes.

    Only for contexts in good order: one that failed, or that work may still run on, is dropped instead.

    Args:
        engine: Whose contexts these are.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._idle: list[Context] = []

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, scratch: Tensor) -> Context:
        """A context of nobody else's, on the given scratch memory.

        Args:
            scratch: As :class:`~graphcache.engines.context.Context` takes it.

        Raises:
            EngineExecutionError: If there is no idle one and TensorRT cannot make one.
        """
        try:
            # Taken by one thread, whichever comes first.
            context = self._idle.pop()
        except IndexError:
            return Context(self._engine, scratch)
        context.use_scratch(scratch)
        return context

    def give_back(self, context: Context) -> None:
        """Keep a context whose last work has finished, unless the engine was closed."""
        context.let_go()
        if not self._engine.closed:
            self._idle.append(context)

    def clear(self) -> None:
        """Drop the idle contexts."""
        self._idle.clear()
