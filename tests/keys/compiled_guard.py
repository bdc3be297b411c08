"""What native guards compare, as Python tells it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch


def items_of(d: dict[Any, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Keys and values of a dictionary in the order in which it gives them."""
    return tuple(d), tuple(d.values())


def add_dict(guard: Any, d: dict[Any, Any]) -> None:
    """Let a guard hold a dictionary as it is."""
    guard.add_dict(d, *items_of(d))


def fields(x: torch.Tensor) -> tuple[Any, ...]:
    """What of a tensor must stay as it is."""
    keys = torch._C._dispatch_keys(x).raw_repr()
    return (x.untyped_storage().data_ptr(), x.storage_offset(), keys, x.dtype, tuple(x.shape), x.stride(), x._cdata)


def hold_module(guard: Any, module: torch.nn.Module) -> int:
    """Let a guard hold all Python state of a module but its tensors; says how many dictionaries that are."""
    count = 0
    for each in module.modules():
        attributes = vars(each)
        guard.add_class(each, type(each))
        guard.add_dict_of(each, attributes)
        for d in [attributes, *(value for value in attributes.values() if isinstance(value, (dict, OrderedDict)))]:
            add_dict(guard, d)
            count += 1
    return count


class Hostile:
    """An object that must never be asked: a guard compares by identity."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a guard ran Python code")

    def __hash__(self) -> int:
        return 7


class Slotted:
    """Has slots and no dictionary."""

    __slots__ = ("one", "two")


class Plain:
    """Has a dictionary."""


def plain(**attributes: Any) -> Any:
    """An object with these attributes."""
    made = Plain()
    made.__dict__.update(attributes)
    return made
