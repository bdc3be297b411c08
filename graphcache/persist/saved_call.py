"""A call in a file: what of it a file holds, as JSON, and from that the call again."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from graphcache.errors import Refusal, shown
from graphcache.keys.call_key import CallKey, StateName, describe
from graphcache.keys.call_spec import CallSpec, TensorSpec

MAX_TEXT = 64 * 1024
"""Characters of one call in a file."""


def saved(spec: CallSpec) -> CallSpec:
    """A call as a file holds it: without indices of devices, settings of PyTorch, and who would require gradients.

    Raises:
        ValueError: If no file can hold it.
    """
    key = spec.key
    if key.held or key.written or any(type(name) is StateName for name, _ in key.kwargs):
        raise ValueError("an object, a tensor that the call updates in place, or state that it rebinds")
    if isinstance(key.grad, tuple) and any(key.grad):
        raise ValueError("an input requires gradients")
    if len({each.device for each in spec.tensors if each.device.type != "cpu"}) > 1:
        raise ValueError("tensors on several devices")
    if any(each.pending or each.attributes for each in spec.tensors):
        raise ValueError("a tensor with attributes, or with a pending conjugation or negation")
    key = _moved(key, lambda device: torch.device(device.type))
    found = CallSpec(key._replace(grad=key.grad is not False, settings=None), spec.names)
    if len(text := text_of(found)) > MAX_TEXT:
        raise ValueError(f"{len(text)} characters as text, of which at most {MAX_TEXT} are kept")
    return found


def text_of(spec: CallSpec) -> str:
    """A :func:`saved` call as JSON."""
    # No file holds the last two, objects and addresses.
    return _text(_encoded(tuple(spec.key)[:-2]))


def of_json(tree: Any) -> CallSpec:
    """The call that :func:`text_of` wrote, from JSON; a ``ValueError`` for anything else."""
    try:
        key = CallKey(*_decoded(tree))
        found = CallSpec(key)
        # A call of the same arguments, without memory, has to describe itself in the same way.
        again = describe(*_arguments(found, lambda _: "meta")).key
        devices = iter([each.device for each in found.tensors])
        again = _moved(again, lambda _: next(devices))
        again = key._replace(settings=None, repeats=again.repeats, args=again.args, kwargs=again.kwargs)
        if text_of(CallSpec(again)) != _text(tree) or any(each.device.index is not None for each in found.tensors):
            raise ValueError("it is not as it is written here")
        casts = all(kind in ("cuda", "cpu") and to in (torch.float16, torch.bfloat16) for kind, to in key.autocast)
        if type(key.grad) is not bool or type(key.inference) is not bool or not casts:
            raise ValueError("its modes are none")
        if any(type(name) is not str for name, _ in key.kwargs):
            raise ValueError("an argument's name that is no text")
        if any(type(values) not in (tuple, type(None)) for values in key.host_values):
            raise ValueError("its values on the host are none")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, Refusal) as error:
        raise ValueError(f"{shown(tree)} is no call: {type(error).__name__}: {str(error)[:200]}") from error
    return found


def nbytes(spec: CallSpec) -> int:
    """Bytes of the tensors that :func:`example` makes."""
    pairs = enumerate(zip(_places(spec), spec.tensors, strict=True))
    return sum(_extent(each) * each.dtype.itemsize for index, (first, each) in pairs if first == index)


def example(spec: CallSpec, device: torch.device | str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call that a file can hold: zeros, laid out alike.

    Tensors that lay on the CPU beside others on a device lie on the CPU, all others on ``device``.
    """
    mixed = any(each.device.type != "cpu" for each in spec.tensors)
    return _arguments(spec, lambda own: "cpu" if mixed and own.type == "cpu" else device)


@contextmanager
def entered(spec: CallSpec) -> Iterator[None]:
    """Inside, the grad mode, inference mode and autocast are those of the call.

    Autocast for CUDA is left out where there is no CUDA device.
    """
    casts = dict(spec.key.autocast)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(spec.key.inference))
        stack.enter_context(torch.set_grad_enabled(spec.key.grad is not False))
        for kind in ("cuda", "cpu"):
            if kind in casts and (kind == "cpu" or torch.cuda.is_available()):
                stack.enter_context(torch.autocast(kind, casts[kind]))
            elif torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _arguments(
    spec: CallSpec, device_for: Callable[[torch.device], torch.device | str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of zeros, on the device that is told for the device of each."""
    made: list[torch.Tensor] = []
    for first, each in zip(_places(spec), spec.tensors, strict=True):
        made.append(made[first] if first < len(made) else _zeros(each, device_for(each.device)))
    return spec.key.arguments(made)


def _places(spec: CallSpec) -> Sequence[int]:
    """For each tensor, the place of the first that is the same object."""
    return spec.key.repeats or range(len(spec.tensors))


def _extent(spec: TensorSpec) -> int:
    """Elements from the first one in memory to the last one."""
    pairs = zip(spec.shape, spec.stride, strict=True)
    return 0 if 0 in spec.shape else 1 + sum((size - 1) * step for size, step in pairs)


def _zeros(spec: TensorSpec, device: torch.device | str) -> torch.Tensor:
    """Zeros of a layout, without gradients and outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        if spec.layout == "contiguous":
            return torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        # Elements that overlap cannot be written one by one.
        return torch.zeros(_extent(spec), dtype=spec.dtype, device=device).as_strided(spec.shape, spec.stride)


def _moved(key: CallKey, device_for: Callable[[torch.device], torch.device]) -> CallKey:
    """A key with other devices of its tensors."""

    def moved(part: Any) -> Any:
        if type(part) is not tuple or not part:
            return part
        if type(part[0]) is torch.dtype:
            return *part[:3], device_for(part[3]), *part[4:]
        return tuple(map(moved, part))

    return key._replace(args=moved(key.args), kwargs=moved(key.kwargs))


def _text(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def _encoded(part: Any) -> Any:
    """A part of a key for JSON; a ValueError for what only code can make again."""
    if part is None or type(part) in (bool, str) or (type(part) is int and part.bit_length() <= 1024):
        return part
    if type(part) in (tuple, torch.Size):
        return [_encoded(item) for item in part]
    if type(part) in _ENCODERS:
        tag, write = _ENCODERS[type(part)]
        return {tag: write(part)}
    if isinstance(part, Hashable) and part in _NAMES:
        return {"is": _NAMES[part]}
    raise ValueError(f"{shown(part)}, which no file can hold")


def _decoded(node: Any) -> Any:
    """The part of a key that :func:`_encoded` wrote."""
    if node is None or type(node) in (bool, str, int):
        return node
    if type(node) is list:
        return tuple(map(_decoded, node))
    [(tag, text)] = node.items()
    return _DECODERS[tag](text)


_KINDS = (type(None), bool, int, float, complex, str, bytes, tuple, list, dict, slice, range, torch.Size)
_OF_TORCH = (torch.dtype, torch.layout, torch.memory_format, torch.device)
_NAMES: dict[Any, str] = {
    **{kind: kind.__name__ for kind in (*_KINDS, *_OF_TORCH)},
    **{each: str(each) for each in vars(torch).values() if type(each) in _OF_TORCH[:3]},
}
"""Types and members of torch that a key may hold, by the name that stands for them in a file."""
_ENCODERS: dict[type, tuple[str, Callable[[Any], str]]] = {
    float: ("float", float.hex),
    bytes: ("bytes", bytes.hex),
    torch.device: ("device", str),
}
_DECODERS = {
    "is": {name: each for each, name in _NAMES.items()}.__getitem__,
    "float": float.fromhex,
    "bytes": bytes.fromhex,
    "device": torch.device,
}
