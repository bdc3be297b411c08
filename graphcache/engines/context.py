"""Execution contexts: one engine's shapes, addresses and scratch memory for one sequence of calls."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphcache.engines.engine import Engine, keeping_the_current_device
from graphcache.engines.gate import enqueues
from graphcache.errors import EngineExecutionError

is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing if torch.version.cuda else bool

ALIGNMENT = 256
"""TensorRT's documented alignment of bindings, in bytes (``IExecutionContext::setTensorAddress``)."""


@dataclass(frozen=True, slots=True, eq=False)
class LayoutPlan:
    """The profile and the shapes of outputs for inputs of one layout, so that others like them need no inference."""

    profile: int
    output_shapes: list[tuple[int, ...]]


class Context:
    """An execution context over scratch memory of the caller's. Not safe for two threads at once.

    It keeps alive what TensorRT has addresses of: the engine, the scratch memory, host shape tensors, outputs and the
    last inputs. TensorRT's refusals are ``EngineExecutionError``, with what it said in the block of
    :attr:`Engine.collect_errors` that the caller is in.

    The scratch memory has at least ``engine.scratch_bytes`` bytes on the engine's device. Whoever shares it between
    contexts orders their work.
    """

    def __init__(self, engine: Engine, scratch: Tensor) -> None:
        self.engine = engine
        self._context = engine.new_context()
        self._handles = engine.native_handles
        engine.contexts.add(self)
        self._held: dict[str, Tensor] = {}
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, object] = {}
        self.profile = 0
        """The active optimisation profile."""
        self._plan: LayoutPlan | None = None
        self._output_shapes: list[tuple[int, ...] | None] | None = None
        self._allocators = OutputAllocators(engine)
        # A 0-element tensor has no address, and TensorRT wants one.
        self._nowhere = torch.empty(ALIGNMENT, dtype=torch.uint8, device=engine.device)
        self.scratch: Tensor | None = None
        """The scratch memory of the next enqueue."""
        self.use_scratch(scratch)

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None and not sys.is_finalizing():
            with keeping_the_current_device():
                self._context, self._handles = None, ()

    def use_scratch(self, scratch: Tensor) -> None:
        """Work on this scratch memory from the next enqueue on; graphs captured before keep theirs."""
        if scratch is not self.scratch and self.engine.scratch_bytes:
            self._context.set_device_memory(scratch.data_ptr(), scratch.numel())
        self.scratch = scratch

    def report_to(self, profiler: Any) -> None:
        """Let TensorRT report the time of every layer to an ``IProfiler``, which makes each enqueue wait."""
        self._profiler = profiler
        self._context.profiler = profiler

    def set_inputs(self, inputs: Sequence[Tensor], profile: int, stream: int) -> None:
        """Set profile, shapes, addresses and host values for checked inputs."""
        self._plan = None
        if profile != self.profile:
            self._set_profile(profile, stream)
        for binding, value in zip(self.engine.inputs, inputs, strict=True):
            values = None
            if binding.on_host:
                # TensorRT reads it during the enqueue or later: it must outlive the call, and must not change.
                value = value.detach().cpu().contiguous().clone()
                values = tuple(value.flatten().tolist())
            elif not value.is_contiguous() or value.data_ptr() % ALIGNMENT:
                value = value.detach().clone(memory_format=torch.contiguous_format)
            self._held[binding.name] = value
            if self._shapes.get(binding.name) != (value.shape, values):
                self._set_shape(binding.name, value, values)
            self._set_address(binding.name, value)
        if self._output_shapes is None:
            self._output_shapes = self._infer()

    def output_shapes(self) -> list[tuple[int, ...] | None]:
        """The shapes of the outputs for the inputs that were set; ``None`` where only running the engine will tell."""
        return list(self._output_shapes or ())

    def set_outputs(self, outputs: Sequence[Tensor | None]) -> None:
        """Point the outputs at memory; ``None`` lets TensorRT's output allocator allocate that one."""
        for binding, value in zip(self.engine.outputs, outputs, strict=True):
            if value is None:
                self._addresses.pop(binding.name, None)
                self._allocators.install(self._context, binding.name)
            else:
                if binding.name in self._allocators.installed:
                    self._allocators.remove(self._context, binding.name)
                self._held[binding.name] = value
                self._set_address(binding.name, value)

    def enqueue(self, stream: int) -> bool:
        """Enqueue the engine on a stream (a raw handle); ``False`` if TensorRT refused.

        It does not wait for the device, but for a moment for other threads, if one of them enqueues into a capture.
        """
        # A capture is on the current stream: nobody else hands out a stream to capture into.
        enter = enqueues.exclusive if is_capturing() else enqueues.shared
        return bool(enter(self._context.execute_async_v3, stream))

    def plan(self) -> LayoutPlan | None:
        """The plan of the inputs that were set; ``None`` for unknown output shapes, and for bindings on the host."""
        shapes = self._output_shapes or ()
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes) or any(each.on_host for each in (*self.engine.inputs, *self.engine.outputs)):
            return None
        self._plan = LayoutPlan(self.profile, known)
        return self._plan

    def run(self, plan: LayoutPlan, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int) -> None:
        """Enqueue inputs of a known layout outside of captures. TensorRT is told the differences to the last call."""
        with self.engine.collect_errors():
            if plan is not self._plan:
                self._change_plan(plan, inputs, stream)
            for binding, value in zip(self.engine.bindings, [*inputs, *outputs], strict=True):
                if self._addresses.get(binding.name) != value.data_ptr():
                    self._set_address(binding.name, value)
            if not enqueues.shared(self._context.execute_async_v3, stream):
                raise self.refusal()

    def refusal(self) -> EngineExecutionError:
        """The error of an enqueue that TensorRT refused."""
        return EngineExecutionError(f"{self.engine.name}: TensorRT refused to run: {self.engine.said()}")

    def allocated_output(self, name: str) -> Tensor:
        """The output that TensorRT allocated in the last enqueue: a fresh copy, of the shape of this run."""
        return self._allocators.take(name)

    def check_allocated(self) -> None:
        """Raise the error of the output allocator in the last enqueue, if there was one."""
        self._allocators.check()

    def release_references(self) -> None:
        """Drop the references to the last inputs and outputs. Addresses are set again at the next call."""
        self._held = {binding.name: self._held[binding.name] for binding in self.engine.inputs if binding.on_host}

    def _change_plan(self, plan: LayoutPlan, inputs: Sequence[Tensor], stream: int) -> None:
        """Set profile and shapes of another layout. Shapes of outputs are known, so that nothing is inferred."""
        self._plan = None
        if plan.profile != self.profile:
            self._set_profile(plan.profile, stream)
        for binding, value in zip(self.engine.inputs, inputs, strict=True):
            if self._shapes.get(binding.name) != (value.shape, None):
                self._set_shape(binding.name, value, None)
        for name in list(self._allocators.installed):
            self._allocators.remove(self._context, name)
        self._output_shapes = [*plan.output_shapes]
        self._plan = plan

    def _set_profile(self, profile: int, stream: int) -> None:
        """Switch to an optimisation profile, after which every shape has to be set again."""
        if not self._context.set_optimization_profile_async(profile, stream):
            raise self._error(f"optimisation profile {profile} was refused")
        self.profile = profile
        self._output_shapes = None
        self._shapes.clear()

    def _set_shape(self, name: str, value: Tensor, values: object) -> None:
        """Set the shape of an input, after which the shapes of outputs have to be inferred again."""
        if not self._context.set_input_shape(name, tuple(value.shape)):
            raise self._error(f"shape {tuple(value.shape)} of input {name!r} was refused")
        self._shapes[name] = (value.shape, values)
        self._output_shapes = None

    def _set_address(self, name: str, value: Tensor) -> None:
        """Set the address of an input or output, if it differs from the last one."""
        address = value.data_ptr() or self._nowhere.data_ptr()
        if self._addresses.get(name) == address:
            return
        if not self._context.set_tensor_address(name, address):
            raise self._error(f"the address of {name!r} was refused")
        self._addresses[name] = address

    def _infer(self) -> list[tuple[int, ...] | None]:
        """The shapes of the outputs, from TensorRT."""
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._error(f"shapes do not go together ({error})") from error
        if missing:
            raise self._error(f"shapes of {', '.join(missing)} are still unknown")
        shapes = [tuple(self._context.get_tensor_shape(binding.name)) for binding in self.engine.outputs]
        return [None if any(size < 0 for size in shape) else shape for shape in shapes]

    def _error(self, what: str) -> EngineExecutionError:
        return EngineExecutionError(f"{self.engine.name}: {what}; TensorRT says: {self.engine.said()}")


class ContextPool:
    """The idle execution contexts of one engine. It never holds more than were in use at the same time.

    Each context that TensorRT-RTX 1.5.0.114 destroys leaves 0.35 to 0.65 MB of host memory behind, and making one takes
    20 to 80 ms. So the context of a graph that is gone serves the next graph, of whatever shapes. A context that
    failed, or that work may still run on, is dropped instead.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._idle: list[Context] = []

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, scratch: Tensor) -> Context:
        """An idle context, or a new one, over scratch memory as :class:`Context` takes it."""
        try:
            # Atomic: no two threads pop the same one.
            context = self._idle.pop()
        except IndexError:
            return Context(self._engine, scratch)
        context.use_scratch(scratch)
        return context

    def give_back(self, context: Context) -> None:
        """Keep a context whose last work has finished, unless the engine was closed."""
        context.release_references()
        if not self._engine.closed:
            self._idle.append(context)

    def clear(self) -> None:
        """Drop the idle contexts."""
        self._idle.clear()


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
