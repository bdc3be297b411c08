"""Execution contexts: one engine's shapes, addresses and scratch memory for one sequence of calls, and its enqueues."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor

from graphcache.engines.bindings import Binding
from graphcache.engines.engine import ALIGNMENT, Engine, keeping_the_current_device
from graphcache.errors import EngineExecutionError

is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing if torch.version.cuda else bool

_T = TypeVar("_T")

Shapes = list[tuple[int, ...] | None]
"""Of outputs; ``None`` where only running the engine will tell."""

_POLL_SECONDS = 1e-4
"""How often an exclusive caller looks whether the others have left. An enqueue takes 20 to 100 us, a capture 4 ms."""


class EnqueueGate:
    """Runs functions of any number of threads at once, or one exclusively, which goes first.

    TensorRT documents that threads may use different execution contexts at once. TensorRT-RTX 1.5.0.114 crashes when
    one of them enqueues into a capture, even of another engine: in 12 of 14 processes within seconds (H100), and in
    none of 12 in which captures were exclusive.

    Ctrl-C cannot leave the gate occupied. Whoever is inside is an element of a set, and removing it is the first
    operation of a ``finally``; removing what was never added does nothing. Nobody is notified, since Ctrl-C could come
    before the notification: an exclusive caller polls.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        self._inside: set[tuple[int, object]] = set()
        self._exclusive: set[int] = set()

    def shared(self, function: Callable[..., _T], *args: object) -> _T:
        """Call a function while no other thread is in :meth:`exclusive`."""
        token = (get_ident(), object())
        try:
            self._inside.add(token)
            if self._exclusive:
                self._give_way(token)
            return function(*args)
        finally:
            self._inside.discard(token)

    def exclusive(self, function: Callable[..., _T], *args: object) -> _T:
        """Call a function while no other thread is inside."""
        thread = get_ident()
        if thread in self._exclusive:
            return function(*args)
        if self._holds(thread):
            raise RuntimeError("this thread shares the gate already; it cannot have it exclusively before it has left")
        with self._mutex:
            try:
                self._exclusive.add(thread)
                while self._inside:
                    time.sleep(_POLL_SECONDS)
                return function(*args)
            finally:
                self._exclusive.discard(thread)

    def _give_way(self, token: tuple[int, object]) -> None:
        """Wait outside until no exclusive caller is there, unless it is this thread or waits for it."""
        if token[0] in self._exclusive or self._holds(token[0], beside=token):
            return
        while self._exclusive:
            self._inside.discard(token)
            with self._mutex:
                pass
            self._inside.add(token)

    def _holds(self, thread: int, beside: object = None) -> bool:
        """Whether a thread is inside, with another token than ``beside``."""
        return any(each[0] == thread and each is not beside for each in list(self._inside))


enqueues = EnqueueGate()
"""Of the whole process, as the crash is."""
if hasattr(os, "register_at_fork"):
    # Whoever was inside is not in the child.
    os.register_at_fork(after_in_child=enqueues.__init__)  # type: ignore[misc]


class Context:
    """An execution context over scratch memory of the caller's. Not safe for two threads at once.

    It keeps the engine, the scratch memory and its own copies of inputs alive, but not what it was given: inputs and
    outputs have to live until they are enqueued. TensorRT's refusals are ``EngineExecutionError``, with what it said in
    the block of :attr:`Engine.collect_errors` that the caller is in.

    The scratch memory has at least ``engine.scratch_bytes`` bytes on the engine's device. Whoever shares it between
    contexts orders their work.
    """

    def __init__(self, engine: Engine, scratch: Tensor) -> None:
        self.engine = engine
        self._context = engine.new_context()
        self._handles = engine.native_handles
        engine.contexts.add(self)
        self.profile = 0
        """The active optimisation profile."""
        self.copies: list[Tensor] = []
        """Contiguous and aligned copies of inputs of the last call."""
        self._host_values: dict[str, Tensor] = {}
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, object] = {}
        self._output_shapes: Shapes | None = None
        self._allocators: dict[str, Any] = {}
        self._allocated: set[str] = set()
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

    def set_inputs(
        self, inputs: Sequence[Tensor], profile: int, stream: int, output_shapes: Shapes | None = None
    ) -> None:
        """Set profile, shapes, addresses and host values of checked inputs. TensorRT is told what differs.

        Shapes of outputs that are known for these inputs are not inferred.
        """
        self.copies.clear()
        if profile != self.profile:
            if not self._context.set_optimization_profile_async(profile, stream):
                raise self._error(f"optimisation profile {profile} was refused")
            self.profile = profile
            # All have to be set again.
            self._shapes.clear()
        for binding, value in zip(self.engine.inputs, inputs, strict=True):
            name, values = binding.name, None
            if binding.on_host:
                # TensorRT reads it during the enqueue or later: it must outlive the call, and must not change.
                value = self._host_values[name] = value.detach().cpu().contiguous().clone()
                values = tuple(value.flatten().tolist())
            elif not value.is_contiguous() or value.data_ptr() % ALIGNMENT:
                value = value.detach().clone(memory_format=torch.contiguous_format)
                self.copies.append(value)
            if self._shapes.get(name) != (value.shape, values):
                self._output_shapes = self._shapes[name] = None
                if not self._context.set_input_shape(name, tuple(value.shape)):
                    raise self._error(f"shape {tuple(value.shape)} of input {name!r} was refused")
                self._shapes[name] = value.shape, values
            if self._addresses.get(name) != (address := value.data_ptr()):
                self._set_address(name, address)
        if self._output_shapes is None:
            self._output_shapes = output_shapes or self._infer()

    def output_shapes(self) -> Shapes:
        """The shapes of the outputs for the inputs that were set."""
        return list(self._output_shapes or ())

    def set_outputs(self, outputs: Sequence[Tensor | None]) -> None:
        """Point the outputs at memory; ``None`` lets TensorRT's output allocator allocate that one."""
        for binding, value in zip(self.engine.outputs, outputs, strict=True):
            name = binding.name
            if value is None:
                self._allocate(name)
                continue
            if name in self._allocated:
                # In a capture TensorRT would call the allocator and keep its address.
                self._context.set_output_allocator(name, None)
                self._allocated.discard(name)
            if self._addresses.get(name) != (address := value.data_ptr()):
                self._set_address(name, address)

    def enqueue(self, stream: int, *, capturing: bool | None = None) -> bool:
        """Enqueue the engine on a stream (a raw handle); ``False`` if TensorRT refused.

        It does not wait for the device, but for a moment for other threads, if one of them enqueues into a capture.
        ``capturing`` says whether the stream is being captured, for those who know.
        """
        # A capture is on the current stream: nobody else hands out a stream to capture into.
        capturing = is_capturing() if capturing is None else capturing
        return bool((enqueues.exclusive if capturing else enqueues.shared)(self._context.execute_async_v3, stream))

    def refusal(self) -> EngineExecutionError:
        """The error of an enqueue that TensorRT refused, or of an allocation in it."""
        for name in self._allocated:
            error = self._allocators[name].error
            if error is not None and not isinstance(error, Exception):
                # Ctrl-C, which TensorRT could not pass on.
                raise error
            if error is not None:
                raise EngineExecutionError(f"{self.engine.name}: no memory for output {name!r}: {error}") from error
        return EngineExecutionError(f"{self.engine.name}: TensorRT refused to run: {self.engine.said()}")

    def allocated_output(self, binding: Binding) -> Tensor:
        """The output that TensorRT allocated in the last enqueue: a fresh copy, of the shape of this run."""
        allocator = self._allocators[binding.name]
        if allocator.error is not None:
            raise self.refusal()
        if allocator.shape is None:
            raise EngineExecutionError(
                f"{self.engine.name}: TensorRT did not tell the shape of output {binding.name!r}"
            )
        nbytes = math.prod(allocator.shape) * binding.dtype.itemsize
        fresh = torch.empty(allocator.shape, dtype=binding.dtype, device=self.engine.device)
        if nbytes:
            fresh.view(-1).view(torch.uint8).copy_(allocator.buffer[:nbytes])
        return fresh

    def _allocate(self, name: str) -> None:
        """Have TensorRT allocate an output in the next enqueue."""
        allocator = self._allocators.get(name)
        if allocator is None:
            allocator = self._allocators[name] = _allocator_class(self.engine.trt)(self.engine.device)
        allocator.start()
        if name not in self._allocated:
            self._context.set_output_allocator(name, allocator)
            self._allocated.add(name)
        self._addresses.pop(name, None)

    def _set_address(self, name: str, address: int) -> None:
        """Set the address of an input or output."""
        self._addresses.pop(name, None)
        if not self._context.set_tensor_address(name, address or self._nowhere.data_ptr()):
            raise self._error(f"the address of {name!r} was refused")
        self._addresses[name] = address

    def _infer(self) -> Shapes:
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

    def give_back(self, *contexts: Context) -> None:
        """Keep contexts whose last work has finished, unless the engine was closed."""
        for context in contexts:
            context.copies.clear()
            if not self._engine.closed:
                self._idle.append(context)

    def clear(self) -> None:
        """Drop the idle contexts."""
        self._idle.clear()


@cache
def _allocator_class(trt: Any) -> type:
    """An ``IOutputAllocator`` of a flavour of TensorRT. Its buffer grows when TensorRT asks for more, never shrinks."""

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
