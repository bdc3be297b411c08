"""``torch.cuda.make_graphed_callables``, one per shape, in the dictionary that its users write around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from bench import networks
from bench.systems.base import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store


class GraphedCallables(Peer):
    """Inputs are copied in; answers are overwritten by the next call of that shape."""

    name = "graphed-callables"
    kind: ClassVar[Literal["engine", "torch"]] = "torch"
    rival = "graphcache-torch"

    def __init__(self) -> None:
        self._graphed: dict[torch.Size, Any] = {}
        self._module: Any = None

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        module = self._module = networks.on_device(bundle.name, device)
        graphed = self._graphed
        # All its captures are on one stream and use the workspace of cuBLAS that the first one allocates in its own
        # memory; one of an earlier measurement would lie in memory that was given back.
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()

        # A function, since a module would have its forward replaced by the graph of its last shape.
        def forward(*inputs: Tensor) -> Tensor:
            answer: Tensor = module(*inputs)
            return answer

        def call(*inputs: Tensor) -> Tensor:
            shape = inputs[0].shape
            fast = graphed.get(shape)
            if fast is None:
                # The samples become the static inputs.
                samples = tuple(value.clone() for value in inputs)
                fast = graphed[shape] = torch.cuda.make_graphed_callables(forward, samples)
            answer: Tensor = fast(*inputs)
            return answer

        return call

    def misses(self) -> int | None:
        return len(self._graphed)

    def close(self) -> None:
        if self._graphed:
            torch.cuda.synchronize()
        self._graphed.clear()
        self._module = None
