"""What is written where no package is used: copy the inputs in, replay a graph of PyTorch's, clone the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from bench import networks, raw
from bench.systems.base import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store


class ByHand(Peer):
    """One graph for each shape, in a dictionary; nothing is checked."""

    name = "by-hand"
    kind: ClassVar[Literal["engine", "torch"]] = "torch"
    rival = "graphcache-torch"

    def __init__(self) -> None:
        self._recorded: dict[torch.Size, raw.RecordedModule] = {}
        self._module: Any = None

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        module = self._module = networks.on_device(bundle.name, device)
        graphs = self._recorded

        def call(*inputs: Tensor) -> Tensor:
            shape = inputs[0].shape
            recorded = graphs.get(shape)
            if recorded is None:
                recorded = graphs[shape] = raw.RecordedModule(module, inputs)
            for static, value in zip(recorded.inputs, inputs, strict=True):
                static.copy_(value)
            recorded.replay()
            return recorded.outputs[0].clone()

        return call

    def misses(self) -> int | None:
        return len(self._recorded)

    def close(self) -> None:
        if self._recorded:
            torch.cuda.synchronize()
        self._recorded.clear()
        self._module = None
