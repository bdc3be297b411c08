"""The compiled guard: every change is noticed, nothing else is, and nothing is kept alive or broken by looking."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import timeit
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import CellType, CodeType
from typing import Any

import pytest
import torch
from torch import nn

from tests.keys.compiled_guard import add_dict, compile_guard, hold_module, items_of


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_guard(tmp_path_factory)


@pytest.fixture(params=["shortcuts", "in full"])
def new_guard(library: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The type; with version tags and watchers, and as it is where CPython's cannot be trusted."""
    if request.param == "in full":
        library.use_shortcuts(False)
    yield library.Guard
    library.use_shortcuts(True)


class Hostile:
    """An object that must never be asked: a guard compares by identity."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a guard ran Python code")

    def __hash__(self) -> int:
        return 7


class Slotted:
    __slots__ = ("one", "two")


class OtherSlotted:
    __slots__ = ("one", "two")


class Plain:
    pass


class Other:
    pass


class Sub(list[Any]):
    def __len__(self) -> int:
        raise AssertionError("a guard ran Python code")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a guard ran Python code")


class SubDeque(deque[Any]):
    def __len__(self) -> int:
        raise AssertionError("a guard ran Python code")

    def __getitem__(self, at: Any) -> Any:
        raise AssertionError("a guard ran Python code")


def plain(**attributes: Any) -> Any:
    made = Plain()
    made.__dict__.update(attributes)
    return made


# ---- dictionaries

KEYS = ("a", "b", Hostile(), 1000, ("c", 1))


def filled(kind: type) -> Any:
    made = defaultdict(list) if kind is defaultdict else kind()
    for key in KEYS:
        made[key] = object()
    return made


DICT_WRITES: dict[str, Callable[[Any], object]] = {
    "another value": lambda d: d.__setitem__("a", object()),
    "another key": lambda d: d.__setitem__("z", None),
    "a key less": lambda d: d.__delitem__("a"),
    "pop": lambda d: d.pop("b"),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
    "update": lambda d: d.update(a=1),
    "setdefault": lambda d: d.setdefault("z", 1),
    "or": lambda d: d.__ior__({"a": 1}),
    "order": lambda d: d.__setitem__("a", d.pop("a")),
    "an equal key": lambda d: (d.pop(1000), d.__setitem__(int("1000"), None)),
    "the last value": lambda d: d.__setitem__(("c", 1), None),
}


@pytest.mark.parametrize("kind", [dict, OrderedDict, defaultdict])
@pytest.mark.parametrize("write", DICT_WRITES)
def test_writes_to_a_dictionary(new_guard: Any, kind: type, write: str) -> None:
    d, untouched, guard = filled(kind), filled(dict), new_guard()
    add_dict(guard, untouched)
    add_dict(guard, d)
    assert len(guard) == 2
    assert guard.holds()
    assert guard.holds()
    assert guard.changed() == -1
    DICT_WRITES[write](d)
    assert not guard.holds()
    assert not guard.holds(), "it stays so"
    assert guard.changed() == 1


def test_what_is_written_back_is_as_before(new_guard: Any) -> None:
    d, guard = filled(dict), new_guard()
    add_dict(guard, d)
    kept = d["a"]
    for _ in range(3):
        d["a"] = 1
        assert not guard.holds()
        d["a"] = kept
        assert guard.holds()
    d["z"] = 1
    del d["z"]
    assert guard.holds()


def test_what_did_not_hold_at_first(new_guard: Any) -> None:
    guard = new_guard()
    guard.add_dict({"a": 1}, ("a",), (2,))
    assert not guard.holds()
    assert guard.changed() == 0
    d: dict[str, Any] = {}
    guard = new_guard()
    guard.add_dict(d, ("a",), (None,))
    assert not guard.holds()
    d["a"] = None
    assert guard.holds()


def test_an_entry_is_added_to_a_guard_that_holds(new_guard: Any) -> None:
    guard = new_guard()
    add_dict(guard, filled(dict))
    assert guard.holds()
    guard.add_dict({}, ("a",), (1,))
    assert not guard.holds()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_the_order_of_an_ordered_dictionary(new_guard: Any, count: int) -> None:
    d = OrderedDict((key, object()) for key in range(count))
    guard = new_guard()
    add_dict(guard, d)
    assert guard.holds()
    if count:
        d.move_to_end(0)
        assert guard.holds() == (count == 1)
        d.move_to_end(0, last=False)
        assert guard.holds()
        value = d.pop(0)
        assert not guard.holds()
        d[0] = value
        d.move_to_end(0, last=False)
        assert list(d) == list(range(count))
        assert guard.holds(), "it gives its items in the same order, wherever they lie"
        d[0] = object()
        assert not guard.holds()


def test_attributes(new_guard: Any) -> None:
    writes: list[Callable[[Any], object]] = [
        lambda o: setattr(o, "a", 2),
        lambda o: delattr(o, "a"),
        lambda o: setattr(o, "new", 2),
        lambda o: [setattr(o, "a", each) for each in range(100)],
        lambda o: object.__setattr__(o, "a", 3),
        lambda o: o.__init__(),
    ]

    class Starting(Plain):
        def __init__(self) -> None:
            self.a = 1
            self.b = object()

    for write in writes:
        o = Starting()
        guard = new_guard()
        add_dict(guard, vars(o))
        assert guard.holds()
        write(o)
        assert not guard.holds()


def test_writes_to_a_module(new_guard: Any) -> None:
    def made() -> Any:
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.ReLU()))

    writes: list[Callable[[Any], object]] = [
        lambda m: m.eval(),
        lambda m: m[2][0].train(False),
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(2, 2))),
        lambda m: m[0].register_parameter("bias", None),
        lambda m: setattr(m[1], "running_mean", torch.zeros(2)),
        lambda m: m[1].load_state_dict(m[1].state_dict(), assign=True),
        lambda m: m.append(nn.ReLU()),
        lambda m: m.__setitem__(0, nn.Linear(2, 2)),
        lambda m: m[0].register_forward_hook(print),
        lambda m: m.register_forward_pre_hook(print),
        lambda m: m[2].add_module("0", nn.ReLU()),
        lambda m: setattr(m[2][0], "forward", print),
        lambda m: setattr(m[2][0], "__class__", nn.ReLU6),
        lambda m: setattr(m[2][0], "__dict__", dict(vars(m[2][0]))),
        lambda m: m[2][0].__setstate__(vars(nn.ReLU())),
    ]
    for at, write in enumerate(writes):
        module, guard = made(), new_guard()
        hold_module(guard, module)
        assert guard.holds()
        module(torch.zeros(4, 2))
        assert guard.holds(), "a call writes to no dictionary"
        write(module)
        assert not guard.holds(), at


def test_globals(new_guard: Any) -> None:
    code: dict[str, Any] = {}
    exec(
        "value = 1\ndef write():\n    global value\n    value = 2\ndef remove():\n    global value\n    del value", code
    )
    guard = new_guard()
    add_dict(guard, code)
    assert guard.holds()
    code["write"]()
    assert not guard.holds()
    code["value"] = 1
    assert guard.holds()
    code["remove"]()
    assert not guard.holds()


# ---- what is compared at every call


@pytest.mark.parametrize("kind", [list, deque, Sub, SubDeque])
def test_writes_to_a_sequence(new_guard: Any, kind: type) -> None:
    writes: list[Callable[[Any], object]] = [
        lambda s: s.append(None),
        lambda s: s.pop(),
        lambda s: s.clear(),
        lambda s: s.reverse(),
        lambda s: s.__setitem__(0, object()),
        lambda s: s.__setitem__(69, object()),
        lambda s: s.insert(3, None),
        lambda s: s.extend(range(200)),
    ]
    if issubclass(kind, deque):
        writes += [lambda s: s.rotate(1), lambda s: s.appendleft(None), lambda s: s.popleft()]
    values = (*(object() for _ in range(68)), Hostile(), Hostile())
    for write in writes:
        seq, guard = kind(values), new_guard()
        guard.add_items(seq, values)
        assert guard.holds()
        write(seq)
        assert not guard.holds()
        assert guard.changed() == 0
    empty, guard = kind(), new_guard()
    guard.add_items(empty, ())
    assert guard.holds()
    empty.append(1)
    assert not guard.holds()
    empty.pop()
    assert guard.holds()


def test_writes_to_a_set(new_guard: Any) -> None:
    values = {object() for _ in range(20)} | {"text", 1}
    writes: list[Callable[[Any], object]] = [
        lambda s: s.add("z"),
        lambda s: s.remove("text"),
        lambda s: s.clear(),
        lambda s: s.update(range(1000)),
        lambda s: (s.remove("text"), s.add("other")),
    ]
    for write in writes:
        guard = new_guard()
        changing = set(values)
        changing.add("gone")
        changing.remove("gone")
        guard.add_items(changing, tuple(changing))
        guard.add_items(frozenset(values), tuple(frozenset(values)))
        assert guard.holds() == (list(frozenset(values)) == list(frozenset(values)))
        write(changing)
        assert guard.changed() == 0


def test_cells(new_guard: Any) -> None:
    value = Hostile()
    cell, empty, guard = CellType(value), CellType(), new_guard()
    guard.add_cell(cell, value)
    guard.add_cell(empty)
    assert guard.holds()
    empty.cell_contents = None
    assert guard.changed() == 1
    cell.cell_contents = Hostile()
    assert guard.changed() == 0
    del empty.cell_contents
    cell.cell_contents = value
    assert guard.holds()


def test_slots(new_guard: Any) -> None:
    value, o, guard = Hostile(), Slotted(), new_guard()
    o.one = value
    guard.add_slot(o, Slotted.__dict__["one"], value)
    guard.add_slot(o, Slotted.__dict__["two"])
    factory = defaultdict(list)
    guard.add_slot(factory, defaultdict.__dict__["default_factory"], list)
    none = defaultdict(None)
    guard.add_slot(none, defaultdict.__dict__["default_factory"], None)
    assert guard.holds()
    o.two = None
    assert guard.changed() == 1
    del o.two
    o.one = Hostile()
    assert guard.changed() == 0
    o.one = value
    factory.default_factory = set
    assert guard.changed() == 2
    factory.default_factory = list
    none.default_factory = set
    assert guard.changed() == 3
    none.default_factory = None
    assert guard.holds()
    o.__class__ = OtherSlotted
    assert guard.changed() == 0, "the slot at this place is another class's"
    o.__class__ = Slotted
    assert guard.holds()


def test_classes_and_dictionaries_of_objects(new_guard: Any) -> None:
    o = plain(a=1)
    attributes = vars(o)
    guard = new_guard()
    guard.add_class(o, Plain)
    guard.add_dict_of(o, attributes)
    assert guard.holds()
    o.__class__ = Other
    assert guard.changed() == 0
    o.__class__ = Plain
    o.__dict__ = dict(attributes)
    assert guard.changed() == 1
    o.__dict__ = attributes
    assert guard.holds()
    del o.__dict__
    assert guard.changed() == 1
    o.a = 1
    assert guard.changed() == 1
    for other in (1, object(), Slotted(), print):
        guard = new_guard()
        guard.add_dict_of(other, {})
        assert not guard.holds()


def test_the_first_difference_is_named(new_guard: Any) -> None:
    d, ordered, items, cell = {"a": 1}, OrderedDict(a=1, b=2), [1], CellType(1)
    tensor = torch.zeros(2)
    guard = new_guard()
    guard.add_items(items, (1,))
    add_dict(guard, ordered)
    guard.add_tensor(tensor)
    add_dict(guard, d)
    guard.add_cell(cell, 1)
    changes = [
        lambda: setattr(cell, "cell_contents", 2),
        lambda: d.clear(),
        lambda: tensor.resize_(1),
        lambda: ordered.move_to_end("a"),
        lambda: items.clear(),
    ]
    for at, change in zip((4, 3, 2, 1, 0), changes, strict=True):
        assert guard.changed() == (-1 if at == 4 else at + 1)
        change()
        assert guard.changed() == at
        assert not guard.holds()
    assert len(guard) == 5


def test_what_cannot_be_added(new_guard: Any) -> None:
    guard = new_guard()
    refused: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
        ("add_dict", ([], (), ()), TypeError, "dict"),
        ("add_dict", ({}, [], ()), TypeError, "tuple"),
        ("add_dict", ({}, (1,), ()), ValueError, "1 keys and 0 values"),
        ("add_items", ((), ()), TypeError, "tuple is no list, deque or set"),
        ("add_items", ([], []), TypeError, "tuple"),
        ("add_cell", (1, 1), TypeError, "cell"),
        ("add_slot", (1, Slotted.__dict__["one"]), TypeError, "is not of int"),
        ("add_slot", (Slotted(), Plain.__dict__["__dict__"]), TypeError, "member_descriptor"),
        ("add_slot", (print, type(print).__dict__["__name__"]), TypeError, "member_descriptor"),
        ("add_slot", (range, type.__dict__["__basicsize__"]), TypeError, "holds no object"),
        ("add_class", (1, 2), TypeError, "type"),
        ("add_dict_of", (1, 2), TypeError, "dict"),
        ("add_tensor", (1,), TypeError, "int is not torch.Tensor"),
    ]
    for method, args, error, said in refused:
        with pytest.raises(error, match=said):
            getattr(guard, method)(*args)
    assert len(guard) == 0
    assert guard.holds()


# ---- lifetimes


def everything(new_guard: Any, made: Any) -> Any:
    """A guard with an entry of every kind, all about one object."""
    slotted, cell, function = Slotted(), CellType(made), lambda: made
    slotted.one = made
    guard = new_guard()
    for kind in (dict, OrderedDict):
        add_dict(guard, kind({"a": made, "b": made}))
    add_dict(guard, vars(made))
    for seq in ([made], deque([made]), {made}, frozenset([made])):
        guard.add_items(seq, (made,))
    guard.add_cell(cell, made)
    guard.add_cell(CellType())
    guard.add_slot(slotted, Slotted.__dict__["one"], made)
    guard.add_slot(slotted, Slotted.__dict__["two"])
    guard.add_class(made, type(made))
    guard.add_dict_of(made, vars(made))
    guard.add_tensor(torch.zeros(1, 1, 1, 1, 1, 1, 1))
    assert function.__closure__ is not None
    guard.add_cell(function.__closure__[0], made)
    return guard


def test_nothing_leaks(new_guard: Any) -> None:
    made, parameter = plain(a=1), nn.Parameter(torch.zeros(2))
    d = {"a": made}
    watched = (made, d, parameter, Slotted, Plain, Slotted.__dict__["one"], new_guard)

    def once() -> None:
        guard = everything(new_guard, made)
        guard.add_tensor(parameter)
        add_dict(guard, d)
        assert guard.holds()
        assert guard.changed() == -1
        for wrong in ([], {}, 1):
            with pytest.raises(TypeError):
                guard.add_tensor(wrong)
            with pytest.raises(TypeError):
                guard.add_slot(wrong, Slotted.__dict__["one"], made)

    def counts() -> list[int]:
        gc.collect()
        return [sys.getrefcount(each) for each in watched]

    once()
    before = counts()
    for _ in range(200):
        once()
    assert counts() == before
    guard = everything(new_guard, made)
    before, blocks = counts(), sys.getallocatedblocks()
    for _ in range(10_000):
        guard.holds()
        guard.changed()
    assert counts() == before
    assert abs(sys.getallocatedblocks() - blocks) < 100


def test_ten_thousand_guards(new_guard: Any) -> None:
    o, d = object(), {"a": 1}
    before = sys.getrefcount(o), sys.getrefcount(d)
    blocks = sys.getallocatedblocks()
    for _ in range(10_000):
        guard = new_guard()
        guard.add_dict(d, ("a",), (o,))
        guard.add_items([o], (o,))
        guard.holds()
    del guard
    assert (sys.getrefcount(o), sys.getrefcount(d)) == before
    assert abs(sys.getallocatedblocks() - blocks) < 100


def test_cycles_are_collected(new_guard: Any) -> None:
    made = plain()
    made.guard = everything(new_guard, made)
    alive, kept = weakref.ref(made), made.guard
    assert gc.is_tracked(kept)
    del made, kept
    gc.collect()
    assert alive() is None


def test_a_guard_that_is_being_cleared_holds_no_more(new_guard: Any) -> None:
    said: list[Any] = []
    guard = new_guard()
    address = id(guard)

    def look(dying: object) -> None:
        found = ctypes.cast(address, ctypes.py_object).value
        said.append((found.holds(), found.changed()))

    # Code is no part of any cycle: it dies when the collector clears the guard.
    code = compile("1", "", "eval")
    dying = weakref.ref(code, look)
    guard.add_class(code, CodeType)
    guard.add_class(guard, new_guard)
    assert guard.holds()
    del guard, code
    gc.collect()
    assert dying() is None
    assert said == [(False, 0)]


def test_what_is_guarded_may_die_elsewhere(new_guard: Any) -> None:
    o = plain(a=1)
    guard = new_guard()
    add_dict(guard, vars(o))
    items = [plain()]
    guard.add_items(items, tuple(items))
    del o, items
    gc.collect()
    assert guard.holds()
    for _ in range(50):
        add_dict(guard, vars(plain(a=1, b=[])))
    gc.collect()
    assert guard.holds()


def test_from_several_threads(new_guard: Any) -> None:
    made = plain(a=object())
    d, items, cell, stop = vars(made), [made], CellType(made), threading.Event()
    kept = d["a"]
    guard = new_guard()
    add_dict(guard, d)
    guard.add_items(items, (made,))
    guard.add_cell(cell, made)
    answers: set[bool] = set()

    def look() -> None:
        while not stop.is_set():
            answers.add(guard.holds())

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        made.a = 1
        assert not guard.holds()
        made.a = kept
        items.append(1)
        assert not guard.holds()
        items.pop()
        assert guard.holds()
    stop.set()
    for thread in threads:
        thread.join()
    assert answers <= {True, False}
    assert guard.holds()


# ---- speed


def test_a_guard_is_faster_than_python(library: Any) -> None:
    """By a factor of 20 to 100 here; the bound leaves room for a machine that is busy."""
    module = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(20)])
    guard = library.Guard()
    hold_module(guard, module)
    dicts = [d for each in module.modules() for d in (vars(each), *vars(each).values()) if isinstance(d, dict)]
    expected = [(d, *items_of(d)) for d in dicts]

    def in_python() -> bool:
        return all(
            len(d) == len(keys) and all(map(lambda a, b: a is b, (*d, *d.values()), (*keys, *values)))
            for d, keys, values in expected
        )

    assert guard.holds() is in_python() is True
    native = min(timeit.repeat(guard.holds, number=20, repeat=20))
    python = min(timeit.repeat(in_python, number=5, repeat=5)) * 4
    assert native * 5 < python
