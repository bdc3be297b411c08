"""How calls of the parts find their graphs while the rest of a module runs eagerly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import nn

from graphcache.modules.conditions import global_hooks, global_pre_hooks

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


class Route:
    """Stands in the place of a module's ``forward`` while calls are under way that have it as a part.

    Args:
        module: The module.
    """

    __slots__ = ("original", "own", "parts")

    stands_in = True
    """Snapshots of the module's state see what it stands for, which is ``own``."""

    def __init__(self, module: nn.Module) -> None:
        self.original: Callable[..., Any] = module.forward
        # Whatever the user has put there is what the part runs, and is put back afterwards.
        self.own = {name: value for name, value in module.__dict__.items() if name == "forward"}
        self.parts: dict[Routes | None, CachedModule] = {}
        """Who has it as a part: a module may be one of several wrapped ones, or stand in two places of one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = self.parts.get(_active.get())
        if part is None:
            return self.original(*args, **kwargs)
        token = _active.set(None)
        try:
            # Global hooks have run already: this is the forward of a module that was called.
            if global_hooks or global_pre_hooks:
                return part.forward(*args, **kwargs)
            return part(*args, **kwargs)
        finally:
            _active.reset(token)


class Routes:
    """While active, calls of the parts go through their graphs; outside, and in other threads, nothing has changed.

    A part keeps its place, its name and its hooks: only the ``forward`` that its ``__call__`` finds is another one, for
    as long as a call of the whole is under way. At rest the module is exactly what it was.

    Args:
        parts: Gives the wrapped parts as they are now.
    """

    def __init__(self, parts: Callable[[], tuple[CachedModule, ...]]) -> None:
        self._parts = parts
        self._installed: dict[CachedModule, None] = {}
        self._calls = 0

    def __bool__(self) -> bool:
        return bool(self._parts())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, in this context, the parts use their graphs."""
        parts = self._parts()
        if not parts:
            yield
            return
        with _lock:
            self._calls += 1
            # Some may have been found since a call began that is still under way.
            for part in parts:
                if part not in self._installed:
                    self._install(part)
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            with _lock:
                self._calls -= 1
                if not self._calls:
                    while self._installed:
                        self._remove(self._installed.popitem()[0])

    def _install(self, part: CachedModule) -> None:
        route = part.module.__dict__.get("forward")
        if not isinstance(route, Route):
            route = part.module.__dict__["forward"] = Route(part.module)
        part.runs(route.original)
        route.parts[self] = part
        self._installed[part] = None

    def _remove(self, part: CachedModule) -> None:
        route = part.module.__dict__.get("forward")
        if isinstance(route, Route):
            route.parts.pop(self, None)
            if not route.parts:
                del part.module.__dict__["forward"]
                part.module.__dict__.update(route.own)


_active: ContextVar[Routes | None] = ContextVar("graphcache_routes", default=None)
_lock = threading.Lock()
"""Held while routes are laid or taken away: those of several wrapped modules may lead through the same part."""
