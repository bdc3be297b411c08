"""Requests that are made up: to prepare, to tell what a model takes and gives, to try whether they can be batched."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.buckets.independence import dependence, observed_outputs
from graphcache.buckets.spec import Axis, Buckets, Mask
from graphcache.errors import ConfigError, shown
from graphcache.graphs.verify import padded_gap
from graphcache.modules.engine import EngineModule
from graphcache.modules.prepare import varied
from graphcache.serving.backend import TensorMetadata
from graphcache.serving.batching import Batcher, Tensors, argument_names
from graphcache.serving.kinds import Kind

Called = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


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


def with_rows(given: Any, sizes: Any, inputs: Sequence[str]) -> Buckets:
    """Buckets in which axis 0 of every input are the rows, whether anybody named them or not."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"buckets={shown(given)}: expected sizes of the rows, or arguments with axes")
    rows = Axis(sizes, name="rows")
    found: dict[Any, Any] = {}
    for name in dict.fromkeys([*inputs, *given]):
        axes = given.get(name, {})
        if isinstance(axes, Mask) or not isinstance(axes, Mapping) or 0 in axes:
            found[name] = axes
        else:
            found[name] = {0: rows, **axes}
    return Buckets(found)


def refusal(batcher: Batcher, module: Callable[..., Any], called: Called, example: Tensors, device: Any) -> str:
    """Why requests must be run one by one, as they are; empty if nothing speaks against putting them together.

    Margins are tried as :mod:`graphcache.buckets.independence` tries them, neighbours by holding what two requests get
    together against what each gets alone. Trying is no proof for other values. The batcher is told which axes of the
    answer are as long as which of the inputs, if nobody said that.
    """
    there = {name: tensor.to(device) for name, tensor in example.items()}
    try:
        if batcher.buckets.outputs is None:
            batcher.with_outputs(observed_outputs(module, (), there, batcher.padder))
        text = dependence(module, (), there, batcher.padder)
        return _neighbours(batcher, called, example) if text is None else text
    except Exception as error:
        return f"a call of other sizes raised {type(error).__name__}: {shown(str(error))}"


def valued(batcher: Batcher, kind: Kind) -> dict[str, Tensor]:
    """As many rows of a kind as go together, with values that differ; masks say that all of it is real.

    Integers are 0 or 1, which any table can look up, and 1 at the start of each row: they may be a mask by another
    name, and one that hides everything has no answer.
    """
    generator = torch.Generator().manual_seed(0)
    # Tensors of inference mode could not be filled outside of it.
    with torch.inference_mode(False), torch.no_grad():
        inputs = {name: torch.zeros((batcher.largest, *shape), dtype=dtype) for name, dtype, shape in kind}
        for name, tensor in inputs.items():
            if name in batcher.buckets.masks:
                tensor.fill_(1)
            elif tensor.is_floating_point() or tensor.is_complex():
                varied((), {name: tensor})
            elif tensor.numel():
                tensor.copy_(torch.randint(2, tensor.shape, generator=generator))
                tensor.view(len(tensor), -1)[:, 0] = 1
    return inputs


def _neighbours(batcher: Batcher, called: Called, example: Tensors) -> str:
    last = batcher.largest - 1
    if last < 1:
        return ""
    # What is last has everything else before it, which is where a sum along the rows would show.
    parts = [
        {name: tensor[rows].clone() for name, tensor in example.items()} for rows in (slice(last), slice(last, None))
    ]
    [batch] = batcher.batches([batcher.request(part) for part in parts])
    for part, got in zip(parts, batch.split(called(batch.inputs())), strict=True):
        for name, wanted in called(part).items():
            if (gap := padded_gap(got[name], wanted)) is not None:
                return f"output {name!r} of a request depends on the requests beside it (differs by {gap:.3g})"
    return ""
