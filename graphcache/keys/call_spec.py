"""A call key as people read it: its arguments by path, its modes, and how it differs from another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import EnumType
from functools import cached_property
from inspect import Parameter, Signature
from typing import Any

import torch

from graphcache.errors import shown
from graphcache.keys.ambient import unusual_settings
from graphcache.keys.call_key import CONSTANTS, OPEN_CONSTANTS, CallKey, Part, describe, is_named_tuple, item_ends

_ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its values; sizes and strides in elements.

    Example:
        >>> print(TensorSpec(torch.float32, (8, 64), (64, 1), torch.device("cpu")))
        float32[8, 64]
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    pending: tuple[bool, bool] = (False, False)
    """Whether a conjugation and a negation are pending."""
    attributes: str = ""
    """Those that Python code gave it, as text."""

    @property
    def layout(self) -> str:
        """``"contiguous"``, or the strides."""
        return "contiguous" if self.stride == contiguous(self.shape) else str(self.stride)

    def __str__(self) -> str:
        device = "" if self.device.type == "cpu" else f" on {self.device}"
        layout = "" if self.layout == "contiguous" else f" with strides {self.stride}"
        return f"{short_name(self.dtype)}[{', '.join(map(str, self.shape))}]{device}{layout}"

    def diff(self, other: TensorSpec, path: str) -> Iterator[str]:
        """What differs, from this one to the other, one line each."""
        if len(self.shape) != len(other.shape):
            yield f"`{path}` shape: {list(self.shape)} → {list(other.shape)}"
        else:
            pairs = enumerate(zip(self.shape, other.shape, strict=True))
            yield from (f"`{path}` dim {axis}: {a} → {b}" for axis, (a, b) in pairs if a != b)
        for what, old, new in (
            ("dtype", short_name(self.dtype), short_name(other.dtype)),
            ("device", self.device, other.device),
            ("strides", self.layout, other.layout),
            ("attributes", self.attributes or "none", other.attributes or "none"),
        ):
            if old != new:
                yield f"`{path}` {what}: {old} → {new}"
        if self.pending != other.pending:
            yield f"`{path}`: a conjugation or negation is pending in one of them"


@dataclass(frozen=True, slots=True)
class CodeSpec:
    """A value that only code can make again: an enumeration, a named tuple, a registered container."""

    text: str
    """What it is, such as ``"Mode.FAST"``."""
    items: tuple[tuple[str, Any], ...] = ()
    """What it contains, by the end of the item's path."""

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class CallSpec:
    """A call: its arguments without the values of tensors, and the modes it runs in.

    Args:
        key: The call key.
        names: The signature of the function that is called, or the names of its positional arguments.

    Example:
        >>> old, new = (CallSpec.of((torch.zeros(1, n), 0.5), {"flip": True}, ["input"]) for n in (77, 78))
        >>> print(old)
        input: float32[1, 77], args[1]: 0.5, flip: True
        >>> old.diff(new)
        ['`input` dim 1: 77 → 78']
    """

    key: CallKey
    names: Signature | Sequence[str] = field(default=(), compare=False)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], names: Signature | Sequence[str] = ()) -> CallSpec:
        """The spec of a call, under the modes of this moment."""
        return cls(describe(args, kwargs).key, names)

    @cached_property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments, with a :class:`TensorSpec` for each tensor."""
        return tuple(map(value_of, self.key.args))

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments."""
        return {name: value_of(part) for name, part in self.key.kwargs}

    @cached_property
    def tensors(self) -> list[TensorSpec]:
        """The tensors in the arguments, in order."""
        return [found for _, found, _ in self._walked if type(found) is TensorSpec]

    @property
    def modes(self) -> dict[str, str]:
        """The modes that are on, by name."""
        key, on = self.key, {}
        if key.grad is not False:
            needed = [index for index, needs in enumerate(key.grad) if needs] if key.grad is not True else []
            on["grad mode"] = f"on, tensors {needed} require gradients" if needed else "on"
        if key.inference:
            on["inference mode"] = "on"
        if key.settings is not None:
            on["settings of PyTorch"] = unusual_settings(key.settings)
        if key.autocast:
            on["autocast"] = ", ".join(f"{kind} {short_name(dtype)}" for kind, dtype in key.autocast)
        return on

    @property
    def values(self) -> dict[str, TensorSpec | str]:
        """Path of each argument, such as ``x`` or ``batch['ids'][0]``, and the tensor or constant there."""
        return {path: found for path, found, is_container in self._walked if not is_container}

    def __str__(self) -> str:
        return ", ".join(f"{path}: {value}" for path, value in self.values.items()) or "no arguments"

    def diff(self, other: CallSpec) -> list[str]:
        """What differs, one line each, from this call to the other."""
        found: list[str] = []
        before, after = ({path: value for path, value, _ in each._walked} for each in (self, other))
        for path in {**before, **after}:
            old, new = before.get(path, _ABSENT), after.get(path, _ABSENT)
            if isinstance(old, TensorSpec) and isinstance(new, TensorSpec):
                found += old.diff(new, path)
            elif old != new:
                found.append(f"`{path}`: {old} → {new}")
        for name in {**self.modes, **other.modes}:
            was, now = (each.modes.get(name, "off") for each in (self, other))
            if was != now:
                found.append(f"{name}: {was} → {now}")
        beside = zip(self._beside(), other._beside(), strict=True)
        return found + [f"{old or 'nothing else'} → {new or 'nothing else'}" for old, new in beside if old != new]

    def distance(self, other: CallSpec) -> tuple[int, float]:
        """How far two calls lie apart: in how many things they differ, then by how much their sizes do."""
        apart = 0.0
        for path, old in self.values.items():
            new = other.values.get(path)
            if isinstance(old, TensorSpec) and isinstance(new, TensorSpec) and len(old.shape) == len(new.shape):
                apart += sum(abs(math.log((a + 1) / (b + 1))) for a, b in zip(old.shape, new.shape, strict=True))
        return len(self.diff(other)), apart

    def _beside(self) -> tuple[str, str]:
        """What tells calls apart beside arguments and modes, in words."""
        same = f"the same tensor more than once {self.key.repeats}" if self.key.repeats else ""
        return same, f"values read on the host {shown(self.key.host_values)}" if self.key.host_values else ""

    @cached_property
    def _walked(self) -> list[tuple[str, TensorSpec | str, bool]]:
        """Path of everything in the arguments, what is there, and whether that is a container."""
        names = self.names
        if isinstance(names, Signature):
            kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
            names = [each.name for each in names.parameters.values() if each.kind in kinds]
        args = [(names[i] if i < len(names) else f"args[{i}]", value) for i, value in enumerate(self.args)]
        return [found for name, value in (*args, *self.kwargs.items()) for found in _walk(value, name)]


def value_of(part: Part) -> Any:
    """The value behind a part of a key: a :class:`TensorSpec`, a :class:`CodeSpec`, or the constant or container."""
    kind, *rest = part
    if type(kind) is torch.dtype:
        shape, stride, device, *unusual = rest
        conjugate, negative, attributes = unusual or (False, False, None)
        text = "" if attributes is None else shown(value_of(attributes))
        return TensorSpec(kind, tuple(shape), stride, device, (conjugate, negative), text)
    if kind is float:
        return float.fromhex(*rest)
    if kind is complex:
        return complex(*map(float.fromhex, rest))
    if isinstance(kind, EnumType):
        return CodeSpec(f"{kind.__qualname__}.{rest[0] or rest[1]}")
    if kind in OPEN_CONSTANTS:
        found = map(value_of, rest)
        return torch.Size(found) if kind is torch.Size else kind(*found)
    if kind in CONSTANTS or kind is type:
        return rest[0]
    about: Any = None if rest[0] is None else value_of(rest[0])
    items = list(map(value_of, rest[1:]))
    if kind is dict:
        return dict(zip(about, items, strict=True))
    if kind in (tuple, list):
        return kind(items)
    text = kind.__name__ if is_named_tuple(kind) else f"{kind.__name__} of {len(items)} with {shown(about)}"
    return CodeSpec(text, tuple(zip(item_ends(kind, about, len(items)), items, strict=True)))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a fresh tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def short_name(value: object) -> str:
    """A dtype, layout or memory format without the name of its module."""
    return str(value).removeprefix("torch.")


def _walk(value: Any, path: str) -> Iterator[tuple[str, TensorSpec | str, bool]]:
    """Path of everything in a value, what is there, and whether that is a container."""
    if type(value) in (tuple, list, dict):
        names = list(value) if type(value) is dict else None
        items = value.values() if type(value) is dict else value
        yield path, f"{type(value).__name__} of {len(value)}", True
        pairs = tuple(zip(item_ends(type(value), names, len(value)), items, strict=True))
    elif type(value) is CodeSpec and value.items:
        yield path, value.text, True
        pairs = value.items
    else:
        yield path, value if type(value) is TensorSpec else shown(value), False
        return
    for end, item in pairs:
        yield from _walk(item, path + end)
