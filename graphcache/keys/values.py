"""When two Python values are the same, and the state of objects that show it by no container."""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import itertools
import pathlib
import queue
import random
import re
import sys
import types
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import shown

PLAIN = (
    *(bool, int, float, complex, str, bytes, slice, range),
    *(torch.Size, torch.device),
    *(datetime.date, datetime.time, datetime.timedelta),
    *(decimal.Decimal, fractions.Fraction, pathlib.PurePath, uuid.UUID),
)
"""Types that are compared by value: immutable, without references to other objects that could change."""

ATOMS = frozenset(
    {
        *PLAIN,
        *(type(None), type(Ellipsis), type(NotImplemented), property, re.Pattern),
        *(datetime.datetime, pathlib.PosixPath, pathlib.WindowsPath),
        *(torch.dtype, torch.layout, torch.memory_format),
        *(types.ModuleType, types.CodeType, types.GenericAlias, types.UnionType),
        *(types.MethodDescriptorType, types.WrapperDescriptorType),
        *(types.GetSetDescriptorType, types.MemberDescriptorType),
    }
)
"""Exact types that hold nothing to be followed."""

BUILTIN_METHODS = (types.BuiltinFunctionType, types.MethodWrapperType)
"""Functions in C; those of an object, such as ``table.get``, refer to it."""

VIEWS: tuple[type, ...] = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))
"""What shows a dictionary that it does not own."""


def same(old: Any, new: Any) -> bool:
    """Whether a place that held ``old`` and holds ``new`` is unchanged: identity, or equal plain values.

    Example:
        >>> same((1, 2.0), (1, 2.0)), same(1, True), same([], [])
        (True, False, False)
    """
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, enum.Enum):
        return False
    if isinstance(old, float):
        # The sign of zero decides a division, and no nan equals itself.
        return bool(old.hex() == new.hex())
    if isinstance(old, PLAIN):
        return bool(old == new)
    if type(old) is tuple:
        return len(old) == len(new) and all(map(same, old, new))
    if isinstance(old, types.MethodType):
        return old.__self__ is new.__self__ and old.__func__ is new.__func__
    if isinstance(old, BUILTIN_METHODS):
        return old.__self__ is new.__self__ and old.__name__ == new.__name__
    return False


class Unobservable(Exception):
    """Raised for an object whose state cannot be seen, such as an iterator of an extension module."""


def hidden_state(value: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The state of an object that shows it by no attribute, and the objects that it refers to; ``None`` if it has none.

    Only what a call may *advance* is found here. It is no part of a guard, but for caches: a call that was seen not to
    advance a generator gives the same answer wherever the generator stands.
    """
    for kinds, read in _READERS:
        if isinstance(value, kinds):
            return read(value)
    module = sys.modules.get("numpy")
    if module is not None:
        if isinstance(value, module.random.Generator):
            return repr(value.bit_generator.state), ()
        if isinstance(value, module.random.RandomState):
            state = value.get_state()
            return (state[1].tobytes(), *state[2:]), ()
    if hasattr(type(value), "__next__") and not hasattr(value, "__dict__"):
        return _read_iterator(value)
    return None


def is_generator_of_randomness(value: Any) -> bool:
    """Whether an object draws random numbers."""
    if isinstance(value, (random.Random, torch.Generator)):
        return True
    module = sys.modules.get("numpy")
    return module is not None and isinstance(value, (module.random.Generator, module.random.RandomState))


def array_state(value: Any) -> tuple[Any, ...] | None:
    """Layout, address and bytes of a NumPy array or a buffer of Python's; ``None`` for anything else."""
    if isinstance(value, (bytearray, array.array, memoryview)):
        return (memoryview(value).tobytes(),)
    module = sys.modules.get("numpy")
    if module is None or not isinstance(value, (module.ndarray, module.generic)):
        return None
    interface = value.__array_interface__
    # Objects are compared one by one, like the items of a list.
    contents = b"" if value.dtype.hasobject else value.tobytes()
    return value.shape, value.strides, value.dtype.str, interface["data"][0] if value.ndim else 0, contents


def _read_generator(value: Any) -> tuple[Any, tuple[Any, ...]]:
    frame = value.gi_frame
    if frame is None:
        return "exhausted", ()
    names = tuple(frame.f_locals)
    return (frame.f_lasti, names, tuple(map(_plain_or_id, frame.f_locals.values()))), tuple(frame.f_locals.values())


def _read_cache(value: Any) -> tuple[Any, tuple[Any, ...]]:
    info = value.cache_info()
    return (info.misses, info.currsize), (value.__wrapped__,)


def _read_file(value: Any) -> tuple[Any, tuple[Any, ...]]:
    try:
        return value.tell(), ()
    except (OSError, ValueError):
        return "closed", ()


def _read_iterator(value: Any) -> tuple[Any, tuple[Any, ...]]:
    """The position of an iterator of Python's own, by its ``__reduce__``."""
    if isinstance(value, itertools.count):
        return repr(value), ()
    with suppress(Exception):
        reduced = value.__reduce__()
        if isinstance(reduced, tuple):
            flat = [item for part in reduced[1:] for item in (part if isinstance(part, tuple) else (part,))]
            return tuple(map(_plain_or_id, flat)), tuple(flat)
    raise Unobservable(f"the position of a {type(value).__name__} cannot be read")


def _plain_or_id(value: Any) -> Any:
    return (type(value), value) if isinstance(value, (*PLAIN, type(None))) else id(value)


_READERS: tuple[tuple[Any, Callable[[Any], tuple[Any, tuple[Any, ...]]]], ...] = (
    (random.Random, lambda value: (value.getstate(), ())),
    (torch.Generator, lambda value: (value.get_state().numpy().tobytes(), ())),
    (types.GeneratorType, _read_generator),
    (functools._lru_cache_wrapper, _read_cache),
    ((queue.Queue, queue.SimpleQueue), lambda value: (value.qsize(), ())),
    (io.IOBase, _read_file),
)


def is_plain(value: Any) -> bool:
    """Whether a value is immutable and holds nothing to follow."""
    return type(value) in ATOMS


def short(value: Any) -> str:
    """A value in a message: plain ones as they are, tensors by their shape, anything else by its type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, PLAIN) or value is None:
        # A subclass's own repr may raise, and so does that of an integer of more than 4300 digits.
        text = shown(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    if isinstance(value, (collections.deque, list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
