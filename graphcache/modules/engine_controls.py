"""What Torch-TensorRT's modules let one set on an engine, under their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphcache.config import Specialization
from graphcache.engines.kernel_cache import RuntimeCache
from graphcache.errors import Cause, ClosedError, ConfigError, Reason, shown
from graphcache.graphs import driver
from graphcache.modules.controls import controls
from graphcache.modules.observers import GraphsAlone, Observer, Observers, check

if TYPE_CHECKING:
    from graphcache.engines.context import Context
    from graphcache.modules.engine import EngineModule


class EngineControls(nn.Module):
    """Profiling, outputs made ahead, and what TensorRT-RTX compiles; nothing by itself, a base of an engine's module.

    Everything here concerns one engine and takes effect with its next call.
    """

    _profiler: Any = None
    _ahead: OutputsAhead | None = None
    _runtime: tuple[Specialization | None, RuntimeCache | None] = (None, None)
    _unowned = False
    _observers: Observers | None = None

    def enable_profiling(self, profiler: Any = None) -> None:
        """Let TensorRT report the time of every layer of every call; calls run eagerly meanwhile, and wait.

        Args:
            profiler: An ``IProfiler`` of the TensorRT in use; ``None`` for TensorRT's own, which prints.
        """
        engine = self._open()
        if profiler is None:
            profiler = engine.engine.trt.Profiler()
        elif not hasattr(profiler, "report_layer_time"):
            raise ConfigError(f"profiler={shown(profiler)}: expected an IProfiler, which has report_layer_time")
        with engine.lane.lock:
            self._profiler = profiler
            engine.epoch += 1
            # A profiler cannot be taken off a context.
            engine.lane.release(engine._drop_contexts)

    def disable_profiling(self) -> None:
        """No longer report; does nothing if nothing was reported."""
        engine = self._open()
        with engine.lane.lock:
            if self._profiler is not None:
                self._profiler = None
                engine.epoch += 1
                engine.lane.release(engine._drop_contexts)

    @property
    def profiling_enabled(self) -> bool:
        """Whether TensorRT reports the time of every layer."""
        return self._profiler is not None

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer of the engine's eager runs, and of its own graphs under ``set_cudagraphs_mode(True)``.

        Of graphs of a wrapped module, that module tells: :meth:`CachedModule.observe`.

        Returns:
            A function that ends it.

        Raises:
            ConfigError: For what has no ``before`` and ``after``.
        """
        check(observer)
        engine = self._open()
        with engine.lane.lock:
            if self._observers is None:
                self._observers = Observers()
                self._observers.join(engine)
        ends = self._observers.add(observer), engine._through_cache().observe(GraphsAlone(observer))

        def end() -> None:
            for each in ends:
                each()

        return end

    def get_layer_info(self) -> str:
        """What TensorRT tells of the engine's layers, as JSON."""
        return self._open().engine.layer_information()

    def set_pre_allocated_outputs(self, enable: bool) -> bool:
        """Make the outputs of the next eager call at the end of each one, while the device works.

        They serve a call on the same stream whose outputs have the same shapes. What a call returns is the caller's
        all the same: no two calls return the same memory. Replays do not need it.

        Returns:
            What was set before.
        """
        before, self._ahead = self._ahead is not None, OutputsAhead() if _bool("enable", enable) else None
        return before

    @property
    def use_pre_allocated_outputs(self) -> bool:
        """Whether the outputs of the next eager call are made at the end of each one."""
        return self._ahead is not None

    def forget_outputs(self) -> None:
        """Give back outputs that were made ahead; the next call makes its own."""
        if self._ahead is not None:
            self._ahead = OutputsAhead()

    def set_output_tensors_as_unowned(self, enabled: bool) -> None:
        """Kept for :meth:`are_output_tensors_unowned`. Whatever is set, outputs are the caller's."""
        self._unowned = _bool("enabled", enabled)

    def are_output_tensors_unowned(self) -> bool:
        """What was set."""
        return self._unowned

    def setup_engine(self) -> None:
        """Does nothing: an engine is set up when its module is made."""
        self._open()

    def configure_runtime(
        self, specialization: Specialization | None = None, kernels: RuntimeCache | None = None
    ) -> None:
        """How TensorRT-RTX compiles kernels for this engine at run time. Drops its graphs and contexts.

        Args:
            specialization: ``"lazy"`` compiles beside the calls, ``"eager"`` within the first one, ``"none"`` compiles
                nothing for single shapes; ``None`` for ``"eager"`` (``"none"`` with 1.4, which answers wrongly
                otherwise). A graph keeps the kernels that it was captured with, so that with ``"lazy"`` it may keep
                slower ones for good.
            kernels: Where compiled kernels go; ``None`` for a cache of this engine's own.
        """
        engine = self._open()
        if self._runtime != (specialization, kernels):
            for user in list(engine.users):
                controls(user).clear()
            with engine.lane.lock:
                engine.lane.release(engine._drop_contexts)
                engine.engine.configure(specialization, kernels)
                self._runtime = specialization, kernels
                engine.epoch += 1

    @property
    def runtime_choice(self) -> tuple[Specialization | None, RuntimeCache | None]:
        """What was set with :meth:`configure_runtime`."""
        return self._runtime

    def forbids_profiled(self) -> Cause | None:
        """Why no call can be captured while TensorRT reports."""
        return None if self._profiler is None else Cause(Reason.PROFILING, self._open().name)

    def _open(self) -> EngineModule:
        engine: Any = self
        if engine.engine.closed:
            raise ClosedError(f"{engine.name} was closed; load it again")
        module: EngineModule = engine
        return module


class OutputsAhead:
    """Outputs for the next call of an engine, made at the end of the one before."""

    def __init__(self) -> None:
        self._made: list[Tensor] = []
        self._stream = 0

    def take(self, shapes: Sequence[tuple[int, ...] | None], stream: int) -> list[Tensor | None] | None:
        """The outputs that were made, if they are of these shapes and for this stream; they are gone then.

        Args:
            shapes: Of the outputs.
            stream: A raw handle. While it is captured there are none: a graph's memory comes from its own pool.
        """
        made, self._made = self._made, []
        fits = made and self._stream == stream and [tuple(each.shape) for each in made] == list(shapes)
        return [*made] if fits and not driver.is_capturing(stream) else None

    def make(self, like: Sequence[Tensor], stream: int) -> None:
        """Make outputs like those of a call that was enqueued on the current stream."""
        if not driver.is_capturing(stream):
            self._made = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in like]
            self._stream = stream


def report_to(module: EngineControls, context: Context) -> None:
    """Attach the profiler of a module to a new context, if there is one."""
    if module._profiler is not None:
        context.report_to(module._profiler)


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: expected True or False")
    return value
