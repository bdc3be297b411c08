"""The counters of a wrapped module, and what its calls run."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from graphcache.capture.engine_like import EngineLike, is_foreign, traced_engines
from graphcache.config import GraphConfig
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.dispatch.targets import EngineTarget, ModuleTarget, Target
from graphcache.errors import Reason
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.transparent import TransparentModule, dispatcher_of

_OF_THE_WHOLE = ("process_nbytes", "waits", "wait_seconds")
"""Fields of an account that a module and its parts have in common."""


@dataclass(frozen=True)
class CacheInfo:
    """The counters of a wrapped module and of the submodules that it captured one by one.

    Args:
        hits: Calls answered by a replay.
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
        reasons = self.eager | other.eager
        eager = {reason: self.eager.get(reason, 0) + other.eager.get(reason, 0) for reason in reasons}
        budget = None if self.budget is None or other.budget is None else self.budget + other.budget
        found: dict[str, Any] = {"eager": eager, "budget": budget}
        for name in (each.name for each in fields(self) if each.name not in found):
            pair = getattr(self, name), getattr(other, name)
            found[name] = max(pair) if name in _OF_THE_WHOLE else sum(pair)
        return CacheInfo(**found)


def account_of(dispatcher: Dispatcher) -> CacheInfo:
    """The counters of a module and of its parts."""
    captures, ledger, graphs = dispatcher.captures, dispatcher.ledger, dispatcher.captures.graphs
    account = captures.admission.account()
    found = CacheInfo(
        hits=captures.hits,
        captures=ledger.captures,
        evictions=ledger.evictions,
        eager=dict(ledger.eager),
        graphs=len(graphs),
        nbytes=graphs.nbytes,
        capture_seconds=ledger.capture_seconds,
        padded=0 if dispatcher.padding is None else dispatcher.padding.padded,
        eager_seconds=account.eager_seconds,
        saved_seconds=account.saved_seconds,
        budget=graphs.max_bytes,
        process_nbytes=graphs.budget.nbytes,
        waits=dispatcher.gate.waits,
        wait_seconds=dispatcher.gate.wait_seconds,
    )
    for part in map(dispatcher_of, dispatcher.submodules.parts.values()):
        # Why a part that was found runs eagerly is counted by the call of the whole.
        found += replace(account_of(part), eager={}) if part.ledger.quiet else account_of(part)
    past: CacheInfo = dispatcher.submodules.past
    return found + past


def target_of(fast: nn.Module, module: nn.Module, name: str, config: GraphConfig, *, is_part: bool) -> Target:
    """What the calls of a wrapped module run. Hooks of a part run around it: the whole calls it."""
    run = module.forward if is_part else module
    if isinstance(module, EngineLike):
        return EngineTarget(module, run, config, fast)
    # Who holds the graphs holds the guard too.
    user = weakref.ref(fast)

    def engines(module: nn.Module) -> list[EngineLike]:
        own = [each for each in module.modules() if isinstance(each, EngineLike)]
        found = list(dict.fromkeys([*own, *traced_engines(module)]))
        holder = user()
        for engine in found if holder is not None else ():
            # It clears the holder of its graphs before it changes.
            engine.users.add(holder)
        return found

    # The path of a part in messages and in the option ``ignore``: ``self.layers[0]`` for ``layers.0``.
    steps = name.split(".") if is_part else []
    root = "self" + "".join(f"[{each}]" if each.isdigit() else f".{each}" for each in steps)
    skips, hooks = keeps_its_own_state, not is_part
    guard = ModuleGuard(module, ignore=config.ignore, skips=skips, engines=engines, hooks=hooks, root=root)
    return ModuleTarget(module, run, name, config, guard)


def name_of(module: nn.Module) -> str:
    """The name in messages: the module's own ``name`` if it is text, otherwise that of its class."""
    try:
        name = getattr(module, "name", "")
    except Exception:
        name = ""
    return name if isinstance(name, str) and name else type(module).__name__


def keeps_its_own_state(value: Any) -> bool:
    """Whether what a call changes in an object is no state that a replay would leave out (engines, wrapped modules)."""
    # Asked of the type, past a __getattribute__ of the object's.
    kept = issubclass(type(value), TransparentModule) or getattr(type(value), "keeps_its_own_state", False)
    return bool(kept) or is_foreign(value)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's calls run: an engine's device, that of a parameter or buffer, or CUDA if there is one."""
    for each in module.modules():
        if isinstance(each, EngineLike):
            return torch.device(each.device)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
