"""What ``graphcache run`` runs: an engine file, an ONNX model, or a function that makes a module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import graphcache
from graphcache.cli.build import check_onnx
from graphcache.cli.options import Specs, spanned
from graphcache.cli.output import environment, progress
from graphcache.cli.shapes import Shape, Spec, written
from graphcache.engines.library import require_gpu
from graphcache.errors import ConfigError
from graphcache.serving.factories import is_factory, named_object, raised


@dataclass(frozen=True)
class TargetCall:
    """One set of inputs.

    Args:
        label: What was asked for, such as ``"x:8x64"``.
        args: Positional arguments.
        kwargs: Keyword arguments.
        inputs: The tensors by the names of the inputs.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What is to be run.

    Args:
        name: As it was typed.
        module: The module to call.
        device: Where its inputs go.
    """

    name: str
    module: nn.Module
    device: torch.device

    @property
    def versions(self) -> dict[str, str]:
        """What figures of it depend on."""
        parts = self.module.modules()
        return environment(self.device, tensorrt=any(isinstance(part, graphcache.EngineModule) for part in parts))

    def call(self, point: Mapping[str, Spec], generator: torch.Generator) -> TargetCall:
        """A call with random values: floats normally distributed, integers 0 or 1, which any table can look up."""
        if isinstance(self.module, graphcache.EngineModule):
            return self._engine_call(self.module, point, generator)
        return self._bound(
            {name: _random(spec.shapes[0], _dtype(spec), generator, self.device) for name, spec in point.items()}
        )

    def given(self, inputs: Mapping[str, Tensor]) -> TargetCall:
        """A call with tensors that were given."""
        if not isinstance(self.module, graphcache.EngineModule):
            return self._bound({name: tensor.to(self.device) for name, tensor in inputs.items()})
        bindings = {binding.name: binding for binding in self.module.engine.inputs}
        if set(inputs) != set(bindings):
            raise click.ClickException(
                f"{self.name} has the inputs {', '.join(bindings)}; given are {', '.join(inputs)}"
            )
        moved = {
            name: inputs[name] if binding.on_host else inputs[name].to(self.device)
            for name, binding in bindings.items()
        }
        return TargetCall(_label(moved), tuple(moved.values()), {}, moved)

    def _bound(self, inputs: dict[str, Tensor]) -> TargetCall:
        label = _label(inputs)
        try:
            bound = inspect.signature(self.module.forward).bind(**inputs)
        except TypeError as error:
            parameters = ", ".join(inspect.signature(self.module.forward).parameters)
            raise click.ClickException(
                f"{self.name} cannot be called with {label}: {error}; the parameters of its forward are {parameters}"
            ) from error
        return TargetCall(label, bound.args, bound.kwargs, inputs)

    def _engine_call(
        self, module: graphcache.EngineModule, point: Mapping[str, Spec], generator: torch.Generator
    ) -> TargetCall:
        bindings = {binding.name: binding for binding in module.engine.inputs}
        for name, spec in point.items():
            if name not in bindings:
                raise click.ClickException(f"{self.name} has no input {name!r}; its inputs are {', '.join(bindings)}")
            if spec.dtype is not None:
                raise click.ClickException(f"{name!r} has the dtype {spec.dtype!r}; an engine's inputs have their own")
        inputs = {}
        for name, binding in bindings.items():
            if name not in point and (-1 in binding.shape or binding.on_host):
                raise click.ClickException(
                    f"{self.name} leaves open the input {name!r} ({', '.join(map(str, binding.shape))}); give it with "
                    f"--shapes"
                )
            shape = point[name].shapes[0] if name in point else binding.shape
            if binding.on_host:
                inputs[name] = torch.tensor(shape, dtype=binding.dtype).reshape(binding.shape)
            else:
                inputs[name] = _random(shape, binding.dtype, generator, self.device)
        shown = {name: point[name].shapes[0] if name in point else bindings[name].shape for name in bindings}
        label = " ".join(f"{name}:{written(shape)}" for name, shape in shown.items())
        return TargetCall(label, tuple(inputs.values()), {}, inputs)


def resolve(text: str, shapes: Sequence[Specs], device: str | None) -> Target:
    """Load an engine, a package of one, an ONNX file (built for the shapes), or what a factory makes."""
    if is_factory(text):
        return _from_factory(text, device)
    path = Path(text)
    if device == "cpu":
        raise click.UsageError(f"{text} is no module:factory, and TensorRT engines run only on CUDA.")
    if path.suffix == ".onnx":
        check_onnx(path)
        require_gpu(f"running {text}")
        with progress(f"Building {text}"):
            engine = graphcache.build(path, shapes=spanned(shapes) or None)
        module = graphcache.load(engine, name=path.stem)
    else:
        if not path.is_file():
            raise click.ClickException(
                f"there is no file {text}; expected an engine, an ONNX model, or a factory as package.module:function "
                f"or file.py:function"
            )
        require_gpu(f"running {text}")
        loaded = graphcache.load(path)
        # A package may hold a wrapped engine; here the options are those of the command line.
        module = loaded.module if isinstance(loaded, graphcache.CachedModule) else loaded
    return Target(text, module, module.device)


def _from_factory(text: str, device: str | None) -> Target:
    try:
        found = named_object(text)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise click.ClickException(f"{text} is of type {type(found).__name__}; expected a function or an nn.Module")
        try:
            found = found()
        except Exception as error:
            raise click.ClickException(f"{text} raised {raised(error)}") from error
    if not isinstance(found, nn.Module):
        raise click.ClickException(f"{text} gave an object of type {type(found).__name__}; expected an nn.Module")
    if device is not None:
        if device == "cuda":
            require_gpu(f"running {text} with --device cuda")
        found = found.to(device)
    tensors: list[Tensor] = [*found.parameters(), *found.buffers()]
    where = tensors[0].device if tensors else torch.device(device or "cpu")
    return Target(text, found, where)


def _label(inputs: Mapping[str, Tensor]) -> str:
    return " ".join(f"{name}:{written(tuple(tensor.shape))}" for name, tensor in inputs.items())


def _dtype(spec: Spec) -> torch.dtype:
    found = getattr(torch, spec.dtype, None) if spec.dtype else torch.float32
    if not isinstance(found, torch.dtype):
        raise click.ClickException(f"{spec.name!r} has the dtype {spec.dtype!r}, which torch lacks; such as float16")
    return found


def _random(shape: Shape, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(device, dtype)
    return torch.randint(2, shape, generator=generator).to(device, dtype)
