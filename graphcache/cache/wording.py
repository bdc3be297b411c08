"""A signature in words, and in what two of them differ: for whoever reads why a call found no graph.

A signature is a flat tuple (:mod:`graphcache.keys.call_key`), made to be compared in a hurry. Here it is taken apart
again, with the names of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import EnumType
from inspect import Parameter
from inspect import Signature as Function
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphcache.cache.tree import contiguous
from graphcache.errors import shown

_ABSENT = "absent"
_STATE = 3


@dataclass(frozen=True, slots=True)
class TensorWords:
    """What a signature says of one tensor: sizes in elements, strides in elements.

    Example:
        >>> print(TensorWords(torch.float32, (8, 64), (64, 1), torch.device("cpu")))
        float32[8, 64]
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    pending: tuple[bool, bool] = (False, False)

    @property
    def layout(self) -> str:
        """How the elements lie."""
        return "contiguous" if self.stride == contiguous(self.shape) else str(self.stride)

    def __str__(self) -> str:
        device = "" if self.device.type == "cpu" else f" on {self.device}"
        layout = "" if self.layout == "contiguous" else f" with strides {self.stride}"
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]{device}{layout}"


@dataclass
class Words:
    """A signature taken apart.

    Args:
        values: Path of each argument, such as ``x`` or ``batch['ids'][0]``, and the tensor or constant there.
        structure: Path of each container, and what it is.
        modes: The modes of the call, by name.
        rest: What else tells calls apart, in words.
    """

    values: dict[str, TensorWords | str] = field(default_factory=dict)
    structure: dict[str, str] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    rest: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{path}: {value}" for path, value in self.values.items()) or "no arguments"


def words_of(signature: Sequence[Hashable], names: Function | Sequence[str] = ()) -> Words:
    """Take a signature apart.

    Args:
        signature: As :func:`~graphcache.keys.call_key.describe` makes it; an engine may have added the values that it
            reads on the host.
        names: The signature of the function that is called, or the names of its positional arguments.

    Returns:
        What it says; in its ``rest`` whatever could not be read.

    Example:
        >>> from graphcache.keys.call_key import describe
        >>> signature, _ = describe((torch.zeros(2, 3), 0.5), {"flip": True})
        >>> print(words_of(signature, ["x", "scale"]))
        x: float32[2, 3], scale: 0.5, flip: True
    """
    words = Words()
    try:
        _Reader(signature, positional(names), words).read()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        # Whoever extends signatures extends this too; until then the reader sees what there is.
        words.rest = shown(signature)
    return words


def differences(old: Words, new: Words) -> list[str]:
    """What differs between two calls, one line each, from the first to the second.

    Example:
        >>> from graphcache.keys.call_key import describe
        >>> old, new = (words_of(describe((torch.zeros(1, n),), {})[0], ["input_ids"]) for n in (77, 78))
        >>> differences(old, new)
        ['`input_ids` dim 1: 77 → 78']
    """
    found: list[str] = []
    for path in {**old.structure, **new.structure}:
        before, after = old.structure.get(path, _ABSENT), new.structure.get(path, _ABSENT)
        if before != after:
            found.append(f"`{path}`: {before} → {after}")
    for path in {**old.values, **new.values}:
        found += _between(path, old.values.get(path, _ABSENT), new.values.get(path, _ABSENT))
    for name in {**old.modes, **new.modes}:
        if old.modes.get(name) != new.modes.get(name):
            found.append(f"{name}: {old.modes.get(name, 'off')} → {new.modes.get(name, 'off')}")
    if old.rest != new.rest:
        found.append(f"{old.rest or 'nothing else'} → {new.rest or 'nothing else'}")
    return found


def distance(old: Words, new: Words) -> tuple[int, float]:
    """How far two calls lie apart: in how many things they differ, then by how much their sizes do."""
    apart = 0.0
    for path, before in old.values.items():
        after = new.values.get(path)
        if isinstance(before, TensorWords) and isinstance(after, TensorWords) and len(before.shape) == len(after.shape):
            apart += sum(abs(math.log((a + 1) / (b + 1))) for a, b in zip(before.shape, after.shape, strict=True))
    return len(differences(old, new)), apart


def _between(path: str, old: TensorWords | str, new: TensorWords | str) -> list[str]:
    if old == new:
        return []
    if not isinstance(old, TensorWords) or not isinstance(new, TensorWords):
        return [f"`{path}`: {old} → {new}"]
    found = []
    if len(old.shape) != len(new.shape):
        found.append(f"`{path}` shape: {list(old.shape)} → {list(new.shape)}")
    else:
        pairs = zip(old.shape, new.shape, strict=True)
        found += [f"`{path}` dim {axis}: {a} → {b}" for axis, (a, b) in enumerate(pairs) if a != b]
    if old.dtype != new.dtype:
        found.append(f"`{path}` dtype: {old.dtype} → {new.dtype}".replace("torch.", ""))
    if old.device != new.device:
        found.append(f"`{path}` device: {old.device} → {new.device}")
    if old.layout != new.layout:
        found.append(f"`{path}` strides: {old.layout} → {new.layout}")
    if old.pending != new.pending:
        found.append(f"`{path}`: a conjugation or negation is pending in one of them")
    return found


def positional(names: Function | Sequence[str]) -> list[str]:
    """What positional arguments are called, as far as they have names."""
    if not isinstance(names, Function):
        return list(names)
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in names.parameters.values() if each.kind in kinds]


class _Reader:
    """Goes through the parts in the order in which they were written."""

    def __init__(self, signature: Sequence[Hashable], names: Sequence[str], words: Words) -> None:
        grad, inference, around = signature[:_STATE]
        number, autocast = around if isinstance(around, tuple) and isinstance(around[0], int) else (0, around)
        self._parts: Sequence[Any] = signature[_STATE:]
        self._at = 0
        self._names = names
        self._words = words
        if grad is not False:
            needed = [index for index, needs in enumerate(grad) if needs] if isinstance(grad, tuple) else []
            words.modes["grad mode"] = f"on, tensors {needed} require gradients" if needed else "on"
        if inference:
            words.modes["inference mode"] = "on"
        if number:
            words.modes["settings of PyTorch"] = f"set no. {number}"
        if isinstance(autocast, tuple):
            kinds = (f"{kind} {str(dtype).removeprefix('torch.')}" for kind, dtype in autocast)
            words.modes["autocast"] = ", ".join(kinds)

    def read(self) -> None:
        if self._is(tuple):
            for index in range(self._next()[1]):
                self._value(self._name(index))
            for _ in range(self._next()[1]):
                self._value(self._constant().strip("'"))
        else:
            index = 0
            while self._at < len(self._parts) and isinstance(self._parts[self._at], torch.dtype):
                self._value(self._name(index))
                index += 1
        left = self._parts[self._at :]
        if left and left[0] == "repeats":
            self._words.rest = f"the same tensor more than once {left[1:]}"
        elif left:
            self._words.rest = f"values read on the host {shown(tuple(left))}"

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else f"args[{index}]"

    def _is(self, kind: type) -> bool:
        part = self._parts[self._at] if self._at < len(self._parts) else None
        return type(part) is tuple and bool(part) and part[0] is kind

    def _next(self) -> Any:
        self._at += 1
        return self._parts[self._at - 1]

    def _value(self, path: str) -> None:
        part = self._next()
        if isinstance(part, torch.dtype):
            shape, stride, device = self._next(), self._next(), self._next()
            pending = self._next() if self._is_pending() else (False, False)
            self._words.values[path] = TensorWords(part, tuple(shape), tuple(stride), device, pending)
            return
        kind, *content = part
        if kind in (tuple, list) or (kind is not dict and kind in pytree.SUPPORTED_NODES and kind not in _OPEN):
            count = content[0]
            self._words.structure[path] = f"{kind.__name__} of {count}"
            fields = getattr(kind, "_fields", None)
            if kind not in (tuple, list) and fields is None:
                self._words.structure[path] += f" with {self._constant()}"
            for index in range(count):
                self._value(f"{path}.{fields[index]}" if fields else f"{path}[{index}]")
        elif kind is dict:
            self._words.structure[path] = f"dict of {content[0]}"
            for _ in range(content[0]):
                self._value(f"{path}[{self._constant()}]")
        elif hasattr(kind, "_fields"):
            self._words.structure[path] = kind.__name__
            for name in kind._fields:
                self._value(f"{path}.{name}")
        else:
            self._at -= 1
            self._words.values[path] = self._constant()

    def _is_pending(self) -> bool:
        part = self._parts[self._at] if self._at < len(self._parts) else None
        return type(part) is tuple and len(part) == 2 and type(part[0]) is bool

    def _constant(self) -> str:
        kind, *content = self._next()
        if kind is float:
            return repr(float.fromhex(content[0]))
        if kind is complex:
            return repr(complex(*(float.fromhex(each) for each in content)))
        if isinstance(kind, EnumType):
            return f"{kind.__name__}.{content[0]}"
        if kind is dict:
            pairs = ", ".join(f"{self._constant()}: {self._constant()}" for _ in range(content[0]))
            return f"{{{pairs}}}"
        if kind in _OPEN or kind in (tuple, list) or hasattr(kind, "_fields"):
            return f"{kind.__name__}({', '.join(self._constant() for _ in range(content[0]))})"
        return shown(content[0])


_OPEN = (torch.Size, slice, range)
