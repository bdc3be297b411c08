"""What enqueues an engine: eager runs on the caller's stream, and captures of the module around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache.capture.engine_like import EngineLike, EngineScope
from graphcache.engines.context import ALIGNMENT, Context, LayoutPlan
from graphcache.engines.engine import Engine
from graphcache.errors import Cause, EngineExecutionError, Reason
from graphcache.graphs import driver
from graphcache.graphs.stream_order import StreamOrder, own_stream

Layout = tuple[object, ...]
"""Shapes, dtypes and devices of contiguous, aligned inputs, with what the choice of a profile depends on."""

_MAX_PLANS = 1024
"""Layouts of one engine that are remembered. One takes about a kilobyte."""


class EngineCall(NamedTuple):
    """One eager call."""

    inputs: Sequence[Tensor]
    """Checked, or of a layout that has a plan."""
    profile: int
    layout: Layout | None = None
    """The layout of the inputs; ``None`` if it is not to be remembered."""
    plan: LayoutPlan | None = None
    allocator: bool = False
    """Whether TensorRT allocates all outputs."""


class EngineRunner:
    """Runs an engine with one context. The first call of a layout is checked, later ones follow its plan.

    The plan says which profile fits and which shapes the outputs have, so that TensorRT is told only what differs from
    the call before. Inputs on the host, of tensor subclasses, or that have to be copied have no plan, nor have outputs
    that are allocated by TensorRT or written on the host.
    """

    def __init__(self) -> None:
        self.profiler: Any = None
        """An ``IProfiler`` for new contexts."""
        self.preallocates = False
        """Whether the outputs of the next call are made at the end of each one."""
        self.ahead: tuple[int, list[Tensor]] = 0, []
        """The stream (a raw handle) and the outputs that were made for the next call on it."""
        self.context: Context | None = None
        """The context of eager calls. The next capture of the caller's takes it over."""
        self.recorded: list[Context] = []
        """Contexts in graphs of the caller's, which may be replayed as long as the engine lives."""
        self._plans: dict[Layout, LayoutPlan] = {}

    def attach(self, engine: Engine, order: StreamOrder) -> None:
        """Run this engine from now on, in a stream order."""
        self._engine, self._order = engine, order
        self.drop()

    def drop(self) -> None:
        """Drop the context, all plans, and outputs that were made for the next call."""
        self.context = None
        self._plans.clear()
        self.ahead = 0, []

    def find(self, inputs: Sequence[Any], chosen: int | None) -> tuple[Layout | None, LayoutPlan | None]:
        """The layout of unchecked inputs, and its plan if it ran before; ``None`` for inputs that have no plan."""
        # The active profile is preferred if several fit.
        found: list[object] = [chosen, self.context.profile if self.context is not None else 0]
        try:
            for value in inputs:
                if type(value) is not Tensor or not value.is_contiguous():
                    return None, None
                address = value.data_ptr()
                # Empty tensors, and those without memory, have none.
                if not address or address % ALIGNMENT:
                    return None, None
                found += (value.shape, value.dtype, value.device)
        except RuntimeError:
            # Sparse, nested and vmapped tensors.
            return None, None
        layout = tuple(found)
        return layout, self._plans.get(layout)

    def run(self, call: EngineCall) -> list[Tensor]:
        """Run the engine on the current stream; the outputs are the caller's."""
        order = self._order
        with order.lock:
            stream = torch._C._cuda_getCurrentRawStream(order.index)
            capturing = driver.is_capturing(stream)
            context = self.context or self._new_context(capturing)
            if capturing:
                self.context = None
                self.recorded.append(context)
                return self._run(context, call._replace(plan=None, layout=None), stream, capturing=True)
            if stream:
                if stream != order.stream:
                    order.enter(stream)
                return self._run(context, call, stream)
            # On the legacy default stream TensorRT would synchronise the device at every call.
            caller, side = torch.cuda.current_stream(), own_stream(order.index, "side")
            side.wait_stream(caller)
            order.enter(side.cuda_stream)
            try:
                with torch.cuda.stream(side):
                    outputs = self._run(context, call, side.cuda_stream)
            finally:
                caller.wait_stream(side)
            for tensor in outputs:
                if tensor.is_cuda:
                    tensor.record_stream(caller)
            return outputs

    def _new_context(self, capturing: bool) -> Context:
        """A context with scratch memory of its own, which a capture of the caller's may take over."""
        engine = self._engine
        if capturing:
            raise EngineExecutionError(
                f"{engine.name}: the current stream is being captured, and the engine has never run eagerly, so that "
                f"it has no context that could be captured; before the capture, call it once with these shapes under "
                f"set_cudagraphs_mode(False)"
            )
        scratch = torch.empty(engine.scratch_bytes, dtype=torch.uint8, device=engine.device)
        context = self.context = Context(engine, scratch)
        if self.profiler is not None:
            context.report_to(self.profiler)
        return context

    def _run(self, context: Context, call: EngineCall, stream: int, *, capturing: bool = False) -> list[Tensor]:
        """Enqueue a call, by its plan if it has one; otherwise its layout is remembered."""
        plan, ahead = call.plan, self.preallocates and not (capturing or call.allocator)
        if plan is None:
            with self._engine.collect_errors():
                context.set_inputs(call.inputs, call.profile, stream)
        shapes = context.output_shapes() if plan is None else plan.output_shapes
        outputs: list[Any] = []
        if ahead:
            (made_for, made), self.ahead = self.ahead, (0, [])
            if made_for == stream and [tuple(each.shape) for each in made] == shapes:
                outputs = made
        outputs = outputs or self._engine.new_outputs(shapes, allocator=call.allocator)
        if plan is not None:
            context.run(plan, call.inputs, outputs, stream)
        else:
            outputs = self._enqueue(context, outputs, stream)
            if call.layout is not None and (plan := context.plan()) is not None:
                if len(self._plans) >= _MAX_PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[call.layout] = plan
            context.release_references()
        if ahead:
            # While the device works.
            self.ahead = stream, [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in outputs]
        return outputs

    def _enqueue(self, context: Context, outputs: Sequence[Tensor | None], stream: int) -> list[Tensor]:
        """Enqueue the inputs that were set; the outputs, with those that TensorRT has allocated."""
        engine = self._engine
        with engine.collect_errors():
            context.set_outputs(outputs)
            if not context.enqueue(stream):
                context.check_allocated()
                raise context.refusal()
        if any(binding.on_host for binding in engine.outputs):
            torch.cuda.current_stream().synchronize()
        return [
            context.allocated_output(binding.name) if value is None else value
            for binding, value in zip(engine.outputs, outputs, strict=True)
        ]


def enqueue_into(scope: EngineScope, module: EngineLike, inputs: Sequence[Tensor], profile: int) -> list[Tensor]:
    """Enqueue an engine into the capture of the module around it, or refuse that."""
    if (cause := module.forbids_capture()) is not None:
        raise scope.refusal(cause)
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
