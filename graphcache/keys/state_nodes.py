"""What is remembered of one object of a snapshot, by kind: how it is compared, and how a native guard compares it.

Each kind keeps a shallow copy. An object that is new can only be reached through a container that changed, so that
comparing the shallow copies of all containers finds every change.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any, NamedTuple

from graphcache.keys.values import same, short

MISSING: Any = object()
"""Stands for an attribute, a global or a cell without a value."""

_REPLACED = frozenset({"forward", "__getstate__"})
"""What a wrapped module replaces in the dictionaries of its parts while one of its calls is under way."""


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


class Node:
    """One object of a snapshot.

    Args:
        parent: The node that it was reached through; ``None`` for a root.
        key: Its name or index there, in the form of a path's end: ``".h"``, ``"[0]"``, or a root's name.
        target: The object.
    """

    __slots__ = ("key", "parent", "state", "target")

    guarded = True
    """Whether a guard compares it; otherwise only the effects of a call do."""

    def __init__(self, parent: Node | None, key: str, target: Any) -> None:
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

    def read(self) -> Any:
        """The state of the object now, which later changes of the object do not reach."""
        raise NotImplementedError

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        """The differences of two states, by value."""
        raise NotImplementedError

    def differs(self) -> bool:
        """Whether the object may have changed: a quick comparison, by identity where there are objects inside."""
        return bool(self.read() != self.state)

    def changes(self) -> list[Change]:
        """The differences from what is remembered to what is there now."""
        return list(self.compare(self.state, self.read()))

    def renew(self) -> list[Change]:
        """Remember what is there now, and tell how it differs from what was remembered."""
        old, self.state = self.state, self.read()
        return list(self.compare(old, self.state))

    def guard(self, native: Any) -> bool:
        """Have a native guard compare the object; ``False`` if it cannot."""
        return False


class TableNode(Node):
    """A dictionary: its keys and values, in order."""

    __slots__ = ()

    # A subclass may have methods of its own, which are no way to look at it.
    def _keys(self) -> Iterable[Any]:
        if isinstance(self.target, collections.OrderedDict):
            return collections.OrderedDict.keys(self.target)
        return dict.keys(self.target)

    def _values(self) -> Iterable[Any]:
        if isinstance(self.target, collections.OrderedDict):
            return collections.OrderedDict.values(self.target)
        return dict.values(self.target)

    def read(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(self._keys()), tuple(self._values())

    def end(self, key: Any) -> str:
        """The end of the path of the value under ``key``."""
        return f"[{short(key)}]" if isinstance(key, (str, int)) else f"[a {type(key).__name__}]"

    def differs(self) -> bool:
        keys, values = self.state
        if dict.__len__(self.target) != len(keys):
            return True
        return not (all(map(is_, self._values(), values)) and all(map(is_, self._keys(), keys)))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        before, now = (dict(zip(*each, strict=True)) for each in (old, new))
        found = False
        for key in {**before, **now}:
            change = difference(before.get(key, MISSING), now.get(key, MISSING))
            if change:
                found = True
                yield Change(self.path + self.end(key), change)
        if not found and list(before) != list(now):
            yield Change(self.path, "has its entries in another order")

    def guard(self, native: Any) -> bool:
        native.add_dict(self.target, *self.state)
        return True


class AttributesNode(TableNode):
    """The ``__dict__`` of an object."""

    __slots__ = ()

    def end(self, key: Any) -> str:
        # The tables of a module are no level of their own.
        return "" if key in ("_modules", "_parameters", "_buffers") else f".{key}"

    def read(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        keys, values = super().read()
        if any(name in self.target and _stands_in(self.target[name]) for name in _REPLACED):
            # For as long as a call of a wrapped module is under way, perhaps in another thread.
            found = dict(zip(keys, values, strict=True))
            for name in _REPLACED & found.keys():
                if _stands_in(value := found.pop(name)):
                    found.update(value.own)
                else:
                    found[name] = value
            return tuple(found), tuple(found.values())
        return keys, values

    def guard(self, native: Any) -> bool:
        keys, values = self.state
        if dict.__len__(self.target) == len(keys) and all(map(is_, self._values(), values)):
            return super().guard(native)
        native.add_names(self.target, keys, values, ())
        return True


class MembersNode(TableNode):
    """The parameters, buffers or submodules of a module."""

    __slots__ = ()

    def end(self, key: Any) -> str:
        return f"[{key}]" if str(key).isdigit() else f".{key}"


class NamesNode(Node):
    """Some names of a dictionary, such as the globals that a function reads.

    Args:
        parent: As for :class:`Node`.
        key: As for :class:`Node`.
        target: The dictionary.
        names: The names.
    """

    __slots__ = ("names",)

    def __init__(self, parent: Node | None, key: str, target: dict[str, Any], names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(parent, key, target)

    def read(self) -> tuple[Any, ...]:
        return tuple([self.target.get(name, MISSING) for name in self.names])

    @staticmethod
    def end(name: str) -> str:
        """The end of the path of a name's value."""
        return f".{name}"

    def differs(self) -> bool:
        return not all(map(is_, self.read(), self.state))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        for name, before, now in zip(self.names, old, new, strict=True):
            if change := difference(before, now):
                yield Change(self.path + self.end(name), change)

    def guard(self, native: Any) -> bool:
        native.add_names(self.target, *split(dict(zip(self.names, self.state, strict=True))))
        return True


class ItemsNode(Node):
    """A list, deque or set, or a subclass of one: its items."""

    __slots__ = ()

    def read(self) -> tuple[Any, ...]:
        # Past a subclass's own __iter__, which may have effects.
        kinds: tuple[Any, ...] = (list, collections.deque, set, frozenset)
        return next(tuple(kind.__iter__(self.target)) for kind in kinds if isinstance(self.target, kind))

    @staticmethod
    def end(index: int) -> str:
        """The end of the path of an item."""
        return f"[{index}]"

    def differs(self) -> bool:
        now = self.read()
        return len(now) != len(self.state) or not all(map(is_, now, self.state))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if len(old) != len(new):
            yield Change(self.path, f"had {len(old)} items and has {len(new)}")
            return
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            if change := difference(before, now):
                yield Change(self.path + self.end(index), change)

    def guard(self, native: Any) -> bool:
        native.add_items(self.target, self.state)
        return True


class SlotsNode(Node):
    """The ``__slots__`` of an object.

    Args:
        parent: As for :class:`Node`.
        key: As for :class:`Node`.
        target: The object.
        slots: Names and descriptors.
    """

    __slots__ = ("slots",)

    def __init__(
        self, parent: Node | None, key: str, target: Any, slots: tuple[tuple[str, types.MemberDescriptorType], ...]
    ) -> None:
        self.slots = slots
        super().__init__(parent, key, target)

    def read(self) -> tuple[Any, ...]:
        return tuple([_slot(self.target, descriptor) for _, descriptor in self.slots])

    @staticmethod
    def end(name: str) -> str:
        """The end of the path of a slot's value."""
        return f".{name}"

    def differs(self) -> bool:
        return not all(map(is_, self.read(), self.state))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        for (name, _), before, now in zip(self.slots, old, new, strict=True):
            if change := difference(before, now):
                yield Change(self.path + self.end(name), change)

    def guard(self, native: Any) -> bool:
        for (_, descriptor), value in zip(self.slots, self.state, strict=True):
            native.add_slot(self.target, descriptor, *(() if value is MISSING else (value,)))
        return True


class ObjectNode(Node):
    """An object: its class, and which dictionary holds its attributes."""

    __slots__ = ()

    def read(self) -> tuple[type, Any]:
        table = getattr(self.target, "__dict__", None)
        return type(self.target), table if type(table) is dict else None

    def differs(self) -> bool:
        return not all(map(is_, self.read(), self.state))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if old[0] is not new[0]:
            yield Change(f"{self.path}.__class__", f"{old[0].__name__} became {new[0].__name__}")
        elif old[1] is not new[1]:
            yield Change(f"{self.path}.__dict__", "is another dictionary")

    def guard(self, native: Any) -> bool:
        kind, table = self.state
        native.add_class(self.target, kind)
        if table is not None:
            native.add_dict_of(self.target, table)
        return True


class ThreadLocalNode(Node):
    """What the current thread sees of a ``threading.local``."""

    __slots__ = ()

    def read(self) -> dict[str, Any]:
        return dict(self.target.__dict__)

    def differs(self) -> bool:
        now = self.read()
        return len(now) != len(self.state) or not all(map(is_, now.values(), self.state.values()))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        for name in {**old, **new}:
            if change := difference(old.get(name, MISSING), new.get(name, MISSING)):
                yield Change(f"{self.path}.{name}", change)


def slots_of(kind: type) -> tuple[tuple[str, types.MemberDescriptorType], ...]:
    """The ``__slots__`` of a class and its bases, with what reads them."""
    found: dict[str, types.MemberDescriptorType] = {}
    for each in kind.__mro__:
        declared = each.__dict__.get("__slots__", ())
        for name in (declared,) if isinstance(declared, str) else tuple(declared):
            mangled = f"_{each.__name__.lstrip('_')}{name}" if name.startswith("__") and name[-2:] != "__" else name
            descriptor = each.__dict__.get(mangled)
            if isinstance(descriptor, types.MemberDescriptorType):
                found.setdefault(mangled, descriptor)
    return tuple(found.items())


def difference(old: Any, new: Any) -> str:
    """What became of a place, in words; empty if it is the same."""
    if old is new or (old is not MISSING and new is not MISSING and same(old, new)):
        return ""
    if old is MISSING:
        return f"is new: {short(new)}"
    return "was removed" if new is MISSING else f"{short(old)} became {short(new)}"


def _stands_in(value: Any) -> bool:
    return bool(getattr(type(value), "stands_in", False))


def _slot(target: Any, descriptor: types.MemberDescriptorType) -> Any:
    try:
        return descriptor.__get__(target)
    except AttributeError:
        return MISSING


def split(names: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...], tuple[str, ...]]:
    """Names with values, their values, and names without."""
    present = {name: value for name, value in names.items() if value is not MISSING}
    return tuple(present), tuple(present.values()), tuple([name for name in names if name not in present])
