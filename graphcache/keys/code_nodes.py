"""What is remembered of code: classes, functions, and the variables that they close over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from operator import is_
from typing import Any

from graphcache.keys.state_nodes import MISSING, Change, Node, difference, split

IGNORED_CLASS_NAMES = frozenset(
    {
        "__init__",
        "__slotnames__",
        "__annotations__",
        "__annotations_cache__",
        "__annotate__",
        "__annotate_func__",
        "__doc__",
        "__signature__",
        "__text_signature__",
        "__abstractmethods__",
        "__parameters__",
        "__weakref__",
        "__dict__",
        "_abc_impl",
    }
)
"""Attributes that Python and its libraries put on classes while they are looked at, copied, pickled or compiled."""


class ClassNode(Node):
    """What a class defines: methods and plain attributes."""

    __slots__ = ()

    def read(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.target).items() if name not in IGNORED_CLASS_NAMES}

    def differs(self) -> bool:
        now = self.read()
        return len(now) != len(self.state) or not all(map(is_, now.values(), self.state.values()))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        for name in {**old, **new}:
            if change := difference(old.get(name, MISSING), new.get(name, MISSING)):
                yield Change(f"{self.path}.{name}", change)

    def guard(self, native: Any) -> bool:
        # A class shows its dictionary through a proxy.
        (table,) = gc.get_referents(vars(self.target))
        native.add_names(table, *split(self.state))
        return True


class CellNode(Node):
    """A variable that a function closes over."""

    __slots__ = ()

    def read(self) -> Any:
        try:
            return self.target.cell_contents
        except ValueError:
            return MISSING

    def differs(self) -> bool:
        return self.read() is not self.state

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if change := difference(old, new):
            yield Change(self.path, change)

    def guard(self, native: Any) -> bool:
        native.add_cell(self.target, *(() if self.state is MISSING else (self.state,)))
        return True


class VariableNode(CellNode):
    """A context variable, as the current context has it."""

    __slots__ = ()

    def read(self) -> Any:
        return self.target.get(MISSING)

    def guard(self, native: Any) -> bool:
        return False


class FunctionNode(Node):
    """A function: its code and its default values."""

    __slots__ = ()

    def read(self) -> tuple[Any, ...]:
        return self.target.__code__, self.target.__defaults__, self.target.__kwdefaults__

    def differs(self) -> bool:
        return not all(map(is_, self.read(), self.state))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if not all(map(is_, old, new)):
            yield Change(self.path, "has other code or default values")

    def guard(self, native: Any) -> bool:
        native.add_function(self.target, self.state)
        return True
