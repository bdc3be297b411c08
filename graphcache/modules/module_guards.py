"""The guard of a wrapped module: an engine's epoch, or the state of any other module."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from graphcache.engines.registry import traced_engines
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.engine import EngineModule
from graphcache.modules.foreign import is_foreign


class EngineGuard:
    """The guard of an engine: its epoch, which every change of it raises.

    Args:
        engine: The engine.
        user: Whoever holds the graphs; the engine tells it before it does what no graph may survive.
    """

    def __init__(self, engine: EngineModule, user: object) -> None:
        self._engine = engine
        self._user = weakref.ref(user)
        self.version = 0
        """Stays as it is: the graphs of an engine that has changed are dropped."""
        self.renew()

    def renew(self) -> None:
        """Take the engine as it is now."""
        self._engine.users.add(self._user())
        self.epoch = self._engine.epoch
        """That of the engine when the graphs that are kept now were captured."""

    def holds(self) -> bool:
        """Whether the engine is still the same."""
        return not self.is_stale(False)

    def has_changed(self) -> bool:
        """Whether the engine is another one now."""
        return self.is_stale(False)

    def is_stale(self, grad: bool) -> bool:
        """Whether no graph may answer a call; gradients do not matter."""
        return bool(self._engine.epoch != self.epoch)

    def requires_grad(self) -> bool:
        """Engines record no gradients."""
        return any(each.requires_grad for each in self._engine.parameters())


def guard_of(
    module: nn.Module, user: object, ignore: Sequence[str], *, hooks: bool = True
) -> EngineGuard | ModuleGuard:
    """The guard of a module.

    Args:
        module: The module.
        user: Whoever holds the graphs; engines inside tell it before they do what no graph may survive.
        ignore: Paths that do not matter.
        hooks: Whether what is captured runs the hooks of the module itself; its ``forward`` alone does not.
    """
    if isinstance(module, EngineModule):
        return EngineGuard(module, user)
    # Who holds the graphs holds this too.
    weak = weakref.ref(user)

    def engines(module: nn.Module) -> list[EngineModule]:
        found = [each for each in module.modules() if isinstance(each, EngineModule)]
        found += [each for each in traced_engines(module) if each not in found]
        for engine in found:
            engine.users.add(weak())
        return found

    return ModuleGuard(module, ignore=ignore, skips=keeps_its_own_state, engines=engines, hooks=hooks)


def keeps_its_own_state(value: Any) -> bool:
    """Whether what a call changes in an object (contexts, buffers, counters) is no state that a replay would leave out.

    That is so for engines, wrapped modules and the modules of Torch-TensorRT.
    """
    return bool(getattr(type(value), "keeps_its_own_state", False)) or is_foreign(value)
