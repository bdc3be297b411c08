"""An engine's module in another place: in a ``state_dict``, copied, pickled, sent to another process."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.engines.engine import Engine
from graphcache.errors import ClosedError, ConfigError, EngineError
from graphcache.modules.controls import controls
from graphcache.modules.engine_state import EngineState, bytes_of, tensor_of
from graphcache.modules.packaging import Source, save

_WITH_AN_ENGINE = frozenset({"engine", "device", "lane", "host_inputs", "contexts"})
_OF_THIS_PROCESS = _WITH_AN_ENGINE | {
    "_runner",
    "users",
    "epoch",
    "_cached",
    "_making_cache",
    "_refitted",
    "identity",
    "_runtime",
}


class CarriedEngine(nn.Module):
    """What an engine's module keeps beyond its process, and how it comes to life again.

    The bytes are kept as one ``uint8`` tensor on the CPU: a ``state_dict`` and an exported program refer to it, so that
    saving a module needs no second copy of its engine. No parameter and no buffer: ``.to()`` and ``.half()`` leave it.
    """

    name: str
    engine: Engine
    _bytes: Tensor
    _refitted: bool
    source: Source | None
    keep_kernels: bool
    _profile: int | None

    def __getattr__(self, name: str) -> Any:
        if name in _WITH_AN_ENGINE:
            raise EngineError(
                f"{self.__dict__.get('name') or 'this EngineModule'} holds no engine yet; load_state_dict() gives it "
                f"one, or the constructor does"
            )
        return super().__getattr__(name)

    @property
    def serialized_engine(self) -> bytes:
        """The engine file's bytes, with the weights of the last :meth:`refit`; empty where there is no engine yet."""
        return bytes_of(self.engine_tensor())

    def engine_tensor(self) -> Tensor:
        """The same bytes as a ``uint8`` tensor on the CPU, which is the module's own: do not write into it.

        Raises:
            EngineError: If the engine was refitted, and TensorRT cannot serialise it again.
        """
        if self._refitted:
            with self.lane.lock:
                self.lane.wait()
                self._bytes = tensor_of(self.engine.serialized())
                self._refitted = False
        return self._bytes

    def deserialised(
        self, data: bytes, inputs: Sequence[str] | None, outputs: Sequence[str] | None, name: str
    ) -> Engine:
        """An engine of this module's options on the current device.

        Raises:
            EngineError: As :class:`~graphcache.engines.engine.Engine`.
        """
        return Engine(data, inputs=inputs, outputs=outputs, name=name, keep_kernels=self.keep_kernels)

    def save_kernels(self) -> bool:
        """Write the kernels that were compiled since, where ``keep_kernels`` is on, for processes that start meanwhile.

        Returns:
            Whether there was something new.
        """
        return self.engine.save_kernels()

    def lies_at(self, place: tuple[int, int]) -> bool:
        """Whether an address and a number of bytes are those of this module's bytes: the same memory, not a copy."""
        return place == (self._bytes.data_ptr(), self._bytes.numel())

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` holds of this module: the bytes as a tensor (not a copy), names and options.

        A weight streaming budget is no part of it, as it depends on the device.
        """
        return EngineState(
            self.engine_tensor(),
            tuple(self.input_binding_names),
            tuple(self.output_binding_names),
            self.name,
            self.requires_output_allocator,
            self._profile,
            self.output_shapes,
        ).tree

    def set_extra_state(self, state: Any) -> None:
        """Take over an engine, its names and its options; what ``load_state_dict`` calls. Graphs are dropped.

        Raises:
            EngineFormatError: If that is no state of an engine.
            EngineError: As the constructor; or if a session or a capture of the caller's still uses the engine that
                would be replaced, or the module is wrapped and the other engine reads other inputs on the host.
                The module is unchanged.
        """
        told = EngineState.of(state, self.name or "the engine")
        if "engine" in self.__dict__ and self._is(told):
            self.check_profile(told.profile, self.engine)
        else:
            with on_index(self.__dict__.get("device")):
                engine = self.deserialised(bytes_of(told.engine), told.inputs, told.outputs, told.name)
            self.check_profile(told.profile, engine)
            self._exchange(engine)
            self._bytes, self.source = told.engine, None
        self.name, self.output_shapes = told.name, told.output_shapes
        self.requires_output_allocator, self._profile = told.requires_output_allocator, told.profile
        self.epoch += 1

    def check_profile(self, profile: int | None, engine: Engine) -> None:
        """Refuse a profile that an engine does not have.

        Raises:
            ConfigError: Naming those that it has.
        """
        if profile is not None and (type(profile) is not int or not 0 <= profile < engine.profiles):
            raise ConfigError(f"{self.name} has optimisation profiles 0 to {engine.profiles - 1}, not {profile}")

    def save(self, path: str | os.PathLike[str], *, onnx: Any = None, build: Mapping[str, Any] | None = None) -> None:
        """Write the engine as a package, for :func:`graphcache.load` of another process or machine.

        The file holds the engine's bytes, its names and options, and what it was built by and for. It is written in one
        step. It holds no code and nothing is pickled.

        Args:
            path: Of the file, in a directory that exists; ``.gcache`` is the usual ending.
            onnx: The model that the engine was built from, as a path or as bytes, so that
                ``load(..., rebuild="if_needed")`` can build it again for another TensorRT or GPU. A module that was
                loaded from a package with a model keeps it, until it is refitted.
            build: Keyword arguments of :func:`graphcache.build` for that: ``shapes``, ``weight_streaming``,
                ``refittable``, ``workspace``.

        Raises:
            ConfigError: If the file cannot be written, or for a bad option.
            EngineError: If the engine was refitted, and TensorRT cannot serialise it again.

        Example::

            engine.save("policy.gcache", onnx="policy.onnx", build={"shapes": {"x": ((1, 48), (8, 48), (64, 48))}})
        """
        save(self, path, onnx=onnx, build=build)

    def _is(self, told: EngineState) -> bool:
        names = tuple(self.input_binding_names), tuple(self.output_binding_names)
        return (
            not self.engine.closed
            and names == (told.inputs, told.outputs)
            and torch.equal(self.engine_tensor(), told.engine)
        )

    def _exchange(self, engine: Engine) -> None:
        """Put another engine in the place of this one, with nothing of the old one left."""
        if "engine" in self.__dict__:
            hosts = tuple(index for index, binding in enumerate(engine.inputs) if binding.on_host)
            if len(self.users) and hosts != self.host_inputs:
                raise EngineError(
                    f"{self.name} is wrapped, and the other engine reads other inputs on the host; wrap "
                    f"it after loading"
                )
            for user in list(self.users):
                controls(user).clear()
            with self.lane.lock:
                self.lane.release(self._drop_contexts)
                if live := len(self.engine.contexts):
                    raise EngineError(
                        f"{self.name}: {live} execution contexts are still in use, by sessions or by captures of the "
                        f"caller's; close them before loading another engine"
                    )
                self.engine.close()
                self._attach(engine)
            return
        self._attach(engine)

    def __getstate__(self) -> dict[str, Any]:
        if "engine" in self.__dict__ and self.engine.closed:
            raise ClosedError(f"{self.name} was closed, so it cannot be copied or pickled; load it again")
        self.engine_tensor()
        kept = {name: value for name, value in self.__dict__.items() if name not in _OF_THIS_PROCESS}
        return {**kept, "device": self.__dict__.get("device")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = state.pop("device", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()
        if self._bytes.numel():
            with on_index(device):
                data, names = bytes_of(self._bytes), (self.input_binding_names, self.output_binding_names)
                self._attach(self.deserialised(data, *names, self.name))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = self.__getstate__()
        memo[id(self._bytes)] = self._bytes
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied


def on_index(device: torch.device | None) -> AbstractContextManager[Any]:
    """Inside, a device is the current one; nothing changes if this machine has no such device, or it is ``None``."""
    if device is None or device.index is None or device.index >= torch.cuda.device_count():
        return nullcontext()
    return torch.cuda.device(device)
