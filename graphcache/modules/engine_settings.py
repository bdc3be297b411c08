"""Settings of an engine's module, under the names of Torch-TensorRT."""

from __future__ import annotations

from typing import Any, Literal

from graphcache.config import Specialization
from graphcache.engines.kernel_cache import RuntimeCache
from graphcache.errors import ClosedError, ConfigError, shown
from graphcache.modules.engine_runner import PreallocatedOutputs
from graphcache.modules.engine_state import EngineBase


class EngineSettings(EngineBase):
    """What may be set on an engine's module. A setting takes effect with the next call; graphs of before are stale."""

    _use_output_allocator: bool
    _unowned = False

    def set_optimization_profile(self, profile: int | Literal["auto"] | None) -> None:
        """Use one optimisation profile for every call, or (``None``, ``"auto"``) whichever fits, the current one first.

        Raises:
            ConfigError: If the engine has no such profile.
        """
        if profile == "auto":
            profile = None
        self.check_profile(profile, self.engine)
        self.epoch += self._profile != profile
        self._profile = profile

    def set_use_output_allocator(self, enable: bool) -> bool:
        """Let TensorRT allocate the outputs of every call, or no longer; return what was set before."""
        before, self._use_output_allocator = self._use_output_allocator, bool(enable)
        self.epoch += before != self._use_output_allocator
        return before

    @property
    def uses_output_allocator(self) -> bool:
        """Whether TensorRT allocates the outputs of every call."""
        return self.requires_output_allocator or self._use_output_allocator

    @property
    def profile_choice(self) -> int | None:
        """The profile chosen with :meth:`set_optimization_profile`, if any."""
        return self._profile

    def get_streamable_device_memory_budget(self) -> int:
        """Bytes of weights that may be streamed; 0 if the engine was not built for it."""
        return self.engine.streamable_bytes

    def get_automatic_device_memory_budget(self) -> int:
        """The budget that TensorRT would choose for the device memory that is free now, in bytes."""
        return self.engine.automatic_weight_budget

    def get_device_memory_budget(self) -> int:
        """Bytes of the streamable weights that are kept on the device."""
        return self.engine.weight_budget

    def set_device_memory_budget(self, budget_bytes: int) -> int:
        """Keep fewer or more of the streamable weights on the device.

        Waits for the engine's work and drops every graph of it: a budget cannot change while contexts live. Below the
        full budget the engine runs eagerly, with the reason ``weight_streaming``.

        Args:
            budget_bytes: 0 to :meth:`get_streamable_device_memory_budget`.

        Returns:
            The budget that TensorRT set, in bytes.

        Raises:
            ConfigError: If the engine streams no weights, or for a budget outside that range.
            EngineError: If a session or a capture of the caller's still uses the engine. The budget is unchanged.
        """
        self._drop_graphs()
        with self.lane.lock:
            self.lane.release(self._drop_contexts)
            self.engine.set_weight_budget(budget_bytes)
            self.epoch += 1
        return self.engine.weight_budget

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

    @property
    def profiling_enabled(self) -> bool:
        """Whether TensorRT reports the time of every layer."""
        return self._runner.profiler is not None

    def get_layer_info(self) -> str:
        """TensorRT's description of the engine's layers, as JSON."""
        self.check_open()
        return self.engine.layer_information()

    def set_pre_allocated_outputs(self, enable: bool) -> bool:
        """Make the outputs of the next eager call at the end of each one, while the device works.

        They are used by a call on the same stream whose outputs have the same shapes. No two calls return the same
        memory. Replays do not need it. Returns what was set before.
        """
        before = self.use_pre_allocated_outputs
        self._runner.preallocated = PreallocatedOutputs() if _bool("enable", enable) else None
        return before

    @property
    def use_pre_allocated_outputs(self) -> bool:
        """Whether the outputs of the next eager call are made at the end of each one."""
        return self._runner.preallocated is not None

    def set_output_tensors_as_unowned(self, enabled: bool) -> None:
        """Kept for :meth:`are_output_tensors_unowned`. Whatever is set, outputs are the caller's."""
        self._unowned = _bool("enabled", enabled)

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
                for single shapes; ``None`` for ``"eager"`` (``"none"`` with 1.4, which answers wrongly
                otherwise). A graph keeps the kernels that it was captured with: with ``"lazy"`` possibly slow ones.
            kernels: Where compiled kernels go; ``None`` for a cache of this engine's own.
        """
        self.check_open()
        if self._runtime != (specialization, kernels):
            self._drop_graphs()
            with self.lane.lock:
                self.lane.release(self._drop_contexts)
                self.engine.configure(specialization, kernels)
                self._runtime = specialization, kernels
                self.epoch += 1

    @property
    def runtime_choice(self) -> tuple[Specialization | None, RuntimeCache | None]:
        """What was set with :meth:`configure_runtime`."""
        return self._runtime

    def check_open(self) -> None:
        """Raise a ``ClosedError`` if the engine was closed."""
        if self.engine.closed:
            raise ClosedError(f"{self.name} was closed; load it again")

    def _set_profiler(self, profiler: Any) -> None:
        """Exchange the profiler. It cannot be taken off a context."""
        with self.lane.lock:
            self._runner.profiler = profiler
            self.epoch += 1
            self.lane.release(self._drop_contexts)


def _bool(name: str, value: object) -> bool:
    """The value, if it is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: expected True or False")
    return value
