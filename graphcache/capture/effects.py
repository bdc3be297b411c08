"""One run of a call, for the caller, and everything that it did besides returning.

Nothing is run a second time before this has been decided: a graph may answer a call only if the call is a function of
its tensors, and besides updates no more than tensors of its module. What is observed, and how:

* operations, below autograd, by a dispatch mode: writes into memory of outside, random numbers, memory that is read;
* the Python state that can be reached from the module and from the arguments, by a snapshot before the run;
* version counters and contents of the tensors in it: writes past the dispatcher, such as through NumPy;
* random generators of PyTorch, Python and NumPy, context variables, and what of PyTorch is set for the process;
* reads of tensors by the host, clocks, files, and work that goes to other threads, by the interpreter's profile hook.

Not seen are writes by extension modules and kernels that bypass PyTorch, threads that outlive the call, and clocks that
libraries read.
"""

from __future__ import annotations

import contextvars
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcache.capture.blame import at
from graphcache.capture.host_activity import HostActivity
from graphcache.capture.persistent_state import PersistentState
from graphcache.errors import Cause, Reason
from graphcache.graphs.operations import DispatchMode, is_higher_order, is_unwatched, storage_of, tensors_in, written
from graphcache.graphs.stream_order import quiet_collector
from graphcache.graphs.verify import same_bits
from graphcache.keys.call_key import CallKey, ambient_state
from graphcache.keys.state_snapshot import StatePlace, StateSnapshot, is_strided
from graphcache.keys.values import Unobservable, same

MAX_CONTENTS = 64 << 20
"""Bytes of tensors on the CPU whose contents are compared before and after an observed run."""
_OF_MODES = ("Creating a new Tensor subclass", "Expected a value of type 'Tensor' for argument", "operator prim::")
"""What PyTorch says where a dispatch mode is in the way: of subclasses made of tensors, of TorchScript's first run."""
MAX_REPORTED = 64
"""Changes of Python state that are reported."""


@dataclass
class Effects:
    """What a call did, besides returning ``value``."""

    value: Any
    cause: Cause | None = None
    """Why no graph repeats it, and in which submodule; ``None`` if it is a function of its tensors."""
    outside: list[Tensor] = field(default_factory=list)
    """The tensors that it read and did not make, one for each memory."""
    ran: dict[types.CodeType, dict[str, Any]] = field(default_factory=dict)
    """The code of the user's functions that ran, with their globals."""
    autocasts: bool = False
    """Whether it switched autocast on by itself."""
    version: int = 0
    """That of the module's guard when the call ran."""
    state: PersistentState | None = None
    """What it updated in place, if graphs may do the same."""
    held: StateSnapshot | None = None
    """What the objects among the arguments held before."""
    rebound: list[StatePlace] = field(default_factory=list)
    """Where it put other tensors of the same kind, and before it others did, if it changed no other Python state."""
    put_back: Callable[[], object] = lambda: None
    """Puts the tensors of before at these places again."""
    may_keep: bool = False
    """Whether state holds a tensor that the call was given: the call may have put it there."""


@dataclass(frozen=True)
class Watched:
    """What is compared before and after an observed run: the state reached from module and arguments."""

    module: StateSnapshot
    arguments: StateSnapshot
    inputs: Sequence[Tensor]
    """The tensors among the arguments, in the order of the call key."""
    path_here: Callable[[], str]
    """Names the submodule that is at work."""
    state: PersistentState | None = None
    """Where updates in place are kept that are to be part of a graph; without it they are effects."""
    report: Callable[[Cause, str], object] | None = None
    """Told of every effect and of its operation, while that runs; of changes of state at the end, without an operation.
    Without it, only the first effect is looked for."""


def observe(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], watched: Watched) -> Effects:
    """Run a call once and tell everything it did. If it raises, it has had its effects, as without an observer.

    :class:`Unobservable` says that PyTorch could not run it while it was observed, and that nothing has happened yet.
    """
    host = HostActivity(watched.path_here, watched.report, watched.module.ignores)
    operations = _Operations(watched, host)
    contents = [*_contents(watched.module), *_contents(watched.arguments)]
    before = _process_state(operations.devices)
    # Finalizers of other objects would be taken for what the call does.
    try:
        with quiet_collector, operations, host:
            value = run(*args, **kwargs)
    except RuntimeError as error:
        stands = any(text in str(error) for text in _OF_MODES) and not (operations.cause or host.cause)
        if not stands or _is_changed(watched) or _process_state(operations.devices) != before:
            raise
        raise Unobservable(f"PyTorch does not run it while it is observed: {str(error).splitlines()[0]}") from error
    state = watched.state or None
    lost = None if state is None else state.observed()
    after = _process_state(operations.devices)
    if not operations.ran_opaque:
        # Every operation was seen. If none of them drew random numbers, another thread did.
        before["torch"] = after["torch"]
    limit = MAX_REPORTED if watched.report is not None else 1
    found = _changed_process_state(before, after), _changed_objects(watched, limit), _written(watched, contents)
    changes: Iterable[Cause] = chain.from_iterable(found)
    if watched.report is not None:
        changes = list(changes)
        for change in changes:
            watched.report(change, "")
    cause = operations.cause or lost
    if cause is None:
        cause = host.cause or next(iter(changes), None)
        if cause is not None and host.compiled:
            # A compiler imports, reads clocks and sets variables of its own: none of it happens at the next call.
            cause = Cause(Reason.UNSETTLED, detail="Dynamo compiled a function in it")
    try:
        leaves = pytree.tree_leaves(value)
    except RecursionError:
        leaves, cause = [], cause or Cause(Reason.OUTPUT, detail="it is nested too deep, or contains itself")
    operations.reads([leaf for leaf in leaves if isinstance(leaf, Tensor) and storage_of(leaf)])
    return Effects(value, cause, list(operations.outside.values()), host.functions, host.autocasts, state=state)


class _Operations(DispatchMode):
    """Sees every operation of the current thread, below autograd."""

    def __init__(self, watched: Watched, host: HostActivity) -> None:
        super().__init__()
        self.cause: Cause | None = None
        self.outside: dict[int, Tensor] = {}
        reached = [*watched.inputs, *(node.target for node in watched.module.tensors)]
        self.devices = sorted({tensor.device.index or 0 for tensor in reached if tensor.is_cuda})
        self.ran_opaque = False
        """Whether code ran whose operations are not seen: engines, and what Inductor compiled."""
        self._watched = watched
        self._host = host
        host.reads = not self.devices
        host.entered, host.left = self._enter_opaque, self._leave_opaque
        self._inputs = {storage_of(tensor): index for index, tensor in reversed(list(enumerate(watched.inputs)))}
        # References, so that no memory of the call is freed and its identity used again.
        self._made: dict[int, Tensor] = {}
        # Of the code past the dispatcher that is running: the memory that it was given. All other is its own.
        self._given: list[set[int]] = []

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = tensors_in((args, kwargs))
        if is_higher_order(func):
            out = self.higher_order(func, args, kwargs)
            # Its functions run under this mode; what it makes of their results itself is not seen.
            self._makes(tensors_in(out), {*self.outside, *map(storage_of, given)})
            return out
        drawn = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        self._host.paused = True
        try:
            generators = _generators(self.devices) if drawn else []
            if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
                self._note(Reason.RANDOM, str(func), str(func))
            for tensor in written(func, args, kwargs):
                if self._is_foreign(tensor) and not self._is_state(tensor):
                    self._note(Reason.MUTATES, str(func), self._place(tensor) or str(func))
            self.reads(given)
            for tensor in given if self.devices and func.namespace == "aten" and not self._given else ():
                address = storage_of(tensor)
                on_host = tensor.device.type == "cpu" and not tensor.dim() and address not in self._inputs
                if on_host and (place := self._place(tensor)):
                    # A graph of the device would keep the number of now, as a parameter of a kernel or by item().
                    self._note(Reason.HOST_READ, str(func), place)
            self._host.paused = False
            out = func(*args, **kwargs)
            self._host.paused = True
            if drawn and generators != _generators(self.devices):
                self._note(Reason.RANDOM, str(func), str(func))
            # A constant made by torch.tensor() arrives here by no other operation.
            lifted = func is torch.ops.aten.lift_fresh.default
            self._makes(tensors_in(out), set() if lifted else set(map(storage_of, given)))
        finally:
            self._host.paused = False
        return out

    def reads(self, tensors: Sequence[Tensor]) -> None:
        """Note the memory of outside that is read, but for that of the inputs."""
        for tensor in tensors:
            if self._is_foreign(tensor) and storage_of(tensor) not in self._inputs:
                self.outside.setdefault(storage_of(tensor), tensor)

    def _makes(self, tensors: Sequence[Tensor], known: set[int]) -> None:
        """Note memory that the call has made, which is neither ``known`` nor that of the inputs."""
        for tensor in tensors:
            address = storage_of(tensor)
            if address not in known and address not in self._inputs:
                self._made.setdefault(address, tensor)
                self.outside.pop(address, None)

    def _is_foreign(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory was there before the call."""
        address = storage_of(tensor)
        return address not in self._made and (not self._given or address in self._given[-1])

    def _is_state(self, tensor: Tensor) -> bool:
        """Whether a tensor is state that outlives the call, which a graph may update as the call does."""
        state = self._watched.state
        return state is not None and state.keep(tensor)

    def _enter_opaque(self, given: Sequence[Any]) -> None:
        """Note what code that Inductor compiled, or an engine, reads; little of it passes the dispatcher."""
        self.ran_opaque = True
        tensors = tensors_in(tuple(given))
        self.reads(tensors)
        self._given.append(set(map(storage_of, tensors)))

    def _leave_opaque(self, returned: Any) -> None:
        given = self._given.pop()
        for tensor in tensors_in(returned):
            if (address := storage_of(tensor)) not in given:
                self._made.setdefault(address, tensor)

    def _place(self, tensor: Tensor) -> str:
        address = storage_of(tensor)
        return _path_in(self._watched.arguments, address) or (
            f"args[{self._inputs[address]}]" if address in self._inputs else _path_in(self._watched.module, address)
        )

    def _note(self, reason: Reason, operation: str, where: str) -> None:
        # What an engine does with memory of its own is no change that a replay would leave out.
        if is_unwatched.get():
            return
        cause = Cause(reason, where)
        if self._watched.report is not None:
            self._watched.report(cause, operation)
        if self.cause is None:
            is_named = where.startswith(("self", "args", "kwargs"))
            self.cause = cause if is_named else at(cause, self._watched.path_here(), "")


def _path_in(snapshot: StateSnapshot, address: int) -> str:
    return next((node.path for node in snapshot.tensors if address and storage_of(node.target) == address), "")


def _contents(snapshot: StateSnapshot) -> list[tuple[str, Tensor, Tensor]]:
    """Copies of the tensors that a call may write past the dispatcher and past version counters, as NumPy does."""
    found, budget = [], MAX_CONTENTS
    for node in snapshot.tensors:
        tensor = node.target
        if isinstance(tensor, nn.Parameter) or tensor.device.type != "cpu" or not is_strided(tensor):
            continue
        budget -= tensor.nbytes
        if budget < 0:
            break
        found.append((node.path, tensor, tensor.detach().clone()))
    return found


def _written(watched: Watched, contents: Sequence[tuple[str, Tensor, Tensor]]) -> Iterator[Cause]:
    """Tensors that were written, by their version counters and contents."""
    for snapshot in (watched.module, watched.arguments):
        for change in snapshot.written():
            yield Cause(Reason.MUTATES, change.path, change.detail)
    for path, tensor, before in contents:
        if watched.state is not None and storage_of(tensor) in watched.state:
            continue
        if not is_strided(tensor) or not same_bits([tensor], [before]):
            yield Cause(Reason.MUTATES, path, "the tensor has other contents")


def _changed_objects(watched: Watched, limit: int) -> Iterator[Cause]:
    for snapshot in (watched.module, watched.arguments):
        for change in snapshot.changes(limit):
            yield Cause(Reason.RANDOM if change.is_random else Reason.MUTATES, change.path, change.detail)


def _process_state(devices: Sequence[int]) -> dict[str, Any]:
    """Random generators, context variables, and what is set for the process or the thread."""
    found: dict[str, Any] = {
        "torch": _generators(devices),
        "random": random.getstate(),
        "context": dict(contextvars.copy_context().items()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), ambient_state()),
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        found["numpy"] = (state[1].tobytes(), *state[2:])
    return found


def _changed_process_state(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Cause]:
    """Random generators, context variables and modes that the call changed."""
    for name in ("torch", "random", "numpy"):
        if name in before and before[name] != after[name]:
            yield Cause(Reason.RANDOM, name, "the generator moved on")
    for variable, value in after["context"].items():
        old = before["context"][variable] if variable in before["context"] else _default_of(variable)
        if old is not value and not same(old, value) and not _is_tritons(variable):
            yield Cause(Reason.MUTATES, f"the context variable {variable.name!r}", "it was set")
    if before["modes"] != after["modes"]:
        yield Cause(Reason.MUTATES, "the grad mode or a setting of PyTorch", "it was set")


def _default_of(variable: contextvars.ContextVar[Any]) -> Any:
    """What a context variable is where nobody has set it; one that is set to this is in the context since then."""
    try:
        return contextvars.Context().run(variable.get)
    except LookupError:
        return None


def _is_tritons(variable: contextvars.ContextVar[Any]) -> bool:
    """Whether a context variable is one of Triton's: Inductor sets the allocator of scratch memory at every launch."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "triton"]
    return any(value is variable for module in modules for value in vars(module).values())


def _generators(devices: Sequence[int]) -> list[bytes]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in devices)]
    return [state.numpy().tobytes() for state in states]


def _is_changed(watched: Watched) -> bool:
    """Whether anything that is watched has changed, in Python or in a tensor's memory."""
    snapshots = watched.module, watched.arguments
    return any(True for each in snapshots for _ in (*each.changes(limit=1), *each.written())) or bool(watched.state)


def snapshot_of(args: tuple[Any, ...], kwargs: dict[str, Any], mentioned: Iterable[str] = ()) -> StateSnapshot:
    """What can be reached from the arguments of a call, by code that mentions some names."""
    roots = [(f"args[{index}]", value) for index, value in enumerate(args)]
    roots += [(f"kwargs[{name!r}]", value) for name, value in kwargs.items()]
    return StateSnapshot(roots, mentioned=mentioned)


def snapshot_of_objects(key: CallKey, mentioned: Iterable[str]) -> StateSnapshot | None:
    """What can be reached from objects among the arguments, which it does not keep alive, and from the user's classes.

    ``None`` without any.
    """
    held = [(str(each), each.ref()) for each in key.held]
    roots = [*held, *((kind.__qualname__, kind) for kind in key.classes())]
    return StateSnapshot(roots, weakly=[value for _, value in held], mentioned=mentioned) if roots else None
