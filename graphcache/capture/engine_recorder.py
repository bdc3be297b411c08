"""Recording one engine: a context, static buffers, and a graph that is pointed at the caller's tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from graphcache.capture.engine_like import EngineLike
from graphcache.capture.recording import CaptureRequest, Recording, Sharing
from graphcache.capture.updated_inputs import OnCopies, all_outputs, build_updated
from graphcache.config import GraphConfig, graphs_off
from graphcache.engines.context import Context
from graphcache.errors import Cause, Reason, Refusal
from graphcache.events import log
from graphcache.graphs import driver
from graphcache.graphs.buffers import is_plain_copy, nbytes_of, poison
from graphcache.graphs.capture import capture_copying, refusal_of
from graphcache.graphs.cuda import ALIGNMENT, CudaGraph, IoSlot
from graphcache.graphs.graph import Graph
from graphcache.graphs.param_patching import CannotBind, elsewhere, find_pointers
from graphcache.graphs.stream_order import Enqueue, StreamOrder, capture_enqueue, capturing
from graphcache.graphs.verify import check_repeats, disagreement, perturb, rounds_of, verify

MAX_GRAPHS_PER_CONTEXT = 129
"""A graph that shares a context takes 0.07 MB, another context 74 MB and 30 to 130 ms (evictions-h200.json)."""
MAX_CHECK_SECONDS = 0.01
"""Each capture replays all graphs of its context twice. One that took longer than this gets no further graphs: 7 graphs
of ViT (1.46 ms each) reach it, and 129 of mlp8 (40 us each) do not (H200)."""
_MEASURED = ("1.5.", "1.6.")
"""Versions of TensorRT-RTX under which graphs of one context, in turn, were seen to answer rightly (H100, H200). Under
1.4.0.76 with ``EAGER`` they did not."""


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
        fresh = [tensor.clone() for tensor in answer]
        for place, source in module.engine.aliases.items():
            # Once: what was recorded has worked on copies.
            with torch.inference_mode(given[source].is_inference()), torch.no_grad():
                fresh[place] = given[source].copy_(answer[place])
        return _build(fresh, call.tensors), outcome

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
            if engine.aliases:
                updated = tuple(sorted(set(engine.device_places(engine.aliases.values()))))
                return Recording(graph, partial(build_updated, engine), graph.nbytes, whole=False, written=updated)
            return Recording(graph, _build, graph.nbytes, whole=True, bare=len(engine.outputs) == 1)
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
                engine = self._module.engine
                verify(OnCopies(graph, engine) if engine.aliases else graph, rounds, call.run, where=name)
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
        self._outputs: list[Tensor] = module.engine.with_updated(made, static) if module.engine.aliases else made
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
            raise Refusal(Reason.MUTATES, self._module.name, "it updates an input in place, and would update a copy")
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
        made, engine = tensors[count:], self._module.engine
        self._context.set_outputs(all_outputs(engine, made, inputs) if engine.aliases else made)

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


def _build(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
    """An engine's answer: its only output, or a tuple of all."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# ---- one execution context for several graphs, which are checked whenever another graph is captured with it


@dataclass(eq=False, slots=True)
class SharedContext:
    """A context, the optimisation profile that it is used with, and its graphs."""

    context: Context
    profile: int
    most: int
    """How many graphs it may have."""
    graphs: WeakSet[CudaGraph] = field(default_factory=WeakSet)

    def live(self) -> list[CudaGraph]:
        """The graphs that are open."""
        return [graph for graph in self.graphs if graph.executable is not None]


class SharedContexts:
    """The execution contexts that the graphs of one wrapped engine share, and the check that they may.

    A new context takes 30 to 130 ms, the rest of a capture 4 to 20 (H100, mlp8 to MiniLM). NVIDIA documents one context
    for each graph as safe, and its own servers keep many graphs of one. The risk: a graph may read memory of the
    context whose contents depend on the shapes it was last used with. So the graphs of a context are replayed before
    and after each further capture, on the same inputs. Unless all answer as before, they are closed, and nothing is
    shared any more. The engine's stream order is held throughout.
    """

    def __init__(self, module: EngineLike, config: GraphConfig) -> None:
        self._module = module
        self._open: list[SharedContext] = []
        contexts, library = config.recording.contexts, module.engine.library
        # What an engine updates in place would be another one at each replay.
        is_measured = library.flavour == "tensorrt_rtx" and library.version.startswith(_MEASURED)
        self.shares = not module.engine.aliases and (
            contexts == "shared" or (contexts == "auto" and config.capture_in == "foreground" and is_measured)
        )
        """Whether graphs share contexts."""
        # One is captured before another has to go.
        self._most = min(config.max_graphs + 1, MAX_GRAPHS_PER_CONTEXT)
        self.broken: list[Graph] = []
        """Graphs that were closed, and have to be removed from their cache."""
        self.passing_nbytes = 0
        """Peak memory of the answers of other graphs during a capture, in bytes."""

    @contextmanager
    def one(self, scratch: Tensor, profile: int, shares: bool) -> Iterator[SharedContext]:
        """A context to capture a graph with, which is added to it; one of the graph's own unless it ``shares``."""
        if not shares:
            yield SharedContext(self._module.contexts.take(scratch), profile, most=1)
            return
        fitting = (each for each in self._open if each.profile == profile and len(each.live()) < each.most)
        if (shared := next(fitting, None)) is None:
            shared = SharedContext(self._module.contexts.take(scratch), profile, self._most)
            self._open.append(shared)
        shared.context.use_scratch(scratch)
        graphs = shared.live()
        before = _answers(graphs)
        self.passing_nbytes = max(self.passing_nbytes, 2 * nbytes_of(before))
        try:
            yield shared
        except BaseException:
            # Its state is unknown; its graphs keep it.
            self._open.remove(shared)
            raise
        finally:
            self._check(shared, graphs, before)

    def release(self, *, wait: bool) -> None:
        """Give back the contexts that no graph needs any more, once the last replay is over, and forget the others."""
        unused = [shared.context for shared in self._open if not shared.live()]
        self._open.clear()
        self._module.order.release(partial(self._module.contexts.give_back, *unused), wait=wait)

    def _check(self, shared: SharedContext, graphs: Sequence[CudaGraph], before: Sequence[Tensor]) -> None:
        """Compare the answers of graphs with those from before their context was used."""
        start = time.perf_counter()
        try:
            # Answers that differ from replay to replay may differ from those of before by as much.
            is_same = disagreement(before, _answers(graphs), lambda: _answers(graphs)) is None
        except BaseException:
            # They may be wrong. The new graph was not handed out.
            self._drop(shared.live())
            raise
        # Comparing has waited for the device.
        if time.perf_counter() - start > MAX_CHECK_SECONDS:
            shared.most = len(shared.live())
        if not is_same:
            log.warning(
                "%s: %d graph(s) answered differently once their execution context was used for another shape; they "
                "were dropped, and each graph has a context of its own from now on",
                self._module.name,
                len(graphs),
            )
            self.shares = False
            self._drop(graphs)

    def _drop(self, graphs: Sequence[CudaGraph]) -> None:
        """Close graphs, and share no context that is there."""
        self._open.clear()
        for graph in graphs:
            graph.close(wait=False)
        self.broken += graphs


def _answers(graphs: Sequence[CudaGraph]) -> list[Tensor]:
    """The answers of graphs on their static inputs, with the outputs poisoned before."""
    found: list[Tensor] = []
    for graph in graphs:
        static, out = [slot.buffer for slot in graph.outputs], [slot.fresh() for slot in graph.outputs]
        poison([*static, *out])
        found += graph.replay([slot.buffer for slot in graph.inputs], out)
    return found
