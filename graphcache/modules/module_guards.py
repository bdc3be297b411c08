"""The guard of a module that is no engine: its state, and the engines inside it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from graphcache.capture.engine_like import EngineLike, is_foreign
from graphcache.engines.registry import traced_engines
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.transparent import TransparentModule


def module_guard(module: nn.Module, user: object, ignore: Sequence[str], *, hooks: bool = True) -> ModuleGuard:
    """The guard of a module for graphs of ``user``, whom engines inside tell before they do what none may survive.

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
    return (
        isinstance(value, TransparentModule)
        or bool(getattr(type(value), "keeps_its_own_state", False))
        or is_foreign(value)
    )
