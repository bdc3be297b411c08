"""Whether two twins are in the same state: a walk over both at once, through everything that can be reached."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import functools
import itertools
import random
import threading
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tests.helpers import bits

ATOMS = frozenset({int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, range})
SKIPPED = (types.ModuleType, RemovableHandle, types.CodeType, property)


def difference(left: Any, right: Any) -> str:
    """The path of the first difference, and what it is; empty if there is none."""
    walk = _Walk()
    walk.todo.append((left, right, ""))
    while walk.todo and not walk.found:
        walk.look(*walk.todo.pop())
    return walk.found


class _Walk:
    def __init__(self) -> None:
        self.todo: list[tuple[Any, Any, str]] = []
        self.found = ""
        # Objects that stand for one another, in both directions: what is shared on one side is shared on the other.
        self._left: dict[int, int] = {}
        self._right: dict[int, int] = {}
        # Whatever was made on the way has to live, or its id returns.
        self._alive: list[Any] = []

    def look(self, left: Any, right: Any, path: str) -> None:
        kind = type(left)
        if kind in ATOMS:
            if kind is not type(right) or (left != right and repr(left) != repr(right)):
                self.found = f"{path}: {left!r} instead of {right!r}"
            return
        if isinstance(left, SKIPPED) and getattr(left, "__name__", "") != "made":
            return
        if kind.__qualname__ != type(right).__qualname__:
            self.found = f"{path}: {kind.__qualname__} instead of {type(right).__qualname__}"
            return
        if self._seen(left, right, path, id(left), id(right)):
            return
        compare = next((_COMPARE[base] for base in kind.__mro__ if base in _COMPARE), None)
        if compare is not None:
            compare(self, left, right, path)
        if not isinstance(left, type):
            self._attributes(left, right, path)

    def _seen(self, left: Any, right: Any, path: str, a: int, b: int) -> bool:
        """Whether the pair was met before; a difference if only one of them was, or with another."""
        if self._left.get(a, b) != b or self._right.get(b, a) != a:
            self.found = f"{path}: shared with something else"
        if a in self._left:
            return True
        self._left[a], self._right[b] = b, a
        self._alive += (left, right)
        return False

    def _attributes(self, left: Any, right: Any, path: str) -> None:
        """``__dict__`` and ``__slots__``."""
        own = getattr(left, "__dict__", None)
        if type(own) is dict and (own or right.__dict__):
            self.mapping(own, right.__dict__, path + ".")
        for base in type(left).__mro__:
            names = base.__dict__.get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if name not in ("__dict__", "__weakref__"):
                    self.todo.append((getattr(left, name, None), getattr(right, name, None), f"{path}.{name}"))

    def mapping(self, left: Any, right: Any, path: str) -> None:
        """Keys in order, and values."""
        if path.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called")):
            # Keys are numbers that the process counts.
            self.sequence(list(left.values()), list(right.values()), path)
            return
        if list(left) != list(right):
            self.found = f"{path}: keys {_short(list(left))} instead of {_short(list(right))}"
            return
        for key, value in left.items():
            if value is not (other := right[key]) or type(value) not in ATOMS:
                self.todo.append((value, other, f"{path}{key!s}"))

    def sequence(self, left: Any, right: Any, path: str) -> None:
        """Length and items."""
        if len(left) != len(right):
            self.found = f"{path}: {len(left)} items instead of {len(right)}"
            return
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            if a is not b or type(a) not in ATOMS:
                self.todo.append((a, b, f"{path}[{index}]"))

    def several(self, path: str, left: tuple[Any, ...], right: tuple[Any, ...]) -> None:
        """Things that belong to one object."""
        self.todo.append((left, right, path))

    def tensor(self, left: Tensor, right: Tensor, path: str) -> None:
        """Layout, bits, storage, gradient."""
        for name in ("shape", "dtype", "requires_grad"):
            if getattr(left, name) != getattr(right, name):
                self.found = f"{path}: {name} {getattr(left, name)} instead of {getattr(right, name)}"
                return
        if left.is_inference() != right.is_inference() or left.stride() != right.stride():
            self.found = f"{path}: another kind of tensor or other strides"
        elif not torch.equal(bits(left), bits(right)):
            self.found = f"{path}: {left.tolist()} instead of {right.tolist()}"
        else:
            a, b = (tensor.untyped_storage()._cdata for tensor in (left, right))
            self._seen(left, right, path + " (storage)", a, b)
            if left.is_leaf and not left.is_inference() and (left.grad is not None or right.grad is not None):
                self.todo.append((left.grad, right.grad, path + ".grad"))


def _short(keys: list[Any]) -> str:
    text = repr(keys)
    return text if len(text) < 200 else text[:200] + "..."


def _set(walk: _Walk, left: Any, right: Any, path: str) -> None:
    walk.sequence(sorted(left, key=_rank), sorted(right, key=_rank), path)


def _rank(value: Any) -> tuple[str, str]:
    return type(value).__qualname__, repr(value) if type(value) in ATOMS else ""


def _function(walk: _Walk, left: Any, right: Any, path: str) -> None:
    if left.__code__.co_code != right.__code__.co_code:
        walk.found = f"{path}: another function"
    cells = [[cell.cell_contents for cell in f.__closure__ or () if _is_full(cell)] for f in (left, right)]
    walk.several(
        path + "()", *[(*c, f.__defaults__, f.__kwdefaults__) for c, f in zip(cells, (left, right), strict=True)]
    )


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _class(walk: _Walk, left: Any, right: Any, path: str) -> None:
    if left is right or left.__module__ not in ("generated", "tests.capture.places"):
        return
    one, other = (
        {name: value for name, value in vars(each).items() if not isinstance(value, _DESCRIPTORS)}
        for each in (left, right)
    )
    walk.mapping(one, other, path + ".")
    walk.several(path + ".__bases__", (type(left), *left.__bases__), (type(right), *right.__bases__))


_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType, property, staticmethod, classmethod)


def _default(walk: _Walk, left: Any, right: Any, path: str) -> None:
    walk.mapping(left, right, path)
    walk.several(path + ".default_factory", (left.default_factory,), (right.default_factory,))


def _generator(walk: _Walk, left: Any, right: Any, path: str) -> None:
    frames = [g.gi_frame.f_locals if g.gi_frame else {} for g in (left, right)]
    walk.mapping({**frames[0]}, {**frames[1]}, path + ".")


def _state(get: Any) -> Any:
    """Compare what describes an object completely."""

    def compare(walk: _Walk, left: Any, right: Any, path: str) -> None:
        walk.several(path, get(left), get(right))

    return compare


_COMPARE: dict[type, Any] = {
    Tensor: _Walk.tensor,
    dict: _Walk.mapping,
    list: _Walk.sequence,
    tuple: _Walk.sequence,
    collections.deque: _Walk.sequence,
    set: _set,
    frozenset: _set,
    types.FunctionType: _function,
    type: _class,
    types.MethodType: _state(lambda m: (m.__self__, m.__func__)),
    types.MappingProxyType: _state(lambda m: (dict(m),)),
    types.GeneratorType: _generator,
    collections.defaultdict: _default,
    ctypes.c_double: _state(lambda c: (c.value,)),
    functools.partial: _state(lambda p: (p.func, p.args, p.keywords)),
    functools._lru_cache_wrapper: _state(lambda f: (f.__wrapped__, f.cache_info().misses, f.cache_info().currsize)),
    contextvars.ContextVar: _state(lambda v: (v.get(None),)),
    type({}.values()): _state(lambda v: (list(v),)),
    weakref.ref: _state(lambda r: (r(),)),
    type({}.get): _state(lambda m: (getattr(m, "__self__", None),)),
    threading.local: _state(lambda v: (v.__dict__,)),
    memoryview: _state(lambda m: (m.tobytes(),)),
    bytearray: _state(lambda b: (bytes(b),)),
    array.array: _state(lambda a: (a.tobytes(),)),
    np.ndarray: _state(lambda a: (str(a.dtype), a.shape, a.tolist() if a.dtype.hasobject else a.tobytes())),
    np.random.Generator: _state(lambda g: (repr(g.bit_generator.state),)),
    np.random.RandomState: _state(lambda g: (repr(g.get_state()),)),
    random.Random: _state(lambda r: (str(r.getstate()),)),
    torch.Generator: _state(lambda g: (g.get_state(),)),
    itertools.count: _state(lambda c: (repr(c),)),
    type(iter(range(0))): _state(lambda i: (i.__length_hint__(),)),
    type(iter([])): _state(lambda i: (i.__length_hint__(),)),
    type(reversed(range(0))): _state(lambda i: (i.__length_hint__(),)),
}
