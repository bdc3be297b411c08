"""Calls to prepare, from whatever describes one: arguments, or shapes of an engine's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcache.engines.bindings import Binding, is_shape, sizes_of
from graphcache.errors import ConfigError, InputCountError, is_a, shown
from graphcache.graphs.buffers import is_dense
from graphcache.modules.engine import EngineModule
from graphcache.modules.transparent import TransparentModule, controls


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of a call, for :meth:`CachedModule.prepare`.

    Raises:
        ConfigError: If they are no arguments.

    Example:
        >>> call = Call((torch.zeros(2, 3),), {"scale": 0.5})
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.args, (tuple, list)):
            raise ConfigError(f"Call(args={shown(self.args)}): expected a tuple of positional arguments")
        if not isinstance(self.kwargs, Mapping) or not all(isinstance(name, str) for name in self.kwargs):
            raise ConfigError(f"Call(kwargs={shown(self.kwargs)}): expected keyword arguments by name")
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "kwargs", dict(self.kwargs))


@dataclass(frozen=True)
class Job:
    """A call to prepare, which can be made as often as it is needed."""

    target: TransparentModule
    label: str
    nbytes: int
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    """Gives its arguments; what it makes of shapes, it makes anew each time."""
    modes: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes a context in which it is prepared."""
    measured: dict[str, float] | None = None
    """What it took in another process, in seconds."""
    path: str = ""
    """Of the manifest that lists it; empty for a call that was given."""


def job_of(given: Any, target: TransparentModule) -> Job:
    """The call that :meth:`CachedModule.prepare` was given; of an engine also by shapes of its inputs."""
    module = controls(target).module
    args: tuple[Any, ...] = (given,)
    kwargs: dict[str, Any] = {}
    if is_a(given, Call):
        args, kwargs = tuple(given.args), dict(given.kwargs)
    elif isinstance(module, EngineModule) and is_a(given, Mapping, tuple, list):
        return _of_shapes(given, target, module)
    elif is_a(given, tuple):
        args = given
    elif not is_a(given, Tensor):
        raise ConfigError(
            f"{shown(given)} is no call of {type(module).__name__}; expected a tuple of its arguments, "
            f"graphcache.Call(args, kwargs), a manifest or its path, or of an engine the shapes of its inputs"
        )
    try:
        tensors = [each for each in _tensors((args, kwargs)) if each.layout is torch.strided]
    except Exception:
        # A container that contains itself, say; no signature will describe it.
        tensors = []
    label = ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors)
    nbytes = sum(each.numel() * each.dtype.itemsize for each in tensors)
    return Job(target, label or "no tensors", nbytes, lambda: (args, kwargs))


def varied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give floating tensors values that differ, always the same ones; integers stay valid indices.

    A graph that reads its inputs in the wrong places would pass a comparison on zeros.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        for tensor in _tensors((args, kwargs)):
            if tensor.is_floating_point() and tensor.element_size() > 1 and is_dense(tensor):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in arguments."""
    return (leaf for leaf in pytree.tree_leaves(value) if type(leaf) in (Tensor, nn.Parameter) and not leaf.is_nested)


def _of_shapes(given: Any, target: TransparentModule, engine: EngineModule) -> Job:
    """A call of an engine from shapes and tensors, by name or in the order of its inputs."""
    names, bindings = engine.input_binding_names, engine.engine.inputs
    if not is_a(given, Mapping):
        # A bare shape is that of the only input.
        values = [given] if is_shape(given) and len(names) == 1 else given
        if len(values) != len(names):
            raise InputCountError(
                f"{engine.name} takes {len(names)} inputs ({', '.join(names)}); {shown(given)} is not a shape or a "
                f"tensor for each of them"
            )
        given = dict(zip(names, values, strict=True))
    if unknown := [name for name in given if name not in names]:
        raise InputCountError(f"{engine.name} has no input {shown(unknown[0])}; its inputs are {', '.join(names)}")
    sizes = {each.name: sizes_of(engine.name, each, given.get(each.name)) for each in bindings}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The tensors that were given, and new ones for shapes."""
        made = [
            tensors[each.name] if each.name in tensors else _new(engine, each, sizes[each.name]) for each in bindings
        ]
        varied(tuple(value for name, value in zip(names, made, strict=True) if name not in tensors), {})
        return tuple(made), {}

    label = " ".join(f"{name}:{'x'.join(map(str, shape)) or '[]'}" for name, shape in sizes.items())
    nbytes = sum(math.prod(sizes[each.name]) * each.dtype.itemsize for each in bindings if not each.on_host)
    return Job(target, label, nbytes, make)


def _new(engine: EngineModule, binding: Binding, sizes: tuple[int, ...]) -> Tensor:
    """A tensor of zeros, or of host values."""
    if binding.on_host:
        return torch.tensor(sizes, dtype=binding.dtype).reshape(binding.shape)
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(sizes, dtype=binding.dtype, device=engine.device).zero_()
