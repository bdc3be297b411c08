"""A call key taken apart: a description of a call that people read, that can be compared, and that files hold."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, Signature
from typing import Any

import torch

from graphcache.errors import shown
from graphcache.keys.call_key import STATE_PARTS, describe
from graphcache.keys.key_contents import CodeSpec, KeyContents, TensorSpec, contents_of, short_name

MOST_TEXT = 64 * 1024
"""Characters of one call in a file."""
_ABSENT = "absent"


@dataclass(frozen=True, eq=False)
class CallSpec:
    """A call: its arguments without the values of tensors, and the modes it runs in.

    Two are equal if a file holds them as the same call. The index of a device, the settings of PyTorch, and the names
    of arguments do not count.

    Args:
        key: The call key; anything else is shown as it is.
        names: The signature of the function that is called, or the names of its positional arguments.

    Example:
        >>> old, new = (CallSpec.of((torch.zeros(1, n), 0.5), {"flip": True}, ["input"]) for n in (77, 78))
        >>> print(old)
        input: float32[1, 77], args[1]: 0.5, flip: True
        >>> old.diff(new)
        ['`input` dim 1: 77 → 78']
    """

    key: Any
    names: Signature | Sequence[str] = ()

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], names: Signature | Sequence[str] = ()) -> CallSpec:
        """The spec of a call, under the modes of this moment."""
        return cls(describe(args, kwargs)[0], names)

    @classmethod
    def of_json(cls, tree: Any) -> CallSpec:
        """The spec of a tree that :attr:`json` gave; a ``ValueError`` for any other."""
        try:
            found = cls(_decoded(tree))
            if found.unsaveable:
                raise ValueError(found.unsaveable)
            _check(found.contents)
            if found.text != _text(tree):
                raise ValueError("it is not as it is written here")
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{shown(tree)} is no call: {type(error).__name__}: {str(error)[:200]}") from error
        return found

    @cached_property
    def contents(self) -> KeyContents:
        """The arguments and modes."""
        return contents_of(self.key)

    @property
    def json(self) -> Any:
        """The key as lists, numbers and texts, for a file."""
        return json.loads(self.text)

    @property
    def text(self) -> str:
        """:attr:`json` as text, which equal calls have in common."""
        return self._written[0]

    @property
    def unsaveable(self) -> str:
        """Why no file can hold the call; empty if one can."""
        return self._written[1]

    @cached_property
    def _written(self) -> tuple[str, str]:
        """The text, and why it could not be read again."""
        odd: list[str] = []
        found = self.contents
        if found.rest:
            return _text({"code": found.rest}), found.rest
        grad: Any = found.grad is not False
        if isinstance(found.grad, tuple) and any(found.grad):
            grad = found.grad
            odd.append("an input requires gradients")
        if len({each.device for each in found.tensors if each.device.type != "cpu"}) > 1:
            odd.append("tensors on several devices")
        if any(any(each.pending) or each.attributes for each in found.tensors):
            odd.append("a tensor with attributes, or with a pending conjugation or negation")
        parts = [part.type if type(part) is torch.device else part for part in self.key[STATE_PARTS:]]
        state = (grad, found.inference, found.autocast or None)
        text = _text([_encoded(part, odd) for part in (*state, *parts)])
        if len(text) > MOST_TEXT:
            odd.append(f"{len(text)} characters as text, of which at most {MOST_TEXT} are kept")
        return text, odd[0] if odd else ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that :meth:`example` makes."""
        pairs = enumerate(zip(self.contents.repeats, self.contents.tensors, strict=True))
        return sum(spec.extent * spec.dtype.itemsize for index, (first, spec) in pairs if first == index)

    @property
    def modes(self) -> dict[str, str]:
        """The modes that are on, by name."""
        found, on = self.contents, {}
        if found.grad is not False:
            needed = [index for index, needs in enumerate(found.grad) if needs] if found.grad is not True else []
            on["grad mode"] = f"on, tensors {needed} require gradients" if needed else "on"
        if found.inference:
            on["inference mode"] = "on"
        if found.settings:
            on["settings of PyTorch"] = f"set no. {found.settings}"
        if found.autocast:
            on["autocast"] = ", ".join(f"{kind} {short_name(dtype)}" for kind, dtype in found.autocast)
        return on

    @property
    def values(self) -> dict[str, TensorSpec | str]:
        """Path of each argument, such as ``x`` or ``batch['ids'][0]``, and the tensor or constant there."""
        return {path: value for path, (value, is_container) in self._parts.items() if not is_container}

    def __str__(self) -> str:
        return ", ".join(f"{path}: {value}" for path, value in self.values.items()) or "no arguments"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallSpec) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def diff(self, other: CallSpec) -> list[str]:
        """What differs, one line each, from this call to the other."""
        found: list[str] = []
        for path in {**self._parts, **other._parts}:
            old, new = (each._parts.get(path, (_ABSENT,))[0] for each in (self, other))
            if isinstance(old, TensorSpec) and isinstance(new, TensorSpec):
                found += old.diff(new, path)
            elif old != new:
                found.append(f"`{path}`: {old} → {new}")
        for name in {**self.modes, **other.modes}:
            before, after = (each.modes.get(name, "off") for each in (self, other))
            if before != after:
                found.append(f"{name}: {before} → {after}")
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

    def example(self, device: torch.device | str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the call: zeros, laid out alike. It has to be one that a file can hold.

        Tensors that lay on the CPU beside others on a device lie on the CPU, all others on ``device``.
        """
        found = self.contents
        mixed = any(spec.device.type != "cpu" for spec in found.tensors)
        made: list[torch.Tensor] = []
        for first, spec in zip(found.repeats, found.tensors, strict=True):
            place = "cpu" if mixed and spec.device.type == "cpu" else device
            made.append(made[first] if first < len(made) else spec.zeros(place))
        remaining = iter(made)
        args: tuple[Any, ...] = _filled(found.args, remaining)
        return args, _filled(found.kwargs, remaining)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the grad mode, inference mode and autocast are those of the call.

        Autocast for CUDA is left out where there is no CUDA device.
        """
        casts = dict(self.contents.autocast)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.contents.inference))
            stack.enter_context(torch.set_grad_enabled(self.contents.grad is not False))
            for kind in ("cuda", "cpu"):
                if kind in casts and (kind == "cpu" or torch.cuda.is_available()):
                    stack.enter_context(torch.autocast(kind, casts[kind]))
                elif torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield

    def _beside(self) -> tuple[str, str, str]:
        """What tells calls apart beside arguments and modes, in words."""
        found = self.contents
        once = found.repeats == tuple(range(len(found.repeats)))
        same = "" if once else f"the same tensor more than once {found.repeats}"
        values = f"values read on the host {shown(found.host_values)}" if found.host_values else ""
        return same, values, found.rest

    @cached_property
    def _parts(self) -> dict[str, tuple[TensorSpec | str, bool]]:
        """Path of everything in the arguments: what is there, and whether that is a container."""
        names = self.names
        if isinstance(names, Signature):
            kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
            names = [each.name for each in names.parameters.values() if each.kind in kinds]
        args = [(names[i] if i < len(names) else f"args[{i}]", value) for i, value in enumerate(self.contents.args)]
        return {
            path: (found, is_container)
            for name, value in (*args, *self.contents.kwargs.items())
            for path, found, is_container in _walk(value, name)
        }


def _walk(value: Any, path: str) -> Iterator[tuple[str, TensorSpec | str, bool]]:
    """Path of everything in a value, what is there, and whether that is a container."""
    if type(value) in (tuple, list, dict):
        yield path, f"{type(value).__name__} of {len(value)}", True
        for name, item in value.items() if type(value) is dict else enumerate(value):
            yield from _walk(item, f"{path}[{shown(name)}]")
    elif type(value) is CodeSpec and value.items:
        yield path, value.text, True
        for end, item in value.items:
            yield from _walk(item, f"{path}{end}")
    else:
        yield path, value if type(value) is TensorSpec else shown(value), False


def _filled(value: Any, made: Iterator[torch.Tensor]) -> Any:
    """A value with what was made of each tensor in its place."""
    if type(value) is TensorSpec:
        return next(made)
    if type(value) in (tuple, list):
        return type(value)([_filled(item, made) for item in value])
    return {name: _filled(item, made) for name, item in value.items()} if type(value) is dict else value


def _check(found: KeyContents) -> None:
    """Raise a ValueError unless a call that came from a file is one that describes itself."""
    casts = all(kind in ("cuda", "cpu") and dtype in (torch.float16, torch.bfloat16) for kind, dtype in found.autocast)
    if type(found.grad) is not bool or type(found.inference) is not bool or not casts:
        raise ValueError("its modes are none")
    for tensor in found.tensors:
        if len(tensor.shape) != len(tensor.stride) or tensor.device.index is not None:
            raise ValueError(f"{tensor.shape} with strides {tensor.stride} on {tensor.device}")
        if any(type(size) is not int or not 0 <= size < 2**63 for size in (*tensor.shape, *tensor.stride)):
            raise ValueError(f"the sizes {shown(tensor.shape)} and strides {shown(tensor.stride)} of a tensor")
    places = range(len(found.tensors))
    if len(found.repeats) != len(places) or any(at not in places or found.repeats[at] != at for at in found.repeats):
        raise ValueError("a tensor that is the same as one that is not there")
    if not all(type(name) is str for name in found.kwargs):
        raise ValueError("an argument's name that is no text")


def _encoded(part: Any, odd: list[str]) -> Any:
    """A part of a key for JSON; what only code can make again is told in ``odd``."""
    if part is None or type(part) in (bool, str) or (type(part) is int and part.bit_length() <= 1024):
        return part
    if type(part) in (tuple, torch.Size):
        return [_encoded(item, odd) for item in part]
    if type(part) in (float, bytes):
        return {type(part).__name__: part.hex()}
    if type(part) is torch.device:
        return {"device": str(part)}
    if isinstance(part, Hashable) and part in _NAMES:
        return {"is": _NAMES[part]}
    odd.append(f"{shown(part)}, which no file can hold")
    return {"code": shown(part)}


def _decoded(node: Any, depth: int = 0) -> Any:
    """The part of a key that :func:`_encoded` wrote."""
    if node is None or type(node) in (bool, str, int):
        return node
    if type(node) is list and depth < 4:
        return tuple(_decoded(item, depth + 1) for item in node)
    [(tag, text)] = node.items()
    return _DECODERS[tag](text)


def _text(tree: Any) -> str:
    """A tree as text, the same for the same tree."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


_KINDS = (type(None), bool, int, float, complex, str, bytes, tuple, list, dict, slice, range, torch.Size)
_OF_TORCH = (torch.dtype, torch.layout, torch.memory_format, torch.device)
_NAMES: dict[Any, str] = {
    **{kind: kind.__name__ for kind in (*_KINDS, *_OF_TORCH)},
    **{each: str(each) for each in vars(torch).values() if type(each) in _OF_TORCH[:3]},
}
"""Types and members of torch that a key may hold, by the name that stands for them in a file."""
_DECODERS = {
    "is": {name: each for each, name in _NAMES.items()}.__getitem__,
    "float": float.fromhex,
    "bytes": bytes.fromhex,
    "device": torch.device,
}
