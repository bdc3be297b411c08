"""How calls of the parts find their graphs while the rest of a module runs eagerly."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from graphcache.dispatch.fast_path import global_hooks, global_pre_hooks, has_hooks, is_compiling
from graphcache.keys.state_nodes import StandIn
from graphcache.modules.transparent import TransparentModule, controls, dispatcher_of

_PATCHED = ("forward", "__getstate__")


class _Patch(StandIn):
    """A value in a module's ``__dict__`` while calls are under way. A copy or a pickle holds what it replaces."""

    __slots__ = ("module",)

    name: str

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        attributes = vars(module)
        self.own = {self.name: attributes[self.name]} if self.name in attributes else None

    def __reduce__(self) -> Any:
        return (operator.getitem, (self.own, self.name)) if self.own else (getattr, (self.module, self.name))


class ForwardPatch(_Patch):
    """Replaces a module's ``forward`` while calls are under way that have it as a part."""

    __slots__ = ("__wrapped__", "parts")
    name = "forward"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # Whatever the user has put there is what the part runs, and is put back afterwards.
        self.__wrapped__: Callable[..., Any] = module.forward
        self.parts: dict[object, TransparentModule] = {}
        """The part that each call under way has here: several wrapped modules may have the same one."""

    def __getattr__(self, name: str) -> Any:
        # Its name and text are those of the original.
        return getattr(self.__wrapped__, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What is compiled holds no graphs.
        part = None if is_compiling() else self.parts.get(_active.get())
        # Hooks of the module have run already, and running the module would run them once more.
        if part is None or (dispatcher_of(part).target.run is self.module and has_hooks(self.module)):
            return self.__wrapped__(*args, **kwargs)
        token = _active.set(None)
        try:
            # So have global hooks: this is the forward of a module that was called.
            return (part.forward if global_hooks or global_pre_hooks else part)(*args, **kwargs)
        finally:
            _active.reset(token)


class StatePatch(_Patch):
    """Replaces a module's ``__getstate__`` beside a :class:`ForwardPatch`: what is copied and pickled has neither."""

    __slots__ = ()
    name = "__getstate__"

    def __call__(self) -> Any:
        state = self.own[self.name]() if self.own else type(self.module).__getstate__(self.module)  # type: ignore[no-untyped-call]
        # A tuple is that of a class with slots.
        return tuple(map(_unpatched, state)) if type(state) is tuple else _unpatched(state)


def _unpatched(state: Any) -> Any:
    """The attributes of a module as they are at rest; anything else as it is."""
    if type(state) is not dict:
        return state
    # Copied in one step: other threads patch meanwhile.
    found = state.copy()
    _restore(found)
    return found


def _restore(attributes: dict[str, Any]) -> None:
    """Put back what the user had in the place of patches."""
    for name in _PATCHED:
        if isinstance(patch := attributes.get(name), _Patch):
            del attributes[name]
            attributes.update(patch.own or {})


@contextmanager
def graphs_of_parts(parts: Sequence[TransparentModule]) -> Iterator[None]:
    """Inside, in this context, calls of the parts go through their graphs. In other threads nothing has changed.

    A part keeps its place, its name and its hooks: only the ``forward`` that its ``__call__`` finds is another one.
    """
    if not parts:
        yield
        return
    call = object()
    token = _active.set(call)
    try:
        with _lock:
            for part in parts:
                _install(call, part)
        yield
    finally:
        _active.reset(token)
        with _lock:
            for part in parts:
                _remove(call, part)


def _install(call: object, part: TransparentModule) -> None:
    """Lead calls of a part to its graphs, of what the user has put in the place of its ``forward`` by now."""
    target = dispatcher_of(part).target
    patch = vars(target.module).get("forward")
    if not isinstance(patch, ForwardPatch):
        patch = ForwardPatch(target.module)
        vars(target.module).update(__getstate__=StatePatch(target.module), forward=patch)
    _follow(part, patch.__wrapped__)
    patch.parts[call] = part


def _follow(part: TransparentModule, forward: Callable[..., Any]) -> None:
    """Capture another ``forward`` of a part from now on; graphs of the one before are dropped."""
    target = dispatcher_of(part).target
    if target.run is not target.module and target.run != forward:
        controls(part).clear()
        target.runs(forward)


def _remove(call: object, part: TransparentModule) -> None:
    """Undo :func:`_install`; the last one to leave puts everything back."""
    attributes = vars(dispatcher_of(part).target.module)
    patch = attributes.get("forward")
    if isinstance(patch, ForwardPatch):
        patch.parts.pop(call, None)
        if not patch.parts:
            _restore(attributes)


_active: ContextVar[object] = ContextVar("graphcache_call_of_parts", default=None)
"""The call under way that this context is in."""
_lock = threading.Lock()
"""Held while modules are patched: several wrapped modules may have the same part."""
