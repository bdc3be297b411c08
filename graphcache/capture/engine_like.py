"""What captures and calls need of a module that runs one engine, and what such a module sees of a capture around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from graphcache.engines.context import Context, ContextPool
from graphcache.engines.engine import Engine
from graphcache.errors import Cause, Refusal
from graphcache.graphs.stream_order import StreamOrder

_TORCH_TENSORRT = ("PythonTorchTensorRTModule", "TorchTensorRTModule")
"""The classes of Torch-TensorRT whose modules hold one engine each."""


def is_foreign(module: object) -> bool:
    """Whether something is a module of Torch-TensorRT that holds an engine, by the names of its classes."""
    kind = type(module)
    return issubclass(kind, nn.Module) and any(each.__name__ in _TORCH_TENSORRT for each in kind.__mro__)


class EngineLike(nn.Module):
    """A module that runs one TensorRT engine; ``EngineModule``, which is one, describes what it has."""

    keeps_its_own_state = True
    """What a call changes here (contexts, buffers) is no state that a replay would leave out."""
    takes_numbers = False
    """Whether numbers may stand for tensors among the arguments; :meth:`bind` makes tensors of them."""

    name: str
    engine: Engine
    contexts: ContextPool
    device: torch.device
    order: StreamOrder
    users: WeakSet[Any]
    """Wrapped modules that may hold graphs of the engine; each is cleared before it changes."""
    epoch: int
    """Goes up whenever a graph of the engine would no longer do what a call does."""
    input_binding_names: list[str]
    host_inputs: tuple[int, ...]
    """Positions of the inputs whose values TensorRT reads on the host."""
    bind: Callable[[Sequence[Any], dict[str, Any]], list[Any]]
    moved: Callable[[Sequence[Any]], list[Any]]
    checked: Callable[[Sequence[Any]], tuple[list[Tensor], int]]
    forbids_capture: Callable[[], Cause | None]

    def check_open(self) -> None:
        """Raise a ``ClosedError`` if the engine was closed."""
        self.engine.check_open()


alive: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""The engine modules of this process. Each has ``lies_at``, which compares the address of its bytes."""


def traced_engines(module: nn.Module) -> list[Any]:
    """The modules of this process whose engines a traced program runs, which it holds as constants."""
    engines = list(alive.values())
    if not engines:
        return []
    # An engine's module refers to its bytes itself, which its deep copies share.
    places = {
        (tensor.data_ptr(), tensor.numel())
        for each in module.modules()
        if not isinstance(each, EngineLike)
        for tensor in (*each.__dict__.values(), *each._buffers.values())
        if type(tensor) is Tensor and tensor.dtype is torch.uint8 and tensor.device.type == "cpu"
    }
    return [each for each in engines if any(map(each.lies_at, places))]


class EngineScope:
    """A capture in progress. Every engine call in it gets a context of its own, which lives as long as the graph.

    The calls are counted, so that the warm-up, the capture and the run on other values find the same context for the
    same call, with its shapes set and its kernels compiled.
    """

    def __init__(self, order: StreamOrder) -> None:
        self._order = order
        self._contexts: list[tuple[EngineLike, Context]] = []
        self._calls = 0
        self._refused: Cause | None = None
        self.in_order = False
        """Whether the graph was found right, so that its contexts may serve others when it is gone."""

    def context_of(self, module: EngineLike) -> Context:
        """The context of the engine call that comes next."""
        index = self._calls
        self._calls += 1
        if index < len(self._contexts) and self._contexts[index][0] is module:
            return self._contexts[index][1]
        context = module.contexts.take(self._order.scratch(module.engine.scratch_bytes))
        del self._contexts[index:]
        self._contexts.append((module, context))
        return context

    def refusal(self, cause: Cause) -> Refusal:
        """Remember the first cause: the module between may catch the exception, or torch may wrap it."""
        self._refused = self._refused or cause
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
        token = current_scope.set(self)
        try:
            yield
        finally:
            current_scope.reset(token)
            if self._refused is not None:
                raise Refusal(self._refused.reason, self._refused.where, self._refused.detail)


current_scope: ContextVar[EngineScope | None] = ContextVar("graphcache_recording", default=None)
