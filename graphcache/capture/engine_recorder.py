"""Recording one engine: a context, static buffers, and a graph that is pointed at the caller's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from graphcache.capture.context_groups import SharedContexts
from graphcache.capture.engine_like import EngineLike
from graphcache.capture.recording import Recorded, Sharing, nothing, refill
from graphcache.config import GraphConfig, graphs_off
from graphcache.engines.context import Context
from graphcache.engines.library import join_messages
from graphcache.errors import Cause, EngineExecutionError, Reason, Refusal
from graphcache.events import log
from graphcache.graphs import driver
from graphcache.graphs.buffers import is_plain_copy, nbytes_of
from graphcache.graphs.capture import capture_enqueue, capturing, refusal_of
from graphcache.graphs.copies import find_copies, order_copies, with_copies
from graphcache.graphs.copy_kernel import copy_kernels
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.edges import make_all_full
from graphcache.graphs.graph import Graph
from graphcache.graphs.lane import Lane, own_stream
from graphcache.graphs.pointers import CannotBind, elsewhere, find_pointers
from graphcache.graphs.slots import ALIGNMENT, Slot
from graphcache.graphs.verify import Round, largest_gap, perturb, repeats, verify
from graphcache.keys.call import Call


class EngineRecorder:
    """Records one engine: a context, static buffers and a graph per signature, on the engine's scratch memory."""

    def __init__(self, module: EngineLike, config: GraphConfig) -> None:
        self._module = module
        self._config = config
        self._recording = config.recording
        self._contexts = SharedContexts(module, config)
        self._passing = 0

    def attempt(
        self,
        call: Call,
        *,
        sharing: Sharing = Sharing.ALL,
        begin: Callable[[], object] = nothing,
        known: Recorded | None = None,
    ) -> tuple[Any, Recorded | Cause]:
        module = self._module
        given, profile = module.checked(module.bind(call.args, call.kwargs))
        if (cause := module.forbids_capture()) is not None:
            return self._eagerly(call), cause
        answer: list[Tensor] = []
        outcome: Recorded | Cause
        try:
            begin()
            lane = Lane(module.device.index) if sharing is Sharing.NOTHING else module.lane
            shares = self._contexts.shares and sharing is Sharing.ALL
            with capturing(lane), torch.inference_mode(False), torch.no_grad():
                scratch = lane.scratch(module.engine.scratch_bytes)
                own = [value.detach() for value in given]
                if shares:
                    with self._contexts.one(scratch, profile) as (context, keep):
                        graph = self._capture(own, profile, answer, lane, context, shares)
                        keep(graph)
                else:
                    graph = self._capture(own, profile, answer, lane, module.contexts.take(scratch), shares)
                outcome = Recorded(graph, self._build, whole=True, bare=len(module.engine.outputs) == 1)
        except Refusal as refusal:
            outcome = refusal.cause
        except Exception as error:
            outcome = refusal_of(error, module.name).cause
        if not answer:
            return self._eagerly(call), outcome
        # Copies, since these were made on the capture stream, and outside of the caller's inference mode. Another
        # capture must not get their memory before they are copied.
        stream = torch.cuda.current_stream(module.device)
        for tensor in answer:
            if tensor.is_cuda:
                tensor.record_stream(stream)
        return self._build([tensor.clone() for tensor in answer], call.tensors), outcome

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

    def _eagerly(self, call: Call) -> Any:
        # In subgraph mode the engine would go through its cache, and come back here.
        with graphs_off():
            return self._module(*call.args, **call.kwargs)

    def _capture(
        self,
        given: Sequence[Tensor],
        profile: int,
        answer: list[Tensor],
        lane: Lane,
        context: Context,
        shared: bool,
    ) -> CudaGraph:
        module = self._module
        stream = own_stream(module.device.index, "capture").cuda_stream
        static = [torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value) for value in given]
        context.set_inputs(static, profile, stream)
        outputs = []
        for binding, output in zip(module.engine.outputs, module.new_outputs(context, allocator=False), strict=True):
            if output is None:
                raise Refusal(Reason.OUTPUT_ALLOCATOR, f"{module.name}, output {binding.name!r}")
            outputs.append(output)
        context.set_outputs(outputs)

        def run(values: Sequence[Tensor]) -> list[Tensor]:
            refill(static, values)
            with module.engine.collect_errors() as said:
                if not context.enqueue(stream):
                    raise EngineExecutionError(f"{module.name}: TensorRT refused to run: {join_messages(said)}")
            return [output.clone() for output in outputs]

        expected = run(given)
        others = perturbed(module, given)
        rounds = [Round("the inputs of the capture", module.device_only(given), expected)]
        if self._config.verify:
            rounds.append(Round("inputs of other values", module.device_only(others), run(others)))
            negative = perturbed(module, given, negative=True)
            rounds.append(Round("inputs of the other sign", module.device_only(negative), run(negative)))
        again = run(given)
        torch.cuda.current_stream().synchronize()
        # Of all this only the static inputs and outputs stay.
        passing = [tensor for each in rounds[1:] for tensor in (*each.inputs, *each.expected)]
        self._passing = max(self._passing, nbytes_of([*expected, *passing, *again]))
        answer += expected
        for index, (left, right) in enumerate(zip(again, expected, strict=True)):
            if not repeats(left, right):
                gap = largest_gap(left, right)
                raise Refusal(
                    Reason.NONDETERMINISTIC, module.name, f"output {index} differed by {gap:.3g} between two runs"
                )
        plain = [is_plain_copy(value, buffer) for value, buffer in zip(given, static, strict=True)]
        full_edges = self._recording.full_edges
        io = _EngineIO(module, context, profile, static, plain, outputs, lane, full_edges=full_edges)

        def verified(graph: CudaGraph) -> CudaGraph:
            if self._config.verify:
                try:
                    verify(graph, rounds, lambda values: run(module.with_host_inputs(values, given)), where=module.name)
                except BaseException:
                    graph.close()
                    raise
            io.returns_context = not shared
            if shared:
                # What it is looked at with when its context is used again: verification has left NaN there, of which
                # a graph that has become wrong makes the same.
                refill(static, others)
            return graph

        if self._recording.bind:
            try:
                return verified(io.bound())
            except CannotBind as why:
                log.debug("%s copies its inputs and outputs: %s", module.name, why)
            except Refusal as refusal:
                if refusal.cause.reason is not Reason.MISMATCH:
                    raise
                log.debug("%s copies its inputs and outputs: pointed at others, %s", module.name, refusal.cause.detail)
        return verified(io.copying())

    @staticmethod
    def _build(outputs: list[Tensor], inputs: Sequence[Tensor]) -> Any:
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class _EngineIO:
    """One engine call with static inputs and outputs, captured in either of two ways."""

    def __init__(
        self,
        module: EngineLike,
        context: Context,
        profile: int,
        static: Sequence[Tensor],
        plain: Sequence[bool],
        outputs: Sequence[Tensor],
        lane: Lane,
        *,
        full_edges: bool,
    ) -> None:
        self._module = module
        self._lane = lane
        self._full_edges = full_edges
        self._context = context
        self._profile = profile
        self.returns_context = False
        """Whether another graph may have the context when this one is gone: not before it is known to be in order."""
        self._all_inputs = static
        self._inputs = module.device_only(static)
        self._outputs = outputs
        # What no plain copy moves is put into its static buffer by an operation of its own, before the launch.
        self._direct = [*module.device_only(plain), *(True for _ in outputs)]

    def bound(self) -> CudaGraph:
        """A graph whose kernels are pointed at the caller's tensors."""
        ours = [*self._inputs, *self._outputs]
        with ExitStack() as undo:
            first = self._capture(self._context.enqueue)
            undo.callback(driver.call, "cuGraphDestroy", first)
            if any(tensor.numel() == 0 for tensor in ours):
                raise CannotBind("an input or output is empty")
            if self._module.engine.aliases:
                raise CannotBind("an output shares the memory of an input")
            others = elsewhere(ours)
            with ExitStack() as after:
                self._point_context_at(others)
                after.callback(self._point_context_at, ours)
                second = self._capture(self._context.enqueue)
                after.callback(driver.call, "cuGraphDestroy", second)
                pointers = find_pointers(first, second, ours, others)
            undo.pop_all()
        places = [found if direct else [] for found, direct in zip(pointers, self._direct, strict=True)]
        return self._graph(first, [Slot(own, found, ALIGNMENT) for own, found in zip(ours, places, strict=True)])

    def copying(self) -> CudaGraph:
        """A graph that begins and ends with nodes that copy, which are pointed at the caller's tensors."""
        ours = [*self._inputs, *self._outputs]
        others = [torch.empty_like(tensor) for tensor in ours]
        copied = [direct and own.numel() > 0 for own, direct in zip(ours, self._direct, strict=True)]
        count = len(self._inputs)
        before = [(ours[i], others[i]) for i in range(count) if copied[i]]
        after = [(others[i], ours[i]) for i in range(count, len(ours)) if copied[i]]
        moved = [other for other, each in zip(others, copied, strict=True) if each]
        kernels = copy_kernels(self._lane.index)
        with ExitStack() as undo:
            captured = self._capture(with_copies(self._context.enqueue, before, after, kernels))
            undo.callback(driver.call, "cuGraphDestroy", captured)
            order_copies(captured, kernels, early=not self._full_edges)
            try:
                found = iter(find_copies(captured, moved, kernels))
            except CannotBind as why:
                raise Refusal(Reason.CAPTURE_FAILED, self._module.name, str(why)) from why
            undo.pop_all()
        places = [next(found) if each else [] for each in copied]
        return self._graph(captured, [Slot(own, place, 1) for own, place in zip(ours, places, strict=True)])

    def _capture(self, enqueue: Callable[[int], bool]) -> Any:
        with self._module.engine.collect_errors() as said:
            captured = capture_enqueue(enqueue, self._lane, self._module.name, lambda: join_messages(said))
        with ExitStack() as undo:
            undo.callback(driver.call, "cuGraphDestroy", captured)
            if self._full_edges:
                make_all_full(captured)
            undo.pop_all()
        return captured

    def _point_context_at(self, tensors: Sequence[Tensor]) -> None:
        stream = own_stream(self._module.device.index, "capture").cuda_stream
        given = iter(tensors)
        inputs = [
            value if index in self._module.host_inputs else next(given) for index, value in enumerate(self._all_inputs)
        ]
        self._context.set_inputs(inputs, self._profile, stream)
        self._context.set_outputs(list(given))

    def _graph(self, captured: Any, slots: Sequence[Slot]) -> CudaGraph:
        count = len(self._inputs)
        return CudaGraph(
            captured,
            inputs=slots[:count],
            outputs=slots[count:],
            lane=self._lane,
            # Another graph of the context may give it other scratch memory.
            keep=(self._context, self._context.scratch, self._all_inputs),
            release=lambda: self._release(captured),
            # Scratch memory of the module's own lane serves all of its graphs.
            pool_bytes=0 if self._lane is self._module.lane else self._module.engine.scratch_bytes,
        )

    def _release(self, captured: Any) -> None:
        driver.call("cuGraphDestroy", captured)
        if self.returns_context:
            self._module.contexts.give_back(self._context)


def perturbed(module: EngineLike, given: Sequence[Tensor], *, negative: bool = False) -> list[Tensor]:
    """Other values for an engine's inputs, to verify with; those that are read on the host stay as they are given."""
    return [
        value if binding.on_host else other
        for binding, value, other in zip(module.engine.inputs, given, perturb(given, negative=negative), strict=True)
    ]
