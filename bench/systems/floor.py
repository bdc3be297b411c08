"""The floor: launching graphs that were captured by hand, one per shape, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from bench import networks, raw
from bench.systems.base import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store


class Floor(Peer):
    """``cuGraphLaunch`` of a graph per shape; inputs and outputs stay where they are."""

    name = "raw"
    exact = True

    def __init__(self) -> None:
        self._calls: dict[tuple[torch.Size, ...], Any] = {}
        self._graphs: dict[tuple[torch.Size, ...], raw.Launchable] = {}
        self._module: Any = None
        self._scratch: Any = None

    @property
    def nodes(self) -> list[int]:
        """How many nodes each graph has, in the order of the first calls."""
        return [graph.nodes for graph in self._graphs.values()]

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        self._module = self._ready(bundle, device)

        def call(*inputs: Tensor) -> Tensor:
            shapes = tuple(value.shape for value in inputs)
            if shapes not in self._graphs:
                self._calls[shapes], self._graphs[shapes] = self._capture(inputs)
            recorded = self._calls[shapes]
            for static, value in zip(recorded.inputs, inputs, strict=True):
                static.copy_(value)
            # A launch that did nothing would otherwise be seen to give the last answer.
            recorded.outputs[0].fill_(float("nan"))
            self._graphs[shapes].launch()
            return recorded.outputs[0]

        return call

    def timed(self, inputs: Sequence[Tensor]) -> Callable[[], object] | None:
        return self._graphs[tuple(value.shape for value in inputs)].launch

    def misses(self) -> int | None:
        return len(self._graphs)

    def close(self) -> None:
        if self._graphs:
            torch.cuda.synchronize()
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._calls.clear()
        if hasattr(self._module, "close"):
            self._module.close()
        self._module = self._scratch = None

    def _ready(self, bundle: store.Bundle, device: torch.device) -> Any:
        import graphcache

        module = graphcache.EngineModule(bundle.engine.read_bytes(), bundle.inputs, name=bundle.name)
        self._scratch = torch.empty(max(module.engine.scratch_bytes, 1), dtype=torch.uint8, device=device)
        return module

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[Any, raw.Launchable]:
        recorded = raw.Recorded(self._module, inputs, self._scratch)
        return recorded, raw.driver_graph(recorded)


class TorchFloor(Floor):
    """The same for the torch network: captured by PyTorch, launched by the driver."""

    name = "raw-torch"
    kind: ClassVar[Literal["engine", "torch"]] = "torch"

    def _ready(self, bundle: store.Bundle, device: torch.device) -> Any:
        return networks.on_device(bundle.name, device)

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[Any, raw.Launchable]:
        recorded = raw.RecordedModule(self._module, inputs)
        return recorded, recorded.graph()
