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
from graphcache.keys.call_key import (
    CONSTANTS,
    OPEN_CONSTANTS,
    CallKey,
    Part,
    describe,
    is_named_tuple,
    item_ends,
    node_of,
    unusual_settings,
)

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
        args = [(names[i] if i < len(names) else f"args[{i}]", part) for i, part in enumerate(self.key.args)]
        return [found for name, part in (*args, *self.key.kwargs) for found in _walk(part, name)]


def constant_of(part: Part) -> Any:
    """The constant behind a part of a key in which no tensor is."""
    kind, *rest = part
    if kind is float:
        return float.fromhex(*rest)
    if kind is complex:
        return complex(*map(float.fromhex, rest))
    if kind in CONSTANTS or kind is type:
        return rest[0]
    if isinstance(kind, EnumType):
        return kind[rest[0]] if rest[0] else kind(rest[1])
    if kind in OPEN_CONSTANTS:
        found = map(constant_of, rest)
        return torch.Size(found) if kind is torch.Size else kind(*found)
    about, *items = (None if each is None else constant_of(each) for each in rest)
    return node_of(kind).unflatten_fn(items, kind if is_named_tuple(kind) else about)


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


def _walk(part: Part, path: str) -> Iterator[tuple[str, TensorSpec | str, bool]]:
    """Path of everything in a part of a key, what is there, and whether that is a container."""
    kind, *rest = part
    if type(kind) is torch.dtype:
        shape, stride, device, *unusual = rest
        conjugate, negative, attributes = unusual or (False, False, None)
        text = "" if attributes is None else shown(constant_of(attributes))
        yield path, TensorSpec(kind, tuple(shape), stride, device, (conjugate, negative), text), False
    elif isinstance(kind, EnumType):
        yield path, f"{kind.__qualname__}.{rest[0] or rest[1]}", False
    elif kind in CONSTANTS or kind in OPEN_CONSTANTS or kind in (float, complex, type):
        yield path, shown(constant_of(part)), False
    else:
        about, *items = rest
        context = None if about is None else constant_of(about)
        told = kind in (tuple, list, dict) or is_named_tuple(kind)
        yield path, f"{kind.__name__} of {len(items)}{'' if told else f' with {shown(context)}'}", bool(items)
        for end, item in zip(item_ends(kind, context, len(items)), items, strict=True):
            yield from _walk(item, path + end)
