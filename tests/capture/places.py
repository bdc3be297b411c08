"""Places in which generated modules keep their state: nested Python structures behind an attribute, a global and so on.

A place is text: an expression that reads its value, a statement that writes it, and the lines that build it. Programs
made of such text are executed once for each twin, so that two twins share no state.
"""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import enum
import functools
import itertools
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# ---- what generated programs are made of


class Box:
    """An object with a ``__dict__``."""

    def __init__(self, v: Any) -> None:
        self.v = v

    def read(self) -> Any:
        return self.v


class Slots:
    """An object without one."""

    __slots__ = ("v",)

    def __init__(self, v: Any) -> None:
        self.v = v


class MoreSlots(Slots):
    """Slots of a base class, and one of its own."""

    __slots__ = ("w",)

    def __init__(self, v: Any) -> None:
        super().__init__(0)
        self.w = v


@dataclass(eq=False)
class Record:
    """A plain dataclass, known to pytree."""

    v: Any


@dataclass(slots=True)
class SlotRecord:
    """A dataclass with slots."""

    v: Any


@dataclass(frozen=True, eq=False)
class Frozen:
    """A dataclass that cannot be changed, with a field that can."""

    v: Any


class Pair(NamedTuple):
    """A named tuple."""

    v: Any
    other: int = 0


class Listed(list):  # type: ignore[type-arg]
    """A list with an attribute."""

    def __init__(self, v: Any) -> None:
        super().__init__([0])
        self.v = v


class Mapped(dict):  # type: ignore[type-arg]
    """A dictionary with an attribute."""

    def __init__(self, v: Any) -> None:
        super().__init__(a=0)
        self.v = v


class Holder(nn.Module):
    """A module with a plain attribute."""

    def __init__(self, v: Any) -> None:
        super().__init__()
        self.v = v


def cell(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """A variable that two functions close over."""

    def get() -> Any:
        return value

    def put(new: Any) -> None:
        nonlocal value
        value = new

    return get, put


def first(kept: Any) -> Any:
    return kept


def with_default(value: Any) -> Callable[[], Any]:
    """A function with a mutable default argument."""

    def read(kept: Any = [value]) -> Any:  # noqa: B006 - what is meant
        return kept

    return read


def with_attribute(value: Any) -> Callable[[], Any]:
    """A function with an attribute."""

    def read() -> Any:
        return read.v  # type: ignore[attr-defined]

    read.v = value  # type: ignore[attr-defined]
    return read


def a_class(value: Any) -> type:
    return type("Made", (), {"v": value})


def a_derived_class(value: Any) -> type:
    return type("Derived", (a_class(value),), {})


def a_class_with_a_metaclass(value: Any) -> type:
    # In a list: a function read from a class of its metaclass would be bound.
    return type("Meta", (type,), {"v": [value]})("Made", (), {})


def a_member(value: Any) -> enum.Enum:
    """The member of an enumeration, with an attribute."""
    made: Any = enum.Enum("Made", {"A": 1}, module=__name__)
    made.A.v = value
    return made.A  # type: ignore[no-any-return]


def a_module(value: Any) -> types.ModuleType:
    made = types.ModuleType("made")
    made.v = value  # type: ignore[attr-defined]
    return made


def a_partial(value: Any) -> Any:
    """A partial function with an attribute."""
    made: Any = functools.partial(first)
    made.v = value
    return made


def a_proxy(value: Any) -> Any:
    box = Box(value)
    alive.append(box)
    return weakref.proxy(box)


def a_table(value: Any) -> Any:
    """A function with a cache that holds the value."""

    @functools.lru_cache(None)
    def table() -> list[Any]:
        return [value]

    table()
    return table


def a_factory(value: Any) -> collections.defaultdict[Any, Any]:
    return collections.defaultdict(Box(value).read)


class Failure(Exception):
    """An exception with an attribute."""

    def __init__(self, v: Any) -> None:
        super().__init__()
        self.v = v


class Worker(threading.Thread):
    """A thread with an attribute, which is never started."""

    def __init__(self, v: Any) -> None:
        super().__init__(name="worker")
        self.v = v


class Labelled(np.ndarray):  # type: ignore[type-arg]
    """An array with an attribute."""


def labelled(value: Any) -> Labelled:
    made = np.zeros(1).view(Labelled)
    made.v = value  # type: ignore[attr-defined]
    return made


def noted(value: Any) -> Tensor:
    """A tensor with an attribute."""
    tensor = torch.zeros(1)
    tensor.v = value  # type: ignore[attr-defined]
    return tensor


alive: list[Any] = []
"""What keeps the targets of weak references; no generated code names it."""


def weakly(value: Any) -> weakref.ref[Box]:
    box = Box(value)
    alive.append(box)
    return weakref.ref(box)


def local(value: Any) -> threading.local:
    made = threading.local()
    made.v = value
    return made


def objects(value: Any) -> Any:
    """A NumPy array of Python objects."""
    return np.array([Box(value), None], dtype=object)


def variable(value: Any) -> contextvars.ContextVar[Any]:
    made: contextvars.ContextVar[Any] = contextvars.ContextVar("made")
    made.set(value)
    return made


def refill(kept: set[Any], value: Any) -> None:
    kept.clear()
    kept.add(value)


def counting(start: int) -> Iterator[int]:
    """A generator."""
    while True:
        yield start
        start += 1


pool = ThreadPoolExecutor(1)


def elsewhere(tensor: Tensor) -> float:
    """The sum, read by another thread."""
    return pool.submit(lambda: float(tensor.sum())).result()


def register() -> None:
    """Make :class:`Record` known to pytree, for the length of a test."""
    pytree.register_pytree_node(Record, lambda record: ([record.v], None), lambda values, _: Record(*values))


def unregister() -> None:
    pytree._deregister_pytree_node(Record)


# ---- places


@dataclass(frozen=True)
class Kind:
    """A kind of structure with room for one value.

    Args:
        make: The expression that builds it, with ``%s`` for the value.
        get: The expression that reads the value, with ``%s`` for the structure.
        put: The statement that writes it, with ``%s`` for structure and value; empty where nothing can be put.
        any_thread: Whether other threads find the same value.
        numbers: Whether it holds only numbers.
    """

    make: str
    get: str
    put: str = ""
    any_thread: bool = True
    numbers: bool = False


KINDS = {
    "list": Kind("[%s]", "%s[0]", "%s[0] = %s"),
    "tuple": Kind("(0, %s)", "%s[1]"),
    "dict": Kind("{'k': %s}", "%s['k']", "%s['k'] = %s"),
    "OrderedDict": Kind("OrderedDict(k=%s)", "%s['k']", "%s['k'] = %s"),
    "defaultdict": Kind("defaultdict(int, {1: %s})", "%s[1]", "%s[1] = %s"),
    "UserDict": Kind("UserDict(k=%s)", "%s['k']", "%s['k'] = %s"),
    "mappingproxy": Kind("MappingProxyType({'k': %s})", "%s['k']"),
    "deque": Kind("deque([0, %s], maxlen=2)", "%s[1]", "%s.append(%s)"),
    "set": Kind("{Box(%s)}", "next(iter(%s)).v", "next(iter(%s)).v = %s"),
    "frozenset": Kind("frozenset([Slots(%s)])", "next(iter(%s)).v", "next(iter(%s)).v = %s"),
    "object": Kind("Box(%s)", "%s.v", "%s.v = %s"),
    "namespace": Kind("SimpleNamespace(v=%s)", "%s.v", "%s.v = %s"),
    "slots": Kind("Slots(%s)", "%s.v", "%s.v = %s"),
    "slots of a base": Kind("MoreSlots(%s)", "%s.w", "%s.w = %s"),
    "dataclass": Kind("Record(%s)", "%s.v", "%s.v = %s"),
    "dataclass with slots": Kind("SlotRecord(%s)", "%s.v", "%s.v = %s"),
    "frozen dataclass": Kind("Frozen(%s)", "%s.v"),
    "namedtuple": Kind("Pair(%s)", "%s.v"),
    "attribute of a list": Kind("Listed(%s)", "%s.v", "%s.v = %s"),
    "attribute of a dict": Kind("Mapped(%s)", "%s.v", "%s.v = %s"),
    "attribute of a tensor": Kind("noted(%s)", "%s.v", "%s.v = %s"),
    "module": Kind("Holder(%s)", "%s.v", "%s.v = %s"),
    "closure": Kind("cell(%s)", "%s[0]()", "%s[1](%s)"),
    "partial": Kind("partial(first, [%s])", "%s()[0]", "%s.args[0][0] = %s"),
    "keyword of a partial": Kind("partial(first, kept=[%s])", "%s()[0]", "%s.keywords['kept'][0] = %s"),
    "bound method": Kind("Box(%s).read", "%s()", "%s.__self__.v = %s"),
    "default argument": Kind("with_default(%s)", "%s()[0]", "%s.__defaults__[0][0] = %s"),
    "attribute of a function": Kind("with_attribute(%s)", "%s()", "%s.v = %s"),
    "class": Kind("a_class(%s)", "%s.v", "%s.v = %s"),
    "base of a class": Kind("a_derived_class(%s)", "%s.v", "%s.__bases__[0].v = %s"),
    "metaclass": Kind("a_class_with_a_metaclass(%s)", "%s.v[0]", "type(%s).v[0] = %s"),
    "enumeration": Kind("a_member(%s)", "%s.v", "%s.v = %s"),
    "module of Python": Kind("a_module(%s)", "%s.v", "%s.v = %s"),
    "attribute of a partial": Kind("a_partial(%s)", "%s.v", "%s.v = %s"),
    "proxy": Kind("a_proxy(%s)", "%s.v", "%s.v = %s"),
    "table of a cached function": Kind("a_table(%s)", "%s()[0]", "%s()[0] = %s"),
    "default factory": Kind("a_factory(%s)", "%s.default_factory()", "%s.default_factory.__self__.v = %s"),
    "exception": Kind("Failure(%s)", "%s.v", "%s.v = %s"),
    "thread": Kind("Worker(%s)", "%s.v", "%s.v = %s"),
    "attribute of an array": Kind("labelled(%s)", "%s.v", "%s.v = %s"),
    "number of C": Kind("c_double(%s)", "%s.value", "%s.value = %s", numbers=True),
    "ChainMap": Kind("ChainMap({}, {'k': %s})", "%s['k']", "%s.maps[1]['k'] = %s"),
    "view of a dict": Kind("{'k': %s}.values()", "next(iter(%s))"),
    "weak reference": Kind("weakly(%s)", "%s().v", "%s().v = %s"),
    "method of a dict": Kind("{'k': %s}.get", "%s('k')", "%s.__self__['k'] = %s"),
    "NumPy array of objects": Kind("objects(%s)", "%s[0].v", "%s[0].v = %s"),
    "thread local": Kind("local(%s)", "%s.v", "%s.v = %s", any_thread=False),
    "context variable": Kind("variable(%s)", "%s.get()", "%s.set(%s)", any_thread=False),
    "array": Kind("array('d', [%s])", "%s[0]", "%s[0] = %s", numbers=True),
    "memoryview": Kind("memoryview(array('d', [%s]))", "%s[0]", "%s[0] = %s", numbers=True),
    "NumPy array": Kind("np.array([%s])", "float(%s[0])", "%s[0] = %s", numbers=True),
    "set of numbers": Kind("{%s}", "next(iter(%s))", "refill(%s, %s)", numbers=True),
}
ITSELF = Kind("%s", "%s", "%s = %s")
"""No structure: what the root refers to is the value."""

ROOTS = ("attribute", "attribute", "part", "global", "enclosing", "class", "base class", "default", "argument")
ARGUMENTS = {
    "dict": ("%s", "cache"),
    "list": ("[%s]", "cache[0]"),
    "object": ("Box(%s)", "cache.v"),
    "dataclass": ("Record(%s)", "cache.v"),
    "namedtuple": ("Pair(%s)", "cache.v"),
    "nested": ("{'layers': [Slots(%s)]}", "cache['layers'][0].v"),
}
"""How a program's second argument is built around a dictionary, and where that is found in it."""


@dataclass
class Place:
    """Where one value is kept.

    Args:
        get: The expression that reads it.
        put: The statement that writes it, with ``%s`` for the value.
        whole: The statement that puts a new structure in the place of the old one, with ``%s`` for the value.
        declare: ``global`` and ``nonlocal`` statements of functions that write.
        sections: What is added to the parts of the program, see ``programs``.
        kinds: The root and the structures on the way.
        any_thread: Whether other threads find the same value.
    """

    get: str
    put: str
    whole: str
    declare: str
    sections: dict[str, list[str]]
    kinds: list[str] = field(default_factory=list)
    any_thread: bool = True


def drawn(rng: random.Random, *, numbers: bool, local: bool) -> tuple[str, ...]:
    """A random root, and the kinds of the structures below it.

    Args:
        rng: Chance.
        numbers: Whether only numbers are put there.
        local: Whether the place has to belong to the module: where neither arguments nor the class are at hand.
    """
    root = rng.choice(ROOTS[:4] if local else ROOTS)
    depth = rng.choice((0, 1, 1, 2, 3, 4))
    if not depth:
        return (root,)
    only = numbers and rng.random() < 0.4
    ends = [name for name, kind in KINDS.items() if kind.put and kind.numbers <= numbers and kind.numbers >= only]
    inner = [name for name, kind in KINDS.items() if not kind.numbers]
    return (root, *(rng.choice(inner) for _ in range(depth - 1)), rng.choice(ends))


def place_at(path: Sequence[str], number: int, value: str, argument: str) -> Place:
    """A place.

    Args:
        path: One of ``ROOTS``, and the kinds of structures below it.
        number: Tells the places of a program apart.
        value: The expression of what it holds at first.
        argument: The kind of the program's second argument, one of ``ARGUMENTS``.
    """
    root, *names = path
    kinds = [KINDS[name] for name in names]
    read, assign, (section, line), declare = _root(root, number, argument)
    # A function read from an instance of its class would be bound, and from CPython 3.14 on a partial too.
    functions = ("default argument", "attribute of a function", "table of a cached function")
    is_function = bool(names) and (names[0] in functions or "partial" in names[0])
    make, expression = "%s", assign if is_function else read
    for kind in reversed(kinds):
        make = kind.make % make
    for kind in kinds[:-1]:
        expression = kind.get % expression
    last = kinds[-1] if kinds else ITSELF
    return Place(
        last.get % expression,
        last.put % (expression if kinds else assign, "%s"),
        f"{assign} = {make}",
        declare,
        {section: (line % (make % value)).splitlines()},
        [root, *names],
        all(kind.any_thread for kind in kinds),
    )


def _root(root: str, number: int, argument: str) -> tuple[str, str, tuple[str, str], str]:
    """How a root is read, how it is assigned, the section and line that make it, and its declaration."""
    name = f"s{number}"
    if root == "attribute":
        return f"self.{name}", f"self.{name}", ("init", f"self.{name} = %s"), ""
    if root == "part":
        return f"self.p{name}.v", f"self.p{name}.v", ("init", f"self.p{name} = Holder(%s)"), ""
    if root == "global":
        return f"G{number}", f"G{number}", ("globals", f"G{number} = %s"), f"global G{number}"
    if root == "enclosing":
        return f"n{number}", f"n{number}", ("enclosing", f"n{number} = %s"), f"nonlocal n{number}"
    if root == "class":
        return f"self.c{number}", f"Net.c{number}", ("class", f"c{number} = %s"), ""
    if root == "base class":
        return f"self.b{number}", f"Base.b{number}", ("base", f"b{number} = %s"), ""
    if root == "default":
        line = f"def d{number}(self, kept=[%s]):\n    return kept"
        return f"self.d{number}()[0]", f"self.d{number}()[0]", ("class", line), ""
    found = f"{ARGUMENTS[argument][1]}['{name}']"
    return found, found, ("argument", f"'{name}': %s,"), ""


def names() -> dict[str, Any]:
    """What every generated program finds among its globals."""
    own = {name: value for name, value in globals().items() if getattr(value, "__module__", "") == __name__}
    return {
        **own,
        "__name__": "generated",
        "OrderedDict": collections.OrderedDict,
        "defaultdict": collections.defaultdict,
        "deque": collections.deque,
        "ChainMap": collections.ChainMap,
        "UserDict": collections.UserDict,
        "MappingProxyType": types.MappingProxyType,
        "SimpleNamespace": types.SimpleNamespace,
        "partial": functools.partial,
        "lru_cache": functools.lru_cache,
        "pool": pool,
        "array": array.array,
        "c_double": ctypes.c_double,
        "itertools": itertools,
        "random": random,
        "np": np,
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
    }
