"""Graphs of engines that update inputs in place, such as KV caches: kernels are pointed at the caller's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from graphcache.engines.engine import Engine
from graphcache.graphs.cuda import CudaGraph


def build_updated(engine: Engine, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
    """The answer of an engine that has updated inputs."""
    given: list[Any] = list(inputs)
    for place in engine.host_inputs:
        given.insert(place, None)
    # One that is not aligned was copied: the copy was updated, and nothing of the caller's.
    engine.check_updated(given)
    engine.updated(given)
    answer = all_outputs(engine, outputs, given)
    return answer[0] if len(answer) == 1 else tuple(answer)


def all_outputs(engine: Engine, own: Sequence[Tensor], inputs: Sequence[Any]) -> Sequence[Tensor]:
    """The outputs with memory of their ``own``, and in their places the inputs that the others are."""
    left = iter(own)
    places = range(len(engine.outputs))
    return engine.with_updated([None if place in engine.aliases else next(left) for place in places], inputs)


class OnCopies:
    """A graph that updates copies of inputs, which are outputs like others, so that it can be verified."""

    def __init__(self, graph: CudaGraph, engine: Engine) -> None:
        self._graph, self._engine = graph, engine
        self._updated = dict(zip(engine.aliases, engine.device_places(engine.aliases.values()), strict=True))
        self.close = graph.close

    def poison(self, out: Sequence[Tensor]) -> None:
        self._graph.poison(self._own(out))

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor]) -> list[Tensor]:
        copied = set(self._updated.values())
        given = [each.clone() if place in copied else each for place, each in enumerate(inputs)]
        own = iter(self._graph.replay(given, self._own(out)))
        return [given[self._updated[place]] if place in self._updated else next(own) for place in range(len(out))]

    def _own(self, out: Sequence[Tensor]) -> list[Tensor]:
        return [each for place, each in enumerate(out) if place not in self._updated]
