"""What is remembered of objects of further kinds: arrays, variables, generators, caches, TorchScript, arguments."""

from __future__ import annotations

import contextvars
import copyreg
import functools
import gc
import io
import itertools
import queue
import random
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from operator import eq
from typing import Any

import torch
from torch import Tensor
from torch._C import TensorBase
from torch.nn import Parameter

from graphcache.keys.state_nodes import Change, ObjectNode, State, StateNode, pairs, present
from graphcache.keys.values import MISSING, SHOWN, Unobservable, draws_randomness, is_plain, same

_MEMORY_FILES = (io.BytesIO, io.StringIO)
"""Files in memory."""
_GUARDED = (functools._lru_cache_wrapper, BaseException, contextvars.Context, *_MEMORY_FILES)
_FRAMES = {
    types.GeneratorType: ("gi_frame", "gi_yieldfrom"),
    types.CoroutineType: ("cr_frame", "cr_await"),
    types.AsyncGeneratorType: ("ag_frame", "ag_await"),
}
"""Where the variables of a generator are, and what it waits for."""
_CODE = (types.FrameType, types.CodeType)
_EMPTY = (copyreg._reconstructor, copyreg.__newobj__)  # type: ignore[attr-defined]

Hidden = tuple[Any, tuple[Any, ...]]
"""What shows the state of an object, and the objects that it refers to."""


class ArrayNode(StateNode):
    """A NumPy array or a buffer of Python's, with its contents."""

    is_alike = staticmethod(eq)
    whole = "has other contents or another layout"

    def read(self) -> State:
        state = array_state(self.target) or ()
        return range(len(state)), state


class VariableNode(StateNode):
    """A context variable: its value in the context of now."""

    def read(self) -> State:
        try:
            return (".get()",), (self.target.get(),)
        except LookupError:
            return (".get()",), (MISSING,)

    def end(self, name: Any) -> str:
        return str(name)

    def guard(self, native: Any) -> None:
        native.add_variable(self.target, *present(*self.state[1]))


class ShownNode(StateNode):
    """What a function, ``places``, shows of an object now: the ends of paths, and the values there."""

    is_alike = staticmethod(same)

    def read(self) -> State:
        return pairs(self.places(self.target))

    def end(self, name: Any) -> str:
        return str(name)


class GradientNode(ShownNode):
    """Whether tensors, by their paths, want gradients, or the gradients they have, for code that asks."""

    def __init__(self, tensors: dict[str, Tensor], name: str) -> None:
        super().__init__(None, "", tensors, partial(_about_gradients, name=name))

    def guard(self, native: Any) -> None:
        for path, value in zip(*self.state, strict=True):
            place, _, name = path.rpartition(".")
            tensor = self.target[place]
            # Others may have Python code behind it.
            if type(tensor) not in (Tensor, Parameter):
                raise TypeError
            native.add_property(tensor, vars(TensorBase)[name], value)


class HeldNode(ObjectNode):
    """An object that is not kept alive."""

    __slots__ = ("_ref",)

    @property
    def target(self) -> Any:
        return self._ref()

    @target.setter
    def target(self, value: Any) -> None:
        self._ref = weakref.ref(value)

    def guard(self, native: Any) -> None:
        raise TypeError


class HiddenNode(StateNode):
    """An object that shows its state by no attribute, such as a generator."""

    is_alike = staticmethod(eq)
    whole = "it moved on"

    @property
    def guarded(self) -> bool:
        # A call that did not advance a generator gives the same answer wherever that stands. But one that used a cached
        # function has to fill a cache that was cleared, which a graph does not.
        return issubclass(type(self.target), _GUARDED)

    def read(self) -> State:
        # With the objects that it refers to, so that no id in the state is used twice.
        return ("", "refers to"), hidden_state(self.target) or (None, ())

    def renew(self) -> bool:
        before, self.state = self.state, self.read()
        known = {id(each) for each in _reached(before[1][1])}
        return all(id(each) in known for each in _reached(self.state[1][1]))

    def guard(self, native: Any) -> None:
        if not issubclass(type(self.target), functools._lru_cache_wrapper):
            raise TypeError
        # A result is put into a dictionary of its own, and looked up without writing.
        (table,) = _tables_of(self.target)
        native.add_unwritten(table)
        if self.differs():
            raise ValueError

    def changes(self, now: State) -> list[Change]:
        return [change._replace(is_random=draws_randomness(self.target)) for change in super().changes(now)]


def _reached(values: Iterable[Any]) -> Iterator[Any]:
    """What may hold state among some values; what is left to an iterator of a dictionary is in a new list each time."""
    for value in values:
        if type(value) in (list, tuple):
            yield from _reached(value)
        elif not is_plain(value):
            yield value


def _about_gradients(tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    # Only leaves have a gradient.
    asked = {path: tensor for path, tensor in tensors.items() if name != "grad" or tensor.is_leaf}
    return {f"{path}.{name}": getattr(tensor, name) for path, tensor in asked.items()}


def array_state(value: Any) -> tuple[Any, ...] | None:
    """Layout, address and bytes of a NumPy array or another buffer that can be written; ``None`` for anything else."""
    module = sys.modules.get("numpy")
    if module is None or not issubclass(type(value), (module.ndarray, module.generic)):
        try:
            view = memoryview(value)
        except (TypeError, ValueError, BufferError):
            return None
        return (view.tobytes(),) if type(value) is memoryview or not view.readonly else None
    interface = value.__array_interface__
    # Objects are compared one by one, like the items of a list.
    contents = b"" if value.dtype.hasobject else value.tobytes()
    return value.shape, value.strides, value.dtype.str, interface["data"][0] if value.ndim else 0, contents


def script_state(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """Every parameter, buffer and attribute of a TorchScript module, which C++ holds; copies of containers by item."""
    held: Any = module._c
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(held._type())
    # A parameter that may be None is an attribute without a value.
    values = {name: held.getattr(name) if held.hasattr(name) else None for name in sorted(kind.get_attributes())}
    return dict(item for name, value in values.items() for item in _flat(f".{name}", value))


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple, dict)):
        yield f"{path} (length)", len(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{path}[{key!r}]", item)
    elif isinstance(value, torch._C.ScriptObject):
        # Another object each time it is asked for. What a custom class holds is shown by nothing.
        yield path, str(value._type())
    else:
        yield path, value


def hidden_state(value: Any) -> Hidden | None:
    """The state that a call may advance of an object that shows it by no attribute; ``None`` if it has none."""
    kind = type(value)
    if draws_randomness(value):
        return _random_state(value), ()
    if kind in _FRAMES:
        return _generator_state(value)
    if issubclass(kind, functools._lru_cache_wrapper):
        return _cache_state(value)
    if issubclass(kind, BaseException):
        return tuple(map(_shown_or_id, value.args)), value.args
    if kind is contextvars.Context:
        return tuple(map(id, chain.from_iterable(value.items()))), tuple(value.values())
    if issubclass(kind, (queue.Queue, queue.SimpleQueue)):
        return value.qsize(), ()
    if issubclass(kind, io.IOBase):
        try:
            return (value.tell(), value.getvalue() if issubclass(kind, _MEMORY_FILES) else None), ()
        except (OSError, ValueError) as error:
            # While somebody iterates over a file it does not tell its position: taken for another one each time.
            return object() if "next()" in str(error) else "closed", ()
    if isinstance(getattr(kind, "__next__", None), types.WrapperDescriptorType):
        return _iterator_state(value)
    return None


def _random_state(value: Any) -> Any:
    if isinstance(value, random.SystemRandom):
        raise Unobservable("a random.SystemRandom has no state that could be read")
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, sys.modules["numpy"].random.RandomState):
        state = value.get_state()
        return state[1].tobytes(), *state[2:]
    return repr(getattr(value, "bit_generator", value).state)


def _generator_state(value: Any) -> Hidden:
    frame, inner = (getattr(value, name) for name in _FRAMES[type(value)])
    if frame is None:
        return "exhausted", ()
    shown = frame.f_locals
    # Its evaluation stack too, where a loop keeps its iterator, and its function, whose variables it may read.
    held = [each for each in gc.get_referents(value) if type(each) not in _CODE and each is not shown]
    return (frame.f_lasti, id(inner), *map(_shown_or_id, held)), (*held, inner)


def _cache_state(value: Any) -> Hidden:
    info = value.cache_info()
    # Results are in the table of the cache, or in links that the collector passes over.
    found = [each for each in gc.get_referents(value) if type(each) is not dict]
    found += chain.from_iterable(table.values() for table in _tables_of(value))
    # A hit changes the order of the entries, and nothing else.
    found.sort(key=id)
    return (info.misses, info.currsize, *map(id, found)), tuple(found)


def _tables_of(value: Any) -> list[dict[Any, Any]]:
    """The dictionary in which a cached function keeps its results."""
    return [each for each in gc.get_referents(value) if type(each) is dict and each is not value.__dict__]


def _iterator_state(value: Any) -> Hidden:
    """The position of an iterator of Python's own, by its ``__reduce__``."""
    if isinstance(value, itertools.count):
        return repr(value), ()
    with suppress(Exception):
        reduced = value.__reduce__()
        # What object.__reduce__ gives shows nothing that an extension module holds.
        if isinstance(reduced, tuple) and reduced[0] not in _EMPTY:
            flat = [item for part in reduced[1:] for item in (part if isinstance(part, tuple) else (part,))]
            return tuple(map(_shown_or_id, flat)), tuple(flat)
    raise Unobservable(f"the position of a {type(value).__name__} cannot be read")


def _shown_or_id(value: Any) -> Any:
    return (type(value), value) if isinstance(value, SHOWN) else id(value)
