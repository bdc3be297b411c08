"""What can go wrong, and why a call ran eagerly. A message says what was seen, what was expected, and what to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class GraphCacheError(Exception):
    """Base of everything graphcache raises on purpose."""


class ConfigError(GraphCacheError, ValueError):
    """An option, a mode or an environment variable has a value that means nothing."""


class InputError(GraphCacheError, ValueError):
    """A module was called with something it cannot take."""


class InputCountError(InputError, TypeError):
    """Too many or too few inputs, or a name that the module does not have."""


class InputTypeError(InputError, TypeError):
    """An input is not a tensor."""


class InputDtypeError(InputError, TypeError):
    """An input has another dtype than its binding. graphcache never casts silently."""


class InputDeviceError(InputError):
    """An input lies on another device than the engine."""


class InputRankError(InputError):
    """An input has another number of dimensions than its binding."""


class ProfileRangeError(InputError):
    """A size lies outside every optimisation profile of the engine."""


class OutputMismatchError(InputError):
    """Tensors given for the answer have another structure, shape, dtype or device than the answer."""


class EngineError(GraphCacheError, RuntimeError):
    """Something about a TensorRT engine."""


class EngineFormatError(EngineError, ValueError):
    """The bytes are not a TensorRT engine, or not all of one."""


class EngineVersionError(EngineError):
    """The engine was built by another TensorRT version or flavour, or for another GPU."""


class EngineBuildError(EngineError):
    """An ONNX model could not be built into an engine."""


class EngineExecutionError(EngineError):
    """TensorRT refused to run an engine."""


class CaptureError(GraphCacheError, RuntimeError):
    """A call could not be captured, and ``on_failure="raise"`` was asked for."""


class ModeConflictError(GraphCacheError, RuntimeError):
    """CUDA graphs and a dynamic output allocator were asked for together, in ``strict`` mode."""


class ClosedError(GraphCacheError, RuntimeError):
    """An engine, a module or a graph was used after ``close()``."""


class PackageError(GraphCacheError, ValueError):
    """A file is no package of graphcache, or a damaged one; the message names the part and how to make it again."""


class NoGpuError(GraphCacheError, RuntimeError):
    """Something needs a CUDA device, and there is none."""


class CudaError(GraphCacheError, RuntimeError):
    """A CUDA driver call failed; the message names the call and the driver's own code."""


class CompileError(GraphCacheError, RuntimeError):
    """`graphcache compile`: native code cannot be compiled, or disagrees with Python; hits are answered in Python."""


class TensorRTNotFoundError(GraphCacheError, ModuleNotFoundError):
    """No flavour of TensorRT can be imported."""


class ExtraNotFoundError(GraphCacheError, ModuleNotFoundError):
    """An optional package is not installed; the message names the extra that installs it."""


class ResultError(GraphCacheError, ValueError):
    """A file is no result of ``graphcache bench`` or ``run``, or a damaged one; the message names the field."""


class ServingError(GraphCacheError, RuntimeError):
    """A server, or a repository of models, cannot do what it was asked for."""


class UnknownModelError(ServingError, LookupError):
    """No model of that name is served, or no such version of it; the message names those that are."""


class UnavailableError(ServingError):
    """A model cannot answer now: it is being prepared, is reloaded, or has too many requests waiting."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        """Keep what happened, and after how many seconds asking again makes sense."""
        super().__init__(message)
        self.retry_after = retry_after


class Reason(enum.Enum):
    """Why a call ran eagerly. The names are stable: counters and metrics are labelled with them.

    Each member has a ``sentence`` (what is the case) and a ``remedy`` (what would change it).

    Example:
        >>> Reason.OUTPUT_ALLOCATOR.value
        'output_allocator'
    """

    sentence: str
    remedy: str

    def __new__(cls, value: str, sentence: str, remedy: str) -> Reason:
        member = object.__new__(cls)
        member._value_ = value
        member.sentence = sentence
        member.remedy = remedy
        return member

    DISABLED = (
        "disabled",
        "CUDA graphs are switched off here",
        "call set_cudagraphs_mode(True), or leave the block that switched them off; unset GRAPHCACHE_DISABLE",
    )
    OUTPUT_ALLOCATOR = (
        "output_allocator",
        "an output's shape is known only at run time, so TensorRT allocates it during the call",
        "ask for the output allocator only where the shape really depends on the data",
    )
    DATA_DEPENDENT = (
        "data_dependent",
        "the shape of a result depends on the values of the inputs",
        "move the operation out of the module; strategy='auto' captures what is around it",
    )
    HOST_READ = (
        "host_read",
        "the host reads a value that the device computes",
        "keep the value on the device; strategy='auto' captures what is around it",
    )
    NOT_CAPTURABLE = (
        "not_capturable",
        "TensorRT refused to enqueue the engine into a capture (loops, conditionals and some layers forbid it)",
        "rebuild the network without them, or leave it eager",
    )
    CAPTURE_FAILED = (
        "capture_failed",
        "the capture failed",
        "see the message; the call key is tried again after some calls",
    )
    EMPTY_GRAPH = (
        "empty_graph",
        "the capture ended without a single node",
        "leave it as it is: there is no work in this call that a graph could launch",
    )
    MISMATCH = (
        "mismatch",
        "the captured graph did not give the eager answer, so it was thrown away",
        "report it, with the engine; the eager answer is the one returned",
    )
    NONDETERMINISTIC = (
        "nondeterministic",
        "eager execution itself gives different answers for the same inputs, so no graph can be verified",
        "check the eager answers against a reference first: this engine or module may be wrong on this device",
    )
    RANDOM = ("random", "the module draws random numbers", "call module.eval() if it is dropout")
    MUTATES = (
        "mutates",
        "the module changes its inputs, attributes or other state, which a replay would not",
        "update tensors in place, as Transformers' StaticCache does; keep other state outside, or name it in ignore",
    )
    UNOBSERVED = (
        "unobserved",
        "not everything that the call does besides answering could be observed",
        "name the state that does not matter to the answer in the option ignore, as in ignore=['self.history']",
    )
    UNSETTLED = (
        "unsettled",
        "the module changes what it runs, or has changed often, so a graph waits until it stays as it is",
        "call it again; if it never settles, name what changes without mattering to the answer in the option ignore",
    )
    ALIASES_STATE = (
        "aliases_state",
        "an output is a view of the module's own parameters or buffers, or a reshaping view of an input",
        "return a copy of it",
    )
    GRAD = (
        "grad",
        "the call may need gradients, which a replay does not record",
        "call it under torch.inference_mode() or torch.no_grad(), or module.requires_grad_(False)",
    )
    TRACING = (
        "tracing",
        "torch.compile, torch.export or another tracer is running the module",
        "wrap what the tracer made, instead of what it traced",
    )
    OUTER_CAPTURE = (
        "outer_capture",
        "the caller's stream is being captured, so the work was enqueued into that capture",
        "leave it as it is: the outer graph contains the work",
    )
    ARGUMENT = (
        "argument",
        "an argument can be neither copied into a graph nor told apart by value, or is another object at every call",
        "pass tensors, numbers, strings, None, and tuples, lists or dictionaries of them; keep other objects",
    )
    NEW_STATE = (
        "new_state",
        "an object among the arguments, or a tensor that the call updates in place, is not that of the calls before",
        "give the same one to the next calls, which a graph then reads and updates where it is",
    )
    OUTPUT = (
        "output",
        "the module returned something that a replay could not return again",
        "return tensors, plain values, and tuples, lists or dictionaries of them",
    )
    WEIGHT_STREAMING = (
        "weight_streaming",
        "the engine streams weights from host memory at every call, which no graph can hold",
        "set_device_memory_budget to what get_streamable_device_memory_budget gives",
    )
    PROFILING = (
        "profiling",
        "the engine reports the time of every layer, which a replay would not",
        "call disable_profiling()",
    )
    COLD = (
        "cold",
        "calls of this key are too few so far for a graph to pay for its capture",
        "leave it as it is, prepare the call, or use capture='first'",
    )
    PENDING = (
        "pending",
        "a graph of the module is being captured by another thread, or in the background",
        "leave it as it is: later calls have the graph; prepare() makes graphs before there are calls",
    )
    NOT_WORTH_IT = (
        "not_worth_it",
        "a graph of this call was no faster than eager execution, so it was dropped",
        "leave it eager; capture='first' keeps graphs whatever they save",
    )
    NOT_PREPARED = (
        "not_prepared",
        "only prepared calls are captured, and this one is not prepared",
        "give its shapes to prepare(), or use capture='worthwhile'",
    )
    PADDING = (
        "padding",
        "an axis that was declared independent is not, so the call was not padded to its bucket",
        "declare a fill or a mask that makes it so, or outputs; or leave the axis without buckets",
    )
    OVER_BUDGET = (
        "over_budget",
        "the graph would not fit the cache's budget",
        "raise max_graphs or max_bytes, or unpin graphs",
    )
    OUT_OF_MEMORY = ("out_of_memory", "the device had no room for the graph's buffers", "lower max_graphs or max_bytes")


GRAPHS_OFF = frozenset({Reason.DISABLED, Reason.TRACING, Reason.OUTER_CAPTURE})
"""The user has turned graphs off, or somebody watches the operations: submodules have no graphs either."""
NOT_YET = frozenset(
    {Reason.UNSETTLED, Reason.COLD, Reason.PENDING, Reason.NOT_WORTH_IT, Reason.NOT_PREPARED, Reason.NEW_STATE}
)
"""The whole may have a graph some day: submodules are left alone until then, and the time of the call counts for it."""
EXPECTED = GRAPHS_OFF | NOT_YET
"""What was asked for: no warning, and no failure with ``on_failure="raise"``."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A reason, with where it arose and what was seen there.

    Args:
        reason: Why.
        where: The engine, submodule or argument concerned; empty for the module as a whole.
        detail: What TensorRT, CUDA or PyTorch said, in one line; empty if nothing.

    Example:
        >>> print(Cause(Reason.RANDOM, where="head.dropout"))
        random: the module draws random numbers (at head.dropout). To change that: call module.eval() if it is dropout.
    """

    reason: Reason
    where: str = ""
    detail: str = ""

    def __str__(self) -> str:
        where = f" (at {self.where})" if self.where else ""
        detail = f": {self.detail.rstrip('.')}" if self.detail else ""
        return f"{self.reason.value}: {self.reason.sentence}{where}{detail}. To change that: {self.reason.remedy}."


def shown(value: object) -> str:
    """``repr`` of anything, for a message: it never raises, and is never longer than 200 characters."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"an object of type {type(value).__name__} (whose repr raises {type(error).__name__})"
    return text if len(text) <= 200 else f"{text[:197]}..."


def is_a(value: object, *kinds: type) -> bool:
    """``isinstance`` of anything, also of what cannot be asked."""
    try:
        return isinstance(value, kinds)
    except Exception:
        return False


class Refusal(Exception):
    """Raised inside a capture to say why it cannot be; never reaches the user."""

    def __init__(self, reason: Reason, where: str = "", detail: str = "") -> None:
        self.cause = Cause(reason, where, detail)
        super().__init__(str(self.cause))
