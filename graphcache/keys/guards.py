"""Whether what was captured of a module is still what a call of it does."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from graphcache.keys.call_key import ambient_state
from graphcache.keys.state_nodes import Change, NamesNode
from graphcache.keys.state_snapshot import StatePlace, StateSnapshot
from graphcache.keys.state_walk import Skips
from graphcache.keys.user_code import functions_of, has_global_state, holds_state

_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_forward_hooks_with_kwargs", "_global_forward_hooks_always_called"),
)
MAX_FUNCTIONS = 4096
"""How many functions are followed that only runs have found."""


class EpochNode(NamesNode):
    """The epoch of an engine: it goes up with every change that graphs of the engine do not survive."""

    is_ignorable = False

    def __init__(self, engine: Any) -> None:
        super().__init__(None, "engine", vars(engine), ("epoch",))


class ModuleGuard:
    """The condition under which graphs of a module stay valid: nothing that a call can reach has changed.

    Values of tensors are no part of it, since a graph reads them where they are. Left out are the paths in ``ignore``,
    submodules that ``skips`` tells, which keep their own account, and without ``hooks`` all hooks. Of the ``engines``
    among these submodules the ``epoch`` goes up with every change.
    """

    __slots__ = (
        *("_find_engines", "_functions", "_hooks", "_ignore", "_lock", "_made", "_module", "_skips", "_stateless"),
        *("known", "places", "root", "version"),
    )

    def __init__(
        self,
        module: nn.Module,
        *,
        ignore: Sequence[str] = (),
        skips: Skips | None = None,
        engines: Callable[[nn.Module], Sequence[Any]] = lambda module: (),
        hooks: bool = True,
        root: str = "self",
    ) -> None:
        self._module = module
        self.root = root
        """The path of the module."""
        self._ignore = tuple(ignore) if hooks else (*ignore, f"{root}._forward_*hooks*")
        self._hooks = _GLOBAL_HOOKS if hooks else ()
        self._skips = skips
        self._find_engines = engines
        self._functions: dict[types.CodeType, dict[str, Any]] = {}
        self._made: list[weakref.ref[types.FunctionType]] = []
        self._stateless: set[types.CodeType] = set()
        self.places: Sequence[StatePlace] = ()
        """What is no part of the state: it is an argument of every call."""
        self.known: StateSnapshot | None = None
        """The state that graphs were proven in; ``None`` if there is none. Native code reads it too."""
        self._lock = threading.Lock()
        self.version = 0
        """Goes up with every snapshot that is given up. A graph is valid under the version that it was proven under."""

    def snapshot(self) -> StateSnapshot:
        """The state of the module now, for a run that is to be observed; ``Unobservable`` if it cannot be watched."""
        # Another thread may forget it meanwhile.
        known = self.known
        if known is not None and known.renew():
            return known
        self.forget()
        hooks = [(name, getattr(torch_module, name)) for name in self._hooks if hasattr(torch_module, name)]
        made = [function for reference in self._made if (function := reference()) is not None]
        roots = [(self.root, self._module), *hooks, *((each.__qualname__, each) for each in made)]
        options: dict[str, Any] = {"ignore": self._ignore, "skips": self._skips, "functions": self._functions}
        found = StateSnapshot(roots, **options, places=self.places)
        for engine in self._find_engines(self._module):
            found.guard_also(EpochNode(engine))
        with self._lock:
            # Another thread may have looked at the module meanwhile, in another state.
            self._forget()
            found.version = self.version
            self.known = found
        return found

    def holds(self) -> bool:
        """Whether nothing has changed since :meth:`snapshot`."""
        return (known := self.known) is not None and known.holds()

    def has_changed(self) -> bool:
        """Whether something is known to have changed since :meth:`snapshot`; not after :meth:`forget`."""
        return self.known is not None and not self.holds()

    def change_since(self, version: int) -> Change | None:
        """What has changed since the snapshot of a version, values of tensors too; ``None`` if nothing has."""
        known = self.known
        if known is None or known.version != version:
            # Whoever gave that snapshot up knows what it was.
            return Change(self.root, "its state changed")
        return next(iter((*known.changes(limit=1), *known.written())), None)

    def is_stale(self, grad: bool) -> bool:
        """Whether no graph may answer a call; one that records gradients also if a parameter wants them."""
        return not self.holds() or (grad and self.requires_grad())

    def stale_since(self, version: int) -> Callable[[bool], bool]:
        """:meth:`is_stale` for one graph, which was proven under a version and in the ambient state of now."""
        ambient = ambient_state()

        def is_stale(grad: bool) -> bool:
            # The version last: once it has gone up, another thread may have found the module as it is now.
            return self.is_stale(grad) or self.version != version or ambient_state() != ambient

        return is_stale

    def tensors(self) -> list[Tensor]:
        """Those that the module reaches; without a snapshot, its parameters and buffers."""
        if (known := self.known) is not None:
            return [node.target for node in known.tensors]
        return [*self._module.parameters(), *self._module.buffers()]

    def requires_grad(self) -> bool:
        """Whether any of them wants gradients."""
        return any(each.requires_grad for each in self.tensors())

    def holds_any(self, identities: set[int]) -> bool:
        """Whether one of some objects was found by :meth:`snapshot`."""
        known = self.known
        nodes = () if known is None else (*known.nodes, *known.tensors)
        return any(id(node.target) in identities for node in nodes)

    def forget(self) -> None:
        """Take everything for changed: no graph is valid until it was proven again."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self.known is not None:
            # First: without a snapshot, the version alone tells another thread of the change.
            self.version += 1
            self.known = None

    @property
    def is_armed(self) -> bool:
        """Whether there is a graph of the state of now to be guarded."""
        return (known := self.known) is not None and known.armed

    def arm(self) -> None:
        """Compare in native code from now on, for there is a graph to be guarded."""
        if (known := self.known) is not None and not known.armed:
            known.arm()

    def leave_out(self, places: Sequence[StatePlace]) -> None:
        """Take what stands at these places, and at no others, for arguments."""
        self.places = places
        self.forget()

    def unseen(self, ran: dict[types.CodeType, dict[str, Any]]) -> dict[types.CodeType, dict[str, Any]]:
        """Of functions that ran, by their code and with globals, those that may hold state and were not followed."""
        if (known := self.known) is None:
            return {}
        left = {code: table for code, table in ran.items() if code not in known.covered | self._stateless}
        left = {code: table for code, table in left.items() if not known.ignores(code.co_qualname)}
        if not left:
            return {}
        stateful = {function.__code__ for function in functions_of(left) if holds_state(function)}
        found = {code: table for code, table in left.items() if code in stateful or has_global_state(code, table)}
        self._stateless.update(left.keys() - found.keys())
        return found

    def follow(self, functions: dict[types.CodeType, dict[str, Any]]) -> None:
        """Follow functions that ran and that no walk has found, given by their code, with their globals."""
        if len(self._functions) + len(functions) > MAX_FUNCTIONS:
            # Code that is made anew at every call.
            self._functions.clear()
            self._made.clear()
            self._stateless.clear()
        self._functions.update(functions)
        self._made += map(weakref.ref, functions_of(functions))
        self.forget()
