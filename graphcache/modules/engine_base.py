"""The part of an engine's module that holds the engine: its settings, and what copies of it have."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from graphcache.capture.engine_like import EngineLike, alive
from graphcache.config import Specialization, check_bool
from graphcache.engines.context import ContextPool
from graphcache.engines.engine import Engine
from graphcache.engines.kernel_cache import RuntimeCache
from graphcache.errors import ClosedError, ConfigError, EngineError, shown
from graphcache.events import Observers
from graphcache.graphs.stream_order import StreamOrder
from graphcache.modules.engine_runner import EngineRunner
from graphcache.modules.packaging import Source
from graphcache.modules.portable import EngineState, bytes_of, on_index, tensor_of
from graphcache.modules.transparent import controls

_OF_AN_ENGINE = frozenset({"engine", "device", "order", "host_inputs", "contexts"})
"""Attributes that a module without an engine does not have."""
_NOT_COPIED = _OF_AN_ENGINE - {"device"} | {"users", "epoch", "identity", "runtime_choice", "use_pre_allocated_outputs"}
_NOT_COPIED |= {"_runner", "_cached", "_observers", "_refitted"}


class EngineBase(EngineLike):
    """A module that holds an engine. A setting takes effect with the next call, and graphs of before are stale."""

    _unowned = False

    def __init__(
        self,
        serialized_engine: bytes | None = None,
        input_binding_names: Sequence[str] | None = None,
        output_binding_names: Sequence[str] | None = None,
        *,
        name: str = "",
        settings: Any = None,
        weight_name_map: Any = None,
        requires_output_allocator: bool = False,
        keep_kernels: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.settings = settings
        self.weight_name_map = weight_name_map
        self.requires_output_allocator = requires_output_allocator
        self.keep_kernels = keep_kernels
        self.input_binding_names = list(input_binding_names or ())
        self.output_binding_names = list(output_binding_names or ())
        self.output_shapes = ""
        """How shapes of outputs follow from those of inputs, for tracers; found when it is first needed."""
        self.source: Source | None = None
        """What the engine was built from, for packages; see :meth:`save`."""
        # No parameter and no buffer: .to() and .half() leave it. A state_dict refers to it, without another copy.
        self._bytes = tensor_of(b"")
        self._profile: int | None = None
        self._use_output_allocator = False
        self._begin()
        if serialized_engine is not None:
            self._attach(self._deserialised(serialized_engine, input_binding_names, output_binding_names, name))
            self._bytes = tensor_of(bytes(serialized_engine))

    def _begin(self) -> None:
        """Set everything that is of this process, which no copy has."""
        self._runner = EngineRunner()
        self.users: WeakSet[Any] = WeakSet()
        self.epoch = 0
        self._cached: Any = None
        self._observers = Observers()
        self._refitted = False
        self.use_pre_allocated_outputs = False
        self.runtime_choice: tuple[Specialization | None, RuntimeCache | None] = None, None
        self.identity = secrets.token_hex(16)
        """By which programs that were traced in this process find the module."""
        alive[self.identity] = self

    def _deserialised(self, data: bytes, inputs: Any, outputs: Any, name: str) -> Engine:
        """An engine of this module's options, on the device that it had before if this machine has it."""
        with on_index(self.__dict__.get("device")):
            return Engine(data, inputs=inputs, outputs=outputs, name=name, keep_kernels=self.keep_kernels)

    def _attach(self, engine: Engine) -> None:
        """Take an engine, where there is none or a closed one."""
        self.engine, self.name = engine, engine.name
        self.input_binding_names = [binding.name for binding in engine.inputs]
        self.output_binding_names = [binding.name for binding in engine.outputs]
        self.host_inputs = engine.host_inputs
        self.contexts = ContextPool(engine)
        """Contexts for graphs; eager calls have one of their own."""
        self._refitted = False
        if "order" not in self.__dict__:
            self.device = engine.device
            self.order = StreamOrder(self.device.index)
        self._runner.attach(engine, self.order)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_AN_ENGINE:
            raise EngineError(
                f"{self.__dict__.get('name') or 'this EngineModule'} holds no engine yet; load_state_dict() gives it "
                f"one, or the constructor does"
            )
        return super().__getattr__(name)

    def _drop_graphs(self, *, wait: bool = True) -> None:
        for user in list(self.users):
            controls(user).clear(wait=wait)

    def _drop_contexts(self) -> None:
        """Give back the execution contexts that no graph uses."""
        self._runner.drop()
        self.contexts.clear()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, nothing runs, and the engine has no graphs and no idle contexts, so that it may be changed."""
        self._drop_graphs()
        with self.order.lock:
            self.order.release(self._drop_contexts)
            yield
            # A graph that another thread has captured meanwhile is of before.
            self.epoch += 1

    # ---- settings, under the names of Torch-TensorRT

    def set_optimization_profile(self, profile: int | Literal["auto"] | None) -> None:
        """Use one optimisation profile for every call, or (``None``, ``"auto"``) whichever fits, the current one first.

        Raises:
            ConfigError: If the engine has no such profile.
        """
        profile = None if profile == "auto" else profile
        self._check_profile(profile, self.engine)
        self.epoch += self._profile != profile
        self._profile = profile

    @property
    def profile_choice(self) -> int | None:
        """The profile chosen with :meth:`set_optimization_profile`, if any."""
        return self._profile

    def set_use_output_allocator(self, enable: bool) -> bool:
        """Let TensorRT allocate the outputs of every call, or no longer; return what was set before."""
        before, self._use_output_allocator = self._use_output_allocator, bool(enable)
        self.epoch += before != self._use_output_allocator
        return before

    @property
    def uses_output_allocator(self) -> bool:
        """Whether TensorRT allocates the outputs of every call."""
        return self.requires_output_allocator or self._use_output_allocator

    def enable_profiling(self, profiler: Any = None) -> None:
        """Let TensorRT report the time of every layer of every call. Meanwhile calls run eagerly, and wait.

        Args:
            profiler: An ``IProfiler`` of the TensorRT in use; ``None`` for TensorRT's own, which prints.
        """
        self.check_open()
        if profiler is None:
            profiler = self.engine.trt.Profiler()
        elif not hasattr(profiler, "report_layer_time"):
            raise ConfigError(f"profiler={shown(profiler)}: expected an IProfiler, which has report_layer_time")
        self._set_profiler(profiler)

    def disable_profiling(self) -> None:
        """No longer report; does nothing if nothing was reported."""
        self.check_open()
        if self.profiling_enabled:
            self._set_profiler(None)

    def _set_profiler(self, profiler: Any) -> None:
        """Exchange the profiler, and the contexts with it, off which it cannot be taken."""
        with self.order.lock:
            self._runner.profiler = profiler
            self.epoch += 1
            self.order.release(self._drop_contexts)

    @property
    def profiling_enabled(self) -> bool:
        """Whether TensorRT reports the time of every layer."""
        return self._runner.profiler is not None

    def get_layer_info(self) -> str:
        """TensorRT's description of the engine's layers, as JSON."""
        self.check_open()
        return self.engine.layer_information()

    def set_pre_allocated_outputs(self, enable: bool) -> bool:
        """Make the outputs of the next eager call at the end of each one, while the device works; replays need it not.

        A call on the same stream whose outputs have the same shapes uses them. Returns what was set before.
        """
        before, self.use_pre_allocated_outputs = self.use_pre_allocated_outputs, check_bool("enable", enable)
        return before

    def set_output_tensors_as_unowned(self, enabled: bool) -> None:
        """Kept for :meth:`are_output_tensors_unowned`. Whatever is set, outputs are the caller's."""
        self._unowned = check_bool("enabled", enabled)

    def are_output_tensors_unowned(self) -> bool:
        """What was set."""
        return self._unowned

    def setup_engine(self) -> None:
        """Does nothing: an engine is set up when its module is made."""
        self.check_open()

    def configure_runtime(
        self, specialization: Specialization | None = None, kernels: RuntimeCache | None = None
    ) -> None:
        """Set how TensorRT-RTX compiles kernels for this engine at run time. Drops its graphs and contexts.

        Args:
            specialization: ``"lazy"`` compiles in the background, ``"eager"`` within the first call, ``"none"`` nothing
                for single shapes; ``None`` for ``"eager"`` (``"none"`` with 1.4, which answers wrongly otherwise). A
                graph keeps the kernels that it was captured with: with ``"lazy"`` possibly slow ones.
            kernels: Where compiled kernels go; ``None`` for a cache of this engine's own.
        """
        self.check_open()
        if self.runtime_choice != (specialization, kernels):
            with self._changing():
                self.engine.configure(specialization, kernels)
                self.runtime_choice = specialization, kernels

    def save_kernels(self) -> bool:
        """Write the kernels that were compiled since, where ``keep_kernels`` is on; whether there were any."""
        return self.engine.save_kernels()

    # ---- the engine in a state_dict, in copies and in pickles

    @property
    def holds_engine(self) -> bool:
        """Whether there is an engine; an empty module gets one by ``load_state_dict()``."""
        return "engine" in self.__dict__

    def engine_tensor(self) -> Tensor:
        """The engine's bytes as a ``uint8`` tensor on the CPU, which is the module's own: do not write into it."""
        if self._refitted:
            with self.order.lock:
                self.order.wait()
                self._bytes = tensor_of(self.engine.serialized())
                self._refitted = False
        return self._bytes

    @property
    def serialized_engine(self) -> bytes:
        """The engine file's bytes, with the weights of the last :meth:`refit`; empty where there is no engine yet."""
        return bytes_of(self.engine_tensor())

    def lies_at(self, place: tuple[int, int]) -> bool:
        """Whether an address and a number of bytes are those of this module's bytes: the same memory, not a copy."""
        return place == (self._bytes.data_ptr(), self._bytes.numel())

    def _check_profile(self, profile: int | None, engine: Engine) -> None:
        if profile is not None and (type(profile) is not int or not 0 <= profile < engine.profiles):
            raise ConfigError(f"{self.name} has optimisation profiles 0 to {engine.profiles - 1}, not {profile}")

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` holds: the bytes as a tensor (not a copy), names and options, no weight budget."""
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
        engine: Engine | None = self.__dict__.get("engine")
        if (
            engine is None
            or engine.closed
            or (self.input_binding_names, self.output_binding_names) != (given.inputs, given.outputs)
            or not torch.equal(self.engine_tensor(), given.engine)
        ):
            engine = self._deserialised(bytes_of(given.engine), given.inputs, given.outputs, given.name)
        self._check_profile(given.profile, engine)
        if engine is not self.__dict__.get("engine"):
            self._exchange(engine)
            self._bytes, self.source = given.engine, None
        self.name, self.output_shapes = given.name, given.output_shapes
        self.requires_output_allocator, self._profile = given.requires_output_allocator, given.profile
        self.epoch += 1

    def _exchange(self, engine: Engine) -> None:
        """Put an engine in the place of this one, with nothing of the old one left."""
        if not self.holds_engine:
            self._attach(engine)
            return
        if self.users and engine.host_inputs != self.host_inputs:
            raise EngineError(
                f"{self.name} is wrapped, and the other engine reads other inputs on the host; wrap it after loading"
            )
        with self._changing():
            self.engine.check_unused("loading another engine")
            self.engine.close()
            self._attach(engine)

    def __getstate__(self) -> dict[str, Any]:
        if self.holds_engine and self.engine.closed:
            raise ClosedError(f"{self.name} was closed, so it cannot be copied or pickled; load it again")
        self.engine_tensor()
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()
        if self._bytes.numel():
            data, names = bytes_of(self._bytes), (self.input_binding_names, self.output_binding_names)
            self._attach(self._deserialised(data, *names, self.name))
        elif "device" in self.__dict__:
            # In pickles of 0.1.
            del self.device

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = self.__getstate__()
        memo[id(self._bytes)] = self._bytes
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied
