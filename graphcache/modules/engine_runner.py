"""What enqueues an engine: eager runs on the caller's stream, and captures of the module around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache.capture.engine_like import EngineLike, EngineScope
from graphcache.engines.context import Context, Shapes
from graphcache.engines.engine import ALIGNMENT, Engine
from graphcache.errors import Cause, EngineExecutionError, Reason
from graphcache.graphs import driver
from graphcache.graphs.stream_order import StreamOrder, own_stream

Layout = tuple[object, ...]
"""Shapes, dtypes and devices of contiguous, aligned inputs, with what the choice of a profile depends on."""

_MAX_LAYOUTS = 1024
"""Layouts of one engine that are remembered. One takes about a kilobyte."""


class EngineCall(NamedTuple):
    """One eager call, of checked inputs or of those of a known layout."""

    inputs: Sequence[Tensor]
    profile: int
    output_shapes: Shapes | None
    """``None`` unless the layout is known."""
    layout: Layout | None
    """``None`` if it is not to be remembered."""
    allocator: bool
    """Whether TensorRT allocates all outputs."""
    ahead: bool
    """Whether the outputs of the next call are made at the end of this one."""


class EngineRunner:
    """Runs an engine with one context. Inputs of a layout that ran before need no checks, and TensorRT infers nothing.

    Inputs of tensor subclasses or that have to be copied have no layout, nor has an engine with bindings on the host.
    """

    def __init__(self) -> None:
        self.profiler: Any = None
        """An ``IProfiler`` for new contexts."""
        self.ahead: tuple[int, Shapes, bool, list[Any]] = 0, [], False, []
        """The stream (a raw handle), shapes, and mode of the next call, and the outputs that were made for it."""
        self.context: Context | None = None
        """The context of eager calls. The next capture of the caller's takes it over."""
        self.recorded: list[Context] = []
        """Contexts in graphs of the caller's, which may be replayed as long as the engine lives."""
        self.known: dict[Layout | None, tuple[int, Shapes]] = {}
        """The profile that fits a layout, and the shapes of its outputs."""

    def attach(self, engine: Engine, order: StreamOrder) -> None:
        """Run this engine from now on, in a stream order."""
        self._engine, self._order = engine, order
        self.drop()

    def drop(self) -> None:
        """Drop the context, all layouts, and outputs that were made for the next call."""
        self.context = None
        self.known.clear()
        self.ahead = 0, [], False, []

    def layout(self, inputs: Sequence[Any], chosen: int | None) -> Layout | None:
        """The layout of unchecked inputs, if they have one."""
        if self._engine.uses_host_memory:
            return None
        # The active profile is preferred if several fit.
        found: list[object] = [chosen, self.context.profile if self.context is not None else 0]
        try:
            for value in inputs:
                if type(value) is not Tensor or not value.is_contiguous():
                    return None
                address = value.data_ptr()
                # Empty tensors, and those without memory, have none.
                if not address or address % ALIGNMENT:
                    return None
                found += (value.shape, value.dtype, value.device)
        except RuntimeError:
            # Sparse, nested and vmapped tensors.
            return None
        return tuple(found)

    def run(self, call: EngineCall) -> list[Tensor]:
        """Run the engine on the current stream; the outputs are the caller's."""
        order = self._order
        with order.lock:
            stream = torch._C._cuda_getCurrentRawStream(order.index)
            if driver.is_capturing(stream):
                return self._enqueue(self._given_away(), call, stream, capturing=True)
            context = self.context or self._new_context()
            if stream:
                if stream != order.stream:
                    order.enter(stream)
                return self._enqueue(context, call, stream)
            # On the legacy default stream TensorRT would synchronise the device at every call.
            caller, side = torch.cuda.current_stream(), own_stream(order.index, "side")
            side.wait_stream(caller)
            order.enter(side.cuda_stream)
            try:
                with torch.cuda.stream(side):
                    outputs = self._enqueue(context, call, side.cuda_stream)
            finally:
                caller.wait_stream(side)
            for tensor in outputs:
                if tensor.is_cuda:
                    tensor.record_stream(caller)
            return outputs

    def _given_away(self) -> Context:
        """The context of eager calls, for a capture of the caller's."""
        if self.context is None:
            raise EngineExecutionError(
                f"{self._engine.name}: the current stream is being captured, and the engine has never run eagerly, so "
                f"that it has no context that could be captured; before the capture, call it once with these shapes "
                f"under set_cudagraphs_mode(False)"
            )
        context, self.context = self.context, None
        self.recorded.append(context)
        return context

    def _new_context(self) -> Context:
        """A context for eager calls, with scratch memory of its own, which a capture of the caller's may take over."""
        engine = self._engine
        scratch = torch.empty(engine.scratch_bytes, dtype=torch.uint8, device=engine.device)
        context = self.context = Context(engine, scratch)
        if self.profiler is not None:
            context.report_to(self.profiler)
        return context

    def _enqueue(self, context: Context, call: EngineCall, stream: int, *, capturing: bool = False) -> list[Tensor]:
        engine, ahead = self._engine, call.ahead and not (capturing or call.allocator)
        with engine.collect_errors():
            context.set_inputs(call.inputs, call.profile, stream, call.output_shapes)
            shapes = call.output_shapes or context.output_shapes()
            if ahead and self.ahead[:3] == (stream, shapes, torch.is_inference_mode_enabled()):
                outputs = self.ahead[3]
            else:
                outputs = engine.new_outputs(shapes, allocator=call.allocator)
            if engine.aliases:
                outputs = engine.with_updated(outputs, call.inputs)
            context.set_outputs(outputs)
            if not context.enqueue(stream, capturing=capturing):
                raise context.refusal()
        if engine.aliases:
            engine.updated(call.inputs)
        if call.output_shapes is None:
            if any(binding.on_host for binding in engine.outputs):
                torch.cuda.current_stream().synchronize()
            if call.layout is not None and None not in shapes:
                if len(self.known) >= _MAX_LAYOUTS:
                    del self.known[next(iter(self.known))]
                self.known[call.layout] = call.profile, shapes
            outputs = [
                context.allocated_output(binding) if value is None else value
                for binding, value in zip(engine.outputs, outputs, strict=True)
            ]
            context.copies.clear()
        if ahead:
            # While the device works.
            self.ahead = stream, shapes, torch.is_inference_mode_enabled(), engine.new_outputs(shapes)
        return outputs


def enqueue_into(scope: EngineScope, module: EngineLike, inputs: Sequence[Tensor], profile: int) -> list[Tensor]:
    """Enqueue an engine into the capture of the module around it, or refuse that."""
    if (cause := module.forbids_capture()) is not None:
        raise scope.refusal(cause)
    if module.engine.aliases:
        raise scope.refusal(Cause(Reason.MUTATES, module.name, "it updates an input in place"))
    context = scope.context_of(module)
    stream = torch.cuda.current_stream().cuda_stream
    with module.engine.collect_errors():
        context.set_inputs(inputs, profile, stream)
        outputs = module.engine.new_outputs(context.output_shapes())
        if any(output is None for output in outputs):
            raise scope.refusal(Cause(Reason.OUTPUT_ALLOCATOR, module.name))
        context.set_outputs(outputs)
        if not context.enqueue(stream):
            raise scope.refusal(Cause(Reason.NOT_CAPTURABLE, module.name, module.engine.said()))
    return [output for output in outputs if output is not None]
