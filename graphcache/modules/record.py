"""From a call to a verified graph that repeats it: the transaction of a capture.

Either everything is made and handed over, or nothing is left and a cause says why. The caller is answered both ways.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphcache.cache.signature import substitute
from graphcache.config import graphs_off
from graphcache.engines.context import Context
from graphcache.engines.library import words
from graphcache.errors import Cause, CudaError, EngineExecutionError, Reason, Refusal
from graphcache.events import log
from graphcache.graphs import driver
from graphcache.graphs.buffers import static_copy
from graphcache.graphs.cuda import CudaGraph, capture_enqueue, capturing, record_torch, refusal_of, with_copies
from graphcache.graphs.graph import Graph
from graphcache.graphs.host import HostGraph
from graphcache.graphs.lane import Lane, own_stream
from graphcache.graphs.pointers import CannotBind, find_copies, find_pointers
from graphcache.graphs.slots import ALIGNMENT, Slot
from graphcache.graphs.verify import RELATIVE, difference, perturb, verify
from graphcache.modules.answers import Answer
from graphcache.modules.engine import EngineModule
from graphcache.modules.recording import Session
from graphcache.modules.state import Dependencies, Watch

Build = Callable[[list[Tensor], Sequence[Tensor]], Any]


class Recorded:
    """A graph, and how its outputs become the module's answer."""

    __slots__ = ("build", "graph", "nbytes")

    def __init__(self, graph: Graph, build: Build) -> None:
        self.graph = graph
        self.build = build
        self.nbytes = graph.nbytes

    def close(self) -> None:
        """Close the graph."""
        self.graph.close()


class Recorder(Protocol):
    """Makes graphs of one module's calls."""

    def attempt(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]
    ) -> tuple[Any, Recorded | Cause]:
        """Answer a call, and capture it if that can be done.

        Args:
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
            inputs: The tensors among them, as the signature orders them.

        Returns:
            The eager answer, and either the graph or why there is none.
        """


class TorchRecorder:
    """Records any module: on the CPU as a host graph, on CUDA as a graph with a memory pool of its own.

    Args:
        module: Whose parameters and buffers the call depends on.
        run: What is called, ``module`` itself or its ``forward``.
        name: For messages.
        verified: Whether new graphs are held against eager execution.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], name: str, *, verified: bool) -> None:
        self._module = module
        self._run = run
        self._name = name
        self._verified = verified
        self._host_lock = threading.RLock()
        self._lanes: dict[int, Lane] = {}

    def attempt(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]
    ) -> tuple[Any, Recorded | Cause]:
        state = Dependencies(self._module).tensors()
        devices = {tensor.device for tensor in (*inputs, *state)}
        devices |= {m.device for m in self._module.modules() if isinstance(m, EngineModule)}
        indices = sorted(device.index for device in devices if device.type == "cuda")
        watch = Watch(inputs, state, indices)
        with graphs_off():
            value = self._run(*args, **kwargs)
        try:
            if len(devices) > 1 or not all(device.type in ("cuda", "cpu") for device in devices):
                raise Refusal(Reason.ARGUMENT, detail=f"tensors on {', '.join(sorted(map(str, devices)))} in one call")
            watch.check()
            answer = Answer(value, inputs, state)
            call = _Call(self._run, args, kwargs, inputs, answer, state)
            graph = self._on_cuda(call, indices[0]) if indices else self._on_host(call)
        except Refusal as refusal:
            return value, refusal.cause
        except (RuntimeError, TypeError, ValueError, NotImplementedError, CudaError) as error:
            return value, refusal_of(error, self._name).cause
        return value, Recorded(graph, answer.builder())

    def _on_host(self, call: _Call) -> Graph:
        static = [static_copy(tensor) for tensor in call.inputs]
        expected = call.eager(static, "a second time", call.answer.tensors)
        others = perturb(static)
        graph = HostGraph.record(lambda: call.run(static).tensors, static, self._host_lock)
        expected_others = call.on_others(static, others)
        self._verify(graph, call.inputs, expected, others, expected_others)
        return graph

    def _on_cuda(self, call: _Call, index: int) -> Graph:
        lane = self._lanes.setdefault(index, Lane(index))
        session = Session(lane)

        def run(static: Sequence[Tensor]) -> list[Tensor]:
            with session.run():
                try:
                    return call.run(static).tensors
                finally:
                    if session.refused is not None:
                        raise Refusal(session.refused.reason, session.refused.where, session.refused.detail)

        with capturing(lane):
            static = [static_copy(tensor) for tensor in call.inputs]
            others = perturb(static)
            expected = [tensor.clone() for tensor in run(static)]
            call.compare(expected, call.answer.tensors, "a second time")
            graph = record_torch(
                lambda: run(static),
                inputs=static,
                expected=expected,
                lane=lane,
                keep=(session, call.kept()),
                where=self._name,
            )
            try:
                _refill(static, others)
                expected_others = [tensor.clone() for tensor in run(static)]
                self._verify(graph, call.inputs, expected, others, expected_others)
            except BaseException:
                graph.close()
                raise
        return graph

    def _verify(
        self,
        graph: Graph,
        inputs: Sequence[Tensor],
        expected: Sequence[Tensor],
        others: Sequence[Tensor],
        expected_others: Sequence[Tensor] | None,
    ) -> None:
        if self._verified:
            if expected_others is None:
                others, expected_others = inputs, expected
            verify(graph, inputs, expected, others, expected_others, where=self._name)


class _Call:
    """One call of a module, repeatable on other tensors."""

    def __init__(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: Sequence[Tensor],
        answer: Answer,
        state: Sequence[Tensor],
    ) -> None:
        self._function = run
        self._args, self._kwargs = substitute(args, kwargs, [tensor.detach() for tensor in inputs])
        self.inputs = [tensor.detach() for tensor in inputs]
        self.answer = answer
        self._state = state

    def run(self, static: Sequence[Tensor]) -> Answer:
        """Call the module on other tensors.

        Raises:
            Refusal: If the answer is of another layout than the first one was.
        """
        args, kwargs = substitute(self._args, self._kwargs, static)
        with graphs_off(), torch.inference_mode(False), torch.no_grad():
            answer = Answer(self._function(*args, **kwargs), static, self._state)
        if answer.layout != self.answer.layout:
            raise Refusal(Reason.DATA_DEPENDENT, detail="the answer had another structure or other shapes")
        return answer

    def eager(self, static: Sequence[Tensor], when: str, wanted: Sequence[Tensor]) -> list[Tensor]:
        """The outputs on some inputs, held against what they were before."""
        outputs = self.run(static).tensors
        self.compare(outputs, wanted, when)
        return outputs

    def on_others(self, static: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs on inputs of other values; ``None`` if the module does not take those."""
        _refill(static, others)
        try:
            return [tensor.clone() for tensor in self.run(static).tensors]
        except Refusal:
            raise
        except Exception:
            return None
        finally:
            _refill(static, self.inputs)

    def compare(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor], when: str) -> None:
        """Raise unless eager execution repeats itself."""
        for index, (left, right) in enumerate(zip(outputs, wanted, strict=True)):
            error = difference(left, right.detach())
            if not error <= RELATIVE:
                raise Refusal(
                    Reason.NONDETERMINISTIC, detail=f"output {index} differed by {error:.3g} (relative) when run {when}"
                )

    def kept(self) -> list[Tensor]:
        """The weights as they are now: while these live, no other tensor can take their address."""
        return [tensor.detach() for tensor in self._state]


class EngineRecorder:
    """Records one engine: a context, static buffers and a graph per signature, on the engine's scratch memory.

    Args:
        module: The engine.
        shared_context: Use one context for all graphs of the engine.
        verified: Whether new graphs are held against eager execution.
        binds: Whether kernels are pointed at the caller's tensors where that can be done.
    """

    def __init__(self, module: EngineModule, *, shared_context: bool, verified: bool, binds: bool) -> None:
        self._module = module
        self._binds = binds
        self._shared_context = shared_context
        self._verified = verified
        self._context: Context | None = None

    def attempt(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]
    ) -> tuple[Any, Recorded | Cause]:
        module = self._module
        given, profile = module.checked(module.bind(args, kwargs))
        if (cause := module.forbids_capture()) is not None:
            return module(*args, **kwargs), cause
        answer: list[Tensor] = []
        outcome: Recorded | Cause
        caller = torch.cuda.current_stream(module.device)
        try:
            with capturing(module.lane):
                outcome = Recorded(self._capture([value.detach() for value in given], profile, answer), self._build)
        except Refusal as refusal:
            outcome = refusal.cause
        except (RuntimeError, CudaError, EngineExecutionError) as error:
            outcome = refusal_of(error, module.name).cause
        if not answer:
            return module(*args, **kwargs), outcome
        for tensor in answer:
            tensor.record_stream(caller)
        return self._build(answer, inputs), outcome

    def _capture(self, given: Sequence[Tensor], profile: int, answer: list[Tensor]) -> Graph:
        module = self._module
        stream = own_stream(module.device.index, "capture").cuda_stream
        context = self._new_context()
        static = [torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value) for value in given]
        context.set_inputs(static, profile, stream)
        outputs = []
        for binding, output in zip(module.engine.outputs, module.new_outputs(context, allocator=False), strict=True):
            if output is None:
                raise Refusal(Reason.OUTPUT_ALLOCATOR, f"{module.name}, output {binding.name!r}")
            outputs.append(output)
        context.set_outputs(outputs)

        def run(values: Sequence[Tensor]) -> list[Tensor]:
            _refill(static, values)
            with module.engine.said() as said:
                if not context.enqueue(stream):
                    raise EngineExecutionError(f"{module.name}: TensorRT refused to run: {words(said)}")
            return [output.clone() for output in outputs]

        expected = run(given)
        others = [
            value if binding.on_host else other
            for binding, value, other in zip(module.engine.inputs, given, perturb(static), strict=True)
        ]
        expected_others = run(others) if self._verified else []
        again = run(given)
        torch.cuda.current_stream().synchronize()
        answer += expected
        for index, (left, right) in enumerate(zip(again, expected, strict=True)):
            error = difference(left, right)
            if not error <= RELATIVE:
                raise Refusal(
                    Reason.NONDETERMINISTIC, module.name, f"output {index} differed by {error:.3g} between two runs"
                )
        io = _EngineIO(module, context, profile, static, outputs)

        def verified(graph: CudaGraph) -> CudaGraph:
            if self._verified:
                try:
                    on_device = (self._device_only(given), expected, self._device_only(others), expected_others)
                    verify(graph, *on_device, where=module.name)
                except BaseException:
                    graph.close()
                    raise
            return graph

        if self._binds:
            try:
                return verified(io.bound())
            except CannotBind as why:
                log.debug("%s copies its inputs and outputs: %s", module.name, why)
            except Refusal as refusal:
                if refusal.cause.reason is not Reason.MISMATCH:
                    raise
                log.debug("%s copies its inputs and outputs: pointed at others, %s", module.name, refusal.cause.detail)
        return verified(io.copying())

    def _device_only(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [value for index, value in enumerate(values) if index not in self._module.host_inputs]

    def _new_context(self) -> Context:
        if not self._shared_context:
            return self._module.new_context()
        if self._context is None:
            self._context = self._module.new_context()
        return self._context

    @staticmethod
    def _build(outputs: list[Tensor], inputs: Sequence[Tensor]) -> Any:
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class _EngineIO:
    """One engine call with static inputs and outputs, captured in either of two ways."""

    def __init__(
        self, module: EngineModule, context: Context, profile: int, static: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self._module = module
        self._context = context
        self._profile = profile
        self._all_inputs = static
        self._inputs = [value for index, value in enumerate(static) if index not in module.host_inputs]
        self._outputs = outputs

    def bound(self) -> CudaGraph:
        """A graph whose kernels are pointed at the caller's tensors.

        Raises:
            CannotBind: If not all places where addresses stand can be found.
            Refusal: If the engine cannot be captured.
        """
        ours = [*self._inputs, *self._outputs]
        first = self._capture(self._context.enqueue)
        with ExitStack() as undo:
            undo.callback(driver.call, "cuGraphDestroy", first)
            if any(tensor.numel() == 0 for tensor in ours):
                raise CannotBind("an input or output is empty")
            if self._module.engine.aliases:
                raise CannotBind("an output shares the memory of an input")
            others = [torch.empty_like(tensor) for tensor in ours]
            self._point_context_at(others)
            try:
                second = self._capture(self._context.enqueue)
            finally:
                self._point_context_at(ours)
            undo.callback(driver.call, "cuGraphDestroy", second)
            pointers = find_pointers(first, second, ours, others)
            undo.pop_all()
        driver.call("cuGraphDestroy", second)
        return self._graph(first, [Slot(t, p, ALIGNMENT) for t, p in zip(ours, pointers, strict=True)])

    def copying(self) -> CudaGraph:
        """A graph that begins and ends with copy nodes, which are pointed at the caller's tensors.

        Raises:
            Refusal: If the engine cannot be captured.
        """
        ours = [*self._inputs, *self._outputs]
        others = [torch.empty_like(tensor) for tensor in ours]
        pairs = list(zip(ours, others, strict=True))
        count = len(self._inputs)
        before, after = pairs[:count], [(other, own) for own, other in pairs[count:]]
        captured = self._capture(with_copies(self._context.enqueue, before, after))
        try:
            found = iter(find_copies(captured, [other for other in others if other.numel()]))
        except CannotBind as why:
            driver.call("cuGraphDestroy", captured)
            raise Refusal(Reason.CAPTURE_FAILED, self._module.name, str(why)) from why
        return self._graph(captured, [Slot(own, next(found) if own.numel() else [], 1) for own in ours])

    def _capture(self, enqueue: Callable[[int], bool]) -> Any:
        with self._module.engine.said() as said:
            return capture_enqueue(enqueue, self._module.lane, self._module.name, lambda: words(said))

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
            lane=self._module.lane,
            keep=(self._context, self._all_inputs),
            release=lambda: driver.call("cuGraphDestroy", captured),
        )


def _refill(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
