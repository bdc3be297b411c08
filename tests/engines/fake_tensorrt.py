"""Stands in for TensorRT's Python module, as far as graphcache uses it, by the documented rules.

It refuses what TensorRT refuses (``False`` and a message to the logger, or ``None``) and computes real answers at the
addresses it was given: at once, or through the stand-in for the driver if ``device`` is set, where it can be captured.
"""

from __future__ import annotations

import ctypes
import enum
import json
import struct
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphcache.engines import library

__version__ = "1.5.0.114"

device: Any = None
"""A :class:`tests.graphs.fake_driver.Driver`, to enqueue on its streams."""

ALIGNMENT = 256
_HEADER = struct.Struct("<4sIQQ4B")


class Violation(AssertionError):
    """Undefined behaviour, or a crash, had this been TensorRT."""


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8
    INT4 = 9
    FP4 = 10
    E8M0 = 11

    def __str__(self) -> str:
        return f"DataType.{self.name}"


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.IntEnum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


_LAZY = DynamicShapesKernelSpecializationStrategy.LAZY


class EngineValidity(enum.IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity
    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        self._constructed = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Dims:
    """A shape; a sequence, but not a tuple."""

    def __init__(self, shape: Iterable[int]) -> None:
        self._shape = tuple(int(size) for size in shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: int) -> int:
        return self._shape[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._shape)


# ---- networks

Shape = tuple[int, ...]
TORCH = {
    DataType.FLOAT: torch.float32,
    DataType.HALF: torch.float16,
    DataType.INT8: torch.int8,
    DataType.INT32: torch.int32,
    DataType.BOOL: torch.bool,
    DataType.UINT8: torch.uint8,
    DataType.BF16: torch.bfloat16,
    DataType.INT64: torch.int64,
}


@dataclass(frozen=True)
class IO:
    """An input or output; ``ranges`` holds (min, opt, max) of each profile, of the values where it is on the host."""

    name: str
    is_input: bool
    shape: Shape
    dtype: DataType = DataType.FLOAT
    host: bool = False
    ranges: tuple[tuple[Shape, Shape, Shape], ...] = ()


@dataclass(frozen=True)
class Network:
    """What an engine computes.

    Args:
        io: Inputs and outputs.
        shapes: From shapes of inputs, and values of those on the host, to shapes of outputs: -1 where only running it
            tells; raises ``ValueError`` where they do not go together.
        compute: From inputs to outputs.
        scratch: How many bytes of device memory it works in.
        captures: Whether it can be enqueued into a capture.
        hides: Whether its kernel finds the address of output ``y`` in device memory, ``"instead"`` of in its
            arguments, or ``"as well"``, where it does not look at the argument.
        keeps: Whether its kernel reads the shape that its context was used with last, from memory of the context's.
        aliased: By output, the input whose memory it shares.
        streamable: How many bytes of weights may be streamed.
        weights: What may be refitted; an enqueue freezes their values. Those that begin alike go together.
    """

    io: tuple[IO, ...]
    shapes: Callable[[dict[str, Shape], dict[str, list[int]]], dict[str, Shape]]
    compute: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    scratch: int = 0
    captures: bool = True
    hides: str = ""
    keeps: bool = False
    name: str = ""
    aliased: dict[str, str] = field(default_factory=dict)
    streamable: int = 0
    weights: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return id(self)

    @property
    def profiles(self) -> int:
        return max([1, *(len(each.ranges) for each in self.io)])


def _range(low: Shape, high: Shape) -> tuple[Shape, Shape, Shape]:
    return (low, low, high)


def _pair(shapes: dict[str, Shape], values: dict[str, list[int]]) -> dict[str, Shape]:
    if shapes["a"] != shapes["b"]:
        raise ValueError(f"a has shape {shapes['a']}, b {shapes['b']}")
    return {"sum": shapes["a"], "product": shapes["a"]}


_rows = (_range((1, 4), (4, 4)), _range((8, 4), (16, 4)))
_any = (_range((0, 1), (32, 32)),)
_calls = iter(range(10**9))

NETWORKS: dict[str, Network] = {
    "affine": Network(
        (IO("x", True, (-1, 4), ranges=_rows), IO("y", False, (-1, 4))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * 3 + 1},
        scratch=1000,
        name="Affine",
    ),
    "pair": Network(
        (
            IO("a", True, (-1, -1), ranges=_any),
            IO("b", True, (-1, -1), ranges=_any),
            IO("sum", False, (-1, -1)),
            IO("product", False, (-1, -1)),
        ),
        _pair,
        lambda given: {"sum": given["a"] + given["b"], "product": given["a"] * given["b"]},
    ),
    "head": Network(
        (
            IO("x", True, (16, 4), ranges=(_range((16, 4), (16, 4)),)),
            IO("stop", True, (1,), DataType.INT64, host=True, ranges=(_range((1,), (16,)),)),
            IO("y", False, (-1, 4)),
        ),
        lambda _, values: {"y": (values["stop"][0], 4)},
        lambda given: {"y": given["x"][: int(given["stop"])].relu()},
    ),
    "positive": Network(
        (IO("x", True, (-1,), ranges=(_range((0,), (64,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": (-1,)},
        lambda given: {"y": given["x"][given["x"] > 0]},
        captures=False,
    ),
    "conditional": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (64,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"].relu() if given["x"].sum() > 0 else -given["x"]},
        captures=False,
    ),
    "length": Network(
        (
            IO("x", True, (-1,), ranges=(_range((1,), (64,)),)),
            IO("y", False, (-1,)),
            IO("n", False, (1,), DataType.INT64, host=True),
        ),
        lambda shapes, _: {"y": shapes["x"], "n": (1,)},
        lambda given: {"y": -given["x"], "n": torch.tensor([given["x"].numel()])},
    ),
    "hidden": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (64,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * 2},
        hides="instead",
    ),
    "deceiving": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (64,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * 2},
        hides="as well",
    ),
    "keeping": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (64,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * (2 + given.get("kept", len(given["x"])) - len(given["x"]))},
        keeps=True,
    ),
    "keeping integers": Network(
        (
            IO("x", True, (-1,), DataType.INT64, ranges=(_range((1,), (64,)),)),
            IO("y", False, (-1,), DataType.INT64),
        ),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * (2 + given.get("kept", len(given["x"])) - len(given["x"]))},
        keeps=True,
    ),
    "scaled": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (64,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * 2},
    ),
    "overlapping": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (8,)), _range((4,), (16,)))), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * 2},
    ),
    "unsteady": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (64,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] + next(_calls)},
    ),
    "scalar": Network(
        (
            IO("x", True, (-1,), ranges=(_range((1,), (8,)),)),
            IO("s", True, (), ranges=(_range((), ()),)),
            IO("y", False, (-1,)),
        ),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * given["s"]},
    ),
    "refittable": Network(
        (IO("x", True, (-1, 2), ranges=(_range((1, 2), (8, 2)),)), IO("y", False, (-1, 2))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] * given["scale.a"] + given["scale.b"] + given["shift"]},
        weights={"scale.a": (2.0, 3.0), "scale.b": (0.0, 0.0), "shift": (1.0, 1.0)},
    ),
    "streaming": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (8,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] + 1},
        scratch=256,
        streamable=4096,
    ),
    "cache": Network(
        (IO("x", True, (-1,), ranges=(_range((1,), (8,)),)), IO("y", False, (-1,))),
        lambda shapes, _: {"y": shapes["x"]},
        lambda given: {"y": given["x"] + 1},
        aliased={"y": "x"},
    ),
    "kv": Network(
        (
            IO("cache", True, (-1,), ranges=(_range((1,), (8,)),)),
            IO("update", True, (-1,), ranges=(_range((1,), (8,)),)),
            IO("kept", False, (-1,)),
            IO("twice", False, (-1,)),
        ),
        lambda shapes, _: {"kept": shapes["cache"], "twice": shapes["update"]},
        lambda given: {"kept": given["cache"] * 0.5 + given["update"], "twice": given["update"] * 2},
        aliased={"kept": "cache"},
    ),
}


def serialize(
    network: str, *, version: Sequence[int] = (1, 5, 0, 114), magic: bytes = b"vtrt", nbytes: int | None = None
) -> bytes:
    """An engine file of the layout of TensorRT-RTX: a header of 64 bytes, then what only this module reads."""
    body = network.encode().ljust(192, b"\0")
    total = 64 + len(body)
    header = _HEADER.pack(magic, 0, 64, total if nbytes is None else nbytes, *version)
    return header.ljust(64, b"\0") + body


# ---- the API


class IOutputAllocator:
    def __init__(self) -> None:
        self._constructed = True


class IRuntimeCache:
    """What TensorRT-RTX compiled at run time: one kernel for each engine and set of shapes.

    Beside them the names of the engines that contexts were made of.
    """

    def __init__(self) -> None:
        self._compiled: list[str] = []
        self.kernels: set[str] = set()

    def serialize(self) -> memoryview:
        return memoryview(json.dumps([__version__, self._compiled, sorted(self.kernels)]).encode())

    def deserialize(self, blob: Any) -> bool:
        try:
            version, compiled, kernels = json.loads(bytes(memoryview(blob)))
        except ValueError:
            return False
        if version != __version__:
            return False
        self._compiled += [name for name in compiled if name not in self._compiled]
        self.kernels.update(kernels)
        return True

    def reset(self) -> bool:
        self._compiled.clear()
        self.kernels.clear()
        return True


class LayerInformationFormat(enum.IntEnum):
    ONELINE = 0
    JSON = 1


class IProfiler:
    def __init__(self) -> None:
        self._constructed = True

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class Profiler(IProfiler):
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        print(f"{layer_name}: {ms}ms")


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        if format is not LayerInformationFormat.JSON:
            raise TypeError("get_engine_information(): incompatible function arguments")
        return json.dumps({"Layers": [self._engine.name], "Bindings": list(self._engine._io)})


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._kernels = _LAZY
        self._cache: Any = None

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._strategy = ExecutionContextAllocationStrategy(strategy)

    def get_execution_context_allocation_strategy(self) -> ExecutionContextAllocationStrategy:
        return self._strategy

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> DynamicShapesKernelSpecializationStrategy:
        return self._kernels

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, value: DynamicShapesKernelSpecializationStrategy) -> None:
        self._kernels = type(_LAZY)(value)

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache | None = None) -> bool:
        # The bindings do not keep it alive, and use it nevertheless.
        self._cache = weakref.ref(cache) if cache is not None else None
        return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        if not isinstance(logger, ILogger) or not hasattr(logger, "_constructed"):
            raise TypeError("__init__(): incompatible constructor arguments")
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        memoryview(serialized_engine)
        wrong = _fault(serialized_engine)
        if wrong is not None:
            message = f"IRuntime::deserializeCudaEngine: Error Code 1: {wrong[1]}"
            self._logger.log(ILogger.ERROR, message)
            return None
        name, weights = _body(serialized_engine)
        return ICudaEngine(NETWORKS[name], self._logger, weights)

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        wrong = _fault(buffer)
        return (EngineValidity.VALID, 0) if wrong is None else (EngineValidity.INVALID, int(wrong[0]))


def _fault(data: bytes) -> tuple[EngineInvalidityDiagnostics, str] | None:
    data = bytes(data)
    if data[:4] == b"sm75":
        return EngineInvalidityDiagnostics.UNSUPPORTED_CC, "The engine was built for compute capability 7.5"
    if len(data) < 256 or data[:4] != b"vtrt":
        what = "Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match)"
        return EngineInvalidityDiagnostics.MALFORMED_ENGINE, what
    if ".".join(map(str, _HEADER.unpack_from(data)[4:])) != __version__:
        return EngineInvalidityDiagnostics.VERSION_MISMATCH, "Serialization (Version tag does not match.)"
    if _body(data)[0] not in NETWORKS:
        return EngineInvalidityDiagnostics.CUDA_ERROR, "Cuda Runtime (operation not supported)"
    return None


def _body(data: bytes) -> tuple[str, dict[str, list[float]]]:
    """The network's name, and the weights that it was refitted with."""
    name, _, weights = bytes(data)[64:].rstrip(b"\0").decode(errors="replace").partition(" {")
    return name, json.loads(f"{{{weights}") if weights else {}


class ICudaEngine:
    def __init__(self, network: Network, logger: ILogger, weights: dict[str, list[float]] | None = None) -> None:
        self._network = network
        self._logger = logger
        self._io = {each.name: each for each in network.io}
        self._budget = network.streamable
        self._weights = {name: torch.tensor(value) for name, value in {**network.weights, **(weights or {})}.items()}

    @property
    def name(self) -> str:
        return self._network.name

    def serialize(self) -> bytes | None:
        known = next(name for name, network in NETWORKS.items() if network is self._network)
        weights = {name: value.tolist() for name, value in self._weights.items()}
        return serialize(f"{known} {json.dumps(weights)}" if weights else known)

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    @property
    def num_optimization_profiles(self) -> int:
        return self._network.profiles

    @property
    def device_memory_size_v2(self) -> int:
        # Streaming needs a buffer for what comes in.
        return self._network.scratch + (512 if self._budget < self._network.streamable else 0)

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        if not 0 <= value <= self._network.streamable:
            message = f"Error Code 3: API Usage Error (a budget of {value} bytes is out of range)"
        elif any(context.engine is self for context in IExecutionContext.made):
            message = "Error Code 3: API Usage Error (the budget cannot change while execution contexts are active)"
        else:
            self._budget = value
            return
        self._logger.log(ILogger.ERROR, message)

    def get_weight_streaming_automatic_budget(self) -> int:
        return self._network.streamable // 2

    @property
    def streamable_weights_size(self) -> int:
        return self._network.streamable

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self._known(name).is_input else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if self._known(name).host else TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._known(name).dtype

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._known(name).shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        io = self._known(name)
        if io.host or not io.is_input:
            raise Violation(f"{name} has values or nothing in a profile, no shape")
        return [Dims(each) for each in (io.ranges[profile_index] if io.ranges else [io.shape] * 3)]

    def get_tensor_profile_values(self, name: int, profile_index: str) -> list[list[int]]:
        # The arguments are declared the other way round than they are called in the documentation.
        if not isinstance(name, int) or not isinstance(profile_index, str):
            raise TypeError("get_tensor_profile_values(): incompatible function arguments")
        io = self._known(profile_index)
        if not io.host or not io.is_input:
            raise RuntimeError(f"{profile_index} is not an input shape binding")
        return [list(each) for each in io.ranges[name]] if io.ranges else []

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._network.aliased.get(name)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext | None:
        if not isinstance(runtime_config, IRuntimeConfig):
            raise TypeError("create_execution_context(): incompatible function arguments")
        if runtime_config._cache is not None and runtime_config._cache() is None:
            raise Violation("the runtime cache of the configuration was freed: a segmentation fault")
        if self._network.name == "no context":
            self._logger.log(ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 8 bytes.)")
            return None
        cache = runtime_config._cache() if runtime_config._cache is not None else None
        if cache is not None and self.name not in cache._compiled:
            cache._compiled.append(self.name)
        context = IExecutionContext(self, runtime_config.get_execution_context_allocation_strategy(), cache)
        context._specialization = runtime_config._kernels
        return context

    def _known(self, name: str) -> IO:
        if not isinstance(name, str):
            raise TypeError("incompatible function arguments")
        if name not in self._io:
            raise Violation(f"there is no tensor {name!r}")
        return self._io[name]


class Weights:
    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        self.dtype = type
        self.size = count
        self._ptr = ptr


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        if not engine._weights:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine = engine
        self._logger = logger
        self._given: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine._weights)

    def get_weights_prototype(self, weights_name: str) -> Weights:
        return Weights(DataType.FLOAT, 0, self._engine._weights[weights_name].numel())

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        expected = self.get_weights_prototype(name)
        if (weights.dtype, weights.size) != (expected.dtype, expected.size) or not weights._ptr:
            raise Violation(f"weights {name} do not fit")
        if self._engine.name == "no weights":
            self._logger.log(ILogger.ERROR, "Error Code 3: API Usage Error (these weights are refused)")
            return False
        self._given[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        begun = {name.split(".")[0] for name in self._given}
        return [name for name in self._engine._weights if name.split(".")[0] in begun and name not in self._given]

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        if self.get_missing_weights():
            raise Violation("weights are missing")
        if self._engine.name == "no refit":
            self._logger.log(ILogger.ERROR, "Error Code 2: OutOfMemory (no memory to refit)")
            return False
        for name, weights in self._given.items():
            self._engine._weights[name] = _load(weights._ptr, (weights.size,), torch.float32)
        return True


class IExecutionContext:
    made: ClassVar[weakref.WeakSet[IExecutionContext]] = weakref.WeakSet()
    _compiled: ClassVar[list[str]] = []
    """Kernels that were in no runtime cache."""

    def __init__(
        self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy, cache: IRuntimeCache | None = None
    ) -> None:
        self._kernels = cache if cache is not None else IRuntimeCache()
        self.engine = engine
        self._network = engine._network
        self._io = engine._io
        self._strategy = strategy
        self._profile = 0
        self._shapes: dict[str, Shape] = {
            each.name: each.shape for each in self._network.io if each.is_input and -1 not in each.shape
        }
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._scratch: tuple[int, int] | None = None
        self._profiler: IProfiler | None = None
        self._specialization = _LAZY
        # Whether the next enqueue must still prepare what a capture cannot hold.
        self._dirty = True
        needed = device is not None and bool(self._network.hides or self._network.keeps)
        self._table = device.heap.empty(1, dtype=torch.int64) if needed else None
        self.made.add(self)

    @property
    def profiler(self) -> IProfiler | None:
        return self._profiler

    @profiler.setter
    def profiler(self, value: IProfiler) -> None:
        if not isinstance(value, IProfiler) or not hasattr(value, "_constructed"):
            raise TypeError("(): incompatible function arguments")
        self._profiler = value

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._network.profiles:
            return self._no(f"profile {profile_index} is out of range")
        if profile_index != self._profile:
            self._profile = profile_index
            # Addresses stay; shapes have to be set again.
            self._shapes = {name: shape for name, shape in self._shapes.items() if -1 not in self._io[name].shape}
            self._dirty = True
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if not isinstance(shape, (tuple, list, Dims)) or not all(isinstance(size, int) for size in shape):
            raise TypeError("set_input_shape(): incompatible function arguments")
        io = self._io.get(name)
        if io is None or not io.is_input:
            return self._no(f"{name} is not an input")
        shape = tuple(shape)
        if len(shape) != len(io.shape) or any(b not in (-1, got) for b, got in zip(io.shape, shape, strict=True)):
            return self._no(f"shape {shape} does not fit {io.shape} of {name}")
        if io.ranges and not io.host:
            low, _, high = io.ranges[self._profile]
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return self._no(f"shape {shape} of {name} is outside of profile {self._profile}")
        self._shapes[name] = shape
        self._dirty = True
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        io = self._io.get(name)
        if io is None:
            return self._no(f"{name} is not a tensor of the engine")
        if not memory or (not io.host and memory % ALIGNMENT):
            return self._no(f"address {memory:#x} of {name} is not aligned to {ALIGNMENT} bytes")
        self._addresses[name] = memory
        if self._table is not None and self._network.hides and name == "y":
            self._table[0] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_output_allocator(self, name: str, output_allocator: IOutputAllocator | None) -> bool:
        if output_allocator is not None and not isinstance(output_allocator, IOutputAllocator):
            raise TypeError("set_output_allocator(): incompatible function arguments")
        if output_allocator is not None and not hasattr(output_allocator, "_constructed"):
            raise Violation("the allocator's base class was not constructed")
        io = self._io.get(name)
        if io is None or io.is_input:
            return self._no(f"{name} is not an output")
        if output_allocator is None:
            self._allocators.pop(name, None)
        else:
            self._allocators[name] = weakref.ref(output_allocator)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if self._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Violation("this context has device memory of its own")
        if memory % ALIGNMENT or size < self.engine.device_memory_size_v2:
            self._no(f"device memory at {memory:#x} of {size} bytes: {self.engine.device_memory_size_v2} are needed")
            return
        self._scratch = (memory, size)

    def infer_shapes(self) -> list[str]:
        missing = self._missing()
        if not missing:
            try:
                self._outputs()
            except ValueError as error:
                raise RuntimeError(f"shape inference failed: {error}") from error
        return missing

    def get_tensor_shape(self, name: str) -> Dims:
        io = self._io.get(name)
        if io is None:
            raise Violation(f"there is no tensor {name!r}")
        if io.is_input:
            return Dims(self._shapes.get(name, io.shape))
        return Dims(io.shape if self._missing() else self._outputs()[name])

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not isinstance(stream_handle, int):
            raise TypeError("execute_async_v3(): incompatible function arguments")
        capture = device.streams[stream_handle].capture if device is not None else None
        if missing := self._missing():
            return self._no(f"the shapes of {', '.join(missing)} were not set")
        if self.engine.device_memory_size_v2 and self._scratch is None:
            return self._no("no device memory was set")
        try:
            shapes = self._outputs()
        except ValueError as error:
            return self._no(f"shape inference failed: {error}")
        for io in self._network.io:
            if io.name in self._allocators:
                if capture is not None:
                    return self._no(f"the allocator of {io.name} would be called inside of a capture")
            elif not io.is_input and -1 in shapes[io.name]:
                return self._no(f"{io.name} has a shape that is known only at run time, and no output allocator")
            elif io.name not in self._addresses:
                return self._no(f"the address of {io.name} was not set")
        for output, source in self._network.aliased.items():
            if self._addresses[output] != self._addresses.get(source):
                return self._no(f"{output} and {source} have to be at the same address")
        if capture is not None and self.engine._budget < self._network.streamable:
            capture.valid = False
            return self._no("weights are streamed, which cannot be captured")
        if capture is not None and not self._network.captures:
            capture.valid = False
            return self._no("IIfConditionalOutputLayer cannot be captured")
        if capture is not None and self._dirty:
            capture.valid = False
            return self._no("the first enqueue after a change of shapes allocates: operation not permitted")
        if capture is not None and self._profiler is not None:
            raise Violation("a profiler reports nothing of a capture")
        self._dirty = False
        ran = self._run(stream_handle, shapes)
        if self._profiler is not None:
            self._profiler.report_layer_time(self._network.name or "layer", 0.5)
        return ran

    # ---- inside

    def _no(self, message: str) -> bool:
        message = f"IExecutionContext: Error Code 3: API Usage Error ({message})"
        self.engine._logger.log(ILogger.ERROR, message)
        return False

    def _missing(self) -> list[str]:
        inputs = [each for each in self._network.io if each.is_input]
        return [
            each.name
            for each in inputs
            if each.name not in self._shapes or (each.host and each.name not in self._addresses)
        ]

    def _outputs(self) -> dict[str, Shape]:
        values = {
            each.name: _load(self._addresses[each.name], self._shapes[each.name], TORCH[each.dtype]).tolist()
            for each in self._network.io
            if each.is_input and each.host
        }
        return self._network.shapes(self._shapes, values)

    def _run(self, stream: int, shapes: dict[str, Shape]) -> bool:
        network = self._network
        kernel = f"{network.name} {sorted(self._shapes.items())}"
        if kernel not in self._kernels.kernels:
            self._kernels.kernels.add(kernel)
            self._compiled.append(kernel)
        inputs = {each.name: (self._shapes[each.name], each) for each in network.io if each.is_input}
        host = {
            name: _load(self._addresses[name], shape, TORCH[io.dtype])
            for name, (shape, io) in inputs.items()
            if io.host
        }
        if self._allocators:
            given = {
                name: host[name] if io.host else _load(self._addresses[name], shape, TORCH[io.dtype])
                for name, (shape, io) in inputs.items()
            }
            made = network.compute({**given, **self.engine._weights})
            for name, reference in self._allocators.items():
                allocator = reference()
                if allocator is None:
                    raise Violation(f"the allocator of {name} was freed")
                nbytes = made[name].numel() * made[name].element_size()
                memory = allocator.reallocate_output_async(
                    name, self._addresses.get(name, 0), nbytes, ALIGNMENT, stream
                )
                if not memory:
                    return self._no(f"no memory for {name}")
                if memory % ALIGNMENT:
                    return self._no(f"memory for {name} is not aligned")
                self._addresses[name] = memory
                allocator.notify_shape(name, Dims(made[name].shape))
                shapes = {**shapes, name: tuple(made[name].shape)}
        for io in network.io:
            if io.host and not io.is_input:
                read = {name: _load(self._addresses[name], s, TORCH[i.dtype]) for name, (s, i) in inputs.items()}
                _store(self._addresses[io.name], network.compute(read)[io.name])
        moved = [each for each in network.io if not each.host]
        shapes = {**self._shapes, **shapes}
        tensors = tuple((each.name, TORCH[each.dtype], shapes[each.name], each.is_input) for each in moved)
        frozen = {**host, **self.engine._weights}
        recipe = _Recipe(network, tensors, tuple((name, tuple(value.tolist())) for name, value in frozen.items()))
        addresses = {each.name: self._addresses[each.name] for each in moved}
        if device is None:
            recipe.run(_load, _store, list(addresses.values()))
        else:
            table = 0 if self._table is None else self._table.data_ptr()
            if self._table is not None and network.keeps:
                self._table[0] = self._shapes["x"][0]
            if network.hides == "instead":
                addresses["y"] = table
            recipe.launch(device, [*addresses.values(), self._scratch[0] if self._scratch else 0, table], stream)
        for name in self._allocators:
            del self._addresses[name]
        return True


@dataclass(frozen=True)
class _Recipe:
    """All that an enqueue freezes: shapes, the values that the host read, and weights."""

    network: Network
    tensors: tuple[tuple[str, torch.dtype, Shape, bool], ...]
    host: tuple[tuple[str, tuple[float, ...]], ...]

    def run(
        self, load: Callable[..., Tensor], store: Callable[..., None], addresses: Sequence[int], **kept: Any
    ) -> None:
        given = {**{name: torch.tensor(value) for name, value in self.host}, **kept}
        for (name, dtype, shape, is_input), address in zip(self.tensors, addresses, strict=True):
            if is_input:
                given[name] = load(address, shape, dtype)
        made = self.network.compute(given)
        for (name, _, shape, is_input), address in zip(self.tensors, addresses, strict=True):
            if not is_input:
                if tuple(made[name].shape) != shape:
                    raise Violation(f"{name} came out as {tuple(made[name].shape)}, inferred {shape}")
                store(address, made[name])

    def launch(self, driver: Any, words: Sequence[int], stream: int) -> None:
        kernels = driver.__dict__.setdefault("_kernels", {})
        if self not in kernels:
            kernels[self] = driver.kernel([8] * len(words), self._body)
        driver.launch(kernels[self], [word.to_bytes(8, "little") for word in words], stream)

    def _body(self, memory: Any, *arguments: bytes) -> None:
        *addresses, scratch, table = (int.from_bytes(each, "little") for each in arguments)
        if self.network.scratch:
            memory.write(scratch, b"s" * self.network.scratch)
        if self.network.hides:
            addresses[1] = int(memory.load(table, (1,), torch.int64))
        kept = {"kept": int(memory.load(table, (1,), torch.int64))} if self.network.keeps else {}
        self.run(memory.load, memory.store, addresses, **kept)


def _load(address: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(ctypes.string_at(address, count * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _store(address: int, tensor: Tensor) -> None:
    dense = tensor.contiguous()
    ctypes.memmove(address, dense.data_ptr(), dense.numel() * dense.element_size())


def use(monkeypatch: Any, flavour: str = "tensorrt_rtx") -> None:
    """Let graphcache find this module, and no other, under the name of a flavour."""
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_lean"):
        monkeypatch.setitem(sys.modules, name, sys.modules[__name__] if name == flavour else None)
    monkeypatch.setattr(library, "_found", {})
    monkeypatch.delenv("GRAPHCACHE_TENSORRT", raising=False)
