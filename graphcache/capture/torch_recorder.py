"""Recording any module: its inputs, its structure, its weights, and what it must not do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.capture.blame import at, located, path_here
from graphcache.capture.effects import Effects, Watched, observe, snapshot_of, snapshot_of_objects
from graphcache.capture.engine_like import EngineLike, EngineScope
from graphcache.capture.host_activity import is_available
from graphcache.capture.persistent_state import PersistentState
from graphcache.capture.rebound_state import StateFunction
from graphcache.capture.recording import CaptureRequest, Recording, Sharing
from graphcache.capture.trial_call import TrialCall, containers_in
from graphcache.config import GraphConfig, graphs_off
from graphcache.errors import Cause, Reason, Refusal
from graphcache.events import fork_safe_lock
from graphcache.graphs.buffers import is_plain_copy, nbytes_of, packed, put, static_copy
from graphcache.graphs.capture import (
    as_if_capturing,
    compiled_runs_eagerly,
    forget_workspaces,
    record_torch,
    refusal_of,
)
from graphcache.graphs.cpu_tape import CpuTape
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.graph import Graph
from graphcache.graphs.operations import HostQuestions, storage_of
from graphcache.graphs.stream_order import StreamOrder, capturing
from graphcache.graphs.verify import rounds_of, verify
from graphcache.keys.call_key import SETTINGS, USUAL, KeyedCall, State, ambient_state, autocast_dtypes
from graphcache.keys.guards import ModuleGuard
from graphcache.keys.state_snapshot import StateSnapshot, is_strided
from graphcache.keys.value_nodes import ShownNode
from graphcache.keys.values import Unobservable

Running = Callable[[], AbstractContextManager[object]]


class TorchRecorder:
    """Records any module: on the CPU as a host graph, on CUDA as a graph with a memory pool of its own."""

    passing_nbytes = 0

    def __init__(
        self, module: nn.Module, run: StateFunction, name: str, config: GraphConfig, guard: ModuleGuard
    ) -> None:
        self._module = module
        self._run = run
        self._name = name
        self._guard = guard
        self._config = config
        self._recording = config.recording
        self._host_lock = fork_safe_lock()
        self._orders: dict[int, StreamOrder] = {}
        self.broken: list[Graph] = []
        self.observing = threading.Lock()
        """Held during an observed run: of two at once, one would not see what it does while the other begins."""

    def attempt(self, request: CaptureRequest) -> tuple[Any, Recording | Cause]:
        effects = self.observe(request.call, keeps_state=request.keeps_state)
        if effects.cause is not None or effects.state is None:
            return effects.value, effects.cause or self.record(request, effects)
        with request.alone() as is_alone:
            if is_alone and effects.state.is_as_observed:
                return effects.value, self.record(request, effects)
        return effects.value, Cause(Reason.UNSETTLED, detail="another thread uses the state that the call updates")

    def observe(self, call: KeyedCall, *, keeps_state: bool = False) -> Effects:
        """Run a call for the caller, and tell whether a graph may repeat it."""
        with self.observing:
            effects = self._observe(call, keeps_state)
        if effects.rebound and self._run.adopt(effects.rebound):
            self._guard.leave_out(effects.rebound)
            names = ", ".join(place.path for place in effects.rebound[:3])
            detail = "the call puts another tensor there, which is an argument from the next call on"
            effects.cause = Cause(Reason.UNSETTLED, names, detail)
        elif effects.cause is not None:
            # What changed no state leaves the graphs of other keys right. Without graphs there is nothing to compare.
            if effects.cause.reason is Reason.MUTATES or not self._guard.is_armed:
                self._guard.forget()
        elif unseen := self._guard.unseen(effects.ran):
            self._guard.follow(unseen)
            names = ", ".join(sorted({code.co_qualname for code in unseen})[:3])
            effects.cause = Cause(
                Reason.UNSETTLED, detail=f"it came to run {names}, which is observed from the next call on"
            )
        return effects

    def _observe(self, call: KeyedCall, keeps_state: bool) -> Effects:
        args, kwargs = call.args, call.kwargs
        try:
            if not is_available():
                raise Unobservable("the profile hook of the interpreter is in use (sys.setprofile)")
            module = self._guard.snapshot()
            snapshots = module, snapshot_of(args, kwargs, module.mentioned)
            held = snapshot_of_objects(call.key, module.mentioned)
            state = PersistentState([*snapshots[0].tensors, *snapshots[1].tensors]) if keeps_state else None
            watched = Watched(*snapshots, call.tensors, lambda: path_here(self._module), state)
            with graphs_off():
                effects = observe(self._run, args, kwargs, watched)
        except Unobservable as error:
            with graphs_off():
                return Effects(self._run(*args, **kwargs), Cause(Reason.UNOBSERVED, detail=str(error)))
        if effects.autocasts:
            # The key says nothing of it, as it is off around the call.
            held = held or StateSnapshot(())
            held.guard_also(ShownNode(None, "torch", None, lambda _: autocast_dtypes()))
        if keeps_state and self._config.buckets is None and effects.cause is not None:
            effects.rebound = module.rebound() if effects.cause.reason is Reason.MUTATES else []
            effects.put_back = partial(module.put_back, effects.rebound)
        effects.version, effects.held, effects.may_keep = module.version, held, self._may_keep(call.tensors, held)
        return effects

    def record(self, request: CaptureRequest, effects: Effects) -> Recording | Cause:
        """Capture a call that was observed to be a function of its tensors; a cause says why that failed."""
        call = request.call
        run = self.again(effects.version, request.running, (call.key.settings or USUAL)[:SETTINGS])
        # The module may ask for it; nothing that it reaches requires gradients.
        run = torch.set_grad_enabled(call.key.grad is not False)(run)
        if effects.state is not None and effects.state.is_inference:
            # Only there may it be updated.
            run = torch.inference_mode()(run)
        state = [*self._weights(), *effects.outside]
        in_inference = torch.is_inference_mode_enabled()
        foreground = request.running is nullcontext
        try:
            with torch.inference_mode(False), torch.no_grad(), _no_autocast_cache():
                if effects.may_keep and not foreground:
                    raise Refusal(Reason.MUTATES, detail="an argument is held by the module, which may keep arguments")
                self._check_containers(effects.value, call)
                self._check_engines()
                request.begin()
                # The caller may have changed the answer of the observed run meanwhile.
                value = effects.value if foreground else run(*call.args, **call.kwargs)
                trial = TrialCall(run, call, value, state, effects.state)
                index, shares = self._cuda_index(call.tensors, effects.state), request.sharing is Sharing.ALL
                graph = self._on_host(trial) if index is None else self._on_cuda(trial, index, shares)
                answer = trial.answer
                recorded = Recording(
                    graph,
                    answer.builder(),
                    graph.nbytes,
                    whole=answer.is_whole,
                    bare=answer.is_whole and isinstance(value, Tensor),
                    enters_inference=answer.is_inference and not in_inference,
                    **_in_place(effects, call.tensors),
                )
                try:
                    self.check_unchanged(effects.version)
                    _check_objects(effects.held)
                except Refusal:
                    recorded.close()
                    raise
        except Exception as error:
            return located(refusal_of(error, self._name).cause, error, self._module, self._name)
        finally:
            if effects.may_keep and foreground:
                if effects.state is not None:
                    effects.state.rewind()
                # The last run leaves the caller's tensors in the state, not those of the recording.
                with graphs_off(), suppress(Exception):
                    self._run(*call.args, **call.kwargs)
            if effects.state is not None:
                effects.state.advance()
            self._run.let_go()
        recorded.version = effects.version
        self._guard.arm()
        if effects.held is not None:
            effects.held.arm()
        return recorded

    def again(self, version: int, running: Running = nullcontext, settings: State | None = None) -> Callable[..., Any]:
        """Runs the module again, which had no effects under this version.

        Inside ``running``, which is entered beside the calls, in no other state, nor under other settings of PyTorch.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            if running is nullcontext:
                with graphs_off():
                    return self._run(*args, **kwargs)
            with running(), graphs_off():
                self.check_unchanged(version)
                _check_settings(settings)
                answer = self._run(*args, **kwargs)
                _check_settings(settings)
                return answer

        return run

    def check_unchanged(self, version: int) -> None:
        """Refuse unless nothing that the module reaches has changed since this version of the guard."""
        # What the comparison asks of tensors is no read of the module's.
        with torch._C.DisableTorchFunction():
            change = self._guard.change_since(version)
        if change is not None:
            raise Refusal(Reason.MUTATES, change.path, f"{change.detail}, after the call was observed")

    @property
    def shared_nbytes(self) -> int:
        return sum(order.pool().nbytes for order in self._orders.values())

    def release(self, *, wait: bool = True) -> None:
        for order in self._orders.values():
            order.close(wait=wait)
        self._orders.clear()

    def _check_containers(self, value: Any, call: KeyedCall) -> None:
        """Refuse an answer with a container that outlives the call, or is there twice: a replay makes new ones."""
        containers = containers_in(value)
        found = {id(each) for each in containers}
        given = {id(each) for each in containers_in((call.args, call.kwargs))}
        if len(found) < len(containers) or found & given or self._guard.holds_any(found):
            raise Refusal(Reason.OUTPUT, detail="a container in it is not of its own")

    def _check_engines(self) -> None:
        """Refuse before anything is repeated if an engine may update what it is given, which nobody else sees."""
        for each in self._module.modules():
            if isinstance(each, EngineLike) and each.engine.aliases:
                raise Refusal(Reason.MUTATES, each.name, "it updates an input in place")

    def _may_keep(self, tensors: Sequence[Tensor], held: StateSnapshot | None) -> bool:
        """Whether the module, or an object among the arguments, holds a tensor that the call is given."""
        given = set(map(id, tensors))
        return self._guard.holds_any(given) or any(id(node.target) in given for node in (held.tensors if held else ()))

    def _weights(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def _cuda_index(self, tensors: Sequence[Tensor], state: PersistentState | None) -> int | None:
        """The CUDA device of a call; ``None`` for the CPU. A call with tensors on several devices is refused."""
        devices = {tensor.device for tensor in (*tensors, *self._weights())}
        devices |= set() if state is None else state.devices
        devices |= {each.device for each in self._module.modules() if isinstance(each, EngineLike)}
        if len(devices) > 1 or not all(device.type in ("cuda", "cpu") for device in devices):
            raise Refusal(Reason.ARGUMENT, detail=f"tensors on {', '.join(sorted(map(str, devices)))} in one call")
        return next((device.index for device in devices if device.type == "cuda"), None)

    def _on_host(self, trial: TrialCall) -> Graph:
        trial.make_static()
        trial.rewind()
        expected = trial.run()
        trial.compare(expected)
        self._check_questions(trial)
        inputs = [packed(tensor) for tensor in trial.static]
        graph = CpuTape.record(trial.run, inputs, self._host_lock, trial.updates or (), trial.rewind)
        self._verify(graph, trial, expected, trial.run)
        return graph

    def _on_cuda(self, trial: TrialCall, index: int, shares: bool) -> Graph:
        # The graphs of an order share its memory pool, where one may overwrite what another has shown.
        order = self._orders.setdefault(index, StreamOrder(index)) if shares else StreamOrder(index)
        scope = EngineScope(order)
        most = 0

        def run() -> list[Tensor]:
            nonlocal most
            with scope.run(), as_if_capturing():
                outputs = trial.run()
            most = max(most, torch.cuda.memory_allocated(index) + nbytes_of(outputs))
            return outputs

        with capturing(order):
            trial.make_static()
            static = trial.static
            trial.rewind()
            expected = [static_copy(tensor) for tensor in run()]
            trial.compare(expected)
            with scope.run():
                self._check_questions(trial)
            pool = order.pool()
            captured, slots = record_torch(
                run,
                [packed(tensor) for tensor in static],
                [is_plain_copy(tensor, buffer) for tensor, buffer in zip(trial.inputs, static, strict=True)],
                expected,
                order,
                self._name,
                self._recording.full_edges,
            )
            graph = CudaGraph(
                captured,
                inputs=slots[: len(static)],
                outputs=slots[len(static) :],
                order=order,
                # The state too: while it lives, no other tensor can take its address.
                keep=([tensor.detach() for tensor in trial.state], trial, scope, static, pool),
                release=scope.close,
                # Of a pool that others use too, no graph is charged.
                pool_bytes=0 if shares else pool.nbytes,
            )
            self._verify(graph, trial, expected, run)
            scope.in_order = True
            if shares:
                graph.let_go()
            del expected
            trial.let_go()
            # What eager execution on this stream needed, and is not going to run here again before the next capture.
            forget_workspaces()
            self.passing_nbytes = max(self.passing_nbytes, most - torch.cuda.memory_allocated(index))
        return graph

    def _check_questions(self, trial: TrialCall) -> None:
        """Repeat a call, and refuse it if it asks its tensors what no call key holds."""
        # A read of device memory invalidates the capture by itself; others were noticed by the observed run.
        reached = [each for each in self._guard.tensors() if is_strided(each)]
        questions = HostQuestions(trial.tensors, [*trial.state, *reached], lambda: path_here(self._module))
        # In another state it may do what was not observed, such as count, or write past the end of a cache.
        trial.rewind()
        with compiled_runs_eagerly(), questions as host:
            trial.repeat()
        if host.asked:
            cause = at(Cause(Reason.HOST_READ, host.asked), host.path, self._name)
            raise Refusal(cause.reason, cause.where, cause.detail)

    def _verify(
        self, graph: Graph, trial: TrialCall, expected: Sequence[Tensor], run: Callable[[], Sequence[Tensor]]
    ) -> None:
        """Hold a new graph against eager runs on the inputs of the call and on others; static inputs are written."""

        def again(values: Sequence[Tensor]) -> list[Tensor]:
            with torch.inference_mode(False), torch.no_grad():
                for buffer, value in zip(trial.static, values, strict=True):
                    put(packed(buffer), value)
            trial.rewind()
            return trial.with_state([tensor.clone() for tensor in run()])

        if self._config.verify:
            wanted = [*expected, *(() if trial.updates is None else trial.updates.updated)]
            rounds = rounds_of(trial.inputs, wanted, again, any_values=False)
            verify(graph if trial.updates is None else _Rewinding(graph, trial), rounds, again, where=self._name)


class _Rewinding:
    """A graph that updates state, for its verification: each replay begins with the state of before the call."""

    def __init__(self, graph: Graph, trial: TrialCall) -> None:
        self._graph, self._trial = graph, trial
        self.poison, self.close = graph.poison, graph.close

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor]) -> list[Tensor]:
        """The outputs, and the state after them."""
        self._trial.rewind()
        own = len(out) - len(self._trial.with_state(()))
        with torch.inference_mode(self._trial.updates is not None and self._trial.updates.is_inference):
            outputs = self._graph.replay(inputs, out[:own])
        return self._trial.with_state(outputs)


def _in_place(effects: Effects, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What of a recording says what it updates, and which tensors of the call it uses where they are."""
    state, held = effects.state, effects.held
    if state is None:
        return {"held": held}
    ranges = state.ranges(tensors)
    in_place = tuple([place for place, tensor in enumerate(tensors) if storage_of(tensor) in state])
    written = tuple([place for place in in_place if storage_of(tensors[place]) not in ranges])
    return {
        "held": held,
        "updates": tuple(sorted(chain.from_iterable(ranges.values()))),
        "in_place": in_place,
        "written": written,
    }


def _check_objects(held: StateSnapshot | None) -> None:
    """Refuse if an object among the arguments has changed since the call was observed."""
    for change in () if held is None else held.changes(limit=1):
        raise Refusal(Reason.MUTATES, change.path, f"{change.detail}, after the call was observed")


def _check_settings(wanted: State | None) -> None:
    """Refuse unless what is set for the process is what a call was made under."""
    if wanted is not None and ambient_state()[:SETTINGS] != wanted:
        raise Refusal(Reason.UNOBSERVED, detail="a setting of PyTorch was changed while the call was captured")


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    # Autocast keeps the weights it has cast. A graph must cast them itself, or it would never see them change.
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
