"""A graph on the CPU: the call is recorded once as a list of operations and replayed over static inputs.

Recording sits below autograd and autocast (``TorchDispatchMode``), where a call has become the operations that touch
memory, as a CUDA capture sees kernels. It refuses what a CUDA capture refuses: a value read by the host, a shape that
depends on values, a change made in place to memory that outlives the call. And it freezes what a CUDA graph freezes:
addresses of parameters, Python numbers, the path taken through ``if``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import ClosedError, Reason, Refusal
from graphcache.graphs.buffers import nbytes_of, poison, put
from graphcache.graphs.capture import compiled_runs_eagerly
from graphcache.graphs.graph import Body
from graphcache.graphs.operations import (
    DispatchMode,
    decompose_composite,
    flatten,
    is_higher_order,
    puts_by_mask,
    refuse_by_tag,
    storage_of,
    written,
)

_Fill = tuple[Any, Any, int]
"""A container of arguments, the place in it, and the slot of the value that a replay puts there."""
_Step = tuple[Callable[..., Any], list[Any], dict[str, Any], list[_Fill], Any]
"""Operator, arguments, keyword arguments, fills, and the slots of its results."""
_Level = Callable[[], AbstractContextManager[Any]]


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
    def record(cls, body: Body, inputs: Sequence[Tensor], lock: threading.RLock) -> CpuTape:
        """Run ``body`` once on the static inputs, which the graph keeps, and keep what it did.

        ``lock`` is held during a replay; graphs that share memory share it. A :class:`Refusal` says that the call does
        something that no replay could repeat.
        """
        try:
            return cls._recorded(body, inputs, lock, nullcontext)
        except Refusal as refusal:
            if refusal.cause.reason is not Reason.HOST_READ:
                raise
            why = refusal
        # The read may be a check that an operator makes on the CPU alone, such as that of one_hot. Below autograd such
        # operators arrive whole, and are recorded so; what needs gradients inside raises there.
        try:
            return cls._recorded(body, inputs, lock, torch._C._AutoDispatchBelowAutograd)
        except Exception:
            raise why from None

    @classmethod
    def _recorded(cls, body: Body, inputs: Sequence[Tensor], lock: threading.RLock, level: _Level) -> CpuTape:
        """A graph of one run of ``body``; ``level`` sets where operators are seen."""
        tape = _Recorder()
        try:
            with torch.inference_mode(False), torch.no_grad(), level(), compiled_runs_eagerly(), tape:
                outputs = body()
        except Exception:
            # TorchScript turns every exception into one of its own.
            if tape.refused is not None:
                raise tape.refused from None
            raise
        if tape.refused is not None:
            raise tape.refused
        if not tape.steps:
            raise Refusal(Reason.EMPTY_GRAPH)
        return cls(inputs, tape, outputs, lock)

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
        with self._lock, torch.no_grad(), torch._C._DisableAutocast():
            self._open_inputs()
            for target, tensor in zip(self._pinned, self._run(), strict=True):
                target.copy_(tensor)

    def recorded(self) -> tuple[list[Tensor], list[_Step], list[int]]:
        """The static inputs, the operations, and the slots of the outputs among what the operations make."""
        return self._open_inputs(), list(self._steps), list(self._outputs)

    def _open_inputs(self) -> list[Tensor]:
        """The static inputs, unless the graph was closed."""
        if self._inputs is None:
            raise ClosedError("the graph was closed; call the module again to capture a new one")
        return self._inputs

    def _run(self) -> list[Tensor]:
        """Repeat the operations: fresh outputs."""
        values: dict[int, Any] = {}
        for func, args, kwargs, fills, results in self._steps:
            for container, place, slot in fills:
                container[place] = values[slot]
            result = func(*args, **kwargs)
            for container, place, _ in fills:
                container[place] = None
            if type(results) is int:
                values[results] = result
            elif results is not None:
                items = zip(results, flatten(result), strict=True)
                values |= {slot: item for slot, item in items if slot is not None}
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

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.refused: Refusal | None = None
        # Slots by tensor; the references keep ids from being used twice.
        self._made: dict[int, tuple[int, Tensor]] = {}
        # Storages that the call has made, and those of them that hold a Python number.
        self._own: set[int] = set()
        self._lifted: set[int] = set()

    def slot_of(self, tensor: Tensor) -> int:
        """The slot of an output."""
        made = self._made.get(id(tensor))
        if made is None:
            raise Refusal(Reason.OUTPUT, detail="an output was not made by any operation of the call")
        return made[0]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._record(func, args, kwargs or {})
        except Refusal as refusal:
            # The module may catch it and go on by another way, which is not what it does when nobody records.
            self.refused = self.refused or refusal
            raise

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and keep it."""
        if (whole := decompose_composite(self, func, args, kwargs)) is not NotImplemented:
            return whole
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
        self._refuse(func, args, kwargs)
        leaves = [value for value in flatten([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        if func.is_view and not any(id(value) in self._made for value in leaves):
            # A view of a static input or a parameter: the same memory at every replay, so it is taken once.
            return func(*args, **kwargs)
        fills: list[_Fill] = []
        template_args = [self._template(value, fills) for value in args]
        template_kwargs = {name: self._template(value, fills) for name, value in kwargs.items()}
        self._refer(template_args, args, fills)
        self._refer(template_kwargs, kwargs, fills)
        taken = {storage_of(value) for value in leaves}
        out = func(*args, **kwargs)
        results = self._keep(out, func)
        if results != []:
            self.steps.append((func, template_args, template_kwargs, fills, results))
        made = {storage_of(item) for item in flatten(out) if isinstance(item, Tensor)} - taken
        self._own |= made
        if lifted:
            self._lifted |= made
        return out

    def _refuse(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise for an operator that draws random numbers, writes foreign memory, or writes where values say."""
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise Refusal(Reason.RANDOM, str(func))
        if any(storage_of(tensor) not in self._own for tensor in written(func, args, kwargs)):
            raise Refusal(Reason.MUTATES, str(func))
        if puts_by_mask(func, args) and storage_of(args[2]) in self._own - self._lifted:
            raise Refusal(Reason.DATA_DEPENDENT, str(func))

    def _template(self, value: Any, fills: list[_Fill]) -> Any:
        """A copy of an argument in which recorded tensors can be filled in; other tensors stay as they are."""
        if isinstance(value, (list, tuple)):
            copy = [self._template(item, fills) for item in value]
            self._refer(copy, value, fills)
            return copy
        return value

    def _refer(self, copy: Any, original: Any, fills: list[_Fill]) -> None:
        """Note which items of a container a replay fills in."""
        items = original.items() if isinstance(original, dict) else enumerate(original)
        for place, item in items:
            if isinstance(item, Tensor) and (made := self._made.get(id(item))) is not None:
                copy[place] = None
                fills.append((copy, place, made[0]))

    def _keep(self, out: Any, func: Any) -> Any:
        """The slots of an operation's results; ``[]`` if they are numbers only, which a replay need not make."""
        if isinstance(out, Tensor):
            return self._slot(out)
        if out is None:
            return None
        found = flatten(out)
        # PyTorch's own operators return numbers that depend on layouts alone, as is_same_size does: those that read
        # values were refused by their tags.
        may_read_values = func.namespace not in ("aten", "prims")
        if may_read_values and not all(item is None or isinstance(item, Tensor) for item in found):
            raise Refusal(Reason.HOST_READ, str(func))
        slots = [self._slot(item) if isinstance(item, Tensor) else None for item in found]
        return slots if any(slot is not None for slot in slots) else []

    def _slot(self, tensor: Tensor) -> int:
        """The slot of a tensor that an operation returned."""
        return self._made.setdefault(id(tensor), (len(self._made), tensor))[0]
