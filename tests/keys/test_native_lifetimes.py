"""Nothing is kept alive or broken by a compiled guard."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from collections import OrderedDict, deque
from contextvars import ContextVar
from types import CellType, CodeType
from typing import Any

import pytest
import torch
from torch import nn

from tests.keys.compiled_guard import Plain, Slotted, add_dict, plain


def everything(new_guard: Any, made: Any) -> Any:
    """A guard with an entry of every kind, all about one object."""
    slotted, cell, function = Slotted(), CellType(made), lambda: made
    slotted.one = made
    guard = new_guard()
    add_dict(guard, {"a": made, "b": made})
    add_dict(guard, OrderedDict({"a": made}))
    add_dict(guard, vars(made))
    guard.add_names({"a": made}, ("a",), (made,), ("b",))
    guard.add_list([made], (made,))
    for kind in (set, frozenset, deque):
        guard.add_iterable(kind([made]), kind, (made,))
    variable: ContextVar[Any] = ContextVar("variable", default=made)
    guard.add_variable(variable, made)
    guard.add_property(torch.zeros(1), torch._C.TensorBase.requires_grad, False)
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
    assert counts() == before
    assert abs(sys.getallocatedblocks() - blocks) < 100


def test_ten_thousand_guards(new_guard: Any) -> None:
    o, d = object(), {"a": 1}
    before = sys.getrefcount(o), sys.getrefcount(d)
    blocks = sys.getallocatedblocks()
    for _ in range(10_000):
        guard = new_guard()
        guard.add_dict(d, ("a",), (o,))
        guard.add_list([o], (o,))
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
        said.append(found.holds())

    # Code is no part of any cycle: it dies when the collector clears the guard.
    code = compile("1", "", "eval")
    dying = weakref.ref(code, look)
    guard.add_class(code, CodeType)
    guard.add_class(guard, new_guard)
    assert guard.holds()
    del guard, code
    gc.collect()
    assert dying() is None
    assert said == [False]


def test_what_is_guarded_may_die_elsewhere(new_guard: Any) -> None:
    o = plain(a=1)
    guard = new_guard()
    add_dict(guard, vars(o))
    items = [plain()]
    guard.add_list(items, tuple(items))
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
    guard.add_list(items, (made,))
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
