"""Options of a wrapped module, the modes of the current context, and the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, get_args

from graphcache.errors import ConfigError, shown

Strategy = Literal["auto", "whole_graph", "per_submodule"]
Capture = Literal["first", "worthwhile", "prepared"]
CaptureIn = Literal["foreground", "background"]
Contexts = Literal["auto", "private", "shared"]
MaxBytes = int | Literal["auto"] | None
OnFailure = Literal["eager", "raise"]
Isolation = Literal["auto", "full"]
Runtime = Literal["graphcache", "torch_tensorrt"]
Specialization = Literal["lazy", "eager", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingOptions:
    """How graphs of engines are recorded."""

    bind: bool = True
    """Point kernels at the caller's tensors where all places of addresses are found, rather than copy."""
    full_edges: bool = False
    """Replace programmatic dependencies (dependent launch), for kernels that do not wait when they should."""
    contexts: Contexts = "auto"
    """``"private"`` gives each graph its own execution context, ``"shared"`` captures up to 129 with one, ``"auto"``
    shares where that was measured to be right and captures are made in the foreground."""


RECORDING = {"auto": RecordingOptions(), "full": RecordingOptions(bind=False, full_edges=True, contexts="private")}

_ISOLATION = "use isolation='full' where graphs of an engine answer wrongly or fail"
REMOVED = {
    "io": _ISOLATION,
    "edges": _ISOLATION,
    "contexts": _ISOLATION,
    "weights": "weights are always checked, by a native check that takes no noticeable time",
    "templates": "more graphs are kept in place of what evicted ones left behind; see max_graphs and max_bytes",
    "outputs": "answers are fresh tensors; forward_into writes them into tensors of yours",
}
"""Options of version 0.1 that are gone, and what to use instead. They are ignored in packages of that version."""


class BucketsLike(Protocol):
    """:class:`graphcache.Buckets`, as it is seen from below."""

    sizes: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """How a module is captured, kept and replayed. Every option has a default that is always right.

    Args:
        strategy: ``"whole_graph"`` captures the module as one graph, ``"per_submodule"`` captures its engines (or
            ``include``) one by one and runs the rest eagerly. ``"auto"`` tries the first; where something forbids it,
            it captures the largest submodules around that. It remembers which of the two it is for each call key.
        include: Names of submodules, as ``named_modules()`` gives them, that are captured where the whole is not. Empty
            means every engine in the module with ``"per_submodule"``, and whatever it finds with ``"auto"``.
        exclude: Names of submodules, or patterns of them such as ``"*.nms"``, that no graph is to hold. The whole has
            none then, the largest submodules without them have.
        capture: ``"first"`` captures every call key at its first call. ``"worthwhile"`` captures one when its eager
            calls have lost 0.4 times what a capture takes, keeps the graphs that save most, and drops a graph
            that is no faster than eager execution; an account bounds what captures may take of the whole time.
            ``"prepared"`` captures only what ``prepare`` was given.
        capture_in: ``"foreground"`` captures within the call. ``"background"`` answers eagerly, with the reason
            ``pending``, and captures later, on copies of the call's tensors, in another thread. That thread runs the
            module alone: a call that runs the module meanwhile waits for one run at most. Such a graph has scratch
            memory of its own.
        max_graphs: How many graphs are kept, at least 1; the least recently used goes first, with
            ``capture="worthwhile"`` the one that saved least lately.
        max_bytes: Device memory in bytes that all kept graphs may own together; ``None`` means no bound in bytes.
            ``"auto"`` is a quarter of the device's memory, and no bound on the CPU.
        ignore: Paths of Python state that do not matter to answers, such as ``"self.calls"`` or ``"self.blocks[*].n"``:
            a call that changes them is captured all the same, and replays leave them as they are. Without it such a
            call runs eagerly, with the reason ``mutates``, which names the path. Functions that read a clock or use a
            file, such as ``"time.*"``, ``"print"`` or ``"logging.*"``, can be named too; replays do not call them.
        buckets: Argument -> axis -> sizes, such as ``{"x": {0: [1, 8, 64]}}``; or a :class:`graphcache.Buckets`. A call
            whose sizes lie between them is padded to the next ones, which have a graph, and its answer cropped. Whether
            the module bears it is tried first. ``None`` pads nothing. Parts of a module are never padded.
        verify: Compare every new graph with eager execution, on the caller's inputs and on others, before it is used.
        isolation: How far the graphs of engines are kept apart from each other and from the caller. ``"auto"`` points
            an engine's kernels at the caller's tensors, so that nothing is copied, keeps the dependencies of kernels
            as they were captured, and captures many graphs with one execution context where that was measured to be
            right (TensorRT-RTX 1.5 and 1.6). ``"full"`` copies inputs and outputs by nodes of the graph, lets every
            kernel wait for those before it, and gives each graph an execution context of its own, as NVIDIA documents
            it to be safe: for engines whose graphs answer wrongly or fail otherwise. It takes more memory and time.
        runtime: Who runs the engines in a module that Torch-TensorRT compiled: ``"graphcache"``, for as long as it is
            wrapped, or ``"torch_tensorrt"``, inside a graph of the whole. ``None`` is the first where it can be.
        on_failure: ``"eager"`` answers eagerly whatever cannot be captured and says why; ``"raise"`` raises
            :class:`~graphcache.errors.CaptureError` instead.

    Raises:
        ConfigError: For a value outside what is listed here, or an option of version 0.1 that was removed.

    Example:
        >>> GraphConfig(max_graphs=64).max_bytes
        'auto'
    """

    strategy: Strategy = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    capture: Capture = "first"
    capture_in: CaptureIn = "foreground"
    max_graphs: int = 128
    max_bytes: MaxBytes = "auto"
    ignore: tuple[str, ...] = ()
    # A mapping has no hash.
    buckets: BucketsLike | Mapping[Any, Any] | None = field(default=None, hash=False)
    verify: bool = True
    isolation: Isolation = "auto"
    runtime: Runtime | None = None
    on_failure: OnFailure = "eager"

    def __new__(cls, *args: Any, **options: Any) -> Self:
        for name in options:
            if name in REMOVED:
                raise ConfigError(f"the option {name} was removed in version 0.2: {REMOVED[name]}")
            if name not in cls.__dataclass_fields__:
                raise ConfigError(
                    f"unknown option {shown(name)}; the options are {', '.join(cls.__dataclass_fields__)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, allowed in _LITERALS.items():
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)) or value not in allowed:
                raise ConfigError(
                    f"{name}={shown(value)} is not an option; expected one of {', '.join(map(repr, allowed))}"
                )
        for name, what in (
            ("include", "submodule names, such as ['encoder']"),
            ("exclude", "submodule names, such as ['head.nms']"),
            ("ignore", "paths, such as ['self.calls']"),
        ):
            value = getattr(self, name)
            listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
            if not listed or not all(isinstance(each, str) for each in value):
                raise ConfigError(f"{name}={shown(value)}: expected a sequence of {what}")
            object.__setattr__(self, name, tuple(value))
        if not (self.max_bytes is None or (isinstance(self.max_bytes, str) and self.max_bytes == "auto")):
            _check_number("max_bytes", self.max_bytes, ", or 'auto', or None")
        _check_number("max_graphs", self.max_graphs)
        check_bool("verify", self.verify)
        if self.exclude and self.strategy == "whole_graph":
            raise ConfigError(
                "strategy='whole_graph' with exclude: a graph of the whole holds all of it; expected another strategy, "
                "or no exclude"
            )
        if self.buckets is not None and (self.exclude or self.strategy == "per_submodule"):
            other = "exclude" if self.exclude else "strategy='per_submodule'"
            raise ConfigError(f"buckets with {other}: answers of the whole are cropped; expected one of the two")

    @property
    def recording(self) -> RecordingOptions:
        """How graphs of engines are recorded."""
        return RECORDING[self.isolation]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GraphConfig:
        """Options over the environment over the defaults."""
        numbers = {name: number_in_environment(f"GRAPHCACHE_{name.upper()}") for name in ("max_graphs", "max_bytes")}
        return cls(**{name: number for name, number in numbers.items() if number is not None} | dict(options))


_LITERALS: dict[str, tuple[str | None, ...]] = {
    "strategy": get_args(Strategy),
    "capture": get_args(Capture),
    "capture_in": get_args(CaptureIn),
    "isolation": get_args(Isolation),
    "runtime": (*get_args(Runtime), None),
    "on_failure": get_args(OnFailure),
}


def check_bool(name: str, value: object) -> bool:
    """The value of an option, if it is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: expected True or False")
    return value


def _check_number(name: str, value: object, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={shown(value)}: expected a whole number, 1 or more{otherwise}")


def number_in_environment(variable: str) -> int | None:
    """The whole number, 1 or more, that an environment variable holds; ``None`` if it is not set."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if not text.isdecimal() or len(text) > 30 or int(text) < 1:
        raise ConfigError(f"{variable}={shown(text)}: expected a whole number, 1 or more")
    return int(text)


def switch_in_environment(variable: str, unset: bool = False) -> bool:
    """Whether an environment variable is on; ``unset`` if it is not set."""
    text = os.environ.get(variable, "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"{variable}={shown(text)}: expected 1, true, 0, false or nothing")
    return text in ("1", "true") if text else unset


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes of the current context, named as in ``torch_tensorrt.runtime``."""

    graphs: Literal["off", "subgraph", "whole_graph"] | None = None
    """``None``: wrapped modules use graphs, bare engines don't. ``"off"`` runs everything eagerly, ``"subgraph"`` lets
    bare engines use graphs too, ``"whole_graph"`` is set for a module that is captured as a whole."""
    multi_device_safe: bool = False
    """Move inputs that lie on another device than the engine, instead of refusing them."""
    off: bool = field(init=False)

    def __post_init__(self) -> None:
        # Asked at every hit, where a comparison of strings would cost twice as much.
        object.__setattr__(self, "off", self.graphs == "off")


modes: ContextVar[Modes] = ContextVar("graphcache_modes", default=Modes())  # noqa: B039 - Modes is frozen


@contextmanager
def graphs_off() -> Iterator[None]:
    """Inside, wrapped modules of this context run eagerly: they are part of a call that is being captured."""
    token = modes.set(Modes("off", modes.get().multi_device_safe))
    try:
        yield
    finally:
        modes.reset(token)
