"""When two Python values are the same, and the state of objects that show it by no container."""

from __future__ import annotations

import collections
import copyreg
import datetime
import decimal
import fractions
import functools
import gc
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

MISSING: Any = object()
"""Stands for an attribute, a global or a cell without a value."""

PLAIN = (
    *(bool, int, float, complex, str, bytes, slice, range),
    *(torch.Size, torch.device),
    *(datetime.date, datetime.time, datetime.timedelta),
    *(decimal.Decimal, fractions.Fraction, pathlib.PurePath, uuid.UUID),
)
"""Types that are compared by value: immutable, without references to other objects that could change."""

_EQUAL = frozenset({bool, int, str, bytes, torch.Size, torch.device})
_SHOWN = frozenset(
    {complex, decimal.Decimal, fractions.Fraction, uuid.UUID}
    | {datetime.date, datetime.time, datetime.timedelta, datetime.datetime}
    | {pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath}
)
"""Types whose equal values may differ, in the sign of a zero, in digits or in the time zone. Their text shows that."""

ATOMS = frozenset(
    {
        *PLAIN,
        *(type(None), type(Ellipsis), type(NotImplemented), property, re.Pattern),
        *(datetime.datetime, pathlib.PosixPath, pathlib.WindowsPath),
        *(torch.dtype, torch.layout, torch.memory_format),
        *(types.CodeType, types.GenericAlias, types.UnionType),
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
    kind = type(old)
    if kind is not type(new):
        return False
    if kind in _EQUAL:
        return bool(old == new)
    if kind is float:
        # The sign of zero decides a division, and no nan equals itself.
        return bool(old.hex() == new.hex())
    if kind in _SHOWN:
        return repr(old) == repr(new)
    if kind is tuple:
        return len(old) == len(new) and all(map(same, old, new))
    if kind in (slice, range):
        return all(same(getattr(old, name), getattr(new, name)) for name in ("start", "stop", "step"))
    if kind is types.MethodType:
        return old.__self__ is new.__self__ and old.__func__ is new.__func__
    if kind in BUILTIN_METHODS:
        return old.__self__ is new.__self__ and bool(old.__name__ == new.__name__)
    return False


MEMORY_FILES = (io.BytesIO, io.StringIO)
"""Files whose contents are in the process."""

_EMPTY = (copyreg._reconstructor, copyreg.__newobj__)  # type: ignore[attr-defined]


def is_rebuilt(old: Any, new: Any) -> bool:
    """Whether a container that pytree took apart and put together again is what it was, with its attributes."""
    if same(old, new):
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, dict):
        items = list(dict.keys(old)) == list(dict.keys(new)) and all(
            is_rebuilt(dict.__getitem__(old, key), dict.__getitem__(new, key)) for key in dict.keys(old)
        )
    elif isinstance(old, (list, tuple, collections.deque)):
        items = len(old) == len(new) and all(map(is_rebuilt, old, new))
    else:
        items = hasattr(old, "__dict__")
    before, now = getattr(old, "__dict__", {}), getattr(new, "__dict__", {})
    return items and before.keys() == now.keys() and all(is_rebuilt(before[name], now[name]) for name in before)


def difference(old: Any, new: Any) -> str:
    """What became of a place, in words; empty if it is the same."""
    if old is MISSING or new is MISSING:
        return "" if old is new else "was removed" if new is MISSING else f"is new: {short(new)}"
    return "" if same(old, new) else f"{short(old)} became {short(new)}"


class Unobservable(Exception):
    """Raised for an object whose state cannot be seen, such as an iterator of an extension module."""


def hidden_state(value: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The state of an object that shows it by no attribute, and the objects that it refers to; ``None`` if it has none.

    Only what a call may *advance* is found here. It is no part of a guard, but for caches: a call that was seen not to
    advance a generator gives the same answer wherever the generator stands.
    """
    for kinds, read in _READERS:
        if issubclass(type(value), kinds):
            return read(value)
    module = sys.modules.get("numpy")
    if module is not None:
        if isinstance(value, module.random.Generator):
            return repr(value.bit_generator.state), ()
        if isinstance(value, module.random.BitGenerator):
            return repr(value.state), ()
        if isinstance(value, module.random.RandomState):
            state = value.get_state()
            return (state[1].tobytes(), *state[2:]), ()
    if isinstance(getattr(type(value), "__next__", None), types.WrapperDescriptorType):
        return _read_iterator(value)
    return None


def is_generator_of_randomness(value: Any) -> bool:
    """Whether an object draws random numbers."""
    if isinstance(value, (random.Random, torch.Generator)):
        return True
    module = sys.modules.get("numpy")
    return module is not None and isinstance(
        value, (module.random.Generator, module.random.RandomState, module.random.BitGenerator)
    )


def array_state(value: Any) -> tuple[Any, ...] | None:
    """Layout, address and bytes of a NumPy array or another buffer that can be written; ``None`` for anything else."""
    module = sys.modules.get("numpy")
    if module is None or not isinstance(value, (module.ndarray, module.generic)):
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
    """Every parameter, buffer and attribute of a TorchScript module, which C++ holds, without its submodules.

    TorchScript hands out copies of its containers. Their items are listed in their place, with the length of each.
    """
    held: Any = module._c
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(held._type())
    found: dict[str, Any] = {}
    for name in sorted(kind.get_attributes()):
        # A parameter that may be None is an attribute without a value.
        _flatten(f".{name}", held.getattr(name) if held.hasattr(name) else None, found)
    return found


def _flatten(path: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, (list, tuple, dict)):
        found[f"{path} (length)"] = len(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _flatten(f"{path}[{key!r}]", item, found)
    elif isinstance(value, torch._C.ScriptObject):
        # Another object each time it is asked for. What a custom class holds is shown by nothing.
        found[path] = str(value._type())
    else:
        found[path] = value


_FRAMES = {
    types.GeneratorType: ("gi_frame", "gi_yieldfrom"),
    types.CoroutineType: ("cr_frame", "cr_await"),
    types.AsyncGeneratorType: ("ag_frame", "ag_await"),
}
"""Where the variables of a generator are, and what it waits for."""


def _read_generator(value: Any) -> tuple[Any, tuple[Any, ...]]:
    frame, inner = (getattr(value, name) for name in _FRAMES[type(value)])
    if frame is None:
        return "exhausted", ()
    values = frame.f_locals.values()
    state = (frame.f_lasti, tuple(frame.f_locals), tuple(map(_plain_or_id, values)), id(inner))
    return state, (*values, inner)


def _read_cache(value: Any) -> tuple[Any, tuple[Any, ...]]:
    info, found = value.cache_info(), list[Any]()
    # Results are in the table of the cache, or in links that the collector passes over.
    for each in gc.get_referents(value):
        found += [each] if type(each) is not dict else [] if each is value.__dict__ else each.values()
    # A hit changes the order of the entries, and nothing else.
    found.sort(key=id)
    return (info.misses, info.currsize, *map(id, found)), tuple(found)


def _read_file(value: Any) -> tuple[Any, tuple[Any, ...]]:
    try:
        held = value.getvalue() if isinstance(value, MEMORY_FILES) else None
        return (value.tell(), held), ()
    except (OSError, ValueError):
        return "closed", ()


def _read_iterator(value: Any) -> tuple[Any, tuple[Any, ...]]:
    """The position of an iterator of Python's own, by its ``__reduce__``."""
    if isinstance(value, itertools.count):
        return repr(value), ()
    with suppress(Exception):
        reduced = value.__reduce__()
        # What object.__reduce__ gives shows nothing that an extension module holds.
        if isinstance(reduced, tuple) and reduced[0] not in _EMPTY:
            flat = [item for part in reduced[1:] for item in (part if isinstance(part, tuple) else (part,))]
            return tuple(map(_plain_or_id, flat)), tuple(flat)
    raise Unobservable(f"the position of a {type(value).__name__} cannot be read")


def _plain_or_id(value: Any) -> Any:
    return (type(value), value) if isinstance(value, (*PLAIN, type(None))) else id(value)


_READERS: tuple[tuple[Any, Callable[[Any], tuple[Any, tuple[Any, ...]]]], ...] = (
    (random.Random, lambda value: (value.getstate(), ())),
    (torch.Generator, lambda value: (value.get_state().numpy().tobytes(), ())),
    (tuple(_FRAMES), _read_generator),
    (functools._lru_cache_wrapper, _read_cache),
    ((queue.Queue, queue.SimpleQueue), lambda value: (value.qsize(), ())),
    (io.IOBase, _read_file),
)


def text_of(value: Any) -> str:
    """What tells plain values of a type apart; it raises what ``repr`` raises, which refuses no long integer here."""
    return hex(value) if type(value) is int else repr(value)


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
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, (collections.deque, list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
