"""Dataclasses made of plain data that others wrote, such as JSON: every field is checked against its annotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from graphcache.errors import is_a, shown

_T = TypeVar("_T")
_SCALARS = (str, bool, type(None))


class FieldError(ValueError):
    """Data that does not fit a dataclass; the message names the field, what was seen and what was expected."""


def read_fields(kind: type[_T], tree: object, where: str = "") -> _T:
    """A dataclass from a mapping that has exactly its fields; ``FieldError`` for the first that is missing or wrong.

    Annotations may be text, truth values, whole numbers (sizes and indices, so none is negative), ``None``, literals,
    other dataclasses, any other class, and lists, tuples, dictionaries and unions of these. A list stands for a tuple.
    ``where`` is what messages put before the names of fields.
    """
    if not is_a(tree, Mapping):
        raise FieldError(f"{where or 'it'} is {shown(tree)}; expected an object")
    assert isinstance(tree, Mapping)
    hints = get_type_hints(kind)
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    dot = f"{where}." if where else ""
    for name in tree:
        if name not in names:
            raise FieldError(f"{dot}{shown(name)} is no field; expected {', '.join(names)}")
    for name in names:
        if name not in tree:
            raise FieldError(f"{dot}{name} is missing")
    return kind(**{name: _read(hints[name], tree[name], f"{dot}{name}") for name in names})


def _read(hint: Any, value: Any, where: str) -> Any:
    """The value, with dataclasses and tuples made of what stands for them."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal and any(type(value) is type(each) and value == each for each in inner):
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in inner:
            return None
        others = [each for each in inner if each is not type(None)]
        if len(others) == 1:
            return _read(others[0], value, where)
    elif origin is list and type(value) in (list, tuple):
        return [_read(inner[0], each, f"{where}[{index}]") for index, each in enumerate(value)]
    elif origin is tuple and type(value) in (list, tuple) and len(value) == len(inner):
        return tuple(_read(each, value[index], f"{where}[{index}]") for index, each in enumerate(inner))
    elif origin is dict and type(value) is dict and all(type(key) is str for key in value):
        return {key: _read(inner[1], each, f"{where}[{shown(key)}]") for key, each in value.items()}
    elif isinstance(hint, type) and is_dataclass(hint):
        return read_fields(hint, value, where)
    elif hint is int:
        if type(value) is int and 0 <= value < 2**63:
            return value
    elif type(value) is hint if hint in _SCALARS else origin is None and is_a(value, hint):
        return value
    wanted = str(hint).replace("typing.", "") if origin else hint.__name__
    raise FieldError(f"{where} is {shown(value)}; expected {wanted}")
