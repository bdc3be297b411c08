"""Modules as plain data: what a ``state_dict``, copies and pickles hold."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from graphcache.errors import EngineFormatError, shown
from graphcache.features import features
from graphcache.fields import FieldError, read_fields


@dataclass(frozen=True, eq=False, slots=True)
class EngineState:
    """One engine's module as plain data."""

    engine: Tensor
    """The engine file's bytes, as a ``uint8`` tensor on the CPU."""
    inputs: list[str]
    outputs: list[str]
    name: str
    requires_output_allocator: bool
    profile: int | None
    output_shapes: str
    """What :class:`~graphcache.engines.output_shapes.OutputShapes` writes; empty where that is not known."""
    version: Literal[1] = 1

    @classmethod
    def of(cls, state: Any, label: str) -> EngineState:
        """The state that a ``state_dict`` holds, or an ``EngineFormatError`` with the field that is wrong."""
        try:
            found = read_fields(cls, state)
            return replace(found, engine=_flat_bytes(found.engine))
        except FieldError as error:
            raise EngineFormatError(
                f"the state of {label}: {error}; expected what state_dict() of an EngineModule holds: save it again "
                f"with this release, or install the release that saved it"
            ) from error

    @property
    def tree(self) -> dict[str, Any]:
        """The bytes as a tensor (not a copy), lists, text, numbers and ``None``: what ``weights_only`` loads."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def bytes_of(tensor: Tensor) -> bytes:
    """The contents of a contiguous ``uint8`` tensor on the CPU."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())


def tensor_of(data: bytes) -> Tensor:
    """A ``uint8`` tensor that holds a copy of some bytes."""
    with torch.inference_mode(False):
        # torch refuses an empty buffer.
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def on_index(device: torch.device | None) -> AbstractContextManager[Any]:
    """Inside, a device is the current one; nothing changes if this machine has no such device, or it is ``None``."""
    if device is None or device.index is None or device.index >= torch.cuda.device_count():
        return nullcontext()
    return torch.cuda.device(device)


def again(module: Any, config: Any, name: str) -> Any:
    """What copies and pickles of wrapped modules call, also those of version 0.1."""
    return features.graph_backend(module, config, name=name)


def _flat_bytes(value: Tensor) -> Tensor:
    """A tensor on the CPU that :func:`bytes_of` can read."""
    try:
        if value.layout is torch.strided and value.dtype is torch.uint8 and value.dim() == 1 and value.numel() > 0:
            return value.detach().cpu().contiguous()
    except Exception:
        pass
    raise FieldError(f"engine is {shown(value)}; expected the bytes as a uint8 tensor")
