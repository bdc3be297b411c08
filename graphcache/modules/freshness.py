"""Whether what was captured of a module is still what a call of it does."""

from __future__ import annotations

import weakref

from torch import nn

from graphcache.modules.engine import EngineModule
from graphcache.modules.operator import traced_engines
from graphcache.modules.state import Dependencies


class Freshness:
    """Remembers what the graphs of a module depend on, and tells when that changed.

    Of an engine it is the epoch, which every change of it raises; of anything else the place, shape and layout of each
    parameter and buffer, the training flags, the children and their hooks. Values that change in place are read by the
    graph itself and do not matter.

    Args:
        module: What is captured.
        user: Whoever holds the graphs; engines inside tell it before they do what no graph may survive.
        checks_weights: Whether parameters and buffers are looked at.
    """

    __slots__ = (
        "_checks_weights",
        "_dependencies",
        "_engine",
        "_engines",
        "_fingerprint",
        "_module",
        "_user",
        "epoch",
    )

    def __init__(self, module: nn.Module, user: object, *, checks_weights: bool) -> None:
        self._module = module
        # Who holds the graphs holds this too.
        self._user = weakref.ref(user)
        self._engine = module if isinstance(module, EngineModule) else None
        self._checks_weights = checks_weights and self._engine is None
        self.look_again()

    def look_again(self) -> None:
        """Remember what is the case now, for graphs that are captured from now on."""
        self._dependencies = Dependencies(self._module)
        self._engines = [each for each in self._module.modules() if isinstance(each, EngineModule)]
        self._engines += [each for each in traced_engines(self._module) if each not in self._engines]
        for engine in self._engines:
            engine.users.add(self._user())
        self._fingerprint = self._dependencies.fingerprint()
        self.epoch = sum([engine.epoch for engine in self._engines])
        """Of the engines inside, together, when the graphs that are kept now were captured."""

    def is_stale(self, grad: bool) -> bool:
        """Whether no graph may be used any more.

        Args:
            grad: Whether the call records gradients, which a parameter may have begun to want.
        """
        if self._engine is not None:
            return bool(self._engine.epoch != self.epoch)
        if self._engines and sum([engine.epoch for engine in self._engines]) != self.epoch:
            return True
        if self._checks_weights and self._dependencies.fingerprint() != self._fingerprint:
            return True
        return grad and self._dependencies.requires_grad()

    def requires_grad(self) -> bool:
        """Whether any parameter wants gradients."""
        return self._dependencies.requires_grad()
