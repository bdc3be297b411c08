"""Memory for the outputs of an engine whose shape only running it tells."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphcache.engines.engine import Engine
from graphcache.errors import EngineExecutionError


class OutputAllocators:
    """Memory for outputs whose shape only running tells. A buffer grows when TensorRT asks for more, never shrinks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._allocators: dict[str, Any] = {}
        self.installed: set[str] = set()
        """Outputs that TensorRT allocates in the next enqueue."""

    def install(self, context: Any, name: str) -> None:
        """Allocate the memory of an output of a TensorRT context from its next enqueue on."""
        allocator = self._allocators.get(name)
        if allocator is None:
            allocator = self._allocators[name] = _allocator_class(self._engine.trt)(self._engine.device)
        allocator.start()
        if name not in self.installed:
            context.set_output_allocator(name, allocator)
            self.installed.add(name)

    def remove(self, context: Any, name: str) -> None:
        """Return to an address of the caller's: in a capture TensorRT would call the allocator and keep its address."""
        if name in self.installed:
            context.set_output_allocator(name, None)
            self.installed.discard(name)

    def check(self) -> None:
        """Raise the error of an allocation in the last run, also a Ctrl-C, which TensorRT could not pass on."""
        for name in self.installed:
            error = self._allocators[name].error
            if error is not None and not isinstance(error, Exception):
                raise error
            if error is not None:
                raise EngineExecutionError(f"{self._engine.name}: no memory for output {name!r}: {error}") from error

    def take(self, name: str) -> Tensor:
        """A copy of an output in the shape that TensorRT reported, on the current stream."""
        self.check()
        allocator = self._allocators[name]
        if allocator.shape is None:
            raise EngineExecutionError(f"{self._engine.name}: TensorRT did not tell the shape of output {name!r}")
        dtype = next(binding.dtype for binding in self._engine.outputs if binding.name == name)
        nbytes = math.prod(allocator.shape) * dtype.itemsize
        fresh = torch.empty(allocator.shape, dtype=dtype, device=self._engine.device)
        if nbytes:
            fresh.view(-1).view(torch.uint8).copy_(allocator.buffer[:nbytes])
        return fresh


@cache
def _allocator_class(trt: Any) -> type:
    """An ``IOutputAllocator`` of a flavour of TensorRT."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        """Called by TensorRT, into which nothing may be raised: an error is kept, and null is returned."""

        def __init__(self, device: torch.device) -> None:
            trt.IOutputAllocator.__init__(self)
            self.device = device
            self.buffer: Tensor | None = None
            self.start()

        def start(self) -> None:
            """Forget the last run's shape and error; the memory stays."""
            self.shape: tuple[int, ...] | None = None
            self.error: BaseException | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int | None:
            return self.reallocate_output_async(tensor_name, memory, size, alignment, 0)

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int | None:
            try:
                if self.buffer is None or self.buffer.numel() < size:
                    grown = max(size, 2 * self.buffer.numel() if self.buffer is not None else 0, 256)
                    self.buffer = torch.empty(grown, dtype=torch.uint8, device=self.device)
                return self.buffer.data_ptr()
            except BaseException as error:
                self.error = error
                return None

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(int(size) for size in shape)

    return Allocator
