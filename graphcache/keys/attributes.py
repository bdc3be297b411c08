"""Where objects and classes keep what they hold."""

from __future__ import annotations

import collections
import functools
import gc
import types
import weakref
from contextlib import suppress
from typing import Any

from graphcache.keys.values import BUILTIN_METHODS

_BUILT_IN = {collections.defaultdict: ("default_factory",), functools.partial: ("func", "args", "keywords")}
"""What objects of the standard library hold as in slots."""

_VIEWS: tuple[type, ...] = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))
"""What shows a dictionary that it does not own."""


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of an object, past a ``__getattribute__`` of its class; ``None`` for one without."""
    try:
        table = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return table if issubclass(type(table), dict) else None


def table_of(kind: type) -> dict[str, Any]:
    """The dictionary of a class, which shows it through a proxy."""
    (table,) = gc.get_referents(vars(kind))
    return table  # type: ignore[no-any-return]


def slots_of(kind: type) -> dict[str, Any]:
    """The ``__slots__`` of a class and its bases, with what reads them."""
    found: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        names = vars(each) if "__slots__" in vars(each) else _BUILT_IN.get(each, ())
        slots = {name: vars(each)[name] for name in names}
        found |= {name: slot for name, slot in slots.items() if isinstance(slot, types.MemberDescriptorType)}
    return found


def behind(value: Any) -> list[tuple[str, Any]] | None:
    """What is behind an object that cannot change itself, with the ends of the paths; ``None`` for other objects."""
    kind = type(value)
    if kind is tuple:
        return items_of(value)
    if kind is types.MethodType:
        return [("", value.__func__), (".__self__", value.__self__)]
    if kind in BUILTIN_METHODS:
        return [] if isinstance(value.__self__, types.ModuleType) else [(".__self__", value.__self__)]
    if kind in _VIEWS:
        return [("", gc.get_referents(value)[0])]
    if issubclass(kind, weakref.ref):
        return [("()", value())]
    if kind in weakref.ProxyTypes:
        with suppress(ReferenceError):
            # A method of the object that it stands for.
            return [("", value.__reduce_ex__.__self__)]
        return []
    return None


def items_of(value: tuple[Any, ...]) -> list[tuple[str, Any]]:
    return [(f"[{index}]", item) for index, item in enumerate(tuple.__iter__(value))]
