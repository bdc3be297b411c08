"""What is left of an evicted graph of an engine, and how it becomes one again without a capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.config import graphs_off
from graphcache.errors import Reason, Refusal
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.template import Template
from graphcache.graphs.verify import perturb, verify
from graphcache.modules.engine import EngineModule
from graphcache.modules.record import Build, Recorded, nothing, refill
from graphcache.modules.shared_contexts import Shared, SharedContexts


class Recallable:
    """The template of an evicted graph. It takes no memory of the device but that of the context, which others share.

    The graph was verified when it was captured. As long as its context was used for nothing else since it was evicted,
    it is right as it is; replays of other graphs use none. Otherwise it is verified once more, against the engine's
    eager answers, as nobody has looked at it while others were captured.

    Args:
        module: The engine.
        template: Held until :meth:`close`.
        contexts: Those that the engine's graphs share.
        shared: The one that the graph was captured with.
        build: Makes answers of its outputs.
    """

    def __init__(
        self, module: EngineModule, template: Template, contexts: SharedContexts, shared: Shared, build: Build
    ) -> None:
        template.hold()
        self._module = module
        self._build = build
        self._template = template
        self._contexts = contexts
        self._shared = shared
        # Until now it was looked at whenever the context was used.
        self._uses = shared.uses

    def recall(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, begin: Callable[[], object] = nothing
    ) -> tuple[Any, Recorded]:
        """Answer a call of the graph's signature by the graph, which is one again.

        Args:
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
            begin: Called before anything is allocated; it may raise a :class:`~graphcache.errors.Refusal`.

        Raises:
            Refusal: If the graph answers otherwise than the engine. No context of these graphs is used again then.
            CudaError: If the driver refuses something.
            torch.cuda.OutOfMemoryError: If there is no memory for static buffers.
        """
        module = self._module
        given, _ = module.checked(module.bind(args, kwargs))
        own = [value.detach() for value in given]
        begin()
        with module.lane.lock, torch.cuda.device(module.device), torch.inference_mode(False), torch.no_grad():
            if not self._shared.trusted:
                raise Refusal(Reason.MISMATCH, module.name, "other graphs of its context answered differently")
            # Memory of graphs that were evicted is there for this one.
            module.lane.reap(wait=True)
            module.lane.enter(torch.cuda.current_stream().cuda_stream)
            graph = self._template.again()
            try:
                if self._shared.uses != self._uses:
                    self._verify(graph, own)
                # What it is looked at with when its context is used again.
                refill([slot.buffer for slot in graph.inputs], self._device_only(own))
                recorded = Recorded(graph, self._build, whole=True, bare=len(module.engine.outputs) == 1)
                self._shared.graphs.add(graph)
            except BaseException:
                graph.close(wait=False)
                raise
        try:
            return self._build(recorded.replay(self._device_only(own)), own), recorded
        except BaseException:
            recorded.close(wait=False)
            raise

    def close(self) -> None:
        """Let go of the template."""
        with self._module.lane.lock:
            self._template.let_go()

    def _verify(self, graph: CudaGraph, given: Sequence[Tensor]) -> None:
        module = self._module
        others = [
            value if binding.on_host else other
            for binding, value, other in zip(module.engine.inputs, given, perturb(given), strict=True)
        ]
        expected, expected_others = self._eagerly(given), self._eagerly(others)
        on_device = self._device_only(given), expected, self._device_only(others), expected_others
        try:
            verify(graph, *on_device, where=module.name)
        except Refusal:
            self._contexts.distrust(self._shared)
            raise

    def _eagerly(self, given: Sequence[Tensor]) -> list[Tensor]:
        with graphs_off():
            answer = self._module(*given)
        return [answer] if isinstance(answer, Tensor) else list(answer)

    def _device_only(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [value for index, value in enumerate(values) if index not in self._module.host_inputs]
