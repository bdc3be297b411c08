"""What graphcache keeps for one wrapped module; :class:`~graphcache.modules.cached_module.CachedModule` is its face."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from graphcache.capture.engine_like import EngineLike, is_foreign, traced_engines
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.errors import Reason
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.transparent import TransparentModule

_OF_THE_WHOLE = ("process_nbytes", "waits", "wait_seconds")
"""Fields of an account that a module and its parts have in common."""


@dataclass(frozen=True)
class CacheInfo:
    """The counters of a wrapped module and of the submodules that it captured one by one.

    Args:
        hits: Calls answered by a replay, or by an eager run that proved a graph right after a change of the module.
        captures: Graphs made.
        evictions: Graphs closed, whatever the cause.
        eager: Calls answered without a graph, by reason.
        graphs: Graphs held now.
        nbytes: Device memory that they own, in bytes; an estimate where the driver does not tell.
        capture_seconds: Time spent capturing.
        padded: Of the hits, those of calls that were padded to a bucket.
        eager_seconds: What eager execution of the measured calls would have taken; with ``capture="worthwhile"`` all
            are measured.
        saved_seconds: What replays have saved of that.
        budget: Bytes that the graphs may own, ``None`` for no bound; ``max_bytes="auto"`` is set by the first capture.
        process_nbytes: Bytes that the graphs of all modules of the process on this device own; 0 before a capture.
        waits: Eager calls that waited for a run of a background capture.
        wait_seconds: How long these calls waited, together.
    """

    hits: int = 0
    captures: int = 0
    evictions: int = 0
    eager: dict[Reason, int] = field(default_factory=dict)
    graphs: int = 0
    nbytes: int = 0
    capture_seconds: float = 0.0
    padded: int = 0
    eager_seconds: float = 0.0
    saved_seconds: float = 0.0
    budget: int | None = 0
    process_nbytes: int = 0
    waits: int = 0
    wait_seconds: float = 0.0

    def __add__(self, other: CacheInfo) -> CacheInfo:
        eager = {
            reason: self.eager.get(reason, 0) + other.eager.get(reason, 0) for reason in {**self.eager, **other.eager}
        }
        budget = None if self.budget is None or other.budget is None else self.budget + other.budget
        found: dict[str, Any] = {"eager": eager, "budget": budget}
        for name in (each.name for each in fields(self) if each.name not in found):
            pair = getattr(self, name), getattr(other, name)
            found[name] = max(pair) if name in _OF_THE_WHOLE else sum(pair)
        return CacheInfo(**found)


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
        return [state_of(part) for part in self.submodules.active]

    def cache_info(self) -> CacheInfo:
        """The counters so far, with those of the parts."""
        dispatcher, captures, ledger = self.dispatcher, self.dispatcher.captures, self.dispatcher.ledger
        account = captures.admission.account()
        own = CacheInfo(
            hits=captures.hits,
            captures=ledger.captures,
            evictions=ledger.evictions,
            eager=dict(ledger.eager),
            graphs=len(self.graphs),
            nbytes=self.graphs.nbytes,
            capture_seconds=ledger.capture_seconds,
            padded=0 if dispatcher.padding is None else dispatcher.padding.padded,
            eager_seconds=account.eager_seconds,
            saved_seconds=account.saved_seconds,
            budget=self.graphs.max_bytes,
            process_nbytes=self.graphs.budget.nbytes,
            waits=dispatcher.gate.waits,
            wait_seconds=dispatcher.gate.wait_seconds,
        )
        for part in self.parts():
            found = part.cache_info()
            # What was found in it is a part of a call that has been counted.
            own += replace(found, eager={}) if part.dispatcher.ledger.quiet else found
        if (past := self.submodules.past) is not None:
            own += replace(past, eager={})
        return own

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


def module_guard(module: nn.Module, user: object, ignore: Sequence[str], *, hooks: bool = True) -> ModuleGuard:
    """The guard of a module that is no engine for graphs of ``user``. Engines inside tell the user before they change.

    ``hooks`` says whether what is captured runs the hooks of the module itself; its ``forward`` alone does not.
    """
    # Who holds the graphs holds this too.
    weak = weakref.ref(user)

    def engines(module: nn.Module) -> list[EngineLike]:
        found = [each for each in module.modules() if isinstance(each, EngineLike)]
        found += [each for each in traced_engines(module) if each not in found]
        for engine in found:
            engine.users.add(weak())
        return found

    return ModuleGuard(module, ignore=ignore, skips=keeps_its_own_state, engines=engines, hooks=hooks)


def keeps_its_own_state(value: Any) -> bool:
    """Whether what a call changes in an object is no state that a replay would leave out (engines, wrapped modules)."""
    kept = isinstance(value, TransparentModule) or getattr(type(value), "keeps_its_own_state", False)
    return bool(kept) or is_foreign(value)


def name_of(module: nn.Module) -> str:
    """The name in messages: the module's own ``name`` if it is text, otherwise that of its class."""
    try:
        name = getattr(module, "name", "")
    except Exception:
        name = ""
    return name if isinstance(name, str) and name else type(module).__name__


def device_of(module: nn.Module) -> torch.device:
    """Where a module's calls run: an engine's device, that of a parameter or buffer, or CUDA if there is one."""
    for each in module.modules():
        if isinstance(each, EngineLike):
            return torch.device(each.device)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
