"""Torch-TensorRT's modules as they are seen from outside: told by their names and attributes, never imported.

The attributes are those of its sources of version 2.11 (``PythonTorchTensorRTModule``, ``TorchTensorRTModule``) and
2.14 (``TorchTensorRTModule`` over a ``TRTEngine``). An engine that was loaded with its module is in the state of the
engine object only: a list whose places 1 to 5 are name, device, bytes, inputs and outputs.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_NAME, _DEVICE, _ENGINE, _INPUTS, _OUTPUTS, _ALLOCATOR = 1, 2, 3, 4, 5, 9
_BETWEEN = "%"


@dataclass(frozen=True)
class Foreign:
    """What a module of Torch-TensorRT runs.

    Names are in the order of a call; empty for the engine's own order. ``as_list`` says that several outputs are
    returned in a list, not in a tuple.
    """

    serialized: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str = ""
    device: int | None = None
    settings: Any = None
    weight_name_map: Any = None
    requires_output_allocator: bool = False
    as_list: bool = False


def described(module: nn.Module) -> Foreign | str:
    """What a module of Torch-TensorRT runs, or why it can be run by nobody else."""
    if getattr(module, "aliased_io", None):
        return "an output lies in the memory of an input, which it updates in place"
    if getattr(module, "requires_native_multidevice", False):
        return "it talks to other devices"
    state = _state(getattr(module, "engine", None))
    serialized = getattr(module, "serialized_engine", None) or state.get(_ENGINE)
    if not isinstance(serialized, (bytes, bytearray, memoryview)) or not serialized:
        return "it has no engine as yet"
    inputs, outputs = _names(module, "input", state.get(_INPUTS)), _names(module, "output", state.get(_OUTPUTS))
    if inputs is None or outputs is None:
        return "the names of its inputs and outputs are no lists of text"
    name = getattr(module, "name", "") or state.get(_NAME) or ""
    allocator = getattr(module, "requires_output_allocator", None)
    return Foreign(
        bytes(serialized),
        inputs,
        outputs,
        name=name if isinstance(name, str) else "",
        device=_device(module, state.get(_DEVICE)),
        settings=getattr(module, "settings", None),
        weight_name_map=getattr(module, "weight_name_map", None),
        requires_output_allocator=bool(state.get(_ALLOCATOR) == "1" if allocator is None else allocator),
        as_list=any(each.__name__ == "PythonTorchTensorRTModule" for each in type(module).__mro__),
    )


def _state(engine: Any) -> dict[int, Any]:
    """The places of an engine object's state, with its bytes decoded; nothing where there is none."""
    if engine is None:
        return {}
    found = getattr(engine, "serialized_info", None)
    if found is None:
        try:
            found = engine.__getstate__()
        except Exception:
            return {}
    # The state itself, or a tuple that begins with it.
    while isinstance(found, (list, tuple)) and found and isinstance(found[0], (list, tuple)):
        found = found[0]
    if not isinstance(found, (list, tuple)) or len(found) <= _OUTPUTS:
        return {}
    state = dict(enumerate(found))
    if isinstance(state[_ENGINE], str):
        try:
            state[_ENGINE] = base64.b64decode(state[_ENGINE], validate=True)
        except (binascii.Error, ValueError):
            return {}
    return state


def _names(module: nn.Module, what: str, packed: Any) -> tuple[str, ...] | None:
    found = getattr(module, f"{what}_binding_names", None) or getattr(module, f"{what}_names", None)
    if not found and isinstance(packed, str):
        found = [name for name in packed.split(_BETWEEN) if name]
    if not found:
        return ()
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        return None
    return tuple(found)


def _device(module: nn.Module, packed: Any) -> int | None:
    settings = getattr(getattr(module, "settings", None), "device", None)
    for found in (
        getattr(module, "target_device_id", None),
        getattr(getattr(module, "target_device", None), "index", None),
        getattr(settings, "gpu_id", None),
    ):
        if type(found) is int and found >= 0:
            return found
    first = str(packed).split(_BETWEEN)[0] if packed else ""
    return int(first) if first.isdecimal() and len(first) < 4 else None
