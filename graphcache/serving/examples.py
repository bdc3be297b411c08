"""Requests to prepare, and what can be told of a model from them: names, dtypes, shapes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.buckets.spec import Buckets
from graphcache.errors import ConfigError, shown
from graphcache.modules.engine import EngineModule
from graphcache.serving.backend import TensorMetadata
from graphcache.serving.batching import Batcher, Tensors, argument_names


def given_example(given: Mapping[str, Any], engine: EngineModule | None, buckets: Buckets) -> dict[str, Tensor]:
    """One row of what was given for a request."""
    bindings = {} if engine is None else {each.name: each for each in engine.engine.inputs}
    made = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            made[str(name)] = value.detach()[:1].cpu()
            continue
        is_shape = isinstance(value, (tuple, list)) and all(type(size) is int and size >= 0 for size in value)
        if not is_shape or not value:
            raise ConfigError(f"prepare[{shown(name)}]={shown(value)}: expected a tensor, or a shape, with rows")
        dtype = bindings[name].dtype if name in bindings else torch.float32
        made[str(name)] = torch.zeros([1, *value[1:]], dtype=dtype)
    for name, binding in bindings.items():
        if name not in made and name not in buckets.masks and -1 not in binding.shape[1:]:
            made[name] = torch.zeros([1, *binding.shape[1:]], dtype=binding.dtype)
    return made


def usual_examples(name: str, engine: EngineModule | None, batcher: Batcher, most: int) -> list[dict[str, Tensor]]:
    """One row of each combination of an engine's buckets, where nobody said what to prepare."""
    if engine is None:
        raise ConfigError(
            f"{name}: a module does not say what it takes; expected prepare=[{{'x': torch.zeros(1, 64)}}], or on the "
            f"command line --prepare x:1x64"
        )
    buckets = batcher.buckets
    others = {symbol: sizes for symbol, sizes in buckets.sizes.items() if symbol != batcher.symbol}
    found = []
    for chosen in itertools.islice(itertools.product(*others.values()), most):
        sizes = {**dict(zip(others, chosen, strict=True)), batcher.symbol: 1}
        example = {}
        for binding in engine.engine.inputs:
            shape = list(binding.shape)
            for axis, place in zip(buckets.inputs[binding.name], buckets.places(binding.name, len(shape)), strict=True):
                shape[place] = sizes[axis.symbol]
            if -1 in shape:
                raise ConfigError(
                    f"{name} leaves open axis {shape.index(-1)} of {binding.name!r}; expected buckets for it, or what "
                    f"to prepare, such as {binding.name}:{'x'.join(str(max(size, 1)) for size in shape)}"
                )
            example[binding.name] = torch.zeros(shape, dtype=binding.dtype)
        found.append(example)
    return found


def input_names(name: str, arguments: inspect.Signature | Sequence[str]) -> list[str]:
    """The inputs that every call has."""
    found, _ = argument_names(arguments)
    if not found:
        raise ConfigError(f"{name}: forward{arguments} names no input; expected buckets={{'name': {{0: [1, 8]}}}}")
    return list(found)


def specs_of(examples: Sequence[Tensors], axes: Mapping[str, Sequence[int]]) -> tuple[TensorMetadata, ...]:
    """Names, dtypes and shapes of some tensors; -1 where an axis is open, or differs from one example to the next."""
    found = []
    for name, first in examples[0].items():
        same = [other[name].shape for other in examples if name in other and other[name].dim() == first.dim()]
        shape = [size if all(other[at] == size for other in same) else -1 for at, size in enumerate(first.shape)]
        for axis in axes.get(name, ()):
            shape[axis] = -1
        found.append(TensorMetadata(name, str(first.dtype).removeprefix("torch."), tuple(shape)))
    return tuple(found)
