"""Execution contexts: one engine's shapes, addresses and scratch memory for one line of work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphcache.engines.allocator import GrowingOutputs
from graphcache.engines.engine import keeping_the_current_device
from graphcache.engines.gate import enqueues
from graphcache.engines.library import join_messages
from graphcache.errors import EngineExecutionError

if TYPE_CHECKING:
    from graphcache.engines.engine import Engine

is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing if torch.version.cuda else bool

ALIGNMENT = 256
"""TensorRT's documented alignment of bindings, in bytes (``IExecutionContext::setTensorAddress``)."""


class Context:
    """An execution context over scratch memory of the caller's.

    It keeps alive what TensorRT was given addresses of: the engine, the scratch memory, host shape tensors and the last
    inputs that had to be copied. Not safe for two threads at once.

    Args:
        engine: The engine.
        scratch: At least ``engine.scratch_bytes`` bytes on the engine's device. Whoever shares it between contexts
            orders their work.

    Raises:
        EngineExecutionError: If TensorRT cannot make one.
    """

    def __init__(self, engine: Engine, scratch: Tensor) -> None:
        self.engine = engine
        self._context = engine.new_context()
        self._parts = engine.parts
        engine.contexts.add(self)
        self._held: dict[str, Tensor] = {}
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, object] = {}
        self._profile = 0
        self._output_shapes: list[tuple[int, ...] | None] | None = None
        self._growing = GrowingOutputs(engine)
        # A 0-element tensor has no address, and TensorRT wants one.
        self._nowhere = torch.empty(ALIGNMENT, dtype=torch.uint8, device=engine.device)
        self._scratch: Tensor | None = None
        self.use_scratch(scratch)

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None and not sys.is_finalizing():
            with keeping_the_current_device():
                self._context, self._parts = None, ()

    def use_scratch(self, scratch: Tensor) -> None:
        """Work on this scratch memory from the next enqueue on; graphs captured before keep theirs.

        Args:
            scratch: At least ``engine.scratch_bytes`` bytes on the engine's device.
        """
        if scratch is not self._scratch and self.engine.scratch_bytes:
            self._context.set_device_memory(scratch.data_ptr(), scratch.numel())
        self._scratch = scratch

    @property
    def scratch(self) -> Tensor | None:
        """What the next enqueue works on."""
        return self._scratch

    def report_to(self, profiler: Any) -> None:
        """Let TensorRT report the time of every layer to an ``IProfiler``, which makes each enqueue wait.

        Args:
            profiler: Kept alive with the context.
        """
        self._profiler = profiler
        self._context.profiler = profiler

    @property
    def profile(self) -> int:
        """The active optimisation profile."""
        return self._profile

    def set_inputs(self, inputs: Sequence[Tensor], profile: int, stream: int) -> None:
        """Set profile, shapes, addresses and host values for checked inputs.

        Args:
            inputs: In the order of the engine's inputs. Those that are not contiguous or not 256-byte aligned are
                copied, on the current stream.
            profile: The optimisation profile that fits them.
            stream: Where the profile switch is enqueued, a raw handle; the next enqueue must be on it too.

        Raises:
            EngineExecutionError: If TensorRT refuses one of them.
        """
        with self.engine.collect_errors() as said:
            if profile != self._profile:
                if not self._context.set_optimization_profile_async(profile, stream):
                    raise self._error(f"optimisation profile {profile} was refused", said)
                self._profile = profile
                self._output_shapes = None
                self._shapes.clear()
            for binding, value in zip(self.engine.inputs, inputs, strict=True):
                name = binding.name
                if binding.on_host:
                    # TensorRT reads it during the enqueue, and only TensorRT knows how late: it must outlive the call.
                    value = value.detach().cpu().contiguous().clone()
                elif not value.is_contiguous() or value.data_ptr() % ALIGNMENT:
                    value = value.detach().clone(memory_format=torch.contiguous_format)
                self._held[name] = value
                told = tuple(value.flatten().tolist()) if binding.on_host else None
                if self._shapes.get(name) != (value.shape, told):
                    if not self._context.set_input_shape(name, tuple(value.shape)):
                        raise self._error(f"shape {tuple(value.shape)} of input {name!r} was refused", said)
                    self._shapes[name] = (value.shape, told)
                    self._output_shapes = None
                self._address(name, value, said)
            if self._output_shapes is None:
                self._output_shapes = self._infer(said)

    def output_shapes(self) -> list[tuple[int, ...] | None]:
        """The shapes of the outputs for the inputs that were set; ``None`` where only running the engine will tell."""
        return list(self._output_shapes or ())

    def set_outputs(self, outputs: Sequence[Tensor | None]) -> None:
        """Point the outputs at memory; ``None`` installs the growing allocator for that one.

        Raises:
            EngineExecutionError: If TensorRT refuses one of them.
        """
        with self.engine.collect_errors() as said:
            for binding, value in zip(self.engine.outputs, outputs, strict=True):
                if value is None:
                    self._addresses.pop(binding.name, None)
                    self._growing.install(self._context, binding.name)
                else:
                    self._growing.remove(self._context, binding.name)
                    self._held[binding.name] = value
                    self._address(binding.name, value, said)

    def enqueue(self, stream: int) -> bool:
        """Enqueue the engine on a stream (a raw handle); ``False`` if TensorRT refused.

        It does not wait for the device, but for a moment for other threads, if one of them enqueues into a capture.
        """
        # A capture is on the current stream: nobody else hands out a stream to capture into.
        enter = enqueues.exclusive if is_capturing() else enqueues.shared
        return bool(enter(self._context.execute_async_v3, stream))

    def grown_output(self, name: str) -> Tensor:
        """What the growing allocator holds for an output after an enqueue: a fresh copy, of the shape of this run.

        Raises:
            EngineExecutionError: If TensorRT never asked for the memory, or there was none.
        """
        return self._growing.take(name)

    def check_grown(self) -> None:
        """Raise what went wrong while TensorRT asked the growing allocator for memory, if anything did.

        Raises:
            EngineExecutionError: If there was no memory.
        """
        self._growing.check()

    def let_go(self) -> None:
        """Drop the references to the last inputs and outputs. Addresses are set again at the next call."""
        self._held = {binding.name: self._held[binding.name] for binding in self.engine.inputs if binding.on_host}

    def _infer(self, said: list[str]) -> list[tuple[int, ...] | None]:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._error(f"shapes do not go together ({error})", said) from error
        if missing:
            raise self._error(f"shapes of {', '.join(missing)} are still unknown", said)
        shapes = [tuple(self._context.get_tensor_shape(binding.name)) for binding in self.engine.outputs]
        return [None if any(size < 0 for size in shape) else shape for shape in shapes]

    def _address(self, name: str, value: Tensor, said: list[str]) -> None:
        address = value.data_ptr() or self._nowhere.data_ptr()
        if self._addresses.get(name) == address:
            return
        if not self._context.set_tensor_address(name, address):
            raise self._error(f"the address of {name!r} was refused", said)
        self._addresses[name] = address

    def _error(self, what: str, said: list[str]) -> EngineExecutionError:
        return EngineExecutionError(f"{self.engine.name}: {what}; TensorRT says: {join_messages(said)}")
