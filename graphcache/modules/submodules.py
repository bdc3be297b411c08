"""The submodules that are captured one by one: named by options, or found when the whole cannot be captured."""

from __future__ import annotations

import difflib
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from graphcache.capture.engine_like import EngineLike
from graphcache.config import GraphConfig
from graphcache.errors import EXPECTED, Cause, ConfigError, Reason
from graphcache.modules.forward_patch import graphs_of_parts
from graphcache.modules.transparent import TransparentModule, controls, dispatcher_of
from graphcache.modules.wrapped import CacheInfo, account_of

Make = Callable[[str, nn.Module, GraphConfig], TransparentModule]

_OF_THE_WHOLE = EXPECTED | {
    Reason.EMPTY_GRAPH,
    Reason.UNOBSERVED,
    Reason.GRAD,
    Reason.PROFILING,
    Reason.PADDING,
    Reason.OVER_BUDGET,
    Reason.OUT_OF_MEMORY,
}
"""What no single submodule is to blame for: without it, the others would be refused as well."""


class Submodules:
    """The submodules of one module that are captured one by one, its parts. ``make`` wraps one, by name and options.

    With ``strategy="auto"`` and no ``include`` there are none until the whole is refused for something that a single
    submodule may be to blame for. Then every child is a part. A part that is refused has its own children as parts, and
    so on. Each module has a key table of its own, so that one call may have a graph of the whole, and another one
    graphs of parts.
    """

    def __init__(self, module: nn.Module, config: GraphConfig, make: Make) -> None:
        self._module = module
        self._make = make
        self._lock = threading.Lock()
        self.excluded = _excluded(module, config)
        """Names of submodules that are kept out of graphs, so that the whole has none."""
        named, is_engine = _named(module, config, self.excluded), isinstance(module, EngineLike)
        self._finds = config.strategy == "auto" and not named and not is_engine
        self._found = False
        # Of those that are found: they hold nothing that is excluded.
        self._own = replace(config, include=(), exclude=(), buckets=None)
        fixed = replace(self._own, strategy="whole_graph")
        self.parts = {name: make(name, part, fixed) for name, part in named.items()}
        """The parts that stand in the module now, by name, without parts of parts."""
        self.past = CacheInfo()
        """The account of parts that stand in the module no more. Its eager calls are counted by the whole."""
        self.whole = is_engine or (config.strategy != "per_submodule" and not self.excluded)
        """Whether the module is to be captured as a whole."""
        if not self.whole:
            self.discover()

    def in_use(self) -> AbstractContextManager[object]:
        """Inside, calls of the parts use their graphs."""
        return graphs_of_parts(tuple(self.parts.values()))

    def named(self) -> dict[str, TransparentModule]:
        """The parts, and parts of parts, by their names within the module."""
        found: dict[str, TransparentModule] = {}
        for name, part in self.parts.items():
            inner = dispatcher_of(part).submodules.named()
            found |= {name: part} | {f"{name}.{place}": each for place, each in inner.items()}
        return found

    def divide(self, cause: Cause) -> bool:
        """Find the parts if a call was refused for what one of them may be to blame for; whether there are any."""
        # Engines record no gradients in any case.
        engines = cause.reason is Reason.GRAD and any(isinstance(each, EngineLike) for each in self._module.modules())
        if cause.reason not in _OF_THE_WHOLE or engines:
            self.discover()
        return bool(self.parts)

    def discover(self) -> None:
        """Find the parts; those that are known stay, with their graphs."""
        if not self._finds or self._found:
            return
        with self._lock:
            here: dict[str, TransparentModule] = {}
            for name, child in _candidates(self._module, self.excluded).items():
                known = self.parts.get(name)
                if known is None or controls(known).module is not child:
                    known = self._make(name, child, self._own)
                here[name] = known
            gone = [part for name, part in self.parts.items() if here.get(name) is not part]
            self.parts, self._found = here, True
        for part in gone:
            # Not closed: a call in another thread may be on its way through it.
            controls(part).clear(wait=False)
            account = replace(account_of(dispatcher_of(part)), eager={}, graphs=0, nbytes=0, budget=0)
            with self._lock:
                self.past += account

    def expand_to(self, name: str) -> None:
        """Find the parts on the way to a submodule; a name that is none does nothing."""
        if not name or name not in dict(self._module.named_modules()):
            return
        self.discover()
        for own, part in self.parts.items():
            if name.startswith(f"{own}."):
                dispatcher_of(part).submodules.expand_to(name.removeprefix(f"{own}."))

    def look_again(self) -> None:
        """Find the parts anew when they are needed next: the module has changed."""
        self._found = False
        if not self.whole:
            self.discover()


def _named(module: nn.Module, config: GraphConfig, excluded: Sequence[str]) -> dict[str, nn.Module]:
    """The submodules that ``include`` names, or without it the engines, by name; ``{}`` where they are to be found."""
    if config.strategy == "whole_graph" or isinstance(module, EngineLike):
        return {}
    names = _submodules(module)
    for name in config.include:
        if name not in names:
            raise ConfigError(f"include names {name!r}{_near(name, names)}")
        if outer := next((other for other in config.include if other != name and _is_in(name, other)), None):
            raise ConfigError(f"include names both {outer!r} and {name!r}, which is inside it; name one of them")
        if clash := _overlapping(name, excluded):
            raise ConfigError(
                f"include names {name!r} and exclude matches {clash[0]!r}, of which one is inside the other; name one "
                f"of them"
            )
    if config.include or config.strategy == "auto":
        return {name: names[name] for name in config.include}
    engines = [name for name, each in names.items() if isinstance(each, EngineLike)]
    chosen = {name: names[name] for name in engines if not _overlapping(name, excluded)}
    if not chosen:
        what = "contains no engine that is not excluded" if excluded else "contains no engine"
        raise ConfigError(
            f"strategy='per_submodule': {type(module).__name__} {what}; name the submodules to capture, such as "
            f"include={list(names)[:2]}"
        )
    return chosen


def _excluded(module: nn.Module, config: GraphConfig) -> tuple[str, ...]:
    """The names of submodules that ``exclude`` keeps out of graphs; those inside them are kept out with them."""
    names = _submodules(module) if config.exclude else {}
    found: list[str] = []
    for pattern in config.exclude:
        matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"exclude names {pattern!r}{_near(pattern, names)}")
        found += matched
    outermost = [name for name in found if not any(name != other and _is_in(name, other) for other in found)]
    excluded = tuple(dict.fromkeys(outermost))
    if excluded and config.strategy == "auto" and not _candidates(module, excluded):
        raise ConfigError(
            f"exclude={list(config.exclude)} leaves nothing of {type(module).__name__} that could be captured; exclude "
            f"less, or call the module itself"
        )
    return excluded


def _candidates(module: nn.Module, excluded: Collection[str] = ()) -> dict[str, nn.Module]:
    """The largest submodules that are called by themselves, are not wrapped already, and hold nothing excluded."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def search(parent: nn.Module, prefix: str) -> None:
        for key, child in parent.named_children():
            name = f"{prefix}{key}"
            # One that stands in several places is found once.
            if id(child) in seen or isinstance(child, TransparentModule) or name in excluded:
                continue
            seen.add(id(child))
            # A list of modules is never called, and what holds something excluded is not captured as a whole.
            holds_excluded = any(_is_in(each, name) for each in excluded)
            if not _is_closed(child) and (holds_excluded or type(child).forward is nn.Module.forward):
                search(child, f"{name}.")
            else:
                found[name] = child

    if not _is_closed(module):
        search(module, "")
    return found


def _submodules(module: nn.Module) -> dict[str, nn.Module]:
    """Every submodule that Python calls."""
    names = dict(module.named_modules())
    closed = tuple(f"{name}." if name else "" for name, each in names.items() if _is_closed(each))
    return {name: each for name, each in names.items() if name and not name.startswith(closed)}


def _is_closed(module: nn.Module) -> bool:
    """Whether TorchScript or Dynamo runs what is inside of a module, so that no graph could stand in for a part."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    is_optimized = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return isinstance(module, torch.jit.ScriptModule) or is_optimized or module._compiled_call_impl is not None


def _is_in(name: str, other: str) -> bool:
    """Whether a submodule is another one, or inside it."""
    return f"{name}.".startswith(f"{other}.")


def _overlapping(name: str, others: Sequence[str]) -> list[str]:
    """Those of other submodules that are a submodule, hold it, or are inside it."""
    return [other for other in others if _is_in(name, other) or _is_in(other, name)]


def _near(name: str, names: Collection[str]) -> str:
    """The end of a message about a name that is none."""
    if not names:
        return ", but there are no submodules that Python calls"
    near = difflib.get_close_matches(name, names, n=3) or list(names)[:8]
    return f", which is no submodule; did you mean {', '.join(near)}?"
