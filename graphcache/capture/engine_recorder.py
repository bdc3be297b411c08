"""Recording one engine: a context, static buffers, and a graph that is pointed at the caller's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from graphcache.capture.context_groups import SharedContexts
from graphcache.capture.engine_like import EngineLike
from graphcache.capture.recording import Recording, Sharing, nothing, refill
from graphcache.capture.trial_call import check_repeats
from graphcache.config import GraphConfig, graphs_off
from graphcache.engines.context import Context
from graphcache.engines.library import join_messages
from graphcache.errors import Cause, EngineExecutionError, Reason, Refusal
from graphcache.events import log
from graphcache.graphs import driver
from graphcache.graphs.buffers import is_plain_copy, nbytes_of
from graphcache.graphs.capture import capture_enqueue, capturing, refusal_of
from graphcache.graphs.copy_kernel import copy_kernels
from graphcache.graphs.copy_nodes import find_copies, order_copies, with_copies
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.edges import make_all_full
from graphcache.graphs.graph import Graph
from graphcache.graphs.io_slots import ALIGNMENT, IoSlot
from graphcache.graphs.param_patching import CannotBind, elsewhere, find_pointers
from graphcache.graphs.stream_order import StreamOrder, own_stream
from graphcache.graphs.verify import Round, perturb, verify
from graphcache.keys.call import KeyedCall


class EngineRecorder:
    """Records one engine: a context, static buffers and a graph per key, on the engine's scratch memory."""

    def __init__(self, module: EngineLike, config: GraphConfig) -> None:
        self._module = module
        self._config = config
        self._recording = config.recording
        self._contexts = SharedContexts(module, config)
        self._passing = 0

    def attempt(
        self,
        call: KeyedCall,
        *,
        sharing: Sharing = Sharing.ALL,
        begin: Callable[[], object] = nothing,
        known: Recording | None = None,
    ) -> tuple[Any, Recording | Cause]:
        module = self._module
        given, profile = module.checked(module.bind(call.args, call.kwargs))
        if (cause := module.forbids_capture()) is not None:
            return self._eagerly(call), cause
        answer: list[Tensor] = []
        outcome: Recording | Cause
        try:
            begin()
            lane = StreamOrder(module.device.index) if sharing is Sharing.NOTHING else module.lane
            shares = self._contexts.shares and sharing is Sharing.ALL
            with capturing(lane), torch.inference_mode(False), torch.no_grad():
                scratch = lane.scratch(module.engine.scratch_bytes)
                own = [value.detach() for value in given]
                with self._contexts.one(scratch, profile) if shares else self._own(scratch) as (context, keep):
                    engine_call = _EngineCall(module, context, profile, own, lane, self._recording.full_edges)
                    graph = self._capture(engine_call, own, answer, shares)
                    keep(graph)
                outcome = Recording(graph, _build, whole=True, bare=len(module.engine.outputs) == 1)
        except Exception as error:
            outcome = error.cause if isinstance(error, Refusal) else refusal_of(error, module.name).cause
        if not answer:
            return self._eagerly(call), outcome
        # Copies, since these were made on the capture stream, and outside of the caller's inference mode. Another
        # capture must not get their memory before they are copied.
        stream = torch.cuda.current_stream(module.device)
        for tensor in answer:
            if tensor.is_cuda:
                tensor.record_stream(stream)
        return _build([tensor.clone() for tensor in answer], call.tensors), outcome

    @property
    def shared_nbytes(self) -> int:
        # Scratch memory is the engine's, which needs it without graphs too.
        return 0

    @property
    def passing_nbytes(self) -> int:
        return self._passing + self._contexts.passing_nbytes

    def take_broken(self) -> list[Graph]:
        broken: list[Graph] = list(self._contexts.broken)
        self._contexts.broken.clear()
        return broken

    def release(self, *, wait: bool = True) -> None:
        self._contexts.release(wait=wait)

    def _eagerly(self, call: KeyedCall) -> Any:
        # In subgraph mode the engine would go through its cache, and come back here.
        with graphs_off():
            return self._module(*call.args, **call.kwargs)

    @contextmanager
    def _own(self, scratch: Tensor) -> Iterator[tuple[Context, Callable[[CudaGraph], object]]]:
        """A context for one graph, as :meth:`SharedContexts.one` gives one for several."""
        yield self._module.contexts.take(scratch), lambda graph: None

    def _capture(self, call: _EngineCall, given: Sequence[Tensor], answer: list[Tensor], shared: bool) -> CudaGraph:
        """Capture a call, once eager execution has given its ``answer`` twice; the graph is verified."""
        module = self._module
        expected = call.run(given)
        others = perturbed(module, given)
        rounds = [Round("the inputs of the capture", module.device_only(given), expected)]
        if self._config.verify:
            rounds.append(Round("inputs of other values", module.device_only(others), call.run(others)))
            negative = perturbed(module, given, negative=True)
            rounds.append(Round("inputs of the other sign", module.device_only(negative), call.run(negative)))
        again = call.run(given)
        torch.cuda.current_stream().synchronize()
        # Of all this only the static inputs and outputs stay.
        passing = [tensor for each in rounds[1:] for tensor in (*each.inputs, *each.expected)]
        self._passing = max(self._passing, nbytes_of([*expected, *passing, *again]))
        answer += expected
        check_repeats(again, expected, module.name)

        def verified(graph: CudaGraph) -> CudaGraph:
            if self._config.verify:
                try:
                    eager = lambda values: call.run(module.with_host_inputs(values, given))  # noqa: E731
                    verify(graph, rounds, eager, where=module.name)
                except BaseException:
                    graph.close()
                    raise
            call.returns_context = not shared
            if shared:
                # What it is looked at with when its context is used again: verification has left NaN there, of which
                # a graph that has become wrong makes the same.
                refill(call.static, others)
            return graph

        if self._recording.bind:
            try:
                return verified(call.bound())
            except CannotBind as why:
                log.debug("%s copies its inputs and outputs: %s", module.name, why)
            except Refusal as refusal:
                if refusal.cause.reason is not Reason.MISMATCH:
                    raise
                log.debug("%s copies its inputs and outputs: pointed at others, %s", module.name, refusal.cause.detail)
        return verified(call.copying())


class _EngineCall:
    """One call of an engine with static inputs and outputs, which can be captured in either of two ways."""

    def __init__(
        self,
        module: EngineLike,
        context: Context,
        profile: int,
        given: Sequence[Tensor],
        lane: StreamOrder,
        full_edges: bool,
    ) -> None:
        self._module = module
        self._context = context
        self._profile = profile
        self._lane = lane
        self._full_edges = full_edges
        self._stream = own_stream(module.device.index, "capture").cuda_stream
        self.returns_context = False
        """Whether another graph may have the context when this one is gone: not before it is known to be in order."""
        self.static = [torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value) for value in given]
        """The static inputs, also those that TensorRT reads on the host."""
        context.set_inputs(self.static, profile, self._stream)
        self._outputs = []
        for binding, output in zip(module.engine.outputs, module.new_outputs(context, allocator=False), strict=True):
            if output is None:
                raise Refusal(Reason.OUTPUT_ALLOCATOR, f"{module.name}, output {binding.name!r}")
            self._outputs.append(output)
        context.set_outputs(self._outputs)
        inputs = module.device_only(self.static)
        self._count = len(inputs)
        self._buffers: list[Tensor] = [*inputs, *self._outputs]
        # What no plain copy moves is put into its static buffer by an operation of its own, before the launch.
        plain = [is_plain_copy(value, buffer) for value, buffer in zip(given, self.static, strict=True)]
        self._direct: list[bool] = [*module.device_only(plain), *(True for _ in self._outputs)]

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The eager answer for some inputs."""
        refill(self.static, values)
        with self._module.engine.collect_errors() as said:
            if not self._context.enqueue(self._stream):
                why = join_messages(said)
                raise EngineExecutionError(f"{self._module.name}: TensorRT refused to run: {why}")
        return [output.clone() for output in self._outputs]

    def bound(self) -> CudaGraph:
        """A graph whose kernels are pointed at the caller's tensors, or ``CannotBind`` if not all of them are found."""
        with ExitStack() as undo:
            first = self._captured(self._context.enqueue, undo)
            if any(tensor.numel() == 0 for tensor in self._buffers):
                raise CannotBind("an input or output is empty")
            if self._module.engine.aliases:
                raise CannotBind("an output shares the memory of an input")
            others = elsewhere(self._buffers)
            with ExitStack() as after:
                self._point_context_at(others)
                after.callback(self._point_context_at, self._buffers)
                second = self._captured(self._context.enqueue, after)
                pointers = find_pointers(first, second, self._buffers, others)
            undo.pop_all()
        places = [found if direct else [] for found, direct in zip(pointers, self._direct, strict=True)]
        return self._graph(
            first, [IoSlot(own, found, ALIGNMENT) for own, found in zip(self._buffers, places, strict=True)]
        )

    def copying(self) -> CudaGraph:
        """A graph that begins and ends with nodes that copy, which are pointed at the caller's tensors."""
        others = [torch.empty_like(tensor) for tensor in self._buffers]
        copied = [direct and own.numel() > 0 for own, direct in zip(self._buffers, self._direct, strict=True)]
        count = self._count
        pairs = list(zip(self._buffers, others, copied, strict=True))
        before = [(own, other) for own, other, is_copied in pairs[:count] if is_copied]
        after = [(other, own) for own, other, is_copied in pairs[count:] if is_copied]
        kernels = copy_kernels(self._lane.index)
        with ExitStack() as undo:
            captured = self._captured(with_copies(self._context.enqueue, before, after, kernels), undo)
            order_copies(captured, kernels, early=not self._full_edges)
            try:
                found = iter(find_copies(captured, [other for _, other, is_copied in pairs if is_copied], kernels))
            except CannotBind as why:
                raise Refusal(Reason.CAPTURE_FAILED, self._module.name, str(why)) from why
            undo.pop_all()
        return self._graph(captured, [IoSlot(own, next(found) if is_copied else [], 1) for own, _, is_copied in pairs])

    def _captured(self, enqueue: Callable[[int], bool], undo: ExitStack) -> Any:
        """Capture the call; ``undo`` destroys what was captured."""
        with self._module.engine.collect_errors() as said:
            captured = capture_enqueue(enqueue, self._lane, self._module.name, lambda: join_messages(said))
        undo.callback(driver.call, "cuGraphDestroy", captured)
        if self._full_edges:
            make_all_full(captured)
        return captured

    def _point_context_at(self, tensors: Sequence[Tensor]) -> None:
        """Have the context read and write other tensors than the static ones."""
        count = self._count
        self._context.set_inputs(
            self._module.with_host_inputs(tensors[:count], self.static), self._profile, self._stream
        )
        self._context.set_outputs(list(tensors[count:]))

    def _graph(self, captured: Any, slots: Sequence[IoSlot]) -> CudaGraph:
        """The graph of what was captured."""
        return CudaGraph(
            captured,
            inputs=slots[: self._count],
            outputs=slots[self._count :],
            lane=self._lane,
            # Another graph of the context may give it other scratch memory.
            keep=(self._context, self._context.scratch, self.static),
            release=lambda: self._release(captured),
            # Scratch memory of the module's own lane serves all of its graphs.
            pool_bytes=0 if self._lane is self._module.lane else self._module.engine.scratch_bytes,
        )

    def _release(self, captured: Any) -> None:
        """Give back what a graph held that is gone."""
        driver.call("cuGraphDestroy", captured)
        if self.returns_context:
            self._module.contexts.give_back(self._context)


def perturbed(module: EngineLike, given: Sequence[Tensor], *, negative: bool = False) -> list[Tensor]:
    """Other values for an engine's inputs, to verify with; those that are read on the host stay as they are given."""
    return [
        value if binding.on_host else other
        for binding, value, other in zip(module.engine.inputs, given, perturb(given, negative=negative), strict=True)
    ]


def _build(outputs: list[Tensor], inputs: Sequence[Tensor]) -> Any:
    """An engine's answer: its only output, or a tuple of all."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
