"""A deserialised TensorRT engine: its bindings, its profiles, its memory, and the contexts made from it."""

from __future__ import annotations

import json
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from graphcache.engines.bindings import Binding, read_bindings
from graphcache.engines.kernel_cache import RuntimeCache, StoredRuntimeCache
from graphcache.engines.library import Library, join_messages, library, require_gpu
from graphcache.errors import (
    ClosedError,
    ConfigError,
    EngineError,
    EngineExecutionError,
    EngineFormatError,
    EngineVersionError,
    InputError,
    shown,
)

_T = TypeVar("_T")

ALIGNMENT = 256
"""TensorRT's documented alignment of bindings, in bytes (``IExecutionContext::setTensorAddress``)."""
_HEADER = struct.Struct("<4sIQQ4B")
"""Of an engine of TensorRT-RTX, read off files of versions 1.4 and 1.5 (``engine_header_size`` says 64 bytes)."""
_MAGIC = b"vtrt"


class Engine:
    """An engine on the current CUDA device. It owns the weights there, and the kernels compiled for them.

    Several contexts of one engine may run at once if they do not share scratch memory; the engine itself is read only.
    ``inputs`` and ``outputs`` name the bindings in the order of a call, ``None`` is the engine's own order. With
    ``keep_kernels`` the kernels that are compiled at run time are taken from this user's cache folder, and written
    there when the engine is closed or the process ends.
    """

    def __init__(
        self,
        serialized: bytes,
        *,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        name: str = "",
        keep_kernels: bool = False,
    ) -> None:
        self._own_kernels: StoredRuntimeCache | None = None
        self.library = library()
        self.trt: Any = self.library.module
        if not isinstance(name, str):
            raise ConfigError(f"name={shown(name)}: expected text")
        label = name or "the engine"
        if not isinstance(serialized, (bytes, bytearray, memoryview)):
            raise EngineFormatError(f"{label}: expected the bytes of an engine, got {type(serialized).__name__}")
        serialized = bytes(serialized)
        check_header(serialized, flavour=self.library.flavour, version=self.library.version, label=label)
        require_gpu(f"running {label}")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._lock = threading.Lock()
        self.collect_errors: Callable[[], AbstractContextManager[list[str]]] = self.library.logger.collect
        """Collects the errors that TensorRT logs in this thread; Ctrl-C that it swallowed is raised at the end."""
        self.said: Callable[[], str] = self.library.logger.said
        """What was collected so far in the innermost block of this thread, for a message."""
        self._runtime = self.trt.Runtime(self.library.logger)
        with self.collect_errors() as said:
            self._engine = self._runtime.deserialize_cuda_engine(serialized)
        if self._engine is None:
            raise _refused(label, said, self.library, self._runtime, serialized)
        self.name = name or self._engine.name or "engine"
        bindings = read_bindings(self._engine, self.trt)
        self.inputs = _in_order(self.name, "input", inputs, [each for each in bindings if each.is_input])
        self.outputs = _in_order(self.name, "output", outputs, [each for each in bindings if not each.is_input])
        self.host_inputs = tuple(index for index, each in enumerate(self.inputs) if each.on_host)
        """Positions of the inputs whose values TensorRT reads on the host."""
        self.uses_host_memory = any(each.on_host for each in bindings)
        self.profiles = int(self._engine.num_optimization_profiles)
        self.scratch_bytes = int(self._engine.device_memory_size_v2)
        self.streamable_bytes = int(getattr(self._engine, "streamable_weights_size", 0))
        self.contexts: WeakSet[Any] = WeakSet()
        # Key-value caches; TensorRT-RTX and TensorRT 11 tell.
        aliased = getattr(self._engine, "get_aliased_input_tensor", lambda name: None)
        places = {binding.name: place for place, binding in enumerate(self.inputs)}
        named = {place: aliased(binding.name) for place, binding in enumerate(self.outputs)}
        self.aliases = {place: places[name] for place, name in named.items() if name}
        """Of outputs that are inputs, updated in place, the places of the two."""
        self._config: Any = None
        self._kernels: Any = None
        self._specialization: str | None = None
        self._shared_kernels: RuntimeCache | None = None
        if keep_kernels:
            self._own_kernels = StoredRuntimeCache(serialized, self.library, self.name)

    def configure(self, specialization: str | None, kernels: RuntimeCache | None) -> None:
        """Set how TensorRT-RTX compiles for contexts made from now on; ``None`` for the defaults of this engine."""
        with self._lock:
            self._specialization, self._shared_kernels = specialization, kernels
            self._config = self._kernels = None

    def layer_information(self) -> str:
        """TensorRT's description of the engine's layers, as JSON. How detailed it is depends on how it was built."""
        form = self.trt.LayerInformationFormat.JSON
        return str(self._engine.create_engine_inspector().get_engine_information(form) or "")

    def layers(self) -> list[str]:
        """The names of the engine's layers; none where this flavour of TensorRT has no inspector."""
        if not hasattr(self._engine, "create_engine_inspector"):
            return []
        with self.collect_errors():
            text = self.layer_information()
        # An engine that was built without detail has names, another one a dictionary for each layer.
        layers = json.loads(text)["Layers"] if text else []
        return [str(each["Name"] if isinstance(each, dict) else each).strip() for each in layers]

    def refitter(self) -> Any:
        """A new ``IRefitter`` of this engine; ``None`` if TensorRT makes none."""
        try:
            return self.trt.Refitter(self._engine, self.library.logger)
        except TypeError:
            # How the bindings tell that TensorRT made none.
            return None

    def new_outputs(self, shapes: Sequence[tuple[int, ...] | None], *, allocator: bool = False) -> list[Any]:
        """Memory for outputs of these shapes; ``None`` where TensorRT allocates: all on the device if ``allocator``.

        An output that is an input has no memory of its own: :meth:`with_updated` puts it there.
        """
        made: list[Tensor | None] = [None] * len(self.outputs)
        for index, (binding, shape) in enumerate(zip(self.outputs, shapes, strict=True)):
            if shape is not None and (binding.on_host or not allocator) and index not in self.aliases:
                device = torch.device("cpu") if binding.on_host else self.device
                made[index] = torch.empty(shape, dtype=binding.dtype, device=device)
        return made

    def device_places(self, places: Iterable[int]) -> list[int]:
        """Places of inputs among those that TensorRT reads on the device."""
        return [place - sum(host < place for host in self.host_inputs) for place in places]

    def with_updated(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The outputs, with the inputs that some of them are."""
        return [inputs[self.aliases[place]] if place in self.aliases else each for place, each in enumerate(outputs)]

    def check_updated(self, inputs: Sequence[Tensor]) -> None:
        """Raise an ``InputError`` for an input that cannot be updated where it is."""
        for place in set(self.aliases.values()):
            value = inputs[place]
            if not value.is_contiguous() or value.data_ptr() % ALIGNMENT:
                raise InputError(
                    f"{self.name} updates input {self.inputs[place].name!r} in place: expected a contiguous tensor "
                    f"that begins at a multiple of {ALIGNMENT} bytes, got strides {tuple(value.stride())} at "
                    f"{value.data_ptr():#x}; give a copy, and keep it for the next call"
                )

    def updated(self, inputs: Sequence[Tensor]) -> None:
        """Let PyTorch know that inputs were updated, which it does not see."""
        for place in set(self.aliases.values()):
            if not inputs[place].is_inference():
                torch.autograd.graph.increment_version(inputs[place])

    def new_context(self) -> Any:
        """A TensorRT execution context without scratch memory of its own; contexts share the compiled kernels."""
        with self._lock, self.collect_errors():
            if self._config is None:
                self._config = self._new_config()
            context = self._engine.create_execution_context(self._config)
            if context is None:
                raise EngineExecutionError(f"{self.name}: no execution context: {self.said()}")
        return context

    def _new_config(self) -> Any:
        """How contexts are made: without scratch memory, and with the kernels that were compiled before.

        By default they compile the kernels of a new shape before running it (``EAGER``), not in the background: a
        capture would keep the fallback kernel. With 1.4 they compile none for single shapes.
        """
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:
            # 1.4.0.76 with EAGER: every shape but a context's first was answered wrongly.
            usual = "none" if self.library.version.startswith("1.4.") else "eager"
            chosen = getattr(strategies, (self._specialization or usual).upper())
            config.dynamic_shapes_kernel_specialization_strategy = chosen
            cache = self._shared_kernels or self._own_kernels
            # The bindings do not keep it alive for the config (1.5.0.114: a crash in the next line).
            self._kernels = config.create_runtime_cache() if cache is None else cache.made_for(config)
            config.set_runtime_cache(self._kernels)
        return config

    def save_kernels(self) -> bool:
        """Write the kernels that were compiled since, if they are kept; whether there were any."""
        return self._own_kernels is not None and self._own_kernels.keep()

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability of the GPUs that the engine runs on; ``None`` if it is not bound to one."""
        # TensorRT-RTX compiles kernels where the engine runs. TensorRT may build for other GPUs too.
        level = getattr(self._engine, "hardware_compatibility_level", None)
        if self.library.flavour == "tensorrt_rtx" or (level is not None and int(level) != 0):
            return None
        return torch.cuda.get_device_capability(self.device)

    @property
    def weight_budget(self) -> int:
        """Bytes of the streamable weights that are kept on the device; 0 for an engine that streams none."""
        return int(self._engine.weight_streaming_budget_v2) if self.streamable_bytes else 0

    @property
    def automatic_weight_budget(self) -> int:
        """The budget that TensorRT would choose for the memory that is free now, in bytes."""
        return int(self._engine.get_weight_streaming_automatic_budget()) if self.streamable_bytes else 0

    def set_weight_budget(self, nbytes: int) -> None:
        """Keep at most ``nbytes`` bytes of the streamable weights on the device."""
        if not self.streamable_bytes:
            raise ConfigError(f"{self.name} was not built for weight streaming; build it with weight_streaming=True")
        if not 0 <= nbytes <= self.streamable_bytes:
            raise ConfigError(f"{self.name} has {self.streamable_bytes} streamable bytes, so no budget of {nbytes}")
        self.check_unused("changing the weight budget")
        with self.collect_errors():
            self._engine.weight_streaming_budget_v2 = nbytes
            if self.weight_budget != nbytes:
                raise EngineError(f"{self.name}: TensorRT refused a weight budget of {nbytes} bytes: {self.said()}")
        # Streaming needs scratch memory of its own.
        self.scratch_bytes = int(self._engine.device_memory_size_v2)

    def check_unused(self, what: str) -> None:
        """Refuse what cannot be done while contexts live."""
        if live := len(self.contexts):
            raise EngineError(
                f"{self.name}: {live} execution contexts are still in use, by sessions or by captures of the caller's; "
                f"close them before {what}"
            )

    def serialized(self) -> bytes:
        """The engine as a file would hold it now, with the weights that it was refitted with."""
        with self.collect_errors():
            made = self._engine.serialize()
            if made is None:
                raise EngineError(
                    f"{self.name}: TensorRT does not serialise it: {self.said()}. Keep the file it came from"
                )
            return bytes(made)

    def close(self) -> None:
        """Drop the engine. Its memory goes when the last context made from it is gone; twice does nothing."""
        if self._own_kernels is not None:
            self._own_kernels.close()
        with keeping_the_current_device():
            self._config = self._kernels = self._engine = self._runtime = None

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None and not sys.is_finalizing():
            self.close()

    @property
    def native_handles(self) -> tuple[Any, ...]:
        """TensorRT's objects that a context needs for as long as it lives, even after :meth:`close`.

        A tuple releases its last element first: each of these refers to those before it.
        """
        return self._runtime, self._engine, self._kernels, self._config

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._engine is None

    def check_open(self) -> None:
        """Raise a ``ClosedError`` if :meth:`close` was called."""
        if self._engine is None:
            raise ClosedError(f"{self.name} was closed; load it again")

    def device_only(self, values: Sequence[_T]) -> list[_T]:
        """Of what belongs to each input, that of the inputs that TensorRT reads on the device."""
        return [value for binding, value in zip(self.inputs, values, strict=True) if not binding.on_host]


@contextmanager
def keeping_the_current_device() -> Iterator[None]:
    """Restores the current device: destroying an object of TensorRT-RTX 1.5.0.114 makes its device current."""
    before = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if before is not None:
            torch.cuda.set_device(before)


def _refused(label: str, said: Sequence[str], found: Library, runtime: Any, serialized: bytes) -> EngineError:
    """The error for an engine that TensorRT refused, from its messages and its validity check."""
    flags = []
    if hasattr(runtime, "get_engine_validity"):
        _, diagnostics = runtime.get_engine_validity(serialized)
        members = found.module.EngineInvalidityDiagnostics.__members__
        flags = [name for name, member in members.items() if int(diagnostics) & int(member)]
    told = join_messages([*flags, *said])
    kind, remedy = EngineError, "Build it again here, or try another flavour with GRAPHCACHE_TENSORRT"
    if any(sign in told.lower() for sign in _OTHER_MACHINE):
        kind = EngineVersionError
        remedy = (
            "An engine runs only under the version, and on the kind of GPU, it was built for: build it again here, or "
            "install the version that built it"
        )
    elif any(sign in told.lower() for sign in _NOT_AN_ENGINE):
        kind = EngineFormatError
        remedy = f"Expected a complete engine file of {found.flavour}; build it with graphcache.build, or copy it again"
    seen = f"{label} ({len(serialized)} bytes) was refused by {found.flavour} {found.version}"
    return kind(f"{seen}: {told}. {remedy}")


_OTHER_MACHINE = ("version_mismatch", "version tag", "unsupported_cc", "compute capability", "serialization version")
_NOT_AN_ENGINE = ("malformed", "magic", "serialization assertion", "corrupt", "nothing")


class EngineHeader(NamedTuple):
    """The length of a TensorRT-RTX engine file in bytes, and the version that built it, such as ``"1.5.0.114"``."""

    nbytes: int
    version: str


def read_header(serialized: bytes) -> EngineHeader | None:
    """The header of a TensorRT-RTX engine; ``None`` if the bytes do not begin with one."""
    if len(serialized) < _HEADER.size:
        return None
    magic, _, _, nbytes, *version = _HEADER.unpack_from(serialized)
    return EngineHeader(nbytes, ".".join(map(str, version))) if magic == _MAGIC else None


def check_header(serialized: bytes, *, flavour: str, version: str, label: str) -> None:
    """Refuse bytes that this flavour and version of TensorRT cannot run, before it sees them.

    TensorRT-RTX deserialises nothing where there is no device, and its own validity check reads only the header.
    """
    if len(serialized) == 0:
        raise EngineFormatError(f"{label}: expected the bytes of an engine, got none; was the file written completely?")
    if flavour != "tensorrt_rtx":
        return
    header = read_header(serialized)
    if header is None:
        raise EngineFormatError(
            f"{label} is not a TensorRT-RTX engine: its {len(serialized)} bytes begin with {serialized[:8]!r}, an "
            f"engine's with {_MAGIC!r}; an ONNX model goes through graphcache.build first, an engine of another "
            f"flavour of TensorRT runs with GRAPHCACHE_TENSORRT=tensorrt"
        )
    if header.nbytes != len(serialized):
        raise EngineFormatError(
            f"{label} has {len(serialized)} bytes, its header says {header.nbytes}; it was truncated or something was "
            f"appended, so copy the file again or build it with graphcache.build"
        )
    if header.version != version:
        raise EngineVersionError(
            f"{label} was built by TensorRT-RTX {header.version}, and {version} is installed; an engine runs only "
            f"under the version that built it, so build it again, or pip install tensorrt-rtx=={header.version}"
        )


def _in_order(engine: str, what: str, names: Sequence[str] | None, found: Sequence[Binding]) -> tuple[Binding, ...]:
    """Bindings in the order of the names, which have to be theirs."""
    if names is None:
        return tuple(found)
    known = {binding.name: binding for binding in found}
    if sorted(names) != sorted(known):
        raise ConfigError(f"{engine} has the {what}s {', '.join(known)}; the {what} names given are {', '.join(names)}")
    return tuple(known[name] for name in names)
