"""Which submodules are captured one by one, and how their calls find their graphs while the rest runs eagerly."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import nn

from graphcache.config import GraphConfig
from graphcache.errors import ConfigError
from graphcache.modules.engine import EngineModule

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


def find_parts(module: nn.Module, config: GraphConfig) -> dict[str, nn.Module]:
    """The submodules that are captured one by one when the module as a whole is not, by name.

    Args:
        module: The wrapped module.
        config: ``include`` names them; without it they are the engines. ``strategy="whole_graph"`` has none.

    Raises:
        ConfigError: For a name that is not a submodule's, a part inside another part, or ``"per_submodule"`` with
            nothing to capture.
    """
    if config.strategy == "whole_graph" or isinstance(module, EngineModule):
        return {}
    names = dict(module.named_modules())
    names.pop("", None)
    for name in config.include:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or list(names)[:8]
            raise ConfigError(
                f"include names {name!r}, which is no submodule; did you mean {', '.join(near)}?"
                if near
                else f"include names {name!r}, but there are no submodules"
            )
    chosen = {name: names[name] for name in config.include} or {
        name: part for name, part in names.items() if isinstance(part, EngineModule)
    }
    for name in chosen:
        if outer := next((other for other in chosen if name.startswith(f"{other}.")), None):
            raise ConfigError(f"include names both {outer!r} and {name!r}, which is inside it; name one of them")
    if config.strategy == "per_submodule" and not chosen:
        raise ConfigError(
            f"strategy='per_submodule': {type(module).__name__} contains no engine; name the submodules to capture, "
            f"such as include={list(names)[:2]}"
        )
    return chosen


class Routes:
    """While active, calls of the parts go through their graphs; outside, and in other threads, nothing has changed.

    A part keeps its place, its name and its hooks: only the ``forward`` that its ``__call__`` finds is another one, for
    as long as a call of the whole is under way. At rest the module is exactly what it was.

    Args:
        parts: The wrapped parts, by name.
    """

    def __init__(self, parts: Mapping[str, CachedModule]) -> None:
        self._parts = tuple(parts.values())
        self._own: list[dict[str, Any]] = []
        self._calls = 0
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._parts)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, in this context, the parts use their graphs."""
        if not self._parts:
            yield
            return
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._install()
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._remove()

    def _install(self) -> None:
        # Whatever the user has put in the place of a part's forward is what the part runs, and is put back afterwards.
        self._own = [{k: v for k, v in part.module.__dict__.items() if k == "forward"} for part in self._parts]
        for part in self._parts:
            part.module.__dict__["forward"] = self._route(part, part.module.forward)

    def _remove(self) -> None:
        for part, own in zip(self._parts, self._own, strict=True):
            part.module.__dict__.pop("forward", None)
            part.module.__dict__.update(own)

    def _route(self, part: CachedModule, original: Callable[..., Any]) -> Callable[..., Any]:
        part.runs(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if _active.get() is not self:
                return original(*args, **kwargs)
            token = _active.set(None)
            try:
                return part.forward(*args, **kwargs)
            finally:
                _active.reset(token)

        return forward


_active: ContextVar[Routes | None] = ContextVar("graphcache_routes", default=None)
