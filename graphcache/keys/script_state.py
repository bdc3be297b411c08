"""The state of a TorchScript module, which is held in C++: no Python dictionary shows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def script_state(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """Every parameter, buffer and attribute of a TorchScript module, without its submodules.

    TorchScript hands out copies of its containers. Their items are listed in their place, with the length of each, so
    that two states are compared item by item: tensors by identity, numbers and strings by value.
    """
    held: Any = module._c
    found: dict[str, Any] = {}
    for name in attribute_names(module):
        # A parameter that may be None is an attribute without a value.
        _flatten(f".{name}", held.getattr(name) if held.hasattr(name) else None, found)
    return found


def script_constants(module: torch.jit.ScriptModule) -> list[Tensor]:
    """The tensors that the code of a TorchScript module holds; what ``freeze`` makes of its weights."""
    if "forward" not in module._c._method_names():
        return []
    _, constants = module.code_with_constants
    return [value for value in constants.const_mapping.values() if isinstance(value, Tensor)]


def settle(module: torch.jit.ScriptModule) -> None:
    """Have a TorchScript module keep its methods as attributes, which it does when each is first called."""
    for name in module._c._method_names():
        getattr(module, name, None)


def attribute_names(module: torch.jit.ScriptModule) -> list[str]:
    """The names that the type of a TorchScript module declares; they never change."""
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(module._c._type())
    return sorted(kind.get_attributes())


def _flatten(path: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, (list, tuple)):
        found[f"{path} (length)"] = len(value)
        for index, item in enumerate(value):
            _flatten(f"{path}[{index}]", item, found)
    elif isinstance(value, dict):
        found[f"{path} (length)"] = len(value)
        for key, item in value.items():
            _flatten(f"{path}[{key!r}]", item, found)
    elif isinstance(value, torch._C.ScriptObject):
        # Another object each time it is asked for. What a custom class holds is shown by nothing.
        found[path] = str(value._type())
    else:
        found[path] = value
