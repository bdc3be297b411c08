"""What is left of an evicted graph of an engine, and how it becomes one again without a capture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graphcache.config import graphs_off
from graphcache.errors import Reason, Refusal
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.template import Template
from graphcache.graphs.verify import perturb, verify
from graphcache.modules.conditions import several_devices
from graphcache.modules.engine import EngineModule
from graphcache.modules.record import Build, Recorded, refill
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

    def recall(self, inputs: Sequence[Tensor]) -> tuple[Any, Recorded]:
        """Answer a call of the graph's signature by the graph, which is one again.

        Args:
            inputs: The tensors among the call's arguments, as the signature orders them.

        Raises:
            Refusal: If the graph answers otherwise than the engine. No context of these graphs is used again then.
            CudaError: If the driver refuses something.
            torch.cuda.OutOfMemoryError: If there is no memory for static buffers.
        """
        module = self._module
        with module.lane.lock, _on(module.device), torch.no_grad():
            if not self._shared.trusted:
                raise Refusal(Reason.MISMATCH, module.name, "other graphs of its context answered differently")
            # Memory of graphs that were evicted is there for this one.
            module.lane.reap(wait=True)
            module.lane.enter(torch.cuda.current_stream().cuda_stream)
            graph = self._template.again()
            try:
                if self._shared.uses != self._uses:
                    self._verify(graph, inputs)
                recorded = Recorded(graph, self._build, whole=True, bare=len(module.engine.outputs) == 1)
                # What it is looked at with when its context is used again.
                refill([slot.buffer for slot in graph.inputs], module.device_only(inputs))
                self._shared.add(graph, given=True)
            except BaseException:
                graph.close(wait=False)
                raise
        try:
            return self._build(recorded.replay(module.device_only(inputs)), inputs), recorded
        except BaseException:
            recorded.close(wait=False)
            raise

    def close(self) -> None:
        """Let go of the template."""
        with self._module.lane.lock:
            self._template.let_go()

    def _verify(self, graph: CudaGraph, inputs: Sequence[Tensor]) -> None:
        module = self._module
        with torch.inference_mode(False):
            given = [value.detach() for value in inputs]
            others = perturbed(module, given, given)
            expected, expected_others = self._eagerly(given), self._eagerly(others)
            on_device = module.device_only(given), expected, module.device_only(others), expected_others
            try:
                verify(graph, *on_device, where=module.name)
            except Refusal:
                self._contexts.distrust(self._shared)
                raise

    def _eagerly(self, given: Sequence[Tensor]) -> list[Tensor]:
        # Past hooks on the engine, which are no part of a graph of it.
        with graphs_off():
            answer = self._module.forward(*given)
        return [answer] if isinstance(answer, Tensor) else list(answer)


def perturbed(module: EngineModule, given: Sequence[Tensor], static: Sequence[Tensor]) -> list[Tensor]:
    """Other values for an engine's inputs, to verify with; those that are read on the host stay as they are given."""
    return [
        value if binding.on_host else other
        for binding, value, other in zip(module.engine.inputs, given, perturb(static), strict=True)
    ]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """A block in which a device is the current one, which a single device is anyway."""
    return torch.cuda.device(device) if several_devices() else nullcontext()
