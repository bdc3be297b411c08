"""The compiled guard notices every change of what has no watcher, such as a list, a cell, a slot or a class."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar
from types import CellType
from typing import Any

import pytest
import torch

from tests.keys.compiled_guard import Hostile, Plain, Slotted, add_dict, plain


class OtherSlotted:
    __slots__ = ("one", "two")


class Other:
    pass


class Sub(list[Any]):
    def __len__(self) -> int:
        raise AssertionError("a guard ran Python code")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a guard ran Python code")


@pytest.mark.parametrize("kind", [list, Sub])
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
    values = (*(object() for _ in range(68)), Hostile(), Hostile())
    for write in writes:
        seq, guard = kind(values), new_guard()
        guard.add_list(seq, values)
        assert guard.holds()
        write(seq)
        assert not guard.holds()
    empty, guard = kind(), new_guard()
    guard.add_list(empty, ())
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
        frozen, empty = frozenset(values), set[Any]()
        guard.add_iterable(changing, set, tuple(changing))
        guard.add_iterable(frozen, frozenset, tuple(frozen))
        guard.add_iterable(empty, set, ())
        assert guard.holds()
        empty.add(1)
        assert not guard.holds()
        empty.clear()
        assert guard.holds()
        write(changing)
        assert not guard.holds()


def test_the_items_of_what_else_can_be_iterated(new_guard: Any) -> None:
    class Odd(deque[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("a guard ran Python code")

    items, ordered, guard = Odd((Hostile(), 2, 3)), OrderedDict(a=1, b=2), new_guard()
    guard.add_iterable(items, deque, tuple(deque.__iter__(items)))
    guard.add_iterable(ordered, OrderedDict, ("a", "b"))
    assert guard.holds()
    items.rotate(1)
    assert not guard.holds()
    items.rotate(-1)
    assert guard.holds()
    ordered.move_to_end("a")
    assert not guard.holds()
    ordered.move_to_end("b")
    assert guard.holds()
    items.append(1)
    assert not guard.holds()
    items.pop()
    items.pop()
    assert not guard.holds()
    for thing, kind in (([], deque), (deque(), object), (1, int)):
        guard = new_guard()
        guard.add_iterable(thing, kind, ())
        assert not guard.holds()


def test_context_variables(new_guard: Any) -> None:
    value = Hostile()
    unset, default, given = ContextVar("unset"), ContextVar("default", default=value), ContextVar("given")
    given.set(value)
    guard = new_guard()
    guard.add_variable(unset)
    guard.add_variable(default, value)
    guard.add_variable(given, value)
    assert guard.holds()
    for variable in (unset, default, given):
        token = variable.set(None)
        assert not guard.holds()
        variable.reset(token)
        assert guard.holds()
    assert not Context().run(guard.holds)


def test_properties(new_guard: Any) -> None:
    x, flag = torch.zeros(2), torch._C.TensorBase.requires_grad
    guard = new_guard()
    guard.add_property(x, flag, False)
    assert guard.holds()
    x.requires_grad_()
    assert not guard.holds()
    for other in (1, Plain()):
        guard = new_guard()
        guard.add_property(other, flag, False)
        assert not guard.holds()


def test_dictionaries_that_nobody_writes_to(new_guard: Any, request: pytest.FixtureRequest) -> None:
    writes: list[Callable[[Any], object]] = [
        lambda d: d.pop("a"),
        lambda d: d.__setitem__("b", 2),
        lambda d: d.__setitem__("a", object()),
        lambda d: (d.pop("a"), d.__setitem__("a", 1)),
    ]
    if "in full" in request.node.name or sys.version_info >= (3, 14):
        with pytest.raises(TypeError, match="does not count"):
            new_guard().add_unwritten({})
        return
    for write in writes:
        d, other, guard = {"a": 1}, {}, new_guard()
        guard.add_unwritten(d)
        add_dict(guard, other)
        assert guard.holds()
        assert d["a"] == 1
        other.update(a=1)
        other.clear()
        assert guard.holds()
        write(d)
        assert not guard.holds()
        assert not guard.holds()


def test_cells(new_guard: Any) -> None:
    value = Hostile()
    cell, empty, guard = CellType(value), CellType(), new_guard()
    guard.add_cell(cell, value)
    guard.add_cell(empty)
    assert guard.holds()
    empty.cell_contents = None
    assert not guard.holds()
    cell.cell_contents = Hostile()
    assert not guard.holds()
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
    assert not guard.holds()
    del o.two
    o.one = Hostile()
    assert not guard.holds()
    o.one = value
    factory.default_factory = set
    assert not guard.holds()
    factory.default_factory = list
    none.default_factory = set
    assert not guard.holds()
    none.default_factory = None
    assert guard.holds()
    o.__class__ = OtherSlotted
    assert not guard.holds(), "the slot at this place is another class's"
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
    assert not guard.holds()
    o.__class__ = Plain
    o.__dict__ = dict(attributes)
    assert not guard.holds()
    o.__dict__ = attributes
    assert guard.holds()
    del o.__dict__
    assert not guard.holds()
    o.a = 1
    assert not guard.holds()
    for other in (1, object(), Slotted(), print):
        guard = new_guard()
        guard.add_dict_of(other, {})
        assert not guard.holds()


@pytest.mark.parametrize("at", range(5))
def test_each_entry_is_compared(new_guard: Any, at: int) -> None:
    d, ordered, items, cell = {"a": 1}, OrderedDict(a=1), [1], CellType(1)
    tensor = torch.zeros(2)
    guard = new_guard()
    guard.add_list(items, (1,))
    add_dict(guard, ordered)
    guard.add_tensor(tensor)
    add_dict(guard, d)
    guard.add_cell(cell, 1)
    changes: list[Callable[[], object]] = [
        lambda: setattr(cell, "cell_contents", 2),
        lambda: d.clear(),
        lambda: tensor.resize_(1),
        lambda: ordered.clear(),
        lambda: items.clear(),
    ]
    assert guard.holds()
    changes[at]()
    assert not guard.holds()
    assert len(guard) == 5


def test_what_functions_answer(new_guard: Any) -> None:
    guard = new_guard()
    guard.add_answer(torch.get_default_dtype, torch.get_default_dtype())
    guard.add_answer(torch._C._get_float32_matmul_precision, "".join(["high", "est"]))
    reduced = torch._C._get_cublas_allow_fp16_reduced_precision_reduction
    guard.add_answer(reduced, reduced())
    guard.add_answer(torch._C._get_cudnn_benchmark, False)
    assert guard.holds()
    torch.set_float32_matmul_precision("high")
    assert not guard.holds()
    torch.set_float32_matmul_precision("highest")
    assert guard.holds()
    for wrong in (lambda: 1, len, [].append, 1):
        with pytest.raises(TypeError):
            guard.add_answer(wrong, 1)
    raising = new_guard()
    raising.add_answer({}.popitem, 1)
    assert not raising.holds(), "it has raised KeyError"


def test_what_cannot_be_added(new_guard: Any) -> None:
    guard = new_guard()
    refused: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
        ("add_dict", ([], (), ()), TypeError, "dict"),
        ("add_dict", ({}, [], ()), TypeError, "tuple"),
        ("add_dict", ({}, (1,), ()), ValueError, "1 keys and 0 values"),
        ("add_names", ({}, (1,), (1,), ()), TypeError, "names are strings"),
        ("add_names", ({}, ("a",), (), ()), ValueError, "1 keys and 0 values"),
        ("add_list", ((), ()), TypeError, "list"),
        ("add_list", ([], []), TypeError, "tuple"),
        ("add_iterable", (deque(), 1, ()), TypeError, "type"),
        ("add_iterable", (deque(), deque, []), TypeError, "tuple"),
        ("add_variable", (1,), TypeError, "ContextVar"),
        ("add_property", (1, Slotted.__dict__["one"], 1), TypeError, "getset_descriptor"),
        ("add_unwritten", ([],), TypeError, "list is no dict"),
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
