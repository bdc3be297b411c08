"""The part of an engine's module that holds the engine, and carries it into a ``state_dict``, copies and pickles."""

from __future__ import annotations

import copy
import ctypes
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from graphcache.capture.engine_like import EngineLike
from graphcache.config import Specialization
from graphcache.engines.context import ContextPool
from graphcache.engines.engine import Engine
from graphcache.engines.kernel_cache import RuntimeCache
from graphcache.engines.registry import alive
from graphcache.errors import ClosedError, ConfigError, EngineError, EngineFormatError, shown
from graphcache.events import Observers
from graphcache.features import features
from graphcache.fields import FieldError, read_fields
from graphcache.graphs.stream_order import StreamOrder
from graphcache.modules.controls import controls
from graphcache.modules.engine_runner import EngineRunner
from graphcache.modules.engine_source import Source

_WITH_AN_ENGINE = frozenset({"engine", "device", "lane", "host_inputs", "contexts"})
"""Attributes that a module without an engine does not have."""
_OF_THIS_PROCESS = _WITH_AN_ENGINE | {
    "_runner",
    "users",
    "epoch",
    "_cached",
    "_making_cache",
    "_refitted",
    "identity",
    "_observers",
    "_runtime",
}
"""Attributes that no copy has."""


@dataclass(frozen=True, eq=False, slots=True)
class EngineState:
    """One engine's module as plain data."""

    engine: Tensor
    """The engine file's bytes, as a ``uint8`` tensor on the CPU."""
    inputs: list[str]
    outputs: list[str]
    name: str
    requires_output_allocator: bool
    profile: int | None
    """The optimisation profile that was chosen, if any."""
    output_shapes: str
    """What :class:`~graphcache.engines.output_shapes.OutputShapes` writes; empty where that is not known."""
    version: Literal[1] = 1

    @classmethod
    def of(cls, state: Any, label: str) -> EngineState:
        """The state that a ``state_dict`` holds, or an ``EngineFormatError`` with the field that is wrong."""
        try:
            found = read_fields(cls, state)
            return replace(found, engine=_flat_bytes(found.engine))
        except FieldError as error:
            raise EngineFormatError(
                f"the state of {label}: {error}; expected what state_dict() of an EngineModule holds: save it again "
                f"with this release, or install the release that saved it"
            ) from error

    @property
    def tree(self) -> dict[str, Any]:
        """The bytes as a tensor (not a copy), lists, text, numbers and ``None``: what ``weights_only`` loads."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


class EngineBase(EngineLike):
    """A module that holds an engine.

    The bytes are kept as one ``uint8`` tensor on the CPU: a ``state_dict`` and an exported program refer to it, so that
    saving a module needs no second copy of its engine. No parameter and no buffer: ``.to()`` and ``.half()`` leave it.
    """

    output_binding_names: list[str]
    requires_output_allocator: bool
    output_shapes: str
    keep_kernels: bool
    source: Source | None
    _bytes: Tensor
    _profile: int | None

    def _begin(self) -> None:
        """Set everything that is of this process, which no copy has."""
        self._runner = EngineRunner()
        self.users: WeakSet[Any] = WeakSet()
        self.epoch = 0
        self._cached: Any = None
        self._observers: Observers | None = None
        self._making_cache = threading.Lock()
        self._refitted = False
        self._runtime: tuple[Specialization | None, RuntimeCache | None] = (None, None)
        self.identity = secrets.token_hex(16)
        """By which programs that were traced in this process find the module."""
        alive[self.identity] = self

    def _attach(self, engine: Engine) -> None:
        """Take an engine, where there is none or a closed one."""
        self.engine = engine
        self.name = engine.name
        self.input_binding_names = [binding.name for binding in engine.inputs]
        self.output_binding_names = [binding.name for binding in engine.outputs]
        self.host_inputs = tuple(index for index, binding in enumerate(engine.inputs) if binding.on_host)
        self.contexts = ContextPool(engine)
        """Contexts for graphs; eager calls have one of their own."""
        self._refitted = False
        if "lane" not in self.__dict__:
            self.device = engine.device
            self.lane = StreamOrder(self.device.index)
        self._runner.attach(engine, self.lane)

    def _drop_graphs(self, *, wait: bool = True) -> None:
        """Drop every graph of the engine."""
        for user in list(self.users):
            controls(user).clear(wait=wait)

    def _drop_contexts(self) -> None:
        """Give back the execution contexts that no graph uses."""
        self._runner.drop()
        self.contexts.clear()

    def __getattr__(self, name: str) -> Any:
        if name in _WITH_AN_ENGINE:
            raise EngineError(
                f"{self.__dict__.get('name') or 'this EngineModule'} holds no engine yet; load_state_dict() gives it "
                f"one, or the constructor does"
            )
        return super().__getattr__(name)

    @property
    def holds_engine(self) -> bool:
        """Whether there is an engine; an empty module gets one by ``load_state_dict()``."""
        return "engine" in self.__dict__

    @property
    def serialized_engine(self) -> bytes:
        """The engine file's bytes, with the weights of the last :meth:`refit`; empty where there is no engine yet."""
        return bytes_of(self.engine_tensor())

    def engine_tensor(self) -> Tensor:
        """The same bytes as a ``uint8`` tensor on the CPU, which is the module's own: do not write into it."""
        if self._refitted:
            with self.lane.lock:
                self.lane.wait()
                self._bytes = tensor_of(self.engine.serialized())
                self._refitted = False
        return self._bytes

    def deserialised(
        self, data: bytes, inputs: Sequence[str] | None, outputs: Sequence[str] | None, name: str
    ) -> Engine:
        """An engine of this module's options on the current device."""
        return Engine(data, inputs=inputs, outputs=outputs, name=name, keep_kernels=self.keep_kernels)

    def save_kernels(self) -> bool:
        """Write the kernels that were compiled since, where ``keep_kernels`` is on; whether there were any."""
        return self.engine.save_kernels()

    def lies_at(self, place: tuple[int, int]) -> bool:
        """Whether an address and a number of bytes are those of this module's bytes: the same memory, not a copy."""
        return place == (self._bytes.data_ptr(), self._bytes.numel())

    def check_profile(self, profile: int | None, engine: Engine) -> None:
        """Refuse a profile that an engine does not have."""
        if profile is not None and (type(profile) is not int or not 0 <= profile < engine.profiles):
            raise ConfigError(f"{self.name} has optimisation profiles 0 to {engine.profiles - 1}, not {profile}")

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` holds of this module: the bytes as a tensor (not a copy), names and options.

        A weight streaming budget is no part of it, as it depends on the device.
        """
        return EngineState(
            engine=self.engine_tensor(),
            inputs=list(self.input_binding_names),
            outputs=list(self.output_binding_names),
            name=self.name,
            requires_output_allocator=self.requires_output_allocator,
            profile=self._profile,
            output_shapes=self.output_shapes,
        ).tree

    def set_extra_state(self, state: Any) -> None:
        """Take over an engine, its names and its options; what ``load_state_dict`` calls. Graphs are dropped.

        Raises:
            EngineFormatError: If that is no state of an engine.
            EngineError: As the constructor; if a session or a capture of the caller's still uses the present engine; or
                if the module is wrapped and the other engine reads other inputs on the host. The module is unchanged.
        """
        given = EngineState.of(state, self.name or "the engine")
        if self._has(given):
            self.check_profile(given.profile, self.engine)
        else:
            with on_index(self.__dict__.get("device")):
                engine = self.deserialised(bytes_of(given.engine), given.inputs, given.outputs, given.name)
            self.check_profile(given.profile, engine)
            self._exchange(engine)
            self._bytes, self.source = given.engine, None
        self.name, self.output_shapes = given.name, given.output_shapes
        self.requires_output_allocator, self._profile = given.requires_output_allocator, given.profile
        self.epoch += 1

    def save(self, path: str | os.PathLike[str], *, onnx: Any = None, build: Mapping[str, Any] | None = None) -> None:
        """Write the engine as a package, for :func:`graphcache.load` of another process or machine.

        The file holds the engine's bytes, its names and options, and what it was built by and for. It holds no code and
        nothing is pickled.

        Args:
            path: The file, in a directory that exists; ``.gcache`` is the usual ending.
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
        features.save(self, path, onnx=onnx, build=build)

    def _has(self, given: EngineState) -> bool:
        """Whether this module has the engine of a state already."""
        return (
            self.holds_engine
            and not self.engine.closed
            and (self.input_binding_names, self.output_binding_names) == (given.inputs, given.outputs)
            and torch.equal(self.engine_tensor(), given.engine)
        )

    def _exchange(self, engine: Engine) -> None:
        """Put another engine in the place of this one, with nothing of the old one left."""
        if not self.holds_engine:
            self._attach(engine)
            return
        hosts = tuple(index for index, binding in enumerate(engine.inputs) if binding.on_host)
        if len(self.users) and hosts != self.host_inputs:
            raise EngineError(
                f"{self.name} is wrapped, and the other engine reads other inputs on the host; wrap it after loading"
            )
        self._drop_graphs()
        with self.lane.lock:
            self.lane.release(self._drop_contexts)
            if live := len(self.engine.contexts):
                raise EngineError(
                    f"{self.name}: {live} execution contexts are still in use, by sessions or by captures of the "
                    f"caller's; close them before loading another engine"
                )
            self.engine.close()
            self._attach(engine)

    def __getstate__(self) -> dict[str, Any]:
        if self.holds_engine and self.engine.closed:
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

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Inside, another engine may be loaded; if the block raises, engine, names and options are what they were."""
        state = self.get_extra_state() if self.holds_engine else None
        before = vars(self).copy()
        try:
            yield
        except BaseException:
            if state is not None:
                self.set_extra_state(state)
                self.source = before["source"]
            elif self.holds_engine:
                self.close()
                for name in vars(self).keys() - before.keys():
                    delattr(self, name)
                vars(self).update(before)
            raise


def bytes_of(tensor: Tensor) -> bytes:
    """The contents of a contiguous ``uint8`` tensor on the CPU."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())


def tensor_of(data: bytes) -> Tensor:
    """A ``uint8`` tensor that holds a copy of some bytes."""
    with torch.inference_mode(False):
        # torch refuses an empty buffer.
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def on_index(device: torch.device | None) -> AbstractContextManager[Any]:
    """Inside, a device is the current one; nothing changes if this machine has no such device, or it is ``None``."""
    if device is None or device.index is None or device.index >= torch.cuda.device_count():
        return nullcontext()
    return torch.cuda.device(device)


def _flat_bytes(value: Tensor) -> Tensor:
    """A tensor on the CPU that :func:`bytes_of` can read."""
    try:
        if value.layout is torch.strided and value.dtype is torch.uint8 and value.dim() == 1 and value.numel() > 0:
            return value.detach().cpu().contiguous()
    except Exception:
        pass
    raise FieldError(f"engine is {shown(value)}; expected the bytes as a uint8 tensor")
