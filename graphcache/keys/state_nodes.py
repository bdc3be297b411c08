"""What is remembered of one object of a snapshot, by kind: how it is read, compared, named, and guarded in native code.

Each kind keeps a shallow copy. A new object can only be reached through a container that changed, so that comparing the
shallow copies of all containers finds every change.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Callable, Sequence
from operator import eq, is_
from typing import Any, NamedTuple

from torch import Tensor

from graphcache.keys.attributes import attributes_of, table_of
from graphcache.keys.values import MISSING, same, short, told_apart

_IGNORED_CLASS_NAMES = {
    *("__init__", "__slotnames__", "__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__"),
    *("__doc__", "__signature__", "__text_signature__", "__abstractmethods__", "__parameters__", "__weakref__"),
    *("__dict__", "_abc_impl"),
}
"""Attributes that Python and its libraries put on classes while they are looked at, copied, pickled or compiled."""
_REPLACED = frozenset({"forward", "__getstate__"})
"""What a wrapped module replaces in the dictionaries of its parts while one of its calls is under way."""
ITEMS = (list, collections.deque, set, frozenset)

State = tuple[Sequence[Any], Sequence[Any]]
"""Names and values."""


class Change(NamedTuple):
    """One difference between a snapshot and the state now: the path of the place, and what became of it."""

    path: str
    detail: str
    is_random: bool = False
    """Whether it is a generator of random numbers that moved on."""


class StandIn:
    """What a wrapped module puts in the place of an attribute of a module while calls of it are under way."""

    __slots__ = ("own",)

    own: dict[str, Any] | None
    """What it replaces, by its name, if there was anything."""


class StateNode:
    """One object of a snapshot: the names of the places in it, and what each holds."""

    __slots__ = ("key", "parent", "places", "state", "target")

    is_alike: Callable[[Any, Any], bool] = staticmethod(is_)
    """The quick comparison of what one place holds; what is not alike is compared by value."""
    is_ignorable = True
    """Whether a user's ignored paths leave out its changes."""
    whole = ""
    """What is said of changes, for a kind whose places have no path of their own."""

    def __init__(self, parent: StateNode | None, key: str, target: Any, places: Any = ()) -> None:
        self.parent, self.key, self.target = parent, key, target
        self.places = places
        """Which of its places are looked at, for some kinds; of dictionaries and lists, which are not."""
        self.state = self.read()

    @property
    def guarded(self) -> bool:
        """Whether a guard compares it; otherwise only the effects of a call do."""
        return True

    def renew(self) -> bool:
        """Take the state of now; whether nothing is reached through it that was not before."""
        self.state = self.read()
        return True

    @property
    def path(self) -> str:
        """Where the object is, such as ``self.blocks[2].h``."""
        keys, node = [self.key], self.parent
        while node is not None:
            keys.append(node.key)
            node = node.parent
        return "".join(reversed(keys))

    def end(self, name: Any) -> str:
        return f".{name}" if name else ""

    def read(self) -> State:
        """Names and values now, which later changes of the object do not reach."""
        raise NotImplementedError

    def without_places(self, names: Sequence[Any], values: Sequence[Any]) -> State:
        """Names and values but for those that are not looked at."""
        left_out = set(map(told_apart, self.places))
        kept = [index for index, name in enumerate(names) if told_apart(name) not in left_out]
        return tuple([names[index] for index in kept]), tuple([values[index] for index in kept])

    def differs(self) -> bool:
        """Whether the object may have changed: a quick comparison, by identity where there are objects inside."""
        names, values = self.state
        names_now, now = self.read()
        return len(now) != len(values) or not all(map(self.is_alike, now, values)) or names_now != names

    def changes(self, now: State) -> list[Change]:
        """The differences of a later state, by value."""
        before, after = (dict(zip(*each, strict=True)) for each in (self.state, now))
        pairs = {name: (before.get(name, MISSING), after.get(name, MISSING)) for name in {**before, **after}}
        changed = {name: pair for name, pair in pairs.items() if not same(*pair)}
        if changed and self.whole:
            return [Change(self.path, self.whole.format(", ".join(map(str, changed))))]
        if not changed and list(before) != list(after):
            return [Change(self.path, "has its entries in another order")]
        return [Change(self.path + self.end(name), _became(*pair)) for name, pair in changed.items()]

    def guard(self, native: Any) -> None:
        """Have a native guard compare the object; a ``TypeError`` or ``ValueError`` says that it cannot."""
        raise TypeError


class TableNode(StateNode):
    """A dictionary: its keys and values, in order."""

    def _kind(self) -> Any:
        """The class whose methods show it. A subclass may have methods of its own, which are no way to look."""
        return collections.OrderedDict if issubclass(type(self.target), collections.OrderedDict) else dict

    def read(self) -> State:
        kind = self._kind()
        names, values = tuple(kind.keys(self.target)), tuple(kind.values(self.target))
        return self.without_places(names, values) if self.places else (names, values)

    def differs(self) -> bool:
        if self.places:
            return super().differs()
        # Without copies: most tables of a module are empty.
        names, values = self.state
        if dict.__len__(self.target) != len(names):
            return True
        kind = self._kind()
        return not (all(map(is_, kind.values(self.target), values)) and all(map(is_, kind.keys(self.target), names)))

    def end(self, name: Any) -> str:
        return f"[{short(name)}]" if isinstance(name, (str, int)) else f"[a {type(name).__name__}]"

    def guard(self, native: Any) -> None:
        if self._kind() is dict or len(self.state[0]) < 2:
            native.add_dict(self.target, *self.state, vars(StandIn)["own"], tuple(self.places))
            return
        # The iterator of an OrderedDict looks keys up, which runs no Python code for these.
        if self.places or not set(map(type, self.state[0])) <= {str, int}:
            raise TypeError
        native.add_dict(self.target, tuple(dict.keys(self.target)), tuple(dict.values(self.target)))
        # Its order is kept elsewhere: move_to_end() writes to no dictionary.
        native.add_iterable(self.target, collections.OrderedDict, self.state[0])
        if self.differs():
            raise ValueError


class AttributesNode(TableNode):
    """The ``__dict__`` of an object, or the parameters, buffers or submodules of a module."""

    def end(self, name: Any) -> str:
        # No level of its own.
        if name in ("_modules", "_parameters", "_buffers"):
            return ""
        return f"[{name}]" if str(name).isdigit() else f".{name}"

    def read(self) -> State:
        names, values = super().read()
        replaced = self._replaced()
        if not replaced:
            return names, values
        # A call of a wrapped module is under way, perhaps in another thread.
        found = dict(zip(names, values, strict=True))
        for name in _REPLACED & found.keys():
            value = found.pop(name)
            found.update((replaced[name] or {}) if name in replaced else {name: value})
        return pairs(found)

    def _replaced(self) -> dict[str, dict[str, Any] | None]:
        """The names under which something stands in, and what it replaces."""
        given = {name: self.target.get(name) for name in _REPLACED}
        # Asked of the type: isinstance() may call the object's own __getattribute__.
        return {name: value.own for name, value in given.items() if issubclass(type(value), StandIn)}

    def differs(self) -> bool:
        # Not because of what stands in.
        return super().differs() and StateNode.differs(self)

    def guard(self, native: Any) -> None:
        if any(own is not None for own in self._replaced().values()):
            raise ValueError
        super().guard(native)


class DictOfNode(AttributesNode):
    """The ``__dict__`` of an object where it is of a subclass of ``dict``: attributes are set past its methods."""

    def _kind(self) -> Any:
        return dict


class NamesNode(StateNode):
    """Some names of a dictionary, such as the globals that a function reads."""

    def read(self) -> State:
        return self.places, tuple([self.target.get(name, MISSING) for name in self.places])

    def guard(self, native: Any) -> None:
        present = {name: value for name, value in zip(*self.state, strict=True) if value is not MISSING}
        absent = tuple([name for name in self.places if name not in present])
        native.add_names(self.target, tuple(present), tuple(present.values()), absent)


class ClassNode(StateNode):
    """What a class defines: methods and plain attributes."""

    def read(self) -> State:
        return pairs({name: value for name, value in vars(self.target).items() if name not in _IGNORED_CLASS_NAMES})

    def guard(self, native: Any) -> None:
        # All names are compared, so that a new one is noticed.
        found = pairs(table := table_of(self.target))
        if self.differs():
            raise ValueError
        native.add_dict(table, *found)


class ItemsNode(StateNode):
    """A list, deque or set, a subclass of one, or a NumPy array of objects: its items."""

    def _kind(self) -> Any:
        """The class whose iterator shows the items: a subclass's own may have effects. ``None`` for an array."""
        return next((kind for kind in ITEMS if issubclass(type(self.target), kind)), None)

    def read(self) -> State:
        kind = self._kind()
        items = tuple(self.target.ravel().tolist() if kind is None else kind.__iter__(self.target))
        return self.without_places(range(len(items)), items) if self.places else (range(len(items)), items)

    def end(self, name: Any) -> str:
        return f"[{name}]"

    def changes(self, now: State) -> list[Change]:
        if now[0] != self.state[0]:
            return [Change(self.path, f"had {len(self.state[0])} items and has {len(now[0])}")]
        return super().changes(now)

    def guard(self, native: Any) -> None:
        kind = None if self.places else self._kind()
        if kind is list:
            native.add_list(self.target, self.state[1])
        else:
            native.add_iterable(self.target, kind, self.state[1])


class ObjectNode(StateNode):
    """An object: its class, the dictionary of its attributes, and ``__slots__``; its places are what reads these."""

    def read(self) -> State:
        held = [_slot(self.target, descriptor) for descriptor in self.places.values()]
        return ("__class__", "__dict__", *self.places), (type(self.target), attributes_of(self.target), *held)

    def guard(self, native: Any) -> None:
        kind, table, *held = self.state[1]
        native.add_class(self.target, kind)
        if table is not None:
            native.add_dict_of(self.target, table)
        for descriptor, value in zip(self.places.values(), held, strict=True):
            native.add_slot(self.target, descriptor, *present(value))


class FunctionNode(StateNode):
    """A function: its code and its default values."""

    def read(self) -> State:
        parts = (self.target.__code__, self.target.__defaults__, self.target.__kwdefaults__)
        return ("__code__", "__defaults__", "__kwdefaults__"), parts

    def guard(self, native: Any) -> None:
        native.add_function(self.target, self.state[1])


class CellNode(StateNode):
    """A variable that a function closes over."""

    def read(self) -> State:
        return ("",), (_slot(self.target, types.CellType.cell_contents),)

    def guard(self, native: Any) -> None:
        native.add_cell(self.target, *present(*self.state[1]))


class TensorNode(StateNode):
    """A tensor: where its memory is and how it is laid out, and for the effects of a call what was written into it."""

    __slots__ = ("_written", "may_change")

    is_alike = staticmethod(eq)
    whole = "has another {}"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.renew()

    def renew(self) -> bool:
        # Not its place, which a guard compares: another thread may have changed it a moment ago.
        self._written = _asked(_written, self.target)
        self.may_change = False
        """Whether the call that was observed updates it in place, as a graph may."""
        return True

    def read(self) -> State:
        # Sparse tensors and uninitialised parameters have no address.
        return _PLACE, _asked(_place, self.target) or (id(self.target),) * len(_PLACE)

    @property
    def is_written(self) -> bool:
        """Whether an operation wrote into the tensor or a view of it, or a gradient was accumulated or assigned."""
        before, now = self._written or (None, None), _asked(_written, self.target) or (None, None)
        return (before[0] != now[0] and not self.may_change) or before[1] is not now[1]

    def guard(self, native: Any) -> None:
        native.add_tensor(self.target)
        if self.differs():
            # It was changed since it was read, and native code took it as it is now.
            raise ValueError


def pairs(table: dict[Any, Any]) -> State:
    """The names and values of a dictionary."""
    return tuple(table), tuple(table.values())


def _became(old: Any, new: Any) -> str:
    if old is MISSING:
        return f"is new: {short(new)}"
    return "was removed" if new is MISSING else f"{short(old)} became {short(new)}"


def _slot(target: Any, descriptor: Any) -> Any:
    try:
        return descriptor.__get__(target)
    except (AttributeError, TypeError, ValueError):
        # It is not set, or the object has come to be of another class.
        return MISSING


def present(value: Any) -> tuple[Any, ...]:
    """The value, or nothing for a place without one."""
    return () if value is MISSING else (value,)


_PLACE = ("address", "shape", "strides", "dtype", "device", "requires_grad", "conjugation", "sign bit")


def _place(x: Tensor) -> tuple[Any, ...]:
    layout = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device)
    return (*layout, x.requires_grad, x.is_conj(), x.is_neg())


def _written(x: Tensor) -> tuple[Any, ...]:
    # Inference tensors count no versions, and only leaves have a gradient.
    return None if x.is_inference() else x._version, x.grad if x.is_leaf else None


def _asked(question: Callable[[Tensor], Any], tensor: Tensor) -> Any:
    """What a tensor answers; ``None`` for one that cannot be asked."""
    try:
        return question(tensor)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None
