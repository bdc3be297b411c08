"""The compiled guard agrees with Python over random structures and random changes."""

from __future__ import annotations

from collections import OrderedDict, deque
from contextvars import ContextVar
from types import CellType
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.keys.compiled_guard import Slotted, fields, items_of

POOL = ("text", 1000, 1000.0, None, True, (), ("a",), object(), [], 10**30)


MISSING = object()


class A:
    pass


class B:
    pass


class Held:
    """One entry of a guard and what Python says of it."""

    def __init__(self, kind: str, values: list[Any]) -> None:
        self.kind = kind
        self.thing: Any = None
        pairs = list(enumerate(values))
        if kind in ("dict", "ordered"):
            self.thing = dict(pairs) if kind == "dict" else OrderedDict(pairs)
        elif kind == "names":
            self.thing = dict(zip("abcdefgh", values, strict=False))
        elif kind == "list":
            self.thing = list(values)
        elif kind == "deque":
            self.thing = deque(values)
        elif kind == "variable":
            self.thing = ContextVar("some")
        elif kind == "set":
            self.thing = {value for value in values if value.__hash__ is not None}
        elif kind == "cell":
            self.thing = CellType(*values[:1])
        elif kind == "slot":
            self.thing = Slotted()
            if values:
                self.thing.one = values[0]
        elif kind == "tensor":
            self.thing = torch.zeros(3, 4)
        else:
            self.thing = A()
            self.thing.__dict__ = {"a": 1}
        self.given = dict(self.thing) if kind == "names" else {}
        self.expected = self.found()

    def found(self) -> tuple[Any, ...]:
        """What must stay as it is; compared by identity, but for numbers about a tensor."""
        if self.kind in ("dict", "ordered"):
            keys, values = items_of(self.thing)
            return keys + values
        if self.kind == "names":
            return tuple(self.thing.get(name, MISSING) for name in "ahz")
        if self.kind == "cell":
            try:
                return (self.thing.cell_contents,)
            except ValueError:
                return ()
        if self.kind == "variable":
            found = self.thing.get(MISSING)
            return () if found is MISSING else (found,)
        if self.kind == "slot":
            return (self.thing.one,) if hasattr(self.thing, "one") else ()
        if self.kind == "class":
            return (type(self.thing),)
        if self.kind == "dict of":
            return (self.thing.__dict__,)
        return fields(self.thing) if self.kind == "tensor" else tuple(self.thing)

    def same(self) -> bool:
        """What Python says."""
        found = self.found()
        if self.kind == "tensor":
            return found == self.expected
        return len(found) == len(self.expected) and all(map(lambda a, b: a is b, found, self.expected))

    def add_to(self, guard: Any) -> None:
        """Let a guard hold it as it is."""
        if self.kind in ("dict", "ordered"):
            guard.add_dict(self.thing, *items_of(self.thing))
            if self.kind == "ordered":
                guard.add_iterable(self.thing, OrderedDict, tuple(self.thing))
        elif self.kind in ("set", "deque"):
            guard.add_iterable(self.thing, type(self.thing), self.expected)
        elif self.kind == "variable":
            guard.add_variable(self.thing, *self.expected)
        elif self.kind == "names":
            given = {name: value for name, value in zip("ahz", self.expected, strict=True) if value is not MISSING}
            guard.add_names(self.thing, tuple(given), tuple(given.values()), tuple(set("ahz") - set(given)))
        elif self.kind == "cell":
            guard.add_cell(self.thing, *self.expected)
        elif self.kind == "slot":
            guard.add_slot(self.thing, Slotted.__dict__["one"], *self.expected)
        elif self.kind == "class":
            guard.add_class(self.thing, *self.expected)
        elif self.kind == "dict of":
            guard.add_dict_of(self.thing, *self.expected)
        elif self.kind == "tensor":
            guard.add_tensor(self.thing)
        else:
            guard.add_list(self.thing, self.expected)

    def change(self, how: int, value: Any) -> None:
        """Do something to it, which may change nothing."""
        changes = getattr(self, f"_{self.kind.replace(' ', '_')}")
        changes[how % len(changes)](self, value)

    def _restore_items(self, _: Any) -> None:
        half = len(self.expected) // 2
        self.thing.clear()
        self.thing.update(zip(self.expected[:half], self.expected[half:], strict=True))

    def _restore_values(self, _: Any) -> None:
        self.thing.clear()
        (self.thing.update if self.kind == "set" else self.thing.extend)(self.expected)

    def _first(self) -> Any:
        return next(iter(self.thing), None)

    _dict = (
        lambda self, value: self.thing.__setitem__(self._first(), value),
        lambda self, value: self.thing.__setitem__(9, value),
        lambda self, value: self.thing.pop(self._first(), None),
        lambda self, value: self.thing.update(dict.fromkeys(self.thing, value)),
        lambda self, value: self.thing.clear(),
        lambda self, value: self.thing.__setitem__(self._first(), self.thing.pop(self._first(), None)),
        _restore_items,
    )
    _ordered = (
        *_dict,
        lambda self, value: self.thing and self.thing.move_to_end(self._first()),
        lambda self, value: self.thing and self.thing.move_to_end(next(reversed(self.thing)), last=False),
    )
    _names = (
        lambda self, value: self.thing.__setitem__("".join(["a"]), value),
        lambda self, value: self.thing.__setitem__("b", value),
        lambda self, value: self.thing.pop("a", None),
        lambda self, value: self.thing.__setitem__("z", value),
        lambda self, value: self.thing.pop("z", None),
        lambda self, value: self.thing.update(self.given),
    )
    _list = (
        lambda self, value: self.thing.append(value),
        lambda self, value: self.thing and self.thing.pop(),
        lambda self, value: self.thing and self.thing.__setitem__(len(self.thing) // 2, value),
        lambda self, value: self.thing.reverse(),
        lambda self, value: self.thing.clear(),
        _restore_values,
    )
    _deque = (*_list, lambda self, value: self.thing.rotate(1), lambda self, value: self.thing.appendleft(value))
    _variable = (lambda self, value: self.thing.set(value),)
    _set = (
        lambda self, value: self.thing.add(str(value)),
        lambda self, value: self.thing.discard(self._first()),
        lambda self, value: self.thing.update(range(50)),
        lambda self, value: self.thing.clear(),
        _restore_values,
    )
    _cell = (
        lambda self, value: setattr(self.thing, "cell_contents", value),
        lambda self, value: delattr(self.thing, "cell_contents"),
    )
    _slot = (
        lambda self, value: setattr(self.thing, "one", value),
        lambda self, value: hasattr(self.thing, "one") and delattr(self.thing, "one"),
    )
    _class = (
        lambda self, value: setattr(self.thing, "__class__", A),
        lambda self, value: setattr(self.thing, "__class__", B),
    )
    _dict_of = (
        lambda self, value: setattr(self.thing, "__dict__", {"a": value}),
        lambda self, value: setattr(self.thing, "__dict__", self.expected[0]),
        lambda self, value: setattr(self.thing, "a", value),
    )
    _tensor = (
        lambda self, value: self.thing.resize_(3, 4),
        lambda self, value: self.thing.resize_(4, 3),
        lambda self, value: self.thing.resize_(3, 4).as_strided_((2, 2), (1, 2), 1),
        lambda self, value: self.thing.fill_(1),
        lambda self, value: setattr(self.thing, "data", self.thing.detach().clone()),
        lambda self, value: setattr(self.thing, "data", self.thing.detach()),
    )


KINDS = (
    *("dict", "ordered", "names", "list", "deque", "set", "cell", "variable"),
    *("slot", "class", "dict of", "tensor"),
)


@given(data=st.data(), shortcuts=st.booleans())
def test_a_guard_says_what_python_says(library: Any, data: st.DataObject, shortcuts: bool) -> None:
    pool = st.sampled_from(POOL)
    some = st.tuples(st.sampled_from(KINDS), st.lists(pool, max_size=8))
    held = [Held(kind, values) for kind, values in data.draw(st.lists(some, min_size=1, max_size=8))]
    guard = library.Guard()
    for each in held:
        each.add_to(guard)
    trusted = library.use_shortcuts(False)
    library.use_shortcuts(shortcuts and trusted)
    try:
        assert guard.holds()
        steps = st.tuples(st.integers(0, len(held) - 1), st.integers(0, 63), pool, st.booleans())
        for at, how, value, look in data.draw(st.lists(steps, max_size=20)):
            held[at].change(how, value)
            if look:
                same = [each.same() for each in held]
                assert guard.holds() == all(same)
    finally:
        library.use_shortcuts(trusted)
