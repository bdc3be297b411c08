"""The compiled guard, for tests, and how Python tells what it compares."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from graphcache.errors import CompileError
from graphcache.keys.native.compiled_library import compiler, load
from graphcache.keys.native.compiler import build
from graphcache.keys.native.probe import prepare


def compile_guard(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library, compiled once for all workers of a session; skips where there is no C compiler."""
    try:
        compiler("C")
    except CompileError as why:
        pytest.skip(str(why))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GRAPHCACHE_CACHE_DIR", raising=False)
        # The workers of one session share the parent of their own folders; libraries are named by their contents.
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "guards"))
        library = load(build(), "_graphcache_guard")
    with ThreadPoolExecutor(1) as apart:
        apart.submit(prepare, library).result()
    return library


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
