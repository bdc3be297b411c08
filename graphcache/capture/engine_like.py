"""What captures and calls need of a module that runs one engine; ``EngineModule`` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from graphcache.engines.context import Context, ContextPool
from graphcache.engines.engine import Engine
from graphcache.errors import Cause
from graphcache.graphs.stream_order import StreamOrder

_TORCH_TENSORRT = ("PythonTorchTensorRTModule", "TorchTensorRTModule")
"""The classes of Torch-TensorRT whose modules hold one engine each."""


def is_foreign(module: object) -> bool:
    """Whether something is a module of Torch-TensorRT that holds an engine, by the names of its classes."""
    return isinstance(module, nn.Module) and any(each.__name__ in _TORCH_TENSORRT for each in type(module).__mro__)


class EngineLike(nn.Module):
    """A module that runs one TensorRT engine."""

    keeps_its_own_state = True
    """What a call changes here (contexts, buffers) is no state that a replay would leave out."""

    takes_numbers = False
    """Whether numbers may stand for tensors among the arguments; :meth:`bind` makes tensors of them."""

    name: str
    engine: Engine
    contexts: ContextPool
    device: torch.device
    lane: StreamOrder
    users: WeakSet[Any]
    """Wrapped modules that may hold graphs of the engine; each is cleared before it changes."""
    epoch: int
    """Goes up whenever a graph of the engine would no longer do what a call does."""
    input_binding_names: list[str]
    host_inputs: tuple[int, ...]
    """Positions of the inputs whose values TensorRT reads on the host."""

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Inputs in the order of the bindings, from positional and keyword arguments."""
        raise NotImplementedError

    def moved(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs with every tensor on the engine's device, for multi-device safe mode."""
        raise NotImplementedError

    def checked(self, inputs: Sequence[Any]) -> tuple[list[Tensor], int]:
        """Inputs that the engine can take, and the optimisation profile that fits them."""
        raise NotImplementedError

    def forbids_capture(self) -> Cause | None:
        """Why no call of the engine can be captured as things stand; ``None`` if nothing is known."""
        raise NotImplementedError

    def new_outputs(self, context: Context, *, allocator: bool) -> list[Tensor | None]:
        """Memory for the outputs; ``None`` where TensorRT has to allocate."""
        raise NotImplementedError

    def device_only(self, values: Sequence[Any]) -> list[Any]:
        """Of what belongs to each input, that of the inputs that TensorRT reads on the device."""
        return [value for index, value in enumerate(values) if index not in self.host_inputs]

    def with_host_inputs(self, values: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """The inverse of :meth:`device_only`: what is not in ``values`` is taken of ``given``."""
        device = iter(values)
        return [value if index in self.host_inputs else next(device) for index, value in enumerate(given)]
