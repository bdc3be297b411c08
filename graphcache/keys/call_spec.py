"""A call key as people read it: its arguments by path, its modes, and how it differs from another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import EnumType
from functools import cached_property
from inspect import Parameter, Signature
from itertools import compress
from typing import Any

import torch

from graphcache.errors import shown
from graphcache.keys import call_key
from graphcache.keys.call_key import OPEN_CONSTANTS, CallKey, Part, describe, is_named_tuple, node_of, value_of
from graphcache.keys.values import Held


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its values; sizes and strides in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    pending: str = ""
    """A conjugation or negation that is not carried out yet."""
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

    def diff(self, other: TensorSpec, path: str) -> list[str]:
        """What differs, from this one to the other, one line each."""
        was, now = (each._parts(by_axis=len(self.shape) == len(other.shape)) for each in (self, other))
        return [f"`{path}` {what}: {was[what]} → {now[what]}" for what in was if was[what] != now[what]]

    def _parts(self, *, by_axis: bool) -> dict[str, Any]:
        sizes = {f"dim {axis}": size for axis, size in enumerate(self.shape)}
        return {
            **(sizes if by_axis else {"shape": list(self.shape)}),
            "dtype": short_name(self.dtype),
            "device": self.device,
            "strides": self.layout,
            "pending": self.pending or "nothing",
            "attributes": self.attributes or "none",
        }


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

    @property
    def tensors(self) -> list[TensorSpec]:
        """The tensors in the arguments, in order."""
        return [found for _, found, _ in self._walked if type(found) is TensorSpec]

    @property
    def values(self) -> dict[str, TensorSpec | str]:
        """Path of each argument, such as ``x`` or ``batch['ids'][0]``, and the tensor or constant there."""
        return {path: found for path, found, is_container in self._walked if not is_container}

    @property
    def modes(self) -> dict[str, str]:
        """The modes that are on, and what else than arguments tells calls apart, by name."""
        key, on = self.key, {}
        if key.grad is not False:
            needed = [index for index, needs in enumerate(key.grad) if needs] if key.grad is not True else []
            on["grad mode"] = f"on, tensors {needed} require gradients" if needed else "on"
        if key.inference:
            on["inference mode"] = "on"
        if key.settings is not None:
            on["settings of PyTorch"] = call_key.unusual_settings(key.settings)
        if key.autocast:
            on["autocast"] = ", ".join(f"{kind} {short_name(dtype)}" for kind, dtype in key.autocast)
        if key.repeats:
            on["tensors given twice"] = f"by place {key.repeats}"
        if key.written:
            on["tensors updated in place"] = ", ".join(f"{place} at {address:#x}" for place, address in key.written)
        if key.host_values:
            on["values read on the host"] = shown(key.host_values)
        return on

    def __str__(self) -> str:
        return ", ".join(f"{path}: {value}" for path, value in self.values.items()) or "no arguments"

    def diff(self, other: CallSpec) -> list[str]:
        """What differs, one line each, from this call to the other."""
        found: list[str] = []
        before, after = ({path: value for path, value, _ in each._walked} for each in (self, other))
        for path in {**before, **after}:
            old, new = before.get(path, "absent"), after.get(path, "absent")
            if isinstance(old, TensorSpec) and isinstance(new, TensorSpec):
                found += old.diff(new, path)
            elif old != new:
                found.append(f"`{path}`: {old} → {new}")
        was, now = self.modes, other.modes
        changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        return found + [f"{name}: {was.get(name, 'off')} → {now.get(name, 'off')}" for name in changed]

    def distance(self, other: CallSpec) -> tuple[int, float]:
        """How far two calls lie apart: in how many things they differ, then by how much their sizes do."""
        pairs = [(old.shape, new.shape) for old, new in zip(self.tensors, other.tensors, strict=False)]
        sizes = [size for old, new in pairs if len(old) == len(new) for size in zip(old, new, strict=True)]
        return len(self.diff(other)), sum(abs(math.log((old + 1) / (new + 1))) for old, new in sizes)

    @cached_property
    def _walked(self) -> list[tuple[str, TensorSpec | str, bool]]:
        """Path of everything in the arguments, what is there, and whether that is a container."""
        names = self.names
        if isinstance(names, Signature):
            kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
            names = [each.name for each in names.parameters.values() if each.kind in kinds]
        args = [(names[i] if i < len(names) else f"args[{i}]", part) for i, part in enumerate(self.key.args)]
        return [found for name, part in (*args, *self.key.kwargs) for found in _walk(part, name)]


def _walk(part: Part, path: str) -> Iterator[tuple[str, TensorSpec | str, bool]]:
    kind, *rest = part
    if type(kind) is torch.dtype:
        shape, stride, device, *unusual = rest
        *pending, attributes = unusual or (False, False, None)
        names = " and ".join(compress(("conjugation", "negation"), pending))
        text = "" if attributes is None else shown(value_of(attributes))
        yield path, TensorSpec(kind, tuple(shape), stride, device, names, text), False
    elif kind is Held:
        yield path, str(rest[0]), False
    elif isinstance(kind, EnumType):
        yield path, f"{kind.__qualname__}.{rest[0] or rest[1]}", False
    elif node_of(kind) is None or kind in OPEN_CONSTANTS:
        yield path, shown(value_of(part)), False
    else:
        about, *items = rest
        context = None if about is None else value_of(about)
        told = kind in (tuple, list, dict) or is_named_tuple(kind)
        yield path, f"{kind.__name__} of {len(items)}{'' if told else f' with {shown(context)}'}", bool(items)
        for end, item in zip(call_key.item_ends(kind, context, len(items)), items, strict=True):
            yield from _walk(item, path + end)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a fresh tensor."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def short_name(value: torch.dtype) -> str:
    return str(value).removeprefix("torch.")
