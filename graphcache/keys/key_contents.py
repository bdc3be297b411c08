"""A call key taken apart: its arguments again, with what is known of each tensor in its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import EnumType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphcache.errors import shown
from graphcache.keys.call_key import ATTRIBUTES, REPEATS, STATE_PARTS

_DEEPEST = 32
"""Containers in one another."""


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

    @property
    def extent(self) -> int:
        """Elements from the first one in memory to the last one."""
        pairs = zip(self.shape, self.stride, strict=True)
        return 0 if 0 in self.shape else 1 + sum((size - 1) * step for size, step in pairs)

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

    def zeros(self, device: torch.device | str) -> torch.Tensor:
        """Zeros of this layout, without gradients and outside of inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            if self.layout == "contiguous":
                return torch.zeros(self.shape, dtype=self.dtype, device=device)
            # Elements that overlap cannot be written one by one.
            return torch.zeros(self.extent, dtype=self.dtype, device=device).as_strided(self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class CodeSpec:
    """A value that only code can make again: an enumeration, a named tuple, a registered container."""

    text: str
    """What it is, such as ``"Mode.FAST"``."""
    items: tuple[tuple[str, Any], ...] = ()
    """What it contains, by the end of the item's path."""

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class KeyContents:
    """What is in a key."""

    args: tuple[Any, ...] = ()
    """Positional arguments, with a :class:`TensorSpec` for each tensor."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[TensorSpec, ...] = ()
    """The tensors in the arguments, in order."""
    repeats: tuple[int, ...] = ()
    """For each tensor, the place of the first that is the same object."""
    host_values: tuple[Any, ...] = ()
    """For each input that an engine reads on the host, its values."""
    grad: bool | tuple[bool, ...] = False
    """Whether gradients are recorded; or, if they are, which tensors require them."""
    inference: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    """Kinds of devices, with the dtype that autocast casts to."""
    settings: int = 0
    """The number of PyTorch's settings in this process (:mod:`graphcache.keys.ambient`)."""
    rest: str = ""
    """The key as text, if it could not be read."""


def contents_of(key: Any) -> KeyContents:
    """What is in a key; of something else, nothing but the thing itself as text."""
    try:
        return _Reader(key).contents()
    except (AttributeError, LookupError, TypeError, ValueError):
        # Whoever extends keys extends the reader too; until then there is something to look at.
        return KeyContents(rest=shown(key))


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


class _Reader:
    """Reads a key part by part, in the order in which it was written."""

    def __init__(self, key: Any) -> None:
        self._state: Sequence[Any] = key[:STATE_PARTS]
        self._parts = deque[Any](key[STATE_PARTS:])
        self._depth = 0
        self._tensors: list[TensorSpec] = []

    def contents(self) -> KeyContents:
        """What is in the whole key."""
        grad, inference, around = self._state
        settings, autocast = around if isinstance(around, tuple) and isinstance(around[0], int) else (0, around)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if self._starts(tuple):
            args, kwargs = self._value(), self._value()
        else:
            while type(self._peek()) is torch.dtype:
                args += (self._value(),)
        count = len(self._tensors)
        repeats = list(range(count))
        if self._peek() == REPEATS:
            _, *repeats = [self._parts.popleft() for _ in range(1 + count)]
        hosts = tuple(self._parts)
        if any(type(values) not in (tuple, type(None)) for values in hosts):
            raise ValueError("it does not end where it should")
        tensors = tuple(self._tensors)
        return KeyContents(args, kwargs, tensors, tuple(repeats), hosts, grad, inference, autocast or (), settings)

    def _peek(self) -> Any:
        return self._parts[0] if self._parts else None

    def _starts(self, *first: object) -> bool:
        """Whether the next part is a tuple that begins with one of these."""
        part = self._peek()
        return type(part) is tuple and bool(part) and any(part[0] is each for each in first)

    def _value(self) -> Any:
        """The next argument, item or constant."""
        part = self._parts.popleft()
        if type(part) is torch.dtype:
            return self._tensor(part)
        kind, *content = part
        if kind is float:
            return float.fromhex(content[0])
        if kind is complex:
            real, imaginary = content
            return complex(float.fromhex(real), float.fromhex(imaginary))
        if isinstance(kind, EnumType):
            return CodeSpec(f"{kind.__qualname__}.{content[0] or content[1]}")
        if kind is dict:
            flat = self._each(2 * content[0])
            return dict(zip(flat[::2], flat[1::2], strict=True))
        if kind in (tuple, list, torch.Size):
            return kind(self._each(content[0]))
        if kind in (slice, range):
            return kind(*self._each(content[0]))
        if kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
            ends = [f".{name}" for name in kind._fields]
            return CodeSpec(kind.__name__, tuple(zip(ends, self._each(content[0]), strict=True)))
        if kind in pytree.SUPPORTED_NODES:
            text = f"{kind.__name__} of {content[0]} with {shown(self._value())}"
            ends = [f"[{index}]" for index in range(content[0])]
            return CodeSpec(text, tuple(zip(ends, self._each(content[0]), strict=True)))
        [value] = content
        if type(value) is not kind:
            raise TypeError(f"{shown(value)} is no {kind.__name__}")
        return value

    def _each(self, count: int) -> list[Any]:
        """The next values, which are in one container."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} containers in one another")
        found = [self._value() for _ in range(count)]
        self._depth -= 1
        return found

    def _tensor(self, dtype: torch.dtype) -> TensorSpec:
        """The tensor whose dtype was read."""
        shape, stride, device = (self._parts.popleft() for _ in range(3))
        pending, attributes = (False, False), ""
        if self._starts(True, False):
            pending = self._parts.popleft()
        if self._peek() == ATTRIBUTES:
            self._parts.popleft()
            attributes = shown(self._value())
        device = torch.device(device) if type(device) is str else device
        self._tensors.append(TensorSpec(dtype, tuple(shape), tuple(stride), device, pending, attributes))
        return self._tensors[-1]
