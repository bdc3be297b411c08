"""What is remembered of one object of a snapshot, by kind: how it is compared, and how a native guard compares it.

Each kind keeps a shallow copy. A new object can only be reached through a container that changed, so that comparing the
shallow copies of all containers finds every change.
"""

from __future__ import annotations

import collections
import functools
import gc
import types
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

from graphcache.keys.script_state import script_state
from graphcache.keys.values import same, short

MISSING: Any = object()
"""Stands for an attribute, a global or a cell without a value."""

IGNORED_CLASS_NAMES = frozenset(
    {
        *("__init__", "__slotnames__", "__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__"),
        *("__doc__", "__signature__", "__text_signature__", "__abstractmethods__", "__parameters__", "__weakref__"),
        *("__dict__", "_abc_impl"),
    }
)
"""Attributes that Python and its libraries put on classes while they are looked at, copied, pickled or compiled."""

_REPLACED = frozenset({"forward", "__getstate__"})
"""What a wrapped module replaces in the dictionaries of its parts while one of its calls is under way."""


State = tuple[Sequence[Any], Sequence[Any]]
"""Names and values."""
Slots = dict[str, types.MemberDescriptorType]


class Change(NamedTuple):
    """One difference between a snapshot and the state now.

    Args:
        path: The place, such as ``self.cache.layers[0].keys``.
        detail: What was there and what is there.
        is_random: Whether it is a generator of random numbers that moved on.
    """

    path: str
    detail: str
    is_random: bool = False


class StateNode:
    """One object of a snapshot: the names of the places in it, and what each holds."""

    __slots__ = ("key", "parent", "state", "target")

    guarded = True
    """Whether a guard compares it; otherwise only the effects of a call do."""
    is_alike: Callable[[Any, Any], bool] = staticmethod(is_)
    """The quick comparison of what one place holds; what is not alike is compared by value."""

    def __init__(self, parent: StateNode | None, key: str, target: Any) -> None:
        self.parent = parent
        self.key = key
        self.target = target
        self.state = self.read()

    @property
    def path(self) -> str:
        """Where the object is, such as ``self.blocks[2].h``."""
        parts, node = [], self
        while True:
            parts.append(node.key)
            if node.parent is None:
                return "".join(reversed(parts))
            node = node.parent

    def end(self, name: Any) -> str:
        """The end of the path of a place."""
        return f".{name}"

    def read(self) -> Any:
        """Names and values now, which later changes of the object do not reach."""
        raise NotImplementedError

    def differs(self) -> bool:
        """Whether the object may have changed: a quick comparison, by identity where there are objects inside."""
        names, values = self.state
        names_now, now = self.read()
        return len(now) != len(values) or not all(map(self.is_alike, now, values)) or names_now != names

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        """The differences of two states, by value."""
        before, now = (dict(zip(*each, strict=True)) for each in (old, new))
        found = False
        for name in {**before, **now}:
            if change := difference(before.get(name, MISSING), now.get(name, MISSING)):
                found = True
                yield Change(self.path + self.end(name), change)
        if not found and list(before) != list(now):
            yield Change(self.path, "has its entries in another order")

    def changes(self) -> list[Change]:
        """The differences from what is remembered to what is there now."""
        return list(self.compare(self.state, self.read()))

    def renew(self) -> None:
        """Remember what is there now."""
        self.state = self.read()

    def guard(self, native: Any) -> None:
        """Have a native guard compare the object; a ``TypeError`` or ``ValueError`` says that it cannot."""
        raise TypeError


class TableNode(StateNode):
    """A dictionary: its keys and values, in order."""

    def read(self) -> State:
        # A subclass may have methods of its own, which are no way to look at it.
        kind: Any = collections.OrderedDict if isinstance(self.target, collections.OrderedDict) else dict
        return tuple(kind.keys(self.target)), tuple(kind.values(self.target))

    def differs(self) -> bool:
        # As in every other node, but without copies: most tables of a module are empty.
        names, values = self.state
        kind: Any = collections.OrderedDict if isinstance(self.target, collections.OrderedDict) else dict
        if dict.__len__(self.target) != len(names):
            return True
        return not (all(map(is_, kind.values(self.target), values)) and all(map(is_, kind.keys(self.target), names)))

    def end(self, name: Any) -> str:
        return f"[{short(name)}]" if isinstance(name, (str, int)) else f"[a {type(name).__name__}]"

    def guard(self, native: Any) -> None:
        native.add_dict(self.target, *self.state)


class AttributesNode(TableNode):
    """The ``__dict__`` of an object, or the parameters, buffers or submodules of a module."""

    def end(self, name: Any) -> str:
        # The tables of a module are no level of their own.
        if name in ("_modules", "_parameters", "_buffers"):
            return ""
        return f"[{name}]" if str(name).isdigit() else f".{name}"

    def read(self) -> State:
        names, values = super().read()
        if not any(name in self.target and _stands_in(self.target[name]) for name in _REPLACED):
            return names, values
        # For as long as a call of a wrapped module is under way, perhaps in another thread.
        found = dict(zip(names, values, strict=True))
        for name in _REPLACED & found.keys():
            value = found.pop(name)
            found.update(value.own if _stands_in(value) else {name: value})
        return tuple(found), tuple(found.values())

    def guard(self, native: Any) -> None:
        names, values = self.state
        if dict.__len__(self.target) == len(names) and all(map(is_, dict.values(self.target), values)):
            super().guard(native)
        else:
            native.add_names(self.target, names, values, ())


class NamesNode(StateNode):
    """Some names of a dictionary, such as the globals that a function reads."""

    __slots__ = ("names",)

    def __init__(self, parent: StateNode | None, key: str, target: dict[str, Any], names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(parent, key, target)

    def read(self) -> State:
        return self.names, tuple([self.target.get(name, MISSING) for name in self.names])

    def guard(self, native: Any) -> None:
        _guard_names(native, self.target, self.state)


class ClassNode(StateNode):
    """What a class defines: methods and plain attributes."""

    def read(self) -> State:
        found = {name: value for name, value in vars(self.target).items() if name not in IGNORED_CLASS_NAMES}
        return tuple(found), tuple(found.values())

    def guard(self, native: Any) -> None:
        _guard_names(native, table_of(self.target), self.state)


class ItemsNode(StateNode):
    """A list, deque or set, a subclass of one, or a NumPy array of objects: its items."""

    def read(self) -> State:
        # Past a subclass's own __iter__, which may have effects.
        kinds: tuple[Any, ...] = (list, collections.deque, set, frozenset)
        kind = next((kind for kind in kinds if isinstance(self.target, kind)), None)
        items = tuple(self.target.ravel().tolist() if kind is None else kind.__iter__(self.target))
        return range(len(items)), items

    def end(self, name: Any) -> str:
        return f"[{name}]"

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if old[0] != new[0]:
            yield Change(self.path, f"had {len(old[0])} items and has {len(new[0])}")
        else:
            yield from super().compare(old, new)

    def guard(self, native: Any) -> None:
        native.add_items(self.target, self.state[1])


class SlotsNode(StateNode):
    """The ``__slots__`` of an object."""

    __slots__ = ("slots",)

    def __init__(self, parent: StateNode | None, key: str, target: Any, slots: Slots) -> None:
        self.slots = slots
        super().__init__(parent, key, target)

    def read(self) -> State:
        return tuple(self.slots), tuple([_slot(self.target, descriptor) for descriptor in self.slots.values()])

    def guard(self, native: Any) -> None:
        for descriptor, value in zip(self.slots.values(), self.state[1], strict=True):
            native.add_slot(self.target, descriptor, *_present(value))


class ObjectNode(StateNode):
    """An object: its class, and which dictionary holds its attributes."""

    def read(self) -> State:
        return ("__class__", "__dict__"), (type(self.target), attributes_of(self.target))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        (kind, table), (kind_now, table_now) = old[1], new[1]
        if kind is not kind_now:
            yield Change(f"{self.path}.__class__", f"{kind.__name__} became {kind_now.__name__}")
        elif table is not table_now:
            yield Change(f"{self.path}.__dict__", "is another dictionary")

    def guard(self, native: Any) -> None:
        kind, table = self.state[1]
        native.add_class(self.target, kind)
        if table is not None:
            native.add_dict_of(self.target, table)


class ThreadLocalNode(StateNode):
    """What the current thread sees of a ``threading.local``."""

    def read(self) -> State:
        return tuple(self.target.__dict__), tuple(self.target.__dict__.values())


class CellNode(StateNode):
    """A variable that a function closes over."""

    def read(self) -> State:
        try:
            return ("",), (self.target.cell_contents,)
        except ValueError:
            return ("",), (MISSING,)

    def end(self, name: Any) -> str:
        return ""

    def guard(self, native: Any) -> None:
        native.add_cell(self.target, *_present(*self.state[1]))


class VariableNode(StateNode):
    """A context variable, as the current context has it."""

    def read(self) -> State:
        return ("get()",), (self.target.get(MISSING),)


class FunctionNode(StateNode):
    """A function: its code and its default values."""

    def read(self) -> State:
        parts = (self.target.__code__, self.target.__defaults__, self.target.__kwdefaults__)
        return ("__code__", "__defaults__", "__kwdefaults__"), parts

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if not all(map(is_, old[1], new[1])):
            yield Change(self.path, "has other code or default values")

    def guard(self, native: Any) -> None:
        native.add_function(self.target, self.state[1])


class ScriptNode(StateNode):
    """A TorchScript module: what C++ holds of it, and makes a new object of whenever it is asked."""

    is_alike = staticmethod(same)

    def read(self) -> State:
        found = script_state(self.target)
        return tuple(found), tuple(found.values())

    def end(self, name: Any) -> str:
        return str(name)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of an object, past a ``__getattribute__`` of its class; ``None`` for one without."""
    try:
        table = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return table if type(table) is dict else None


def table_of(kind: type) -> dict[str, Any]:
    """The dictionary of a class, which shows it through a proxy."""
    (table,) = gc.get_referents(vars(kind))
    return table  # type: ignore[no-any-return]


_BUILT_IN = {
    collections.defaultdict: ("default_factory",),
    functools.partial: ("func", "args", "keywords"),
}
"""What objects of the standard library hold as in slots."""


def slots_of(kind: type) -> Slots:
    """The ``__slots__`` of a class and its bases, with what reads them."""
    found: Slots = {}
    for each in kind.__mro__:
        declared = each.__dict__.get("__slots__", _BUILT_IN.get(each, ()))
        for name in (declared,) if isinstance(declared, str) else tuple(declared):
            mangled = f"_{each.__name__.lstrip('_')}{name}" if name.startswith("__") and name[-2:] != "__" else name
            descriptor = each.__dict__.get(mangled)
            if isinstance(descriptor, types.MemberDescriptorType):
                found.setdefault(mangled, descriptor)
    return found


def difference(old: Any, new: Any) -> str:
    """What became of a place, in words; empty if it is the same."""
    if old is new or (old is not MISSING and new is not MISSING and same(old, new)):
        return ""
    if old is MISSING:
        return f"is new: {short(new)}"
    return "was removed" if new is MISSING else f"{short(old)} became {short(new)}"


def _stands_in(value: Any) -> bool:
    """Whether a wrapped module has put something in the place of an attribute."""
    return bool(getattr(type(value), "stands_in", False))


def _slot(target: Any, descriptor: types.MemberDescriptorType) -> Any:
    try:
        return descriptor.__get__(target)
    except AttributeError:
        return MISSING


def _present(value: Any) -> tuple[Any, ...]:
    """The value, or nothing for a place without one."""
    return () if value is MISSING else (value,)


def _guard_names(native: Any, table: dict[str, Any], state: State) -> None:
    """Have a native guard compare some names of a dictionary, and that it lacks those without a value."""
    found = dict(zip(*state, strict=True))
    present = {name: value for name, value in found.items() if value is not MISSING}
    native.add_names(table, tuple(present), tuple(present.values()), tuple(found.keys() - present.keys()))
