"""Recording one engine: a context, static buffers, and a graph that is pointed at the caller's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from graphcache.capture.engine_like import EngineLike
from graphcache.capture.recording import Build, CaptureRequest, Recording, Sharing
from graphcache.capture.shared_contexts import SharedContext, SharedContexts
from graphcache.config import GraphConfig, graphs_off
from graphcache.engines.engine import Engine
from graphcache.errors import Cause, Reason, Refusal
from graphcache.events import log
from graphcache.graphs import driver
from graphcache.graphs.buffers import is_plain_copy, nbytes_of
from graphcache.graphs.capture import capture_copying, refusal_of
from graphcache.graphs.cuda import ALIGNMENT, CudaGraph, IoSlot
from graphcache.graphs.param_patching import CannotBind, elsewhere, find_pointers
from graphcache.graphs.stream_order import Enqueue, StreamOrder, capture_enqueue, capturing
from graphcache.graphs.verify import check_repeats, perturb, rounds_of, verify


class EngineRecorder:
    """Records one engine: a context, static buffers and a graph per key, on the engine's scratch memory."""

    shared_nbytes = 0
    """Scratch memory is the engine's, which needs it without graphs too."""

    def __init__(self, module: EngineLike, config: GraphConfig) -> None:
        self._module = module
        self._config = config
        self._recording = config.recording
        self._contexts = SharedContexts(module, config)
        self._passing = 0
        self.broken = self._contexts.broken

    @property
    def passing_nbytes(self) -> int:
        return self._passing + self._contexts.passing_nbytes

    def attempt(self, request: CaptureRequest) -> tuple[Any, Recording | Cause]:
        module, call = self._module, request.call
        given, profile = module.checked(module.bind(call.args, call.kwargs))
        answer: list[Tensor] = []
        outcome = module.forbids_capture() or self._record(request, given, profile, answer)
        if not answer:
            # In subgraph mode the engine would go through its cache, and come back here.
            with graphs_off():
                return module(*call.args, **call.kwargs), outcome
        # Copies, since these were made on the capture stream, and outside of the caller's inference mode. Another
        # capture must not get their memory before they are copied.
        current = torch.cuda.current_stream(module.device)
        for tensor in answer:
            if tensor.is_cuda:
                tensor.record_stream(current)
        fresh = module.engine.with_updated([tensor.clone() for tensor in answer], given)
        for place, source in module.engine.aliases.items():
            # Once: what was recorded has worked on copies.
            with torch.inference_mode(given[source].is_inference()), torch.no_grad():
                given[source].copy_(answer[place])
        return _answer_of(fresh), outcome

    def release(self, *, wait: bool = True) -> None:
        self._contexts.release(wait=wait)

    def _record(
        self, request: CaptureRequest, given: Sequence[Tensor], profile: int, answer: list[Tensor]
    ) -> Recording | Cause:
        """The graph of a call, or why there is none; ``answer`` gets the eager outputs."""
        module = self._module
        try:
            request.begin()
            order = StreamOrder(module.device.index) if request.sharing is Sharing.NOTHING else module.order
            shares = self._contexts.shares and request.sharing is Sharing.ALL
            with capturing(order) as stream, torch.inference_mode(False), torch.no_grad():
                scratch = order.scratch(module.engine.scratch_bytes)
                with module.engine.collect_errors(), self._contexts.one(scratch, profile, shares) as shared:
                    own = [value.detach() for value in given]
                    engine_call = _EngineCall(module, shared, own, order, stream.cuda_stream)
                    graph = self._capture(engine_call, module.engine.device_only(own), answer, shares)
                    engine_call.returns_context = not shares
                    shared.graphs.add(graph)
            engine = module.engine
            updated = tuple(sorted(set(engine.device_places(engine.aliases.values()))))
            whole = not updated
            bare = whole and len(engine.outputs) == 1
            return Recording(graph, _builder(engine), graph.nbytes, whole=whole, bare=bare, written=updated)
        except Exception as error:
            return refusal_of(error, module.name).cause

    def _capture(self, call: _EngineCall, given: Sequence[Tensor], answer: list[Tensor], shares: bool) -> CudaGraph:
        """Capture a call, once eager execution has given its ``answer`` twice; the graph is verified."""
        name, verifies = self._module.name, self._config.verify
        expected = call.run(given)
        rounds = list(rounds_of(given, expected, call.run, any_values=True)) if verifies else []
        again = call.run(given)
        torch.cuda.current_stream().synchronize()
        # Of all this only the static inputs and outputs stay.
        passing = [tensor for each in rounds[1:] for tensor in (*each.inputs, *each.expected)]
        self._passing = max(self._passing, nbytes_of([*expected, *passing, *again]))
        answer += expected
        check_repeats(again, expected, name)

        def verified(graph: CudaGraph) -> CudaGraph:
            if verifies:
                verify(_OnCopies(graph, self._module.engine), rounds, call.run, where=name)
            if shares:
                # What it is looked at with when its context is used again: verification has left NaN there, of which a
                # graph that has become wrong makes the same.
                for slot, value in zip(graph.inputs, perturb(given), strict=True):
                    slot.buffer.copy_(value)
            return graph

        if self._recording.bind:
            try:
                return verified(call.bound())
            except CannotBind as error:
                why = str(error)
            except Refusal as refusal:
                if refusal.cause.reason is not Reason.MISMATCH:
                    raise
                why = f"pointed at others, {refusal.cause.detail}"
            log.debug("%s copies its inputs and outputs: %s", name, why)
        return verified(call.copying(self._recording.full_edges))


class _EngineCall:
    """One call of an engine with static inputs and outputs, which can be captured in either of two ways."""

    def __init__(
        self, module: EngineLike, shared: SharedContext, given: Sequence[Tensor], order: StreamOrder, stream: int
    ) -> None:
        self._module, self._context, self._profile = module, shared.context, shared.profile
        self._order, self._stream = order, stream
        self.returns_context = False
        """Whether another graph may have the context when this one is gone: not before it is known to be in order."""
        static = [torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value) for value in given]
        self._static = static
        """The static inputs, also those that TensorRT reads on the host."""
        self._context.set_inputs(static, self._profile, stream)
        made = module.engine.new_outputs(self._context.output_shapes())
        self._outputs: list[Tensor] = module.engine.with_updated(made, static)
        for binding, output in zip(module.engine.outputs, self._outputs, strict=True):
            if output is None:
                raise Refusal(Reason.OUTPUT_ALLOCATOR, f"{module.name}, output {binding.name!r}")
        self._context.set_outputs(self._outputs)
        self._inputs = module.engine.device_only(static)
        self._own: list[Tensor] = [each for each in made if each is not None]
        """The static outputs that are no inputs."""
        self._buffers: list[Tensor] = [*self._inputs, *self._own]
        # What no plain copy moves is put into its static buffer by an operation of its own, before the launch.
        plain = [is_plain_copy(value, buffer) for value, buffer in zip(given, static, strict=True)]
        self._direct: list[bool] = [*module.engine.device_only(plain), *(True for _ in self._own)]

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The eager answer for some values of the inputs that TensorRT reads on the device."""
        for buffer, value in zip(self._inputs, values, strict=True):
            buffer.copy_(value)
        if not self._context.enqueue(self._stream):
            raise self._context.refusal()
        return [output.clone() for output in self._outputs]

    def bound(self) -> CudaGraph:
        """A graph whose kernels are pointed at the caller's tensors, or ``CannotBind`` if not all of them are found."""
        with ExitStack() as undo:
            first = self._capture(self._context.enqueue)
            undo.callback(driver.call, "cuGraphDestroy", first)
            if any(tensor.numel() == 0 for tensor in self._buffers):
                raise CannotBind("an input or output is empty")
            others = elsewhere(self._buffers)
            with ExitStack() as after:
                self._point_context_at(others)
                after.callback(self._point_context_at, self._buffers)
                second = self._capture(self._context.enqueue)
                after.callback(driver.call, "cuGraphDestroy", second)
                pointers = find_pointers(first, second, self._buffers, others)
            undo.pop_all()
        slots = [
            IoSlot(own, found if direct else [], ALIGNMENT)
            for own, found, direct in zip(self._buffers, pointers, self._direct, strict=True)
        ]
        return self._graph(first, slots)

    def copying(self, full_edges: bool) -> CudaGraph:
        """A graph that begins and ends with nodes that copy, which are pointed at the caller's tensors."""
        if self._module.engine.aliases:
            raise Refusal(Reason.MUTATES, self._module.name, "it updates an input in place, which is not to be a copy")
        captured, slots = capture_copying(
            self._capture,
            lambda stream: self._outputs if self._context.enqueue(stream) else None,
            self._inputs,
            self._direct[: len(self._inputs)],
            self._outputs,
            self._module.name,
            full_edges,
        )
        return self._graph(captured, slots)

    def _capture(self, enqueue: Enqueue) -> Any:
        return capture_enqueue(enqueue, self._order, self._module.name, self._module.engine.said)

    def _point_context_at(self, tensors: Sequence[Tensor]) -> None:
        """Have the context read and write other tensors than the static ones."""
        count, hosts = len(self._inputs), self._module.host_inputs
        device = iter(tensors[:count])
        inputs = [value if index in hosts else next(device) for index, value in enumerate(self._static)]
        self._context.set_inputs(inputs, self._profile, self._stream)
        own = iter(tensors[count:])
        places = self._module.engine.aliases
        made = [None if place in places else next(own) for place in range(len(self._outputs))]
        self._context.set_outputs(self._module.engine.with_updated(made, inputs))

    def _graph(self, captured: Any, slots: Sequence[IoSlot]) -> CudaGraph:
        count = len(self._inputs)
        return CudaGraph(
            captured,
            inputs=slots[:count],
            outputs=slots[count:],
            order=self._order,
            # Another graph of the context may give it other scratch memory.
            keep=(self._context, self._context.scratch, self._static),
            release=self._release,
            # Scratch memory of the module's own order serves all of its graphs.
            pool_bytes=0 if self._order is self._module.order else self._module.engine.scratch_bytes,
        )

    def _release(self) -> None:
        if self.returns_context:
            self._module.contexts.give_back(self._context)


def _answer_of(outputs: Sequence[Tensor]) -> Any:
    """An engine's answer: its only output, or a tuple of all."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _builder(engine: Engine) -> Build:
    """Makes the answer of a graph's outputs, and of the inputs that it has updated."""
    if not engine.aliases:
        return lambda outputs, _: _answer_of(outputs)
    hosts = engine.host_inputs

    def build(outputs: list[Tensor], inputs: Sequence[Tensor]) -> Any:
        # One that is not aligned was copied: the copy was updated, and nothing of the caller's.
        given: list[Any] = list(inputs)
        for place in hosts:
            given.insert(place, None)
        engine.check_updated(given)
        engine.updated(given)
        own = iter(outputs)
        made = [None if place in engine.aliases else next(own) for place in range(len(engine.outputs))]
        return _answer_of(engine.with_updated(made, given))

    return build


class _OnCopies:
    """A graph that updates copies of inputs, which are outputs like others, so that it can be verified."""

    def __init__(self, graph: CudaGraph, engine: Engine) -> None:
        self._graph, self._engine = graph, engine
        self._updated = dict(zip(engine.aliases, engine.device_places(engine.aliases.values()), strict=True))
        self.close = graph.close

    def poison(self, out: Sequence[Tensor]) -> None:
        self._graph.poison(self._own(out))

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor]) -> list[Tensor]:
        copied = set(self._updated.values())
        given = [each.clone() if place in copied else each for place, each in enumerate(inputs)]
        own = iter(self._graph.replay(given, self._own(out)))
        return [given[self._updated[place]] if place in self._updated else next(own) for place in range(len(out))]

    def _own(self, out: Sequence[Tensor]) -> list[Tensor]:
        return [each for place, each in enumerate(out) if place not in self._updated]
