"""Calls to prepare, from whatever describes one: arguments, or shapes of an engine's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcache.engines.bindings import Binding, out_of_range
from graphcache.errors import ConfigError, InputCountError, InputRankError, is_a, shown
from graphcache.graphs.buffers import is_dense
from graphcache.modules.engine import EngineModule


@dataclass(frozen=True)
class Call:
    """Arguments of a call, for :meth:`CachedModule.prepare`.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

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


class Example(NamedTuple):
    """A call that can be made, as often as it is needed."""

    label: str
    """What messages call it."""
    nbytes: int
    """Bytes of its tensors."""
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    """Gives its arguments; what it makes of shapes, it makes anew each time."""


def example(given: Any, module: nn.Module) -> Example:
    """A call of a module, or what :meth:`CachedModule.prepare` takes for one; by name, fixed shapes may be left out."""
    if is_a(given, Call):
        return _of_arguments(tuple(given.args), dict(given.kwargs))
    if is_a(given, Tensor):
        return _of_arguments((given,), {})
    if isinstance(module, EngineModule):
        if is_a(given, Mapping):
            return _of_shapes(module, given)
        if is_a(given, tuple, list):
            return _of_shapes(module, _by_name(module, given))
    elif is_a(given, tuple):
        return _of_arguments(given, {})
    raise ConfigError(
        f"{shown(given)} is no call of {type(module).__name__}; expected a tuple of its arguments, "
        f"graphcache.Call(args, kwargs), a manifest or its path"
        + (", or shapes of its inputs" if isinstance(module, EngineModule) else "; shapes alone are for engines")
    )


def varied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give floating tensors values that differ, always the same ones; integers stay valid indices.

    A graph that reads its inputs in the wrong places would pass a comparison on zeros.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        for tensor in _tensors((args, kwargs)):
            if tensor.is_floating_point() and tensor.element_size() > 1 and is_dense(tensor):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _of_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """A call with these arguments."""
    try:
        tensors = [each for each in _tensors((args, kwargs)) if each.layout is torch.strided]
    except Exception:
        # A container that contains itself, say; no signature will describe it.
        tensors = []
    label = ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors)
    nbytes = sum(each.numel() * each.dtype.itemsize for each in tensors)
    return Example(label or "no tensors", nbytes, lambda: (args, kwargs))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in arguments."""
    return (leaf for leaf in pytree.tree_leaves(value) if type(leaf) in (Tensor, nn.Parameter) and not leaf.is_nested)


def _by_name(engine: EngineModule, given: Sequence[Any]) -> dict[str, Any]:
    """Shapes and tensors by the names of an engine's inputs."""
    names = engine.input_binding_names
    # A bare shape is that of the only input. An empty one may also be no inputs at all, which there is no engine of.
    each = [given] if _is_shape(given) and len(names) == 1 else list(given)
    if len(each) != len(names) or (_is_shape(given) and len(names) > 1 and given):
        raise InputCountError(
            f"{engine.name} takes {len(names)} inputs ({', '.join(names)}); {shown(given)} is not a shape or a tensor "
            f"for each of them"
        )
    return dict(zip(names, each, strict=True))


def _of_shapes(engine: EngineModule, given: Mapping[Any, Any]) -> Example:
    """A call of an engine from shapes and tensors by name."""
    bindings = {binding.name: binding for binding in engine.engine.inputs}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in given:
        if name not in bindings:
            raise InputCountError(f"{engine.name} has no input {shown(name)}; its inputs are {', '.join(bindings)}")
    for name, binding in bindings.items():
        if name not in given and (-1 in binding.shape or binding.on_host):
            raise InputCountError(f"input {name!r} of {engine.name} is missing; its shape {binding.shape} is open")
        value = given.get(name, binding.shape)
        shapes[name] = tuple(value.shape) if isinstance(value, Tensor) else _checked(engine, binding, value)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The tensors that were given, and new ones for shapes."""
        new = {name: _made(engine, bindings[name], shape) for name, shape in shapes.items() if name not in tensors}
        varied(tuple(new.values()), {})
        return tuple({**new, **tensors}[name] for name in bindings), {}

    nbytes = sum(
        math.prod(shapes[each.name]) * each.dtype.itemsize for each in engine.engine.inputs if not each.on_host
    )
    return Example(
        " ".join(f"{name}:{'x'.join(map(str, shape)) or '[]'}" for name, shape in shapes.items()), nbytes, make
    )


def _checked(engine: EngineModule, binding: Binding, value: Any) -> tuple[int, ...]:
    """A shape, before there is memory of that size."""
    label = f"input {binding.name!r} of {engine.name}"
    if not _is_shape(value):
        raise ConfigError(f"{label} was given {shown(value)}; expected a shape, such as (8, 64), or a tensor")
    shape = tuple(value)
    wanted = math.prod(binding.shape) if binding.on_host else len(binding.shape)
    if len(shape) != wanted:
        what = "values" if binding.on_host else "dimensions"
        raise InputRankError(f"{label} was given {shape}, {len(shape)} {what}; the engine takes {wanted}")
    fits = (all(low <= size <= high for size, (low, high) in zip(shape, each, strict=False)) for each in binding.ranges)
    if not any(fits):
        # Not even on the meta device is there a tensor of any size.
        seen: Any = torch.tensor(shape) if binding.on_host else SimpleNamespace(shape=shape)
        raise out_of_range(engine.name, binding, seen, range(len(binding.ranges)))
    return shape


def _made(engine: EngineModule, binding: Binding, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros, or of host values."""
    if binding.on_host:
        return torch.tensor(shape, dtype=binding.dtype).reshape(binding.shape)
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(shape, dtype=binding.dtype, device=engine.device).zero_()


def _is_shape(value: Any) -> bool:
    """Whether something is a sequence of sizes."""
    return isinstance(value, (tuple, list)) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in value
    )
