"""Execution contexts: one engine's shapes, addresses and scratch memory for one sequence of calls, and its enqueues."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor

from graphcache.engines.engine import Engine, keeping_the_current_device
from graphcache.engines.output_allocators import OutputAllocators
from graphcache.errors import EngineExecutionError

is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing if torch.version.cuda else bool

_T = TypeVar("_T")

ALIGNMENT = 256
"""TensorRT's documented alignment of bindings, in bytes (``IExecutionContext::setTensorAddress``)."""

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
