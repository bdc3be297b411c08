"""The call key: what distinguishes the arguments of one call from those of another, and its tensors in order.

Two calls with equal keys run the same operations on tensors of the same layout, so one graph answers both.
:class:`graphcache.keys.call_spec.CallSpec` describes a key to people and in files.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import EnumType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.errors import Reason, Refusal, shown
from graphcache.keys.ambient import ambient_number

CallKey = tuple[Hashable, ...]

STATE_PARTS = 3
"""Parts of a key before those of the arguments: grad mode, inference mode, autocast with the ambient state."""
ATTRIBUTES = "attributes"
"""Part of a key after the parts of a tensor that has attributes of its own."""
REPEATS = "repeats"
"""Part of a key before the places of tensors that are given more than once."""

_strided = torch.strided
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
_is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CallKey, Sequence[Tensor]]:
    """The key of a call, and the tensors in it, depth first; a :class:`~graphcache.errors.Refusal` if it has none.

    Told apart are structure, dtype, shape, strides and device of every tensor, every constant with its type (``True``,
    ``1`` and ``1.0`` are three constants, ``0.0`` and ``-0.0`` two, every ``nan`` is the same), pending conjugations
    and negations, one tensor given twice from two, the grad mode, which tensors require gradients while it is on,
    attributes that Python code gave a tensor, inference mode, autocast, the ambient state of PyTorch
    (:mod:`graphcache.keys.ambient`), and the order of keyword arguments. Not told apart are values of tensors, and
    different tensors that overlap from ones that don't.

    Example:
        >>> one, _ = describe((torch.zeros(2, 3), 1), {})
        >>> two, _ = describe((torch.ones(2, 3), True), {})
        >>> one == two
        False
    """
    parts: list[Hashable] = []
    tensors: list[Tensor] = []
    try:
        # Inside, as nested tensors, plain and strided as they seem, have no shape to ask for.
        if not kwargs and (key := describe_flat(args)) is not None:
            return key, args
        _walk(args, "args", parts, tensors)
        _walk(kwargs, "kwargs", parts, tensors)
    except Refusal:
        raise
    except Exception as error:
        # A container that contains itself, or an object that cannot be looked at.
        raise Refusal(Reason.ARGUMENT, detail=f"looking at it raised {type(error).__name__}") from error
    return (*_state(tensors), *parts, *_repeats(tensors)), tensors


def describe_flat(args: tuple[Any, ...]) -> CallKey | None:
    """The key of positional plain tensors; ``None`` if there is anything else."""
    parts: list[Hashable] = []
    for value in args:
        if type(value) is not Tensor or value.layout is not _strided or value.is_neg() or value.is_conj():
            return None
        if value.__dict__:
            return None
        parts += (value.dtype, value.shape, value.stride(), value.device)
    state = _state(args)
    # A single tensor is repeated by none.
    return (*state, *parts, *_repeats(args)) if len(args) > 1 else (*state, *parts)


def is_flat(key: CallKey, args: tuple[Any, ...]) -> bool:
    """Whether a key says of positional tensors, without gradients, no more than their layout does."""
    # Four parts for each tensor: nothing is pending and none is repeated.
    if len(key) != STATE_PARTS + 4 * len(args) or type(key[-1]) is not torch.device:
        return False
    grad, _, around = key[:STATE_PARTS]
    without_autocast = around is None or (type(around) is tuple and type(around[0]) is int and around[1] is None)
    return grad is False and without_autocast


def substitute(args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> tuple[Any, dict[str, Any]]:
    """The same arguments in new containers, with other tensors where :func:`describe` found tensors, in its order."""
    remaining = iter(tensors)
    new_args = _replace(args, remaining)
    return new_args, _replace(kwargs, remaining)


def _walk(value: Any, where: str, parts: list[Hashable], tensors: list[Tensor]) -> None:
    if len(parts) > _MOST_PARTS:
        raise Refusal(Reason.ARGUMENT, where.partition("[")[0], f"more than {_MOST_PARTS} values")
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        if value.layout is not torch.strided:
            raise Refusal(Reason.ARGUMENT, where, f"a tensor of layout {value.layout}")
        parts += (value.dtype, value.shape, value.stride(), value.device)
        if value.is_conj() or value.is_neg():
            parts.append((value.is_conj(), value.is_neg()))
        if value.__dict__:
            # Attributes that somebody gave it; a module may look at them.
            parts.append(ATTRIBUTES)
            _constant(dict(value.__dict__), f"an attribute of {where}", parts)
        tensors.append(value)
    elif kind is float:
        parts.append((float, value.hex()))
    elif kind is complex:
        parts.append((complex, value.real.hex(), value.imag.hex()))
    elif kind in _CONSTANTS:
        parts.append((kind, value))
    elif isinstance(kind, EnumType):
        # By name, as members may be equal to other things; the names of combined flags are made of their members'.
        parts.append((kind, value._name_, None if value._name_ else int(value._value_)))
    elif kind is tuple or kind is list:
        parts.append((kind, len(value)))
        for index, item in enumerate(value):
            _walk(item, f"{where}[{index}]", parts, tensors)
    elif kind is dict:
        parts.append((dict, len(value)))
        for name, item in value.items():
            _constant(name, f"a key of {where}", parts)
            _walk(item, f"{where}[{shown(name)}]", parts, tensors)
    elif kind in _OPEN_CONSTANTS:
        parts.append((kind, len(_OPEN_CONSTANTS[kind](value))))
        for item in _OPEN_CONSTANTS[kind](value):
            _constant(item, where, parts)
    elif _is_named_tuple(kind):
        parts.append((kind, len(value)))
        for name, item in zip(kind._fields, value, strict=True):
            _walk(item, f"{where}.{name}", parts, tensors)
    elif kind in pytree.SUPPORTED_NODES:
        children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
        parts.append((kind, len(children)))
        _constant(context, where, parts)
        for index, item in enumerate(children):
            _walk(item, f"{where}[{index}]", parts, tensors)
    else:
        raise Refusal(Reason.ARGUMENT, where, f"an object of type {kind.__module__}.{kind.__qualname__}")


def _is_named_tuple(kind: type) -> bool:
    # Not one that was derived from it, which may have attributes of its own.
    return kind.__bases__ == (tuple,) and hasattr(kind, "_fields")


def _constant(value: Any, where: str, parts: list[Hashable]) -> None:
    """What :func:`substitute` does not look into, so that no tensor may be there."""
    tensors: list[Tensor] = []
    _walk(value, where, parts, tensors)
    if tensors:
        raise Refusal(Reason.ARGUMENT, where, "a tensor where only a constant can stand")


def _replace(value: Any, tensors: Any) -> Any:
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        return next(tensors)
    if kind is tuple or kind is list:
        return kind([_replace(item, tensors) for item in value])
    if _is_named_tuple(kind):
        return kind(*[_replace(item, tensors) for item in value])
    if kind is dict:
        return {name: _replace(item, tensors) for name, item in value.items()}
    if kind in pytree.SUPPORTED_NODES and kind not in _OPEN_CONSTANTS:
        node = pytree.SUPPORTED_NODES[kind]
        children, context = node.flatten_fn(value)
        return node.unflatten_fn([_replace(item, tensors) for item in children], context)
    return value


def _state(tensors: Sequence[Tensor]) -> CallKey:
    """Grad and inference mode, and what is around: autocast, and the number of an ambient state that is unusual."""
    grad = tuple([value.requires_grad for value in tensors]) if _is_grad_enabled() else False
    autocast, number = _autocast() if _is_any_autocast_enabled() else None, ambient_number()
    return grad, _is_inference(), (number, autocast) if number else autocast


def _repeats(tensors: Sequence[Tensor]) -> CallKey:
    """Which tensors are the same object as an earlier one; nothing in the usual case, that none is."""
    places: dict[int, int] = {}
    first = [places.setdefault(id(value), index) for index, value in enumerate(tensors)]
    return () if len(places) == len(tensors) else (REPEATS, *first)


def _autocast() -> Hashable:
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind))


_CONSTANTS = frozenset(
    {type(None), type, bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format}
)
_MOST_PARTS = 20_000
_OPEN_CONSTANTS: dict[type, Callable[[Any], Sequence[Any]]] = {
    torch.Size: tuple,
    slice: lambda value: (value.start, value.stop, value.step),
    range: lambda value: (value.start, value.stop, value.step),
}
