"""Exports a module as an ONNX model with open sizes, through ``torch.export``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.errors import ConfigError, EngineBuildError, is_a, shown


@dataclass(frozen=True, slots=True)
class Exported:
    """A module as an ONNX model in one piece, with names in the order of a call and of its answer."""

    onnx: bytes
    inputs: list[str]
    outputs: list[str]
    shapes: dict[str, tuple[tuple[int, ...], ...]]
    """Smallest, usual and largest shape of each input with open sizes, as ``graphcache.build`` takes them."""


def open_sizes(module: nn.Module, inputs: Sequence[Tensor], dynamic: Any) -> list[dict[int, Any]]:
    """Which axes of which inputs are open, checked: for each input, axis -> a ``torch.export.Dim``."""
    if dynamic is None:
        return [{} for _ in inputs]
    if not is_a(dynamic, Mapping):
        raise ConfigError(
            f"dynamic={shown(dynamic)}: expected inputs with their open axes, such as {{'x': {{0: (1, 64)}}}}"
        )
    known = _positional(module)[: len(inputs)]
    names = [*known, *(f"input_{index}" for index in range(len(known), len(inputs)))]
    found: list[dict[int, Any]] = [{} for _ in inputs]
    for key, axes in dynamic.items():
        where = f"dynamic[{shown(key)}]"
        position = names.index(key) if type(key) is str and key in names else key
        if type(position) is not int or not 0 <= position < len(inputs):
            raise ConfigError(f"{where}: there is no such input; expected one of {', '.join(names)}, or a position")
        if not is_a(axes, Mapping):
            raise ConfigError(f"{where}={shown(axes)}: expected axes with their sizes, such as {{0: (1, 64)}}")
        for axis, sizes in axes.items():
            rank = inputs[position].dim()
            if type(axis) is not int or not -rank <= axis < rank:
                raise ConfigError(f"{where}[{shown(axis)}]: the input has {rank} axes")
            place = axis % rank
            size = inputs[position].shape[place]
            low, high, dim = _dim(f"{where}[{axis}]", f"{names[position]}_{place}", sizes)
            if not low <= size <= high:
                raise ConfigError(f"{where}[{axis}]: the example has {size} there, outside of {low} to {high}")
            if low < high:
                found[position][place] = dim
    return found


def export(module: nn.Module, inputs: Sequence[Tensor], dims: Sequence[Mapping[int, Any]]) -> Exported:
    """The module as an ONNX model."""
    # An example of size 0 or 1 would be taken for a size that never changes (torch.export, "0/1 specialization").
    examples = tuple(
        resized(value, {axis: min(max(value.shape[axis], 2), dim.max) for axis, dim in axes.items()})
        for value, axes in zip(inputs, dims, strict=True)
    )
    label = type(module).__name__
    with torch.no_grad():
        try:
            program = torch.export.export(module, examples, dynamic_shapes=_shapes(module, dims))
        except Exception as error:
            raise EngineBuildError(f"torch.export cannot take {label}: {_told(error)}") from error
        spec = program.call_spec.out_spec
        flat = spec is not None and (
            spec.is_leaf() or (spec.type in (tuple, list) and all(each.is_leaf() for each in spec.children()))
        )
        if not flat:
            raise ConfigError(f"{label} returns {spec}; expected a tensor, or a tuple or list of tensors")
        try:
            made = torch.onnx.export(program, dynamo=True, verbose=False)
            assert made is not None
            model = made.model_proto
            data = model.SerializeToString()
        except ImportError as error:
            raise EngineBuildError(
                f"{label} cannot become an ONNX model: {error}. To install what that takes: "
                f'pip install "graphcache[onnx]"'
            ) from error
        except Exception as error:
            raise EngineBuildError(f"{label} cannot become an ONNX model: {_told(error)}") from error
    names = [each.name for each in model.graph.input]
    if len(names) != len(inputs):
        raise EngineBuildError(
            f"the ONNX model of {label} has the inputs {', '.join(names)}, not the {len(inputs)} given"
        )
    return Exported(
        data,
        names,
        [each.name for each in model.graph.output],
        {
            name: tuple(
                tuple(_at(which, size, axes.get(axis)) for axis, size in enumerate(value.shape)) for which in range(3)
            )
            for name, value, axes in zip(names, inputs, dims, strict=True)
            if axes
        },
    )


def resized(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """A tensor of other sizes with the same values, again and again."""
    for axis, size in sizes.items():
        if tensor.shape[axis] != size:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
    return tensor


def _at(which: int, size: int, dim: Any) -> int:
    """The smallest (0), usual (1) or largest (2) size of an axis."""
    return size if dim is None else (max(int(dim.min), 1), size, int(dim.max))[which]


def _positional(module: nn.Module) -> list[str]:
    """The names of the inputs that ``forward`` takes by position."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def _shapes(module: nn.Module, dims: Sequence[Mapping[int, Any]]) -> Any:
    """``dynamic_shapes`` of ``torch.export.export``, which wants those of ``*args`` in a tuple."""
    if not any(dims):
        return None
    given, named = [dict(axes) for axes in dims], len(_positional(module))
    if any(each.kind is each.VAR_POSITIONAL for each in inspect.signature(module.forward).parameters.values()):
        return (*given[:named], tuple(given[named:]))
    return tuple(given)


def _dim(where: str, name: str, sizes: Any) -> tuple[int, int, Any]:
    """The smallest and the largest size, and the ``Dim``, unless there is only one size."""
    if is_a(sizes, type(torch.export.Dim("n", min=1, max=2))):
        if not sizes.max < 2**31:
            raise ConfigError(f"{where}={shown(sizes)}: an engine is built for a largest size; give the Dim a max")
        return max(sizes.min, 1), sizes.max, sizes
    if not is_a(sizes, tuple, list) or len(sizes) != 2 or any(type(size) is not int for size in sizes):
        raise ConfigError(f"{where}={shown(sizes)}: expected (smallest, largest), or a torch.export.Dim")
    low, high = sizes
    if not 1 <= low <= high < 2**31:
        raise ConfigError(f"{where}={shown(sizes)}: expected 1 <= smallest <= largest < 2**31")
    return low, high, None if low == high else torch.export.Dim(name, min=low, max=high)


def _told(error: Exception) -> str:
    """An exception of torch in one line of at most 1000 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:1000]}"
