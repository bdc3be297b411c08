"""One engine as an ``nn.Module``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from graphcache.capture.engine_like import current_scope
from graphcache.config import modes
from graphcache.engines.bindings import check_inputs, choose_profile
from graphcache.engines.output_shapes import output_shapes
from graphcache.engines.refit import by_engine_names, refit
from graphcache.errors import Cause, ConfigError, EngineError, InputCountError, Reason
from graphcache.events import Observer
from graphcache.features import features
from graphcache.graphs.operations import is_unwatched
from graphcache.graphs.stream_order import own_stream
from graphcache.modules.engine_base import EngineBase
from graphcache.modules.engine_runner import EngineCall, enqueue_into
from graphcache.modules.transparent import controls

_making_cache = threading.Lock()


class EngineModule(EngineBase):
    """A TensorRT engine that is called like a module: tensors in, tensors out.

    Bare, it runs eagerly. Behind :func:`graphcache.wrap`, or under ``set_cudagraphs_mode(True)``, each set of shapes is
    captured once and replayed from then on.

    Nothing is cast, and no tensor is moved to another device unless multi-device safe mode is on. Reading a host shape
    tensor that lies on the device waits for the stream. Outputs are fresh tensors of the caller's; they never require
    gradients. Calls from several threads follow one another. ``state_dict``, copies and pickles hold the engine, which
    they deserialise again; a deep copy shares the bytes.

    Args:
        serialized_engine: The engine file's bytes; ``None`` for a module that is empty until ``load_state_dict``.
        input_binding_names: Inputs in the order of a call; ``None`` for the engine's own order.
        output_binding_names: Outputs in the order of the answer; ``None`` for the engine's own order.
        name: What messages call it.
        settings: Kept as an attribute for code that reads it, as Torch-TensorRT's modules do; not used.
        weight_name_map: Names of weights for :meth:`refit`, as Torch-TensorRT has them.
        requires_output_allocator: Whether some output's shape depends on the data, so that TensorRT allocates it.
        keep_kernels: Keep the kernels that TensorRT-RTX compiles for new shapes in this user's cache folder, for later
            processes. They are written by :meth:`close`, :meth:`save_kernels`, or when the process ends.

    Raises:
        EngineError: One of its kinds, for bytes that are no engine of this machine.
        NoGpuError: If there is no CUDA device.
        TensorRTNotFoundError: If no flavour of TensorRT is installed.

    Example::

        engine = graphcache.load("model.engine")
        y = engine(torch.randn(4, 64, device="cuda"))
    """

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Inputs in the order of the bindings, from positional and keyword arguments."""
        if not kwargs:
            return list(args)
        names = self.input_binding_names
        left = names[len(args) :]
        if len(args) > len(names) or kwargs.keys() != set(left):
            raise InputCountError(
                f"{self.name} takes the inputs {', '.join(names)}, each of them once; {len(args)} were given by "
                f"position, and by name {', '.join(kwargs)}"
            )
        return [*args, *(kwargs[name] for name in left)]

    def moved(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs with every tensor on the engine's device; host shape tensors and what is updated stay as they are."""
        kept = {*self.host_inputs, *self.engine.aliases.values()}
        return [
            value.to(self.device)
            if isinstance(value, Tensor) and value.device != self.device and index not in kept
            else value
            for index, value in enumerate(inputs)
        ]

    def checked(self, inputs: Sequence[Any]) -> tuple[list[Tensor], int]:
        """Inputs that the engine can take, and the profile that fits them; an ``InputError`` for one that is wrong."""
        self.engine.check_open()
        if modes.get().multi_device_safe:
            inputs = self.moved(inputs)
        bindings = self.engine.inputs
        check_inputs(self.name, bindings, inputs, self.device)
        if self.engine.aliases:
            self.engine.check_updated(inputs)
        # Values that TensorRT reads on the host are read once, here.
        inputs = [
            value.detach().cpu() if binding.on_host else value for binding, value in zip(bindings, inputs, strict=True)
        ]
        context = self._runner.context
        active = context.profile if context is not None else 0
        profiles = [active, *range(self.engine.profiles)] if self._profile is None else [self._profile]
        return inputs, choose_profile(self.name, bindings, inputs, profiles)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine on inputs in the order of ``input_binding_names``, or by name.

        Returns the output, or a tuple of the outputs if there are several.

        Raises:
            InputError: One of its kinds, for inputs that the engine cannot take; nothing ran.
            EngineExecutionError: If TensorRT refuses to run.
        """
        if is_compiling():
            return self._traced(args, kwargs)
        scope, mode = current_scope.get(), modes.get()
        if scope is None and mode.graphs == "subgraph":
            return self.with_graphs()(*args, **kwargs)
        if torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                return EngineModule.forward(self, *args, **kwargs)
        # No context manager: Ctrl-C in its __enter__ would leave the variable set.
        watched = is_unwatched.get()
        try:
            is_unwatched.set(True)
            inputs = self.bind(args, kwargs)
            if scope is not None:
                outputs = enqueue_into(scope, self, *self.checked(inputs))
            else:
                runner, watchers = self._runner, self._observers
                allocator = self.requires_output_allocator or self._use_output_allocator
                layout = None if allocator or mode.multi_device_safe else runner.layout(inputs, self._profile)
                profile, shapes = runner.known.get(layout, (0, None))
                if shapes is None:
                    inputs, profile = self.checked(inputs)
                call = EngineCall(inputs, profile, shapes, layout, allocator, self.use_pre_allocated_outputs)
                if watchers.active:
                    with watchers.told("eager", self.name):
                        outputs = runner.run(call)
                else:
                    outputs = runner.run(call)
        finally:
            is_unwatched.set(watched)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def forbids_capture(self) -> Cause | None:
        """Why no call of this engine can be captured now; ``None`` if nothing is known that prevents it."""
        if self.requires_output_allocator or self._use_output_allocator:
            return Cause(Reason.OUTPUT_ALLOCATOR, self.name)
        if self._runner.profiler is not None:
            return Cause(Reason.PROFILING, self.name)
        if self.engine.streamable_bytes and self.engine.weight_budget < self.engine.streamable_bytes:
            return Cause(Reason.WEIGHT_STREAMING, self.name)
        for binding in self.engine.outputs:
            if binding.on_host:
                return Cause(Reason.HOST_READ, self.name, f"output {binding.name!r} is written to host memory")
        return None

    def with_graphs(self) -> Any:
        """This engine behind a cache of graphs of its own, as ``set_cudagraphs_mode(True)`` uses it."""
        if self._cached is None:
            with _making_cache:
                if self._cached is None:
                    self._cached = features.graph_backend(self)
        return self._cached

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
        """Keep fewer or more of the streamable weights on the device; return the budget that TensorRT set, in bytes.

        Waits for the engine's work and drops every graph of it: a budget cannot change while contexts live. Below the
        full budget the engine runs eagerly, with the reason ``weight_streaming``.

        Args:
            budget_bytes: 0 to :meth:`get_streamable_device_memory_budget`.

        Raises:
            ConfigError: If the engine streams no weights, or for a budget outside that range.
            EngineError: If a session or a capture of the caller's still uses the engine. The budget is unchanged.
        """
        with self._changing():
            self.engine.set_weight_budget(budget_bytes)
        return self.engine.weight_budget

    def refit(self, weights: Mapping[str, Tensor], *, wait: bool = True) -> None:
        """Replace weights of an engine that was built with ``refittable``.

        Drops every graph of the engine, since a graph may hold copies of weights. No session, no capture of the
        caller's and no other thread may use the engine meanwhile; make sessions anew.

        Args:
            weights: By the engine's own names, or by those that ``weight_name_map`` gives for them (such as the names
                in a ``state_dict``); further names are ignored. Of the number of elements and the dtype that the engine
                was built with. They may be changed again once this returns.
            wait: Wait until the new weights are in place. Otherwise they are put in place in the order of the caller's
                stream, and later calls on any stream follow; only work on another stream is waited for.

        Raises:
            ConfigError: For anything but a mapping.
            CudaError: If the engine ran last on a stream that is being captured. The weights are unchanged.
            EngineError: If the engine cannot take them. What was captured is dropped all the same.
        """
        self.check_open()
        if not isinstance(weights, Mapping):
            raise ConfigError(
                f"{self.name}: weights are of type {type(weights).__name__}; expected a mapping of names to tensors"
            )
        mapped = by_engine_names(weights, self.weight_name_map)
        self._drop_graphs(wait=wait)
        with self.order.lock, torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            direct = not wait and caller.cuda_stream != 0
            stream = caller if direct else own_stream(self.device.index, "side")
            # TensorRT demands it, see IRefitter::refitCudaEngineAsync.
            if self.order.stream != stream.cuda_stream:
                self.order.wait()
            # Whatever happens from here on, a graph that another thread has captured meanwhile is of before.
            self.epoch += 1
            self.order.enter(stream.cuda_stream)
            refit(self.engine, mapped, stream.cuda_stream)
            # The bytes and the model that it was built from have other weights.
            self._refitted, self.source = True, None
            if wait:
                stream.synchronize()
            elif not direct:
                caller.wait_stream(stream)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer of the engine's eager runs, and of its own graphs under ``set_cudagraphs_mode(True)``.

        Returns a function that ends it. For graphs of a wrapped module see :meth:`CachedModule.observe`.

        Raises:
            ConfigError: For an object without ``before`` and ``after``.
        """
        self.check_open()
        graphs = controls(self.with_graphs()).ledger
        end = ExitStack()
        end.callback(self._observers.add(observer))
        end.callback(graphs.observers.add(observer, eager=False))
        return end.close

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
        """
        features.save(self, path, onnx=onnx, build=build)

    def close(self) -> None:
        """Wait for the last call, then give back context, scratch memory, graphs and engine; twice does nothing."""
        if not self.holds_engine:
            return
        # Without the order's lock, under which no event may be delivered.
        cached, self._cached = self._cached, None
        if cached is not None:
            controls(cached).close()
        with self.order.lock:
            self._drop_contexts()
            self._runner.recorded.clear()
            if not self.engine.closed:
                self.order.close()
                self.engine.close()

    def extra_repr(self) -> str:
        if not self.holds_engine:
            return "empty"
        inputs, outputs = (
            ", ".join(f"{b.name}: {b.dtype} {list(b.shape)}" for b in bindings)
            for bindings in (self.engine.inputs, self.engine.outputs)
        )
        return f"{self.name}, ({inputs}) -> ({outputs})"

    def _traced(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A call as a tracer sees it: one operation."""
        inputs = self.bind(args, kwargs)
        # First, since it brings the bytes up to date.
        call = self._described()
        outputs = torch.ops.graphcache.execute_engine.default(inputs, self._bytes, call)
        return outputs[0] if len(self.output_binding_names) == 1 else tuple(outputs)

    def _described(self) -> str:
        """The description of the engine in a traced program, a constant for tracers."""
        if self.engine.aliases:
            raise EngineError(
                f"{self.name} updates an input in place, which a traced program cannot express; call it outside of the "
                f"exported or compiled part"
            )
        with _disable_current_modes(), torch.cuda.device(self.device):
            if not self.output_shapes:
                self.output_shapes = output_shapes(self.engine).text
            return features.describe_engine(self)

    # What torch.compiler.assume_constant_result sets; calling that would import torch's compiler, which takes a second.
    _described._dynamo_marked_constant = True  # type: ignore[attr-defined]
