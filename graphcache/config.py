"""Options of a wrapped module, the modes of the current context, and the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, Self, get_args

from graphcache.errors import ConfigError, shown

Strategy = Literal["auto", "whole_graph", "per_submodule"]
Capture = Literal["first", "worthwhile", "prepared"]
CaptureIn = Literal["foreground", "background"]
InputOutput = Literal["bind", "copy"]
Contexts = Literal["auto", "private", "shared"]
Edges = Literal["captured", "full"]
MaxBytes = int | Literal["auto"] | None
OnFailure = Literal["eager", "raise"]
Weights = Literal["checked", "frozen"]
Runtime = Literal["graphcache", "torch_tensorrt"]
Specialization = Literal["lazy", "eager", "none"]


REMOVED = {
    "templates": "more graphs are kept in place of what evicted ones left behind; see max_graphs and max_bytes",
    "outputs": "answers are fresh tensors; forward_into writes them into tensors of yours",
}
"""Options of version 0.1 that are gone, and what to use instead. They are ignored in packages of that version."""


def refuse_removed(options: Iterable[str]) -> None:
    """Raise if one of the options was removed.

    Raises:
        ConfigError: Then, with what to use instead.
    """
    for name in options:
        if name in REMOVED:
            raise ConfigError(f"the option {name} was removed in version 0.2: {REMOVED[name]}")


class Buckets(Protocol):
    """:class:`graphcache.Buckets`, as it is seen from below."""

    sizes: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """How a module is captured, kept and replayed. Every option has a default that is always right.

    Args:
        strategy: ``"whole_graph"`` captures the module as one graph, ``"per_submodule"`` captures its engines (or
            ``include``) one by one and runs the rest eagerly. ``"auto"`` tries the first; where something forbids it,
            it captures the largest submodules around that. It remembers by signature which of the two it is.
        include: Names of submodules, as ``named_modules()`` gives them, that are captured where the whole is not. Empty
            means every engine in the module with ``"per_submodule"``, and whatever it finds with ``"auto"``.
        exclude: Names of submodules, or patterns of them such as ``"*.nms"``, that no graph is to hold. The whole has
            none then, the largest submodules without them have.
        capture: ``"first"`` captures every signature at its first call. ``"worthwhile"`` captures one when its eager
            calls have lost about as much time as a capture takes, keeps the graphs that save most, and drops a graph
            that is no faster than eager execution; an account bounds what captures may take of the whole time.
            ``"prepared"`` captures only what ``prepare`` was given.
        capture_in: ``"foreground"`` captures within the call. ``"background"`` answers eagerly, with the reason
            ``pending``, and captures on copies of its tensors in a thread beside it; such a graph has scratch memory
            of its own.
        max_graphs: How many graphs are kept, at least 1; the least recently used goes first, with
            ``capture="worthwhile"`` the one that saved least lately.
        max_bytes: Device memory in bytes that all kept graphs may own together; ``None`` means no bound in bytes.
            ``"auto"`` is a quarter of the device's memory, and no bound on the CPU.
        ignore: Paths of Python state that do not matter to answers, such as ``"self.calls"`` or ``"self.blocks[*].n"``:
            a call that changes them is captured all the same, and replays leave them as they are. Without it such a
            call runs eagerly, with the reason ``mutates``, which names the path.
        buckets: Argument -> axis -> sizes, such as ``{"x": {0: [1, 8, 64]}}``; or a :class:`graphcache.Buckets`. A call
            whose sizes lie between them is padded to the next ones, which have a graph, and its answer cropped. Whether
            the module bears it is tried first. ``None`` pads nothing. Parts of a module are never padded.
        verify: Compare every new graph with eager execution, on the caller's inputs and on others, before it is used.
        io: ``"bind"`` points an engine's kernels at the caller's tensors, so that nothing is copied, wherever all
            places are found where they hold an address, and verification agrees. Whatever is not bound is copied.
            ``"copy"`` always copies, by nodes of the graph.
        contexts: ``"private"`` gives each graph of an engine its own execution context, as NVIDIA documents it to be
            safe. ``"shared"`` captures up to 129 with one, which takes a fraction of the time: whenever it is used
            again, all of its graphs have to answer as before, or nothing is shared any more. ``"auto"`` shares where
            that was measured to be right (TensorRT-RTX 1.5 and 1.6), in the foreground.
        edges: ``"captured"`` keeps the dependencies of kernels as they were captured. ``"full"`` replaces
            programmatic ones (dependent launch), for kernels that do not wait where they should.
        weights: ``"checked"`` looks at the place and layout of every parameter and buffer at each hit, so that replaced
            weights are never missed (about 0.3 µs each; on CUDA while the device works). ``"frozen"`` is the caller's
            promise that they stay where they are. Engines have no parameters and pay nothing.
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
    buckets: Buckets | Mapping[Any, Any] | None = field(default=None, hash=False)
    verify: bool = True
    io: InputOutput = "bind"
    contexts: Contexts = "auto"
    edges: Edges = "captured"
    weights: Weights = "checked"
    runtime: Runtime | None = None
    on_failure: OnFailure = "eager"

    def __new__(cls, *args: Any, **options: Any) -> Self:
        refuse_removed(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, allowed in _LITERALS.items():
            value = getattr(self, name)
            if value is None and name == "runtime":
                continue
            if not isinstance(value, str) or value not in allowed:
                raise ConfigError(
                    f"{name}={shown(value)} is not an option; expected one of {', '.join(map(repr, allowed))}"
                )
        if self.buckets is not None and self.strategy == "per_submodule":
            raise ConfigError(
                "buckets with strategy='per_submodule': answers are cropped of the whole module's own; expected "
                "another strategy, or no buckets"
            )
        for name, example in (("include", "encoder"), ("exclude", "head.nms"), ("ignore", "self.calls")):
            value = getattr(self, name)
            what = "paths" if name == "ignore" else "submodule names"
            listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
            if not listed or not all(isinstance(each, str) for each in value):
                raise ConfigError(f"{name}={shown(value)}: expected a sequence of {what}, such as [{example!r}]")
            object.__setattr__(self, name, tuple(value))
        if self.exclude and self.strategy == "whole_graph":
            raise ConfigError(
                "strategy='whole_graph' with exclude: a graph of the whole holds all of it; expected strategy='auto' "
                "or 'per_submodule', or no exclude"
            )
        if self.exclude and self.buckets is not None:
            raise ConfigError(
                "buckets with exclude: answers are cropped of the whole module's own, which has no graph; expected one "
                "of the two"
            )
        for name in ("max_graphs", "max_bytes"):
            value = getattr(self, name)
            others = ("auto", None) if name == "max_bytes" else ()
            if value in others:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                or_ = "".join(f", or {each!r}" for each in others)
                raise ConfigError(f"{name}={shown(value)}: expected a whole number, 1 or more{or_}")
        if self.contexts == "shared" and self.capture_in == "background":
            raise ConfigError(
                "contexts='shared' does not go with capture_in='background', where a context would be captured while "
                "another graph of it is made; leave contexts='auto'"
            )
        if not isinstance(self.verify, bool):
            raise ConfigError(f"verify={shown(self.verify)}: expected True or False")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GraphConfig:
        """Options over the environment over the defaults.

        Raises:
            ConfigError: For an unknown option, naming the known ones, a removed one, or a bad value.
        """
        refuse_removed(options)
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {shown(name)}; the options are {', '.join(known)}")
        return replace(cls(**environment_options()), **options)


_LITERALS: dict[str, tuple[str, ...]] = {
    "strategy": get_args(Strategy),
    "capture": get_args(Capture),
    "capture_in": get_args(CaptureIn),
    "io": get_args(InputOutput),
    "contexts": get_args(Contexts),
    "edges": get_args(Edges),
    "weights": get_args(Weights),
    "runtime": get_args(Runtime),
    "on_failure": get_args(OnFailure),
}


def environment_options() -> dict[str, Any]:
    """The options set through ``GRAPHCACHE_MAX_GRAPHS`` and ``GRAPHCACHE_MAX_BYTES``.

    Raises:
        ConfigError: If one of them is not a whole number.
    """
    found: dict[str, Any] = {}
    for name in ("max_graphs", "max_bytes"):
        variable = f"GRAPHCACHE_{name.upper()}"
        text = os.environ.get(variable, "").strip()
        if not text:
            continue
        if not text.isdecimal() or len(text) > 30 or int(text) < 1:
            raise ConfigError(f"{variable}={shown(text)}: expected a whole number, 1 or more")
        found[name] = int(text)
    return found


def disabled_by_environment() -> bool:
    """Whether ``GRAPHCACHE_DISABLE`` asks for eager execution everywhere; read when a module is wrapped.

    Raises:
        ConfigError: For anything but ``0``, ``1``, ``true``, ``false`` or nothing.
    """
    text = os.environ.get("GRAPHCACHE_DISABLE", "").strip().lower()
    if text in ("1", "true"):
        return True
    if text in ("", "0", "false"):
        return False
    raise ConfigError(f"GRAPHCACHE_DISABLE={shown(text)}: expected 1, true, 0, false or nothing")


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes of the current context, named as in ``torch_tensorrt.runtime``.

    Args:
        graphs: ``None`` where nobody said anything: wrapped modules use graphs, bare engines don't. ``"off"``
            runs everything eagerly, ``"subgraph"`` lets bare engines use graphs too, ``"whole_graph"`` is what
            :func:`graphcache.runtime.enable_cudagraphs` sets for a module captured as a whole.
        multi_device_safe: Move inputs that lie on another device than the engine, instead of refusing them.
    """

    graphs: Literal["off", "subgraph", "whole_graph"] | None = None
    multi_device_safe: bool = False
    off: bool = field(init=False)

    def __post_init__(self) -> None:
        # Asked at every hit, where a comparison of strings would cost twice as much.
        object.__setattr__(self, "off", self.graphs == "off")


modes: ContextVar[Modes] = ContextVar("graphcache_modes", default=Modes())  # noqa: B039 - Modes is frozen


_OFF = {safe: Modes(graphs="off", multi_device_safe=safe) for safe in (False, True)}


class graphs_off:
    """Inside, wrapped modules of this context run eagerly: they are part of a call that is being captured."""

    # No generator, and nothing made anew: each eager call of a signature that is still cold goes through it.
    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = modes.set(_OFF[modes.get().multi_device_safe])

    def __exit__(self, *exc: object) -> None:
        modes.reset(self._token)
