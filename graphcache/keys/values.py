"""When two Python values are the same, and the state of objects that show it by no container."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import pathlib
import random
import re
import sys
import types
import uuid
import weakref
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import shown

MISSING: Any = object()
"""Stands for an attribute, a global or a cell without a value."""

_BY_TEXT = (
    *(bool, int, float, complex, str, bytes, range, torch.Size, torch.device),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.datetime),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID),
    *(pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath),
)
"""Immutable types of which the text tells more apart than ``==``: the sign of a zero, digits, the time zone."""

SHOWN = (*_BY_TEXT, slice, types.NoneType)

ATOMS = {
    *SHOWN,
    *(object, type(Ellipsis), type(NotImplemented), property, re.Pattern),
    *(torch.dtype, torch.layout, torch.memory_format),
    *(types.CodeType, types.GenericAlias, types.UnionType),
    *(types.MethodDescriptorType, types.WrapperDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
}
"""Exact types that hold nothing to be followed."""

BUILTIN_METHODS = (types.BuiltinFunctionType, types.MethodWrapperType)
"""Functions in C; those of an object, such as ``table.get``, refer to it."""


_HEAP_TYPE = 1 << 9
"""``Py_TPFLAGS_HEAPTYPE``, which classes of Python code have."""


class Unobservable(Exception):
    """Raised for an object whose state cannot be seen, such as an iterator of an extension module."""


class Held:
    """An object among the arguments of calls, equal to itself only; not kept alive."""

    __slots__ = ("kind", "ref")

    def __init__(self, value: Any) -> None:
        # One object has one such reference, and no later object gets the same.
        self.ref = weakref.ref(value)
        self.kind = type(value)

    def __eq__(self, other: object) -> bool:
        return type(other) is Held and self.ref is other.ref

    def __hash__(self) -> int:
        return id(self.ref)

    def __repr__(self) -> str:
        return f"an object of type {self.kind.__qualname__}"


def is_holdable(value: Any) -> bool:
    """Whether an object is one of a class written in Python, such as a KV cache."""
    kind = type(value)
    is_python = all(each.__flags__ & _HEAP_TYPE for each in kind.__mro__[:-1])
    is_python = is_python and any("__weakref__" in vars(each) for each in kind.__mro__)
    return is_python and not issubclass(kind, (Tensor, torch.nn.Module))


def is_plain(value: Any) -> bool:
    """Whether a value is immutable and holds nothing to follow."""
    return type(value) in ATOMS


def text_of(value: Any) -> str:
    """What tells plain values of a type apart; it raises what ``repr`` raises, which refuses no long integer here."""
    return hex(value) if type(value) is int else repr(value)


def same(old: Any, new: Any) -> bool:
    """Whether a place that held ``old`` and holds ``new`` is unchanged: identity, or equal plain values."""
    if old is new:
        return True
    kind = type(old)
    if kind is not type(new):
        return False
    if kind in _BY_TEXT:
        return text_of(old) == text_of(new)
    if kind is slice:
        return same((old.start, old.stop, old.step), (new.start, new.stop, new.step))
    if kind is tuple:
        return len(old) == len(new) and all(map(same, old, new))
    if kind is types.MethodType:
        return old.__self__ is new.__self__ and old.__func__ is new.__func__
    if kind in BUILTIN_METHODS:
        return old.__self__ is new.__self__ and bool(old.__name__ == new.__name__)
    return False


def told_apart(name: Any) -> Any:
    """Tells keys apart without an ``__eq__`` of theirs."""
    return name if type(name) in (str, int) else (id(name),)


def is_rebuilt(old: Any, new: Any) -> bool:
    """Whether a container that pytree took apart and put together again is what it was, with its attributes."""
    if same(old, new):
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, dict):
        items = list(dict.keys(old)) == list(dict.keys(new))
        items = items and all(map(is_rebuilt, dict.values(old), dict.values(new)))
    elif isinstance(old, (list, tuple, collections.deque)):
        items = len(old) == len(new) and all(map(is_rebuilt, old, new))
    else:
        items = bool(held_by(old))
    before, now = held_by(old), held_by(new)
    return items and before.keys() == now.keys() and all(is_rebuilt(before[name], now[name]) for name in before)


def held_by(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in ``__slots__`` too."""
    names = [name for each in type(value).__mro__ for name in vars(each).get("__slots__", ())]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in names if hasattr(value, name)}}


def short(value: Any) -> str:
    """A value in a message: plain ones as they are, tensors by their shape, anything else by its type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, SHOWN):
        # A subclass's own repr may raise, and so does that of an integer of more than 4300 digits.
        text = shown(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, (collections.deque, list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def draws_randomness(value: Any) -> bool:
    """Whether an object draws random numbers."""
    # Asked of the type: isinstance() may call the object's own __getattribute__.
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    if (module := sys.modules.get("numpy")) is not None:
        kinds += (module.random.Generator, module.random.RandomState, module.random.BitGenerator)
    return issubclass(type(value), kinds)
