"""The compiled guard notices every write to a dictionary, and nothing else."""

from __future__ import annotations

import gc
import timeit
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.keys.compiled_guard import Hostile, Plain, add_dict, hold_module, items_of

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


@pytest.mark.parametrize("kind", [dict, defaultdict])
@pytest.mark.parametrize("write", DICT_WRITES)
def test_writes_to_a_dictionary(new_guard: Any, kind: type, write: str) -> None:
    d, untouched, guard = filled(kind), filled(dict), new_guard()
    add_dict(guard, untouched)
    add_dict(guard, d)
    assert len(guard) == 2
    assert guard.holds()
    assert guard.holds()
    DICT_WRITES[write](d)
    assert not guard.holds()
    assert not guard.holds(), "it stays so"
    assert not guard.holds()


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


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_the_order_of_an_ordered_dictionary_is_an_entry_of_its_own(new_guard: Any, count: int) -> None:
    """It is kept where no write to the dictionary shows."""
    d, guard, order = OrderedDict((key, object()) for key in range(count)), new_guard(), new_guard()
    add_dict(guard, d)
    order.add_iterable(d, OrderedDict, tuple(d))
    assert guard.holds()
    if count:
        d.move_to_end(0)
        assert guard.holds()
        assert order.holds() == (count == 1)
        d.move_to_end(0, last=False)
        assert order.holds()
        value = d.pop(0)
        assert not guard.holds()
        d[0] = value
        assert guard.holds() == (count == 1)
    d[1000] = object()
    assert not guard.holds()
    assert not order.holds()


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


def test_names_of_a_dictionary(new_guard: Any) -> None:
    value = Hostile()
    d: dict[Any, Any] = {"a": value, 1: 2, "other": 3}
    guard = new_guard()
    guard.add_names(d, ("a",), (value,), ("z",))
    for harmless in (
        lambda: d.__setitem__("other", 4),
        lambda: d.pop(1),
        lambda: d.__setitem__("".join(["a"]), d.pop("a")),
        lambda: d.update(dict.fromkeys(range(1000))),
    ):
        harmless()
        assert guard.holds()
    d["z"] = None
    assert not guard.holds()
    del d["z"]
    assert guard.holds()
    d["a"] = Hostile()
    assert not guard.holds()
    del d["a"]
    assert not guard.holds()
    d["a"] = value
    assert guard.holds()
    d.clear()
    assert not guard.holds()
    ordered = OrderedDict(a=1, b=2)
    guard = new_guard()
    guard.add_names(ordered, ("a", "b"), (1, 2), ())
    ordered.move_to_end("a")
    assert guard.holds()


def test_what_stands_in_for_nothing_is_left_out_of_a_dictionary(new_guard: Any) -> None:
    class StandIn:
        __slots__ = ("own",)

        def __init__(self, own: Any) -> None:
            self.own = own

    d: dict[Any, Any] = {"a": 1, "b": 2}
    guard = new_guard()
    guard.add_dict(d, *items_of(d), vars(StandIn)["own"])
    assert guard.holds()
    d.update(c=StandIn(None), a=d.pop("a"), d=StandIn(None))
    assert not guard.holds(), "another order"
    d.update(b=d.pop("b"))
    assert guard.holds()
    d["e"] = 3
    assert not guard.holds(), "a new entry"
    d["e"] = StandIn(2)
    assert not guard.holds(), "it replaces something"
    del d["e"]
    assert guard.holds()
    del d["b"]
    assert not guard.holds()
    with pytest.raises(TypeError):
        guard.add_dict(d, *items_of(d), "own")


def test_classes(new_guard: Any) -> None:
    class Base:
        limit = 1

        def method(self) -> None: ...

    (table,) = gc.get_referents(vars(Base))
    method, guard = vars(Base)["method"], new_guard()
    guard.add_names(table, ("limit", "method"), (1, method), ("later",))
    assert guard.holds()
    for write, undo in (
        (lambda: setattr(Base, "limit", 2), lambda: setattr(Base, "limit", 1)),
        (lambda: setattr(Base, "method", print), lambda: setattr(Base, "method", method)),
        (lambda: delattr(Base, "limit"), lambda: setattr(Base, "limit", 1)),
        (lambda: setattr(Base, "later", 2), lambda: delattr(Base, "later")),
    ):
        write()  # type: ignore[no-untyped-call]
        assert not guard.holds()
        undo()  # type: ignore[no-untyped-call]
        assert guard.holds()


def test_a_key_that_compares_itself(new_guard: Any) -> None:
    """Looking up a name runs its ``__eq__``, which may do anything to the guard."""
    asked: list[Any] = []
    armed: list[Any] = []

    class Same:
        def __hash__(self) -> int:
            return hash("a")

        def __eq__(self, other: object) -> bool:
            if armed:
                asked.append(other)
                for _ in range(100):
                    armed[0].add_dict({}, (), ())
                if len(asked) == 1:
                    raise ValueError("no answer")
            return False

    d: dict[Any, Any] = {Same(): 0, "a": 1}
    guard = new_guard()
    guard.add_names(d, ("a",), (1,), ())
    add_dict(guard, {})
    armed.append(guard)
    assert not guard.holds(), "no answer is a difference"
    assert guard.holds()
    assert len(asked) > 1


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
