"""The parts of a wrapped module: named by its options, or found when the whole cannot be captured."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import nn

from graphcache.capture.engine_like import EngineLike
from graphcache.config import GraphConfig
from graphcache.errors import Cause, Reason
from graphcache.modules.forward_patch import Routes
from graphcache.modules.info import CacheInfo
from graphcache.modules.strategy import candidates, find_excluded, find_parts
from graphcache.modules.transparent import StandIn
from graphcache.modules.wrapped import state_of

Make = Callable[[str, nn.Module, GraphConfig], StandIn]

_DIVISIBLE = frozenset(
    {
        Reason.OUTPUT_ALLOCATOR,
        Reason.DATA_DEPENDENT,
        Reason.HOST_READ,
        Reason.NOT_CAPTURABLE,
        Reason.CAPTURE_FAILED,
        Reason.MISMATCH,
        Reason.NONDETERMINISTIC,
        Reason.RANDOM,
        Reason.MUTATES,
        Reason.ALIASES_STATE,
        Reason.ARGUMENT,
        Reason.OUTPUT,
        Reason.WEIGHT_STREAMING,
    }
)
"""What one submodule may be to blame for, so that others can be captured without it."""


class Parts:
    """The wrapped parts of one module.

    With ``strategy="auto"`` and no ``include`` there are none until the whole is refused for something that a single
    submodule may be to blame for. Then every child is a part. One that is refused in its turn has its own children as
    parts, and so on: only what leads to the culprit is taken apart, and the largest submodules beside that way are
    captured. Each remembers by signature what came of it, so that one call may have a graph of the whole, and another
    one graphs of parts.

    Args:
        module: The wrapped module.
        config: Its options.
        make: Wraps a part, by its name within the module and its options.

    Raises:
        ConfigError: For names that are none, or strategies with nothing to capture.
    """

    def __init__(self, module: nn.Module, config: GraphConfig, make: Make) -> None:
        self._module = module
        self._config = config
        self._make = make
        self._lock = threading.Lock()
        self.excluded = find_excluded(module, config)
        """Names of submodules that are kept out of graphs, so that the whole has none."""
        named = find_parts(module, config)
        self._finds = config.strategy == "auto" and not named and not isinstance(module, EngineLike)
        # Candidates hold nothing that is excluded.
        self._own = replace(config, include=(), exclude=(), buckets=None)
        fixed = replace(self._own, strategy="whole_graph")
        self._here = {name: make(name, part, self._options(fixed, name)) for name, part in named.items()}
        self.past: CacheInfo | None = None
        """The account of parts that stand in the module no more."""
        self._active = tuple(self._here.values())
        self._found = False
        self.whole = isinstance(module, EngineLike) or (config.strategy != "per_submodule" and not self.excluded)
        """Whether the module is to be captured as a whole."""
        self._routes = Routes(self.active)
        if not self.whole:
            self.find()

    def in_use(self) -> AbstractContextManager[object]:
        """Inside, calls of the parts use their graphs."""
        return self._routes.active()

    def active(self) -> tuple[StandIn, ...]:
        """The parts that stand in the module now, without parts of parts."""
        return self._active

    def named(self) -> dict[str, StandIn]:
        """The parts, and parts of parts, by their names within the module."""
        found = {}
        for name, part in self._here.items():
            found[name] = part
            found.update({f"{name}.{inner}": each for inner, each in state_of(part).submodules.named().items()})
        return found

    def divide(self, cause: Cause) -> bool:
        """Find the parts if a call was refused for what one of them may be to blame for.

        Returns:
            Whether there are any.
        """
        if cause.reason in _DIVISIBLE or (cause.reason is Reason.GRAD and self._has_engines()):
            self.find()
        return bool(self._active)

    def _options(self, config: GraphConfig, name: str) -> GraphConfig:
        """Those of a part, whose own paths begin with ``self``."""
        ends = [f"[{each}]" if each.isdigit() else f".{each}" for each in name.split(".")]
        prefix = "self" + "".join(ends)
        found = (each for path in config.ignore for each in _within(path, prefix))
        return replace(config, ignore=tuple(dict.fromkeys(found)))

    def _has_engines(self) -> bool:
        # They record no gradients in any case; of a model in training that has none, nothing would be captured.
        return self._finds and any(isinstance(each, EngineLike) for each in self._module.modules())

    def find(self) -> None:
        """Find the parts; those that are known stay, with their graphs."""
        if not self._finds or self._found:
            return
        with self._lock:
            if self._found:
                return
            here: dict[str, StandIn] = {}
            for name, child in candidates(self._module, self.excluded):
                known = self._here.get(name)
                if known is None or state_of(known).module is not child:
                    known = self._make(name, child, self._options(self._own, name))
                here[name] = known
            gone = [part for name, part in self._here.items() if here.get(name) is not part]
            self._here, self._active, self._found = here, tuple(here.values()), True
        for part in gone:
            # Not closed: a call in another thread may be on its way through it.
            state_of(part).clear(wait=False)
            account = replace(state_of(part).cache_info(), graphs=0, nbytes=0, budget=0)
            with self._lock:
                self.past = account if self.past is None else self.past + account

    def reach(self, name: str) -> None:
        """Find the parts on the way to one of them, if there is such a one.

        Args:
            name: Of a submodule; any other text does nothing.
        """
        if name not in dict(self._module.named_modules()) or not name:
            return
        self.find()
        for own, part in self._here.items():
            if name.startswith(f"{own}."):
                state_of(part).submodules.reach(name[len(own) + 1 :])

    def look_again(self) -> None:
        """Find the parts anew when they are needed next: the module has changed."""
        self._found = False
        if not self.whole:
            self.find()


def _within(path: str, prefix: str) -> list[str]:
    """What a path that may hold ``*`` is called in the submodule at ``prefix``; empty if it does not reach there."""
    if not path.startswith("self"):
        # It is found from elsewhere, such as a global.
        return [path]
    found = []
    for end in range(len(path) + 1):
        head, rest = path[:end], path[end:]
        if re.fullmatch(re.escape(head).replace(r"\*", ".*"), prefix):
            # What * stands for may go on in the submodule.
            found += [f"self*{rest}"] if head.endswith("*") else []
            found += [f"self{rest}"] if not rest or rest[0] in ".[*" else []
    if not found and re.match(re.escape(path).replace(r"\*", ".*") + r"[.[]", prefix):
        return ["self"]
    return found
