"""What graphcache keeps for one wrapped module; :class:`~graphcache.modules.cached_module.CachedModule` is its face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from graphcache.capture.engine_like import EngineLike
from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.dispatch.targets import EngineTarget, ModuleTarget, Target
from graphcache.errors import Refusal
from graphcache.events import Ledger, Observers
from graphcache.graphs.graph import Graph
from graphcache.modules.info import CacheInfo
from graphcache.modules.module_guards import module_guard


class PartContext(NamedTuple):
    """What a wrapped module and the submodules of it that are captured one by one have in common."""

    observers: Observers
    gate: RunGate


class Wrapped:
    """The dispatcher of a wrapped module, its submodules that are captured one by one, and its end."""

    def __init__(self, dispatcher: Dispatcher, submodules: Any) -> None:
        self.dispatcher = dispatcher
        self.submodules = submodules
        self.name = dispatcher.ledger.name
        """The name in messages."""
        self.module = dispatcher.target.module
        self.config = dispatcher.config
        self.graphs = dispatcher.captures.graphs
        """The graphs of the module as a whole."""
        self.ends: list[Callable[[], object]] = []
        """Called after the module was closed."""
        self.manifest: Any = None
        """The calls that the package it was loaded from lists."""

    def parts(self) -> list[Wrapped]:
        """What is captured one by one now, without parts of parts."""
        return [state_of(part) for part in self.submodules.active()]

    def cache_info(self) -> CacheInfo:
        """The counters so far, with those of the parts."""
        captures, ledger = self.dispatcher.captures, self.dispatcher.ledger
        account = captures.admission.account()
        padding = self.dispatcher.padding
        own = CacheInfo(
            hits=captures.hits,
            captures=ledger.captures,
            evictions=ledger.evictions,
            eager=dict(ledger.eager),
            graphs=len(self.graphs),
            nbytes=self.graphs.nbytes,
            capture_seconds=ledger.capture_seconds,
            padded=0 if padding is None else padding.padded,
            eager_seconds=account.eager_seconds,
            saved_seconds=account.saved_seconds,
            budget=self.graphs.max_bytes,
            process_nbytes=self.graphs.budget.nbytes,
            waits=self.dispatcher.gate.waits,
            wait_seconds=self.dispatcher.gate.wait_seconds,
        )
        for part in self.parts():
            found = part.cache_info()
            # What was found in it is a part of a call that has been counted.
            own += replace(found, eager={}) if part.dispatcher.ledger.quiet else found
        if (past := self.submodules.past) is not None:
            own += replace(past, eager={})
        return own

    def graph_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph | None:
        """The graph that answers a call; without arguments the graph that was used last."""
        if not args and not kwargs:
            entry = max(list(self.graphs.entries.values()), key=lambda each: each.used, default=None)
        else:
            try:
                call = self.dispatcher.target.describe(args, kwargs)
            except Refusal:
                return None
            padding = self.dispatcher.padding
            padded = None if padding is None else padding.target(call)
            entry = self.graphs.entries.get(padded or call.key)
        return None if entry is None else entry.graph.graph

    def clear(self, *, wait: bool = True) -> None:
        """Drop every graph and forget all denials, of the parts too; ``wait`` for replays and captures under way."""
        wait = wait or self.config.capture_in == "background"
        with self.dispatcher.captures.lock:
            self.dispatcher.clear(wait=wait)
            for part in self.parts():
                part.clear(wait=wait)
        if wait:
            self.dispatcher.queue.finish()

    def close(self) -> None:
        """Drop every graph and refuse further calls; twice does nothing."""
        with self.dispatcher.captures.lock:
            self.dispatcher.captures.closed = True
            self.dispatcher.clear()
            for part in self.parts():
                part.close()
        self.dispatcher.queue.finish()
        for end in self.ends:
            end()

    def run_from_now(self, function: Callable[..., Any]) -> None:
        """Call ``function`` in place of the module from now on; graphs of another one are dropped."""
        if function != self.dispatcher.target.run:
            self.clear()
            self.dispatcher.target.runs(function)


def state_of(fast: nn.Module) -> Wrapped:
    """What graphcache keeps for a :class:`CachedModule`."""
    found: Wrapped = fast.__dict__["_graphcache"]
    return found


def name_of(module: nn.Module) -> str:
    """The name in messages: the module's own ``name`` if it is text, otherwise that of its class."""
    try:
        name = getattr(module, "name", "")
    except Exception:
        name = ""
    return name if isinstance(name, str) and name else type(module).__name__


def new_dispatcher(
    module: nn.Module,
    config: GraphConfig,
    *,
    run: Callable[..., Any] | None,
    ledger: Ledger,
    gate: RunGate,
    user: object,
    publish: Callable[[Any], object],
) -> Dispatcher:
    """The dispatcher of a module, or of ``run`` in its place, for ``user``, who holds the graphs."""
    target: Target
    if isinstance(module, EngineLike):
        target = EngineTarget(module, run or module, config, user)
    else:
        guard = module_guard(module, user, config.ignore, hooks=run is None)
        target = ModuleTarget(module, run or module, ledger.name, config, guard)
    return Dispatcher(target, config, ledger, gate, publish)
