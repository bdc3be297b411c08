"""A graph on the CPU: the call is recorded once as a list of operations and replayed over static inputs.

Recording sits below autograd and autocast (``TorchDispatchMode``), where a call has become the operations that touch
memory, as a CUDA capture sees kernels. It refuses what a CUDA capture refuses: a value read by the host, a shape that
depends on values, a change made in place to memory that outlives the call. And it freezes what a CUDA graph freezes:
addresses of parameters, Python numbers, the path taken through ``if``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache.errors import ClosedError, Reason, Refusal
from graphcache.graphs.buffers import nbytes_of, poison, put
from graphcache.graphs.capture import compiled_runs_eagerly
from graphcache.graphs.operations import (
    DispatchMode,
    flatten,
    is_higher_order,
    puts_by_mask,
    refuse_by_tag,
    storage_of,
    tensors_in,
    written,
)

_OF_VALUES = frozenset({"aten::_nnz", "aten::q_scale", "aten::q_zero_point", "aten::is_coalesced"})
"""Operators whose numbers depend on values, which no tag says."""


class Step(NamedTuple):
    """An operation. A fill is a container of arguments, a place in it, and the slot of what a replay puts there."""

    func: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    fills: list[tuple[Any, Any, int]]
    # The slot of the one tensor that it returns, or of each thing, None for what is no tensor.
    results: Any


class CpuTape:
    """A recorded call; see :class:`~graphcache.graphs.graph.Graph` for the contract."""

    def __init__(
        self, inputs: Sequence[Tensor], tape: _Recorder, outputs: Sequence[Tensor], lock: threading.RLock
    ) -> None:
        self._inputs: list[Tensor] | None = list(inputs)
        self._steps = tape.steps
        self._outputs = [tape.slot_of(tensor) for tensor in outputs]
        self._lock = lock
        self._pinned: list[Tensor] = []
        self.nbytes = nbytes_of(inputs)

    @classmethod
    def record(
        cls,
        body: Callable[[], Sequence[Tensor]],
        inputs: Sequence[Tensor],
        lock: threading.RLock,
        updates: Container[int] = (),
        begin: Callable[[], object] = lambda: None,
    ) -> CpuTape:
        """Run ``body`` on the static inputs, which the graph keeps, and keep what it did, or raise a ``Refusal``.

        Of memory that outlives the call it may write what ``updates`` has; ``begin`` is called before each run.
        """
        refused: list[Refusal] = []
        # What the host reads may be a check that an operator makes on the CPU alone, such as that of one_hot. Below
        # autograd such operators arrive whole, and are recorded so; what needs gradients inside raises there.
        for level in (nullcontext, torch._C._AutoDispatchBelowAutograd):
            tape, outputs = _Recorder(updates), None
            begin()
            try:
                with torch.inference_mode(False), torch.no_grad(), level(), compiled_runs_eagerly(), tape:
                    outputs = body()
            except Exception:
                # TorchScript turns a refusal into an exception of its own.
                if not refused and tape.refused is None:
                    raise
            # The module may have caught a refusal, and gone on by another way.
            if outputs is not None and tape.refused is None:
                if not tape.steps:
                    raise Refusal(Reason.EMPTY_GRAPH)
                return cls(inputs, tape, outputs, lock)
            if tape.refused is not None:
                refused.append(tape.refused)
            if refused[0].cause.reason is not Reason.HOST_READ:
                break
        raise refused[0]

    @property
    def nodes(self) -> int:
        return len(self._steps)

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        with self._lock, torch.no_grad(), torch._C._DisableAutocast():
            for buffer, tensor in zip(self._open_inputs(), inputs, strict=True):
                put(buffer, tensor)
            answer = self._run()
            if out is None:
                return answer
            for target, tensor in zip(out, answer, strict=True):
                target.copy_(tensor)
            return out

    def accepts(self, out: Sequence[Tensor]) -> bool:
        # Operations make tensors of their own; there is nothing to be saved.
        return False

    def pin(self) -> tuple[list[Tensor], list[Tensor]]:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            static = self._open_inputs()
            self._pinned = [torch.empty_like(tensor) for tensor in self._run()]
            return static, self._pinned

    def launch(self) -> None:
        self.replay(self._open_inputs(), self._pinned)

    def recorded(self) -> tuple[list[Tensor], list[Step], list[int]]:
        """The static inputs, the operations, and the slots of the outputs among what the operations make."""
        return self._open_inputs(), self._steps, self._outputs

    def _open_inputs(self) -> list[Tensor]:
        if self._inputs is None:
            raise ClosedError("the graph was closed; call the module again to capture a new one")
        return self._inputs

    def _run(self) -> list[Tensor]:
        values: dict[int, Any] = {}
        for func, args, kwargs, fills, results in self._steps:
            for container, place, slot in fills:
                container[place] = values[slot]
            made = func(*args, **kwargs)
            for container, place, _ in fills:
                container[place] = None
            if type(results) is int:
                values[results] = made
            else:
                values.update(zip(results, flatten(made), strict=True))
        return [values[slot] for slot in self._outputs]

    def poison(self, out: Sequence[Tensor] = ()) -> None:
        with self._lock:
            poison(out, self._inputs or ())

    def close(self, *, wait: bool = True) -> None:
        with self._lock:
            self._inputs = None
            self._steps, self._pinned = [], []


class _Recorder(DispatchMode):
    """Records every operation, and where each tensor came from."""

    def __init__(self, updates: Container[int]) -> None:
        super().__init__()
        self._updates = updates
        self.steps: list[Step] = []
        self.refused: Refusal | None = None
        # Slots by tensor; the references keep ids from being used twice.
        self._made: dict[int, tuple[int, Tensor]] = {}
        # Storages that the call has made, and those of them that hold a Python number.
        self._own: set[int] = set()
        # Where such memory begins.
        self._places: set[int] = set()
        self._lifted: set[int] = set()

    def slot_of(self, tensor: Tensor) -> int:
        """The slot of an output."""
        made = self._made.get(id(tensor))
        if made is None:
            raise Refusal(Reason.OUTPUT, detail="an output was not made by any operation of the call")
        return made[0]

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._record(func, args, kwargs)
        except Refusal as refusal:
            self.refused = self.refused or refusal
            raise

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_by_tag(func, args, kwargs)
        if is_higher_order(func):
            raise Refusal(Reason.CAPTURE_FAILED, str(func), "a host graph cannot hold a higher-order operator")
        if func.namespace == "profiler":
            # It only tells the profiler where the call is.
            return func(*args, **kwargs)
        lifted = func is torch.ops.aten.lift_fresh.default
        if lifted:
            # A constant made inside the call; a replay may write into it, so it needs a new one each time.
            func = torch.ops.aten.clone.default
        if func._schema.name == "aten::set_":
            raise Refusal(Reason.HOST_READ, str(func), "what is in its memory was made by no operation")
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise Refusal(Reason.RANDOM, str(func))
        changed = {storage_of(tensor) for tensor in written(func, args, kwargs)} - self._own
        if not all(storage in self._updates for storage in changed):
            raise Refusal(Reason.MUTATES, str(func))
        if puts_by_mask(func, args) and storage_of(args[2]) in self._own - self._lifted:
            raise Refusal(Reason.DATA_DEPENDENT, str(func))
        given = tensors_in((args, kwargs))
        of_outside = func.is_view and not any(id(value) in self._made for value in given)
        fills: list[tuple[Any, Any, int]] = []
        template = self._template(args, fills), self._template(kwargs, fills)
        taken = set(map(storage_of, given))
        out = func(*args, **kwargs)
        if of_outside and set(map(storage_of, tensors_in(out))) <= taken:
            # Views of a static input or a parameter: the same memory at every replay, so they are taken once. What a
            # subclass makes instead is none.
            return out
        if any(_is_sparse(each) for each in tensors_in(out)) and not any(map(_is_sparse, given)):
            raise Refusal(Reason.DATA_DEPENDENT, str(func), "how many elements it has depends on values")
        if (results := self._keep(out, func)) is not None:
            self.steps.append(Step(func, *template, fills, results))
        made = set(map(storage_of, tensors_in(out))) - taken
        self._own |= made
        self._places |= {each.untyped_storage().data_ptr() for each in tensors_in(out) if storage_of(each) in made}
        if lifted:
            self._lifted |= made
        return out

    def _template(self, arguments: Any, fills: list[tuple[Any, Any, int]]) -> Any:
        """A copy of a container in which recorded tensors can be filled in; other tensors stay as they are."""
        copy: Any = dict(arguments) if isinstance(arguments, dict) else list(arguments)
        for place, item in list(copy.items()) if isinstance(copy, dict) else enumerate(copy):
            if isinstance(item, (list, tuple)):
                copy[place] = self._template(item, fills)
            elif isinstance(item, Tensor) and (made := self._made.get(id(item))) is not None:
                copy[place] = None
                fills.append((copy, place, made[0]))
            elif isinstance(item, Tensor) and storage_of(item) and self._is_of_the_call(item):
                raise Refusal(Reason.HOST_READ, detail="a tensor was made of another one by no operation")
        return copy

    def _is_of_the_call(self, tensor: Tensor) -> bool:
        place = tensor.untyped_storage().data_ptr()
        return storage_of(tensor) in self._own or (place != 0 and place in self._places)

    def _keep(self, out: Any, func: Any) -> Any:
        """The slots of an operation's results; ``None`` if they are numbers only, which a replay need not make."""
        if isinstance(out, Tensor):
            return self._slot(out)
        leaves = flatten(out)
        numbers = any(item is not None and not isinstance(item, Tensor) for item in leaves)
        # PyTorch's own operators return numbers that depend on layouts alone, as is_same_size does: those that read
        # values were refused by their tags, but for these.
        if numbers and (func.namespace not in ("aten", "prims") or func._schema.name in _OF_VALUES):
            raise Refusal(Reason.HOST_READ, str(func))
        results = [self._slot(item) if isinstance(item, Tensor) else None for item in leaves]
        return None if numbers and not any(slot is not None for slot in results) else results

    def _slot(self, tensor: Tensor) -> int:
        return self._made.setdefault(id(tensor), (len(self._made), tensor))[0]


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout not in (torch.strided, torch._mkldnn)  # type: ignore[attr-defined]
