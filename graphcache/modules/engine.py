"""One engine as an ``nn.Module``: eager execution on the caller's stream."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from graphcache.config import modes
from graphcache.engines.bindings import check_inputs, choose_profile, out_of_range
from graphcache.engines.context import Context, ContextPool
from graphcache.engines.engine import Engine
from graphcache.engines.library import join_messages
from graphcache.engines.output_shapes import output_shapes
from graphcache.engines.refit import by_engine_names, refit
from graphcache.errors import (
    Cause,
    ClosedError,
    ConfigError,
    EngineError,
    EngineExecutionError,
    EngineFormatError,
    InputCountError,
    Reason,
)
from graphcache.graphs import driver
from graphcache.graphs.lane import Lane, own_stream
from graphcache.graphs.operations import unwatched
from graphcache.modules import recording
from graphcache.modules.controls import controls
from graphcache.modules.engine_carried import CarriedEngine
from graphcache.modules.engine_controls import EngineControls, report_to
from graphcache.modules.engine_state import tensor_of
from graphcache.modules.operator import alive, call_engine, describe_call
from graphcache.modules.packaging import Source

_T = TypeVar("_T")


class EngineModule(CarriedEngine, EngineControls):
    """A TensorRT engine that is called like a module: tensors in, tensors out.

    Bare, it runs eagerly. Behind :func:`graphcache.wrap`, or under ``set_cudagraphs_mode(True)``, each set of shapes is
    captured once and replayed from then on.

    It never casts, and never moves a tensor to another device unless multi-device safe mode is on. Inputs may be 0-d,
    empty and non-contiguous. A host shape tensor may lie on the CPU, where it costs nothing, or on the device, where
    reading it waits for the stream. Outputs are fresh tensors of the caller's; they never require gradients. Calls from
    several threads follow one another.

    Its ``state_dict`` holds the engine. A copy, or what a pickle makes of it in another process, is a module of its own
    with the engine deserialised anew; a deep copy shares the bytes.

    Args:
        serialized_engine: The engine file's bytes; ``None`` for a module that is empty until ``load_state_dict``.
        input_binding_names: Inputs in the order of a call; ``None`` for the engine's own order.
        output_binding_names: Outputs in the order of the answer; ``None`` for the engine's own order.
        name: What messages call it.
        settings: Kept as an attribute for code that reads it, as Torch-TensorRT's modules do; not looked at.
        weight_name_map: Kept as an attribute, for refitting.
        requires_output_allocator: Whether some output's shape depends on the data, so that TensorRT allocates it.
        keep_kernels: Keep the kernels that TensorRT-RTX compiles for new shapes in this user's cache folder, so that
            later processes take them from there. They are written when the module is closed, by :meth:`save_kernels`,
            or when the process ends.

    Raises:
        EngineError: One of its kinds, for bytes that are no engine of this machine.
        NoGpuError: If there is no CUDA device.
        TensorRTNotFoundError: If no flavour of TensorRT is installed.

    Example::

        engine = graphcache.load("model.engine")
        y = engine(torch.randn(4, 64, device="cuda"))
    """

    keeps_its_own_state = True
    """What a call changes here (contexts, buffers) is no state that a replay would leave out."""

    takes_numbers = False
    """Whether numbers may stand for tensors among the arguments; :meth:`bind` makes tensors of them."""

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
        self._bytes = tensor_of(b"")
        self._profile: int | None = None
        self._use_output_allocator = False
        self._begin()
        if serialized_engine is None:
            return
        if not isinstance(serialized_engine, (bytes, bytearray, memoryview)):
            kind = type(serialized_engine).__name__
            raise EngineFormatError(f"{name or 'the engine'}: expected the bytes of an engine, got {kind}")
        data = bytes(serialized_engine)
        self._attach(self.deserialised(data, input_binding_names, output_binding_names, name))
        self._bytes = tensor_of(data)

    def _begin(self) -> None:
        """Everything of this process, which no copy has."""
        self._context: Context | None = None
        # Wrapped modules that may hold graphs, and so contexts, of this engine.
        self.users: WeakSet[Any] = WeakSet()
        # Goes up whenever a captured graph of this engine would no longer do what a call does.
        self.epoch = 0
        self._cached: Any = None
        self._making_cache = threading.Lock()
        # Contexts that a capture of the caller's has recorded; that graph may be replayed as long as this module lives.
        self._recorded_elsewhere: list[Context] = []
        self._refitted = False
        self.identity = secrets.token_hex(16)
        """By which programs that were traced in this process find the module."""
        alive[self.identity] = self

    def _attach(self, engine: Engine) -> None:
        self.engine = engine
        self.name = engine.name
        self.input_binding_names = [binding.name for binding in engine.inputs]
        self.output_binding_names = [binding.name for binding in engine.outputs]
        self.host_inputs = tuple(index for index, binding in enumerate(engine.inputs) if binding.on_host)
        self.contexts = ContextPool(engine)
        """Contexts for graphs; what runs eagerly has one of its own."""
        self._refitted = False
        if "lane" not in self.__dict__:
            self.device = engine.device
            self.lane = Lane(self.device.index)

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
        """Let TensorRT allocate the outputs of every call, even those whose shape is known beforehand.

        Returns:
            What was set before.
        """
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
            The budget that is set now, in bytes.

        Raises:
            ConfigError: If the engine streams no weights, or for a budget outside that range.
            EngineError: If a session or a capture of the caller's still uses the engine. The budget is unchanged.
        """
        for user in list(self.users):
            controls(user).clear()
        with self.lane.lock:
            self.lane.release(self._drop_contexts)
            self.engine.set_weight_budget(budget_bytes)
            self.epoch += 1
        return self.engine.weight_budget

    def refit(self, weights: Mapping[str, Tensor], *, wait: bool = True) -> None:
        """Replace weights of an engine that was built with ``refittable``.

        Drops every graph of the engine, since a graph may hold copies of weights. No session, no capture of the
        caller's and no other thread may use the engine meanwhile; make sessions anew.

        Args:
            weights: By the engine's own names, or by those that ``weight_name_map`` gives for them (such as the names
                in a ``state_dict``); further names that it does not give are not looked at. Of the number of elements
                and the dtype that the engine was built with. They may be changed again once this returns.
            wait: Wait until the new weights are in place. Otherwise they are put in place in the order of the caller's
                stream, and later calls on any stream follow. Work on another stream is waited for in any case, which
                TensorRT demands (``IRefitter::refitCudaEngineAsync``).

        Raises:
            ConfigError: For anything but a mapping.
            CudaError: If the engine ran last on a stream that is being captured. The weights are unchanged.
            EngineError: If the engine cannot take them. What was captured is dropped all the same.
        """
        if self.engine.closed:
            raise ClosedError(f"{self.name} was closed; load it again")
        if not isinstance(weights, Mapping):
            raise ConfigError(
                f"{self.name}: weights are of type {type(weights).__name__}; expected a mapping of names to tensors"
            )
        mapped = by_engine_names(weights, self.weight_name_map)
        for user in list(self.users):
            controls(user).clear(wait=wait)
        with self.lane.lock, torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            direct = not wait and caller.cuda_stream != 0
            stream = caller if direct else own_stream(self.device.index, "side")
            if self.lane.stream != stream.cuda_stream:
                self.lane.wait()
            # Whatever happens from here on, a graph that another thread has captured meanwhile is of before.
            self.epoch += 1
            self.lane.enter(stream.cuda_stream)
            refit(self.engine, mapped, stream.cuda_stream)
            # The bytes and the model that it was built from have other weights.
            self._refitted, self.source = True, None
            if wait:
                stream.synchronize()
            elif not direct:
                caller.wait_stream(stream)

    def forbids_capture(self) -> Cause | None:
        """Why no call of this engine can be captured as things stand, without trying; ``None`` if nothing is known."""
        if self.uses_output_allocator:
            return Cause(Reason.OUTPUT_ALLOCATOR, self.name)
        if (profiled := self.forbids_profiled()) is not None:
            return profiled
        if self.engine.streamable_bytes and self.engine.weight_budget < self.engine.streamable_bytes:
            return Cause(Reason.WEIGHT_STREAMING, self.name)
        for binding in self.engine.outputs:
            if binding.on_host:
                return Cause(Reason.HOST_READ, self.name, f"output {binding.name!r} is written to host memory")
        return None

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Inputs in the order of the bindings, from positional and keyword arguments.

        Raises:
            InputCountError: For a name the engine does not have, one given twice, or one missing.
        """
        if not kwargs:
            return list(args)
        names = self.input_binding_names
        if unknown := [name for name in kwargs if name not in names]:
            raise InputCountError(f"{self.name} has no input {unknown[0]!r}; its inputs are {', '.join(names)}")
        if len(args) > len(names):
            raise InputCountError(
                f"{self.name} takes {len(names)} inputs ({', '.join(names)}), {len(args) + len(kwargs)} were given"
            )
        if twice := [name for name in names[: len(args)] if name in kwargs]:
            raise InputCountError(f"input {twice[0]!r} of {self.name} was given by position and by name")
        if missing := [name for name in names[len(args) :] if name not in kwargs]:
            raise InputCountError(f"input {missing[0]!r} of {self.name} is missing; its inputs are {', '.join(names)}")
        return [*args, *(kwargs[name] for name in names[len(args) :])]

    def checked(self, inputs: Sequence[Any]) -> tuple[list[Tensor], int]:
        """Inputs that the engine can take, and the profile that fits them.

        Raises:
            InputError: One of its kinds, for the first input that is wrong.
        """
        if self.engine.closed:
            raise ClosedError(f"{self.name} was closed; load it again")
        if modes.get().multi_device_safe:
            inputs = self.moved(inputs)
        bindings = self.engine.inputs
        check_inputs(self.name, bindings, inputs, self.device)
        # What is read on the host is read once, here.
        inputs = [
            value.detach().cpu() if binding.on_host else value for binding, value in zip(bindings, inputs, strict=True)
        ]
        if self._profile is None:
            current = self._context.profile if self._context is not None else 0
            return inputs, choose_profile(self.name, bindings, inputs, current, self.engine.profiles)
        for binding, value in zip(bindings, inputs, strict=True):
            if not binding.fits(value, self._profile):
                raise out_of_range(self.name, binding, value, [self._profile])
        return inputs, self._profile

    def device_only(self, values: Sequence[_T]) -> list[_T]:
        """Of what belongs to each input, in their order, that of the inputs that TensorRT reads on the device."""
        return [value for index, value in enumerate(values) if index not in self.host_inputs]

    def with_host_inputs(self, values: Sequence[_T], given: Sequence[_T]) -> list[_T]:
        """The inverse: what belongs to inputs on the device, with what is given for the others in their places."""
        device = iter(values)
        return [value if index in self.host_inputs else next(device) for index, value in enumerate(given)]

    def moved(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs with every tensor on the engine's device; host shape tensors stay where they are."""
        return [
            value.to(self.device)
            if isinstance(value, Tensor) and value.device != self.device and index not in self.host_inputs
            else value
            for index, value in enumerate(inputs)
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine.

        Args:
            args: Inputs in the order of ``input_binding_names``.
            kwargs: Further inputs by name.

        Returns:
            The output, or a tuple of the outputs if there are several.

        Raises:
            InputError: One of its kinds, for inputs that the engine cannot take; nothing ran.
            EngineExecutionError: If TensorRT refuses to run.
        """
        if is_compiling():
            return self._traced(args, kwargs)
        session = recording.current.get()
        if session is None and modes.get().graphs == "subgraph":
            return self._through_cache()(*args, **kwargs)
        with torch.cuda.device(self.device), unwatched():
            inputs, profile = self.checked(self.bind(args, kwargs))
            outputs = self._record(session, inputs, profile) if session is not None else self._run(inputs, profile)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _traced(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a tracer sees of a call: one operation, and whatever stands before and after it."""
        inputs = self.bind(args, kwargs)
        # First, as it sees to it that the bytes are up to date.
        call = self._described()
        outputs = call_engine(inputs, self._bytes, call)
        return outputs[0] if len(self.output_binding_names) == 1 else tuple(outputs)

    def _described(self) -> str:
        if self.engine.aliases:
            raise EngineError(
                f"{self.name} updates an input in place, which a traced program cannot say; call it outside of what is "
                f"exported or compiled"
            )
        with _disable_current_modes(), torch.cuda.device(self.device):
            if not self.output_shapes:
                self.output_shapes = output_shapes(self.engine).text
            return describe_call(self)

    # What torch.compiler.assume_constant_result sets; calling that would import torch's compiler, which takes a second.
    _described._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def close(self) -> None:
        """Wait for the last call, then give back context, scratch memory, graphs and engine; twice does nothing."""
        if "engine" not in self.__dict__:
            return
        # Without the lane's lock, under which nobody may hear of it.
        cached, self._cached = self._cached, None
        if cached is not None:
            controls(cached).close()
        with self.lane.lock:
            self._drop_contexts()
            self._recorded_elsewhere.clear()
            if not self.engine.closed:
                self.lane.close()
                self.engine.close()

    def _drop_contexts(self) -> None:
        self._context = None
        self.forget_outputs()
        self.contexts.clear()

    def extra_repr(self) -> str:
        if "engine" not in self.__dict__:
            return "empty"
        inputs = ", ".join(f"{b.name}: {b.dtype} {list(b.shape)}" for b in self.engine.inputs)
        outputs = ", ".join(f"{b.name}: {b.dtype} {list(b.shape)}" for b in self.engine.outputs)
        return f"{self.name}, ({inputs}) -> ({outputs})"

    def _through_cache(self) -> Any:
        if self._cached is None:
            with self._making_cache:
                if self._cached is None:
                    from graphcache.modules.cached import CachedModule

                    self._cached = CachedModule(self)
        return self._cached

    def _run(self, inputs: Sequence[Tensor], profile: int) -> list[Tensor]:
        with self.lane.lock:
            context = self._context
            if context is None:
                if driver.is_capturing(torch.cuda.current_stream().cuda_stream):
                    raise EngineExecutionError(
                        f"{self.name}: the current stream is being captured, and the engine has never run eagerly, "
                        f"so that it has nothing that could be captured; before the capture, call it once with these "
                        f"shapes under set_cudagraphs_mode(False)"
                    )
                # Its own scratch memory: a capture of the caller's may take this context over.
                scratch = torch.empty(self.engine.scratch_bytes, dtype=torch.uint8, device=self.device)
                context = self._context = Context(self.engine, scratch)
                report_to(self, context)
            caller = torch.cuda.current_stream()
            if driver.is_capturing(caller.cuda_stream):
                self._context = None
                self._recorded_elsewhere.append(context)
                return self._enqueue(context, inputs, profile, caller.cuda_stream)
            if caller.cuda_stream != 0:
                self.lane.enter(caller.cuda_stream)
                return self._enqueue(context, inputs, profile, caller.cuda_stream)
            # On the legacy default stream TensorRT would synchronise the device at every call.
            side = own_stream(self.device.index, "side")
            side.wait_stream(caller)
            self.lane.enter(side.cuda_stream)
            try:
                with torch.cuda.stream(side):
                    outputs = self._enqueue(context, inputs, profile, side.cuda_stream)
            finally:
                caller.wait_stream(side)
            for tensor in outputs:
                if tensor.is_cuda:
                    tensor.record_stream(caller)
            return outputs

    def new_outputs(self, context: Context, *, allocator: bool) -> list[Tensor | None]:
        """Memory for the outputs of the inputs that were set; ``None`` where TensorRT must allocate."""
        made: list[Tensor | None] = []
        for binding, shape in zip(self.engine.outputs, context.output_shapes(), strict=True):
            if shape is None or (allocator and not binding.on_host):
                made.append(None)
            else:
                made.append(torch.empty(shape, dtype=binding.dtype, device="cpu" if binding.on_host else self.device))
        return made

    def _enqueue(self, context: Context, inputs: Sequence[Tensor], profile: int, stream: int) -> list[Tensor]:
        context.set_inputs(inputs, profile, stream)
        allocator = self.uses_output_allocator
        ahead = self._ahead.take(context.output_shapes(), stream) if self._ahead is not None and not allocator else None
        outputs = ahead or self.new_outputs(context, allocator=allocator)
        context.set_outputs(outputs)
        with self.engine.collect_errors() as said:
            if not context.enqueue(stream):
                context.check_allocated()
                raise EngineExecutionError(f"{self.name}: TensorRT refused to run: {join_messages(said)}")
        if any(binding.on_host for binding in self.engine.outputs):
            torch.cuda.current_stream().synchronize()
        answer = [
            context.allocated_output(binding.name) if value is None else value
            for binding, value in zip(self.engine.outputs, outputs, strict=True)
        ]
        context.release_references()
        if self._ahead is not None:
            self._ahead.make(answer, stream)
        return answer

    def _record(self, session: recording.Session, inputs: Sequence[Tensor], profile: int) -> list[Tensor]:
        if (cause := self.forbids_capture()) is not None:
            raise session.refusal(cause)
        context = session.context_of(self)
        stream = torch.cuda.current_stream().cuda_stream
        context.set_inputs(inputs, profile, stream)
        outputs = self.new_outputs(context, allocator=False)
        if any(output is None for output in outputs):
            raise session.refusal(Cause(Reason.OUTPUT_ALLOCATOR, self.name))
        context.set_outputs(outputs)
        with self.engine.collect_errors() as said:
            if not context.enqueue(stream):
                raise session.refusal(Cause(Reason.NOT_CAPTURABLE, self.name, join_messages(said)))
        return [output for output in outputs if output is not None]
