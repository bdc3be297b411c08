"""What is wrapped, as the way of a call sees it: an engine, or any other module."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphcache.capture.engine_like import EngineLike
from graphcache.capture.engine_recorder import EngineRecorder
from graphcache.capture.rebound_state import StateFunction
from graphcache.capture.recording import Recording, lies_in
from graphcache.capture.torch_recorder import TorchRecorder
from graphcache.config import GraphConfig, modes
from graphcache.keys.call_key import CallKey, KeyedCall, describe
from graphcache.keys.guards import ModuleGuard
from graphcache.keys.state_snapshot import is_alike
from graphcache.keys.values import MISSING

_MAX_UPDATES = 1024
"""Keys whose updates are known; without that, the next call of a key finds out again."""


class _Updates(NamedTuple):
    """What calls of one key update in place."""

    places: tuple[int, ...]
    """Tensors of the call."""
    bounds: tuple[int, ...]
    """Where other state begins and ends, as in ``Recording.updates``."""
    sharing: tuple[int, ...]
    """How these tensors share memory, if this is only known of calls whose tensors do."""


class EngineGuard:
    """The guard of an engine: its epoch, which every change of it raises.

    The engine clears ``user``, who holds the graphs, before a change that no graph may survive.
    """

    version = 0
    """Stays as it is: the graphs of an engine that has changed are dropped."""

    def __init__(self, engine: EngineLike, user: object) -> None:
        self._engine = engine
        self._user = weakref.ref(user)
        self.renew()

    def renew(self) -> None:
        """Take the engine as it is now."""
        if (user := self._user()) is not None:
            self._engine.users.add(user)
        self.epoch: int = self._engine.epoch
        """That of the engine when the graphs that are kept now were captured."""

    def forget(self) -> None:
        """Nothing is kept of an engine but its epoch."""

    def has_changed(self) -> bool:
        """Whether the engine is another one than that of the graphs."""
        return bool(self._engine.epoch != self.epoch)

    def is_stale(self, grad: bool) -> bool:
        """Whether no graph may answer a call; gradients do not matter."""
        return bool(self._engine.epoch != self.epoch)

    def requires_grad(self) -> bool:
        """Whether a parameter wants gradients, which engines do not record."""
        return any(each.requires_grad for each in self._engine.parameters())


class ModuleTarget:
    """Any module that is no engine. ``run`` is what a call calls: the module itself or its ``forward``."""

    is_engine = False

    def __init__(
        self, module: nn.Module, run: Callable[..., Any], name: str, config: GraphConfig, guard: ModuleGuard
    ) -> None:
        self.module = module
        self.guard: ModuleGuard = guard
        self._recorder_of = partial(TorchRecorder, module, name=name, config=config, guard=guard)
        self._training: list[bool] = []
        self._updates: dict[CallKey, _Updates] = {}
        self.runs(run)

    def runs(self, run: Callable[..., Any]) -> None:
        """Call ``run`` from now on; graphs of another one must have been dropped."""
        self.guard.leave_out(())
        self.run = run
        self.call = StateFunction(run)
        """What runs a call that was described."""
        self.recorder = self._recorder_of(self.call)

    def describe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeyedCall:
        """The call of these arguments. Its key holds the addresses of tensors in memory that such a call updates."""
        call = describe(args, kwargs) if not self.call.name else self._with_state(args, kwargs)
        if not self._updates or (updates := self._updates.get(call.key)) is None:
            return call
        if updates.sharing and _sharing(call.tensors, updates.places) != updates.sharing:
            return call
        own = {_memory_of(call.tensors[place]) for place in updates.places}
        bounds = sorted([*updates.bounds, *chain.from_iterable(own)])
        written = [place for place, tensor in enumerate(call.tensors) if lies_in(tensor, bounds)]
        return _at_addresses(call, written) if written else call

    def updates(self, call: KeyedCall, recorded: Recording) -> KeyedCall:
        """A call that was found to update what ``recorded`` says, as others of its key do from now on."""
        if not recorded.updates_state:
            return call
        key, places = call.key._replace(written=()), recorded.written
        sharing, known = _sharing(call.tensors, places), self._updates.get(key)
        if len(set(sharing)) == len(sharing):
            sharing = ()
            places = tuple(sorted({*places, *(known.places if known is not None and not known.sharing else ())}))
        elif known is not None and not known.sharing:
            # Which of several tensors in one memory is written cannot be told; of tensors apart it could.
            places, sharing = known.places, ()
        if len(self._updates) >= _MAX_UPDATES:
            self._updates.clear()
        self._updates[key] = _Updates(places, recorded.updates, sharing)
        return _at_addresses(call, recorded.in_place)

    def _with_state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeyedCall:
        """The call of these arguments and of what the module's attributes hold."""
        state = self.call.given()
        if any(value is MISSING for each in state.values() for value in each):
            # Somebody has deleted an attribute, and it is no argument any more.
            self.forget_state()
            state = {}
        return describe(args, {**kwargs, **state})._replace(state=next(iter(state), ""))

    def finish(self, call: KeyedCall, answer: Any) -> Any:
        """The answer to a caller; what the call left in attributes is put there."""
        answer, state = answer
        self.call.put(call.state, state)
        if not all(map(_keeps_kind, call.kwargs[call.state], state)):
            # It grows, so that each call would be another one, or wants gradients.
            self.forget_state()
        return answer

    def forget_state(self) -> None:
        """Look anew for what calls rebind."""
        self.call.name = ""
        self.guard.leave_out(())

    def graph_inputs(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors of a call that a graph is given."""
        return tensors

    def device_of(self, tensors: Sequence[Tensor]) -> torch.device | None:
        """The CUDA device of a call; ``None`` for the host."""
        return next((tensor.device for tensor in tensors if tensor.is_cuda), None)

    def has_changed(self) -> bool:
        """Whether the module is known to have changed, so that denials may be of the past."""
        return self.guard.has_changed() or self._training_flags() != self._training

    def trains_differently(self) -> bool:
        """Whether a training flag was set since this was asked the last time."""
        before, self._training = self._training, self._training_flags()
        return before != self._training

    def _training_flags(self) -> list[bool]:
        # TorchScript's frozen modules have none, and are in evaluation.
        return [bool(getattr(each, "training", False)) for each in self.module.modules()]


class EngineTarget:
    """A module that runs one engine. ``run`` is what a call calls; ``user`` holds the graphs."""

    is_engine = True

    def __init__(self, engine: EngineLike, run: Callable[..., Any], config: GraphConfig, user: object) -> None:
        self.module = self.engine = engine
        self.guard = EngineGuard(engine, user)
        self.has_changed = self.guard.has_changed
        self.runs(run)
        self.recorder = EngineRecorder(engine, config)
        # Whether the arguments of a call are not simply the engine's inputs.
        self._binds = bool(engine.host_inputs) or engine.takes_numbers

    def runs(self, run: Callable[..., Any]) -> None:
        """Call ``run`` from now on."""
        self.run = self.call = run

    def describe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeyedCall:
        """The call of these arguments. Its key holds the values of host shape tensors, which a graph freezes."""
        if kwargs or self._binds:
            args, kwargs = tuple(self.engine.bind(args, kwargs)), {}
        if modes.get().multi_device_safe:
            args = tuple(self.engine.moved(args))
        call = describe(args, kwargs)
        if not self.engine.host_inputs:
            return call
        given = [args[index] for index in self.engine.host_inputs if index < len(args)]
        values = [tuple(value.flatten().tolist()) if isinstance(value, Tensor) else None for value in given]
        return call._replace(key=call.key._replace(host_values=tuple(values)))

    def graph_inputs(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        # The others TensorRT reads on the host.
        return self.engine.engine.device_only(tensors) if self.engine.host_inputs else tensors

    def device_of(self, tensors: Sequence[Tensor]) -> torch.device | None:
        return self.engine.device


def _keeps_kind(before: Any, now: Any) -> bool:
    """Whether a place is as calls without other effects leave it; it may be empty before the first of a sequence."""
    return before is None or now is None or now is before or is_alike(before, now)


def _at_addresses(call: KeyedCall, places: Sequence[int]) -> KeyedCall:
    """The call with the addresses of some of its tensors in its key."""
    written = tuple([(place, call.tensors[place].data_ptr()) for place in places])
    return call._replace(key=call.key._replace(written=written))


def _sharing(tensors: Sequence[Tensor], places: Sequence[int]) -> tuple[int, ...]:
    """For each of some tensors, the first one in the same memory."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(_memory_of(tensors[place])[0], place) for place in places])


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins and ends."""
    memory = tensor.untyped_storage()
    return memory.data_ptr(), memory.data_ptr() + memory.nbytes()


Target = EngineTarget | ModuleTarget


def arguments_of(module: Any) -> inspect.Signature | Sequence[str]:
    """What a module's arguments are called, as far as it can be told."""
    if isinstance(module, EngineLike):
        return module.input_binding_names
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        # Compiled code, which does not say.
        return inspect.signature(lambda *args, **kwargs: None)
