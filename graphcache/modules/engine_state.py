"""What of an engine's module outlives a process: the engine's bytes, its names and its options."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import EngineFormatError, is_a, shown

_VERSION = 1


@dataclass(frozen=True, eq=False, slots=True)
class EngineState:
    """One engine's module as plain data.

    Args:
        engine: The engine file's bytes, as a ``uint8`` tensor on the CPU; empty where there is no engine yet.
        inputs: Inputs in the order of a call.
        outputs: Outputs in the order of the answer.
        name: What messages call it.
        requires_output_allocator: Whether TensorRT allocates the outputs.
        profile: The optimisation profile that was chosen, if any.
        output_shapes: How shapes of outputs follow from those of inputs, as
            :class:`~graphcache.engines.output_shapes.OutputShapes` writes it; empty where that is not known.
    """

    engine: Tensor
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str
    requires_output_allocator: bool
    profile: int | None
    output_shapes: str

    @classmethod
    def of(cls, state: Any, label: str) -> EngineState:
        """From what a ``state_dict`` holds.

        Args:
            state: As :meth:`tree` gives it.
            label: What messages call the module that it is for.

        Raises:
            EngineFormatError: Naming the field that is missing or not what it should be.
        """
        if not is_a(state, Mapping):
            raise EngineFormatError(
                f"the state of {label} is of type {type(state).__name__}; expected the dictionary that state_dict() of "
                f"an EngineModule holds"
            )
        version = state.get("version")
        if type(version) is not int or version != _VERSION:
            raise EngineFormatError(
                f"the state of {label} has version {shown(version)}, and this graphcache reads {_VERSION}; save it "
                f"again with this release, or install the release that saved it"
            )
        engine = state.get("engine")
        if not _holds_bytes(engine):
            raise EngineFormatError(
                f"the state of {label}: engine is {_described(engine)}; expected the bytes as a uint8 tensor"
            )
        for field, right in _RIGHT.items():
            if field not in state or not right(state[field]):
                seen = shown(state[field]) if field in state else "missing"
                raise EngineFormatError(f"the state of {label}: {field} is {seen}; was it changed after it was saved?")
        return cls(
            engine.detach().cpu().contiguous(),
            tuple(state["inputs"]),
            tuple(state["outputs"]),
            state["name"],
            state["requires_output_allocator"],
            state["profile"],
            state["output_shapes"],
        )

    @property
    def tree(self) -> dict[str, Any]:
        """Tensors, lists, text, numbers and ``None``, which ``torch.load(weights_only=True)`` takes."""
        return {
            "version": _VERSION,
            "engine": self.engine,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "name": self.name,
            "requires_output_allocator": self.requires_output_allocator,
            "profile": self.profile,
            "output_shapes": self.output_shapes,
        }


def bytes_of(tensor: Tensor) -> bytes:
    """The contents of a contiguous ``uint8`` tensor on the CPU.

    Example:
        >>> bytes_of(tensor_of(b"engine"))
        b'engine'
    """
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())


def tensor_of(data: bytes) -> Tensor:
    """A ``uint8`` tensor that holds a copy of some bytes."""
    with torch.inference_mode(False):
        # torch refuses an empty buffer.
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _holds_bytes(value: Any) -> bool:
    try:
        dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested
        return dense and value.dtype is torch.uint8 and value.dim() == 1 and value.numel() > 0
    except Exception:
        # A parameter without a shape, or an object that cannot be asked.
        return False


def _described(value: Any) -> str:
    try:
        return f"{value.dtype} {list(value.shape)}"
    except Exception:
        return shown(value)


def _texts(value: object) -> bool:
    return is_a(value, list, tuple) and all(is_a(each, str) for each in value)  # type: ignore[attr-defined]


def _whole_or_none(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value < 2**31)


_RIGHT: dict[str, Callable[[object], bool]] = {
    "inputs": _texts,
    "outputs": _texts,
    "name": lambda value: type(value) is str,
    "requires_output_allocator": lambda value: type(value) is bool,
    "profile": _whole_or_none,
    "output_shapes": lambda value: type(value) is str,
}
