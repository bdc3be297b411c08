"""Modules that answer in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graphcache.engines.bindings import Binding
from graphcache.errors import (
    ConfigError,
    InputCountError,
    ServingError,
    UnavailableError,
    UnknownModelError,
    is_a,
    shown,
)
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.engine import EngineModule
from graphcache.modules.transparent import controls
from graphcache.modules.wrapped import device_of
from graphcache.serving.backend import ModelSpec, TensorMetadata

_T = TypeVar("_T")


class LocalBackend:
    """A backend for tests and for one process: each model has a thread of its own, so no event loop waits for it.

    Requests of a model follow one another, without batches. A request whose caller gave up is not run if it had not
    begun; else it runs to its end. Nothing is ready before :meth:`prepare`.

    Args:
        models: By the names under which they are served.
        specs: What they take and give; what is left out is read from the bindings of an engine.

    Raises:
        ConfigError: If a model is no module, has no spec, or one of several versions.

    Example:
        >>> from graphcache.serving.backend import ModelSpec, TensorMetadata
        >>> x, y = TensorMetadata("x", "float32", (-1,)), TensorMetadata("y", "float32", (-1,))
        >>> spec = ModelSpec("relu", ("1",), (x,), (y,), "pytorch")
        >>> with LocalBackend({"relu": nn.ReLU()}, specs={"relu": spec}) as backend:
        ...     backend.prepare()
        ...     asyncio.run(backend.infer("relu", None, {"x": torch.tensor([-1.0, 1.0])}))
        {'y': tensor([0., 1.])}
    """

    def __init__(self, models: Mapping[str, nn.Module], *, specs: Mapping[str, ModelSpec] | None = None) -> None:
        given = dict(specs or {})
        for name in given:
            if name not in models:
                raise ConfigError(f"specs names {shown(name)}, which is no model; the models are {', '.join(models)}")
        self._models = {name: _Model(name, module, given.get(name)) for name, module in models.items()}

    def __enter__(self) -> LocalBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def prepare(self, name: str | None = None, *calls: Any) -> None:
        """Make models ready, in their threads, and wait for that.

        Args:
            name: Of the model; ``None`` for all of them, without calls.
            calls: What :meth:`graphcache.CachedModule.prepare` takes, for a wrapped module.

        Raises:
            UnknownModelError: If there is no such model.
            ConfigError: For calls to a module that is not wrapped, or that it does not take.
        """
        if name is None:
            for each in self._models.values():
                each.prepare(())
        else:
            self._model(name, None).prepare(calls)

    def names(self) -> Sequence[str]:
        """The models that are served."""
        return list(self._models)

    async def is_ready(self, name: str, version: str | None = None) -> bool:
        """Whether a model is prepared.

        Raises:
            UnknownModelError: If there is no such model.
        """
        return self._model(name, version).ready

    async def describe(self, name: str, version: str | None = None) -> ModelSpec:
        """What a model takes and gives.

        Raises:
            UnknownModelError: If there is no such model.
        """
        return self._model(name, version).spec

    async def infer(self, name: str, version: str | None, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run a model once, as :class:`~graphcache.serving.backend.Backend` says.

        Raises:
            UnknownModelError: If there is no such model.
            UnavailableError: If it is not prepared, or the backend is closed.
            InputError: If it takes no such tensors.
            ServingError: If its answer is not what its spec says.
        """
        model = self._model(name, version)
        if not model.ready:
            raise UnavailableError(f"{name} is being prepared; ask again later")
        submitted = model.submitted(lambda: model.run(inputs))
        try:
            return await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if submitted.cancelled() and not (task and task.cancelling()):
                # By close(), and not by whoever waits here.
                raise UnavailableError(f"{name} was shut down before the request had its turn") from None
            raise

    def close(self) -> None:
        """Wait for what is running, refuse what comes; the modules stay as they are."""
        for each in self._models.values():
            each.ready = False
            each.thread.shutdown(cancel_futures=True)

    def _model(self, name: str, version: str | None) -> _Model:
        found = self._models.get(name)
        if found is None:
            raise UnknownModelError(f"there is no model {shown(name)}; the models are {', '.join(self._models)}")
        if version is not None and version not in found.spec.versions:
            raise UnknownModelError(
                f"{name} has no version {shown(version)}; its versions are {', '.join(found.spec.versions)}"
            )
        return found


class _Model:
    """One of them, with its thread."""

    def __init__(self, name: str, module: nn.Module, spec: ModelSpec | None) -> None:
        if not is_a(module, nn.Module):
            raise ConfigError(f"{name} is of type {type(module).__name__}; expected an nn.Module")
        self.module = module
        self.spec = spec or spec_of(name, module)
        if len(self.spec.versions) != 1:
            raise ConfigError(f"the spec of {name} has {len(self.spec.versions)} versions; expected one")
        self.device = device_of(module)
        self.ready = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"graphcache-{name}")

    def submitted(self, work: Callable[[], _T]) -> Future[_T]:
        try:
            return self.thread.submit(work)
        except RuntimeError as error:
            raise UnavailableError(f"{self.spec.name} is being shut down; ask again later") from error

    def prepare(self, calls: Sequence[Any]) -> None:
        if calls and not isinstance(self.module, CachedModule):
            raise ConfigError(f"{self.spec.name} is not wrapped, so that there is nothing to prepare calls for")
        self.submitted(lambda: self._prepare(calls)).result()
        self.ready = True

    def _prepare(self, calls: Sequence[Any]) -> None:
        # As calls come; a signature holds the grad mode.
        with torch.inference_mode():
            if calls:
                assert isinstance(self.module, CachedModule)
                controls(self.module).prepare(*calls)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if inputs.keys() != {each.name for each in self.spec.inputs}:
            names = ", ".join(each.name for each in self.spec.inputs)
            raise InputCountError(f"{self.spec.name} takes {names or 'nothing'}; it was given {', '.join(inputs)}")
        with torch.inference_mode():
            answer = self.module(*(inputs[each.name].to(self.device) for each in self.spec.inputs))
            return {name: self._out(name, each) for name, each in self._named(answer).items()}

    def _named(self, answer: Any) -> dict[str, Any]:
        names = [each.name for each in self.spec.outputs]
        if isinstance(answer, Mapping):
            found = dict(answer)
        else:
            several = answer if isinstance(answer, (tuple, list)) else (answer,)
            found = dict(zip(names, several, strict=False)) if len(several) == len(names) else {}
        if found.keys() != set(names):
            raise ServingError(f"{self.spec.name} gave another number of outputs than its spec has, {', '.join(names)}")
        return {name: found[name] for name in names}

    def _out(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise ServingError(f"{self.spec.name} gave an output {name} of type {type(value).__name__}, no tensor")
        # A copy in any case: the next call may write where this answer lies, before it is sent.
        return value.to("cpu", copy=True)


def spec_of(name: str, module: nn.Module) -> ModelSpec:
    """What an engine takes and gives, by its bindings; the engine may be wrapped.

    Args:
        name: Under which it is served.
        module: An engine.

    Raises:
        ConfigError: If it is no engine, whose inputs and outputs nobody knows but its maker.
    """
    inner = controls(module).module if isinstance(module, CachedModule) else module
    if not isinstance(inner, EngineModule):
        raise ConfigError(
            f"{name} is a {type(inner).__name__}, whose inputs and outputs are not known; give its ModelSpec as "
            f"specs={{{name!r}: ...}}"
        )
    inputs, outputs = (tuple(map(_tensor, each)) for each in (inner.engine.inputs, inner.engine.outputs))
    return ModelSpec(name, ("1",), inputs, outputs, "tensorrt")


def _tensor(binding: Binding) -> TensorMetadata:
    return TensorMetadata(binding.name, str(binding.dtype).removeprefix("torch."), binding.shape)
