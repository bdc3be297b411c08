"""Graphs before serving: every call runs eagerly first, then all are captured.

A call is given as its arguments, or as shapes of an engine's inputs.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcache.config import graphs_off
from graphcache.dispatch.capture_manager import Preparation, preparing
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.dispatch.targets import ModuleTarget
from graphcache.engines.bindings import Binding, is_shape, sizes_of
from graphcache.errors import (
    CaptureError,
    Cause,
    ClosedError,
    ConfigError,
    InputCountError,
    Reason,
    Refusal,
    is_a,
    shown,
)
from graphcache.events import Event, RanEagerly, log
from graphcache.features import features
from graphcache.graphs.buffers import is_dense
from graphcache.keys.call_key import CallKey, KeyedCall
from graphcache.modules.engine import EngineModule
from graphcache.modules.transparent import TransparentModule, controls, dispatcher_of
from graphcache.modules.wrapped import device_of


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of a call, for :meth:`CachedModule.prepare`.

    Raises:
        ConfigError: If they are no arguments.

    Example:
        >>> call = Call((torch.zeros(2, 3),), {"scale": 0.5})
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.args, (tuple, list)):
            raise ConfigError(f"Call(args={shown(self.args)}): expected a tuple of positional arguments")
        if not isinstance(self.kwargs, Mapping) or not all(isinstance(name, str) for name in self.kwargs):
            raise ConfigError(f"Call(kwargs={shown(self.kwargs)}): expected keyword arguments by name")
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "kwargs", dict(self.kwargs))


@dataclass(frozen=True)
class Job:
    """A call to prepare, which can be made as often as it is needed."""

    target: TransparentModule
    label: str
    nbytes: int
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    """Gives its arguments; what it makes of shapes, it makes anew each time."""
    modes: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes a context in which it is prepared."""
    measured: dict[str, float] | None = None
    """What it took in another process, in seconds."""
    path: str = ""
    """Of the manifest that lists it; empty for a call that was given."""


@dataclass(frozen=True, slots=True)
class ManifestProblem:
    """Why a manifest, or an entry of one, was ignored."""

    path: str
    field: str
    """Where in it; empty for the file as a whole."""
    text: str
    """What was seen there and what was expected."""

    def __str__(self) -> str:
        return f"{self.path}: {self.field}: {self.text}" if self.field else f"{self.path}: {self.text}"


class Refused(NamedTuple):
    """A call that has no graph after all: its tensors, and why."""

    call: str
    cause: Cause


@dataclass(frozen=True)
class Prepared:
    """What a preparation gave.

    Args:
        signatures: How many call keys have a graph now, of the module and of its parts.
        seconds: What it took.
        nbytes: Memory that these graphs own.
        refused: Calls without a graph, with the causes.
        left_out: Calls that were not tried, for lack of time or of room in the budget.
        problems: What was wrong with a manifest, and was ignored.

    Example:
        >>> print(Prepared(32, 1.25, 12_300_000, left_out=2))
        32 signatures prepared in 1.25 s, 12.3 MB; 2 left out
    """

    signatures: int
    seconds: float
    nbytes: int
    refused: tuple[Refused, ...] = ()
    left_out: int = 0
    problems: tuple[ManifestProblem, ...] = ()

    def __str__(self) -> str:
        found = [f"{self.signatures} signatures prepared in {self.seconds:.2f} s, {self.nbytes / 1e6:.1f} MB"]
        if self.refused:
            causes = Counter(each.cause.reason.value for each in self.refused)
            found.append("refused: " + ", ".join(f"{count} {name}" for name, count in sorted(causes.items())))
        if self.left_out:
            found.append(f"{self.left_out} left out")
        if self.problems:
            found.append(f"ignored of manifests: {len(self.problems)}")
        return "; ".join(found)


def prepare(
    fast: TransparentModule, given: Sequence[Any], *, pin: bool, deadline: float | None, progress: bool | None
) -> Prepared:
    """What :meth:`CachedModule.prepare` does."""
    _check_options(given, pin, deadline, progress)
    dispatcher, start = dispatcher_of(fast), time.monotonic()
    dispatcher.check_open()
    kinds = (str, os.PathLike, features.manifest_type)
    jobs = sorted((job_of(each, fast) for each in given if not is_a(each, *kinds)), key=lambda job: -job.nbytes)
    work = _Work(pin)
    for manifest in given:
        if is_a(manifest, *kinds):
            chosen, left_out, problems = features.calls_of_manifest(fast, manifest, deadline)
            jobs += chosen
            work.left_out += left_out
            work.problems += problems
    seconds = deadline or math.inf
    with counting(f"Preparing {dispatcher.ledger.name}", 2 * len(jobs), progress) as step:
        # What is warm and never captured was in vain.
        warm = work.warm(jobs, start + seconds / 2, step)
        work.capture(fast, warm, start + seconds, step)
    done = Prepared(
        len(work.preparation),
        time.monotonic() - start,
        work.preparation.nbytes,
        tuple(work.refused),
        work.left_out,
        tuple(work.problems),
    )
    if work.problems:
        log.warning("%s: of a manifest was ignored: %s", dispatcher.ledger.name, "; ".join(map(str, work.problems)))
    log.info("%s: %s", dispatcher.ledger.name, done)
    return done


class _Work:
    """The two phases, and what is noted on the way."""

    def __init__(self, pin: bool) -> None:
        self.preparation = Preparation(pin=pin)
        self.refused: list[Refused] = []
        self.problems: list[ManifestProblem] = []
        self.left_out = 0
        self._label = ""

    def warm(self, jobs: Sequence[Job], until: float, step: Callable[[], None]) -> list[tuple[Job, CallKey]]:
        """Run every call eagerly, once for each key; those that ran, in the same order."""
        found: dict[tuple[int, CallKey], tuple[Job, CallKey]] = {}
        for job in jobs:
            if self._is_late(until, step):
                continue
            with self._noted(job):
                dispatcher = dispatcher_of(job.target)
                call = dispatcher.target.describe(*job.make())
                place = id(job.target), call.key
                if place not in found and call.key not in dispatcher.entries:
                    dispatcher.captures.notice_device(call)
                    if (cause := dispatcher.forbidden()) is not None:
                        # Of the caller's capture, say, this would become a part.
                        raise Refusal(cause.reason)
                    with dispatcher.on_device(call):
                        _run_once(dispatcher, call)
                found.setdefault(place, (job, call.key))
        for target in dict.fromkeys(job.target for job, _ in found.values()):
            if dispatcher_of(target).captures.on_cuda:
                # What went wrong on the device shows here, with nothing captured.
                torch.cuda.current_stream(device_of(controls(target).module)).synchronize()
        return list(found.values())

    def capture(
        self, fast: TransparentModule, warm: Sequence[tuple[Job, CallKey]], until: float, step: Callable[[], None]
    ) -> None:
        """Capture what ran, and note what cannot be captured."""
        with self.preparation, ExitStack() as stack:
            for part in controls(fast).parts.values():
                stack.callback(controls(part).subscribe(self._hear))
            for job, key in warm:
                if self._is_late(until, step):
                    continue
                dispatcher = dispatcher_of(job.target)
                if job.measured is not None and key not in dispatcher.entries:
                    dispatcher.captures.admission.learn(key, **job.measured)
                # One of a part, with on_failure="raise", was heard.
                with self._noted(job), suppress(CaptureError):
                    call = dispatcher.target.describe(*job.make())
                    with dispatcher.on_device(call):
                        cause = dispatcher.prepare(call._replace(key=key))
                    if cause is not None:
                        self.refused.append(Refused(job.label, cause))

    def _hear(self, event: Event) -> None:
        """Note a part's refusal. Other threads may be serving meanwhile."""
        if isinstance(event, RanEagerly) and preparing.get() is self.preparation:
            self.refused.append(Refused(self._label, event.cause))

    def _is_late(self, until: float, step: Callable[[], None]) -> bool:
        """Whether a call is left out, since its turn comes after a time."""
        step()
        is_late = time.monotonic() > until
        self.left_out += is_late
        return is_late

    @contextmanager
    def _noted(self, job: Job) -> Iterator[None]:
        """In the modes of a call, notes why it has no graph; an error of a call that was given is the caller's."""
        self._label = job.label
        try:
            with job.modes():
                yield
        except Refusal as refusal:
            self.refused.append(Refused(job.label, refusal.cause))
        except Exception as error:
            if isinstance(error, ClosedError) or not job.path:
                raise
            text = f"{job.label}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            self.problems.append(ManifestProblem(job.path, "call", text))


def _run_once(dispatcher: Dispatcher, call: KeyedCall) -> None:
    """Run a call for what it brings up, such as kernels. Tensors that it updates are put back, and it gets no graph."""
    target = dispatcher.target
    with dispatcher.captures.running():
        if not isinstance(target, ModuleTarget):
            with graphs_off():
                target.call(*call.args, **call.kwargs)
            return
        effects = target.recorder.observe(call, keeps_state=True)
        if effects.rebound or (effects.cause is None and effects.state):
            effects.put_back()
            if effects.state is not None:
                effects.state.rewind()
            raise Refusal(Reason.MUTATES, detail="it updates state, and is captured when it is called")


def job_of(given: Any, target: TransparentModule) -> Job:
    """The call that :meth:`CachedModule.prepare` was given; of an engine also by shapes of its inputs."""
    module = controls(target).module
    args: tuple[Any, ...] = (given,)
    kwargs: dict[str, Any] = {}
    if is_a(given, Call):
        args, kwargs = tuple(given.args), dict(given.kwargs)
    elif isinstance(module, EngineModule) and is_a(given, Mapping, tuple, list):
        return _of_shapes(given, target, module)
    elif is_a(given, tuple):
        args = given
    elif not is_a(given, Tensor):
        raise ConfigError(
            f"{shown(given)} is no call of {type(module).__name__}; expected a tuple of its arguments, "
            f"graphcache.Call(args, kwargs), a manifest or its path, or of an engine the shapes of its inputs"
        )
    try:
        tensors = [each for each in _tensors((args, kwargs)) if each.layout is torch.strided]
    except Exception:
        # A container that contains itself, say; no signature will describe it.
        tensors = []
    label = ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors)
    nbytes = sum(each.numel() * each.dtype.itemsize for each in tensors)
    return Job(target, label or "no tensors", nbytes, lambda: (args, kwargs))


def varied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give floating tensors values that differ, always the same ones; integers stay valid indices.

    A graph that reads its inputs in the wrong places would pass a comparison on zeros.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        for tensor in _tensors((args, kwargs)):
            if tensor.is_floating_point() and tensor.element_size() > 1 and is_dense(tensor):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in arguments."""
    return (leaf for leaf in pytree.tree_leaves(value) if type(leaf) in (Tensor, nn.Parameter) and not leaf.is_nested)


def _of_shapes(given: Any, target: TransparentModule, engine: EngineModule) -> Job:
    """A call of an engine from shapes and tensors, by name or in the order of its inputs."""
    names, bindings = engine.input_binding_names, engine.engine.inputs
    if not is_a(given, Mapping):
        # A bare shape is that of the only input.
        values = [given] if is_shape(given) and len(names) == 1 else given
        if len(values) != len(names):
            raise InputCountError(
                f"{engine.name} takes {len(names)} inputs ({', '.join(names)}); {shown(given)} is not a shape or a "
                f"tensor for each of them"
            )
        given = dict(zip(names, values, strict=True))
    if unknown := [name for name in given if name not in names]:
        raise InputCountError(f"{engine.name} has no input {shown(unknown[0])}; its inputs are {', '.join(names)}")
    sizes = {each.name: sizes_of(engine.name, each, given.get(each.name)) for each in bindings}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The tensors that were given, and new ones for shapes."""
        made = [
            tensors[each.name] if each.name in tensors else _new(engine, each, sizes[each.name]) for each in bindings
        ]
        varied(tuple(value for name, value in zip(names, made, strict=True) if name not in tensors), {})
        return tuple(made), {}

    label = " ".join(f"{name}:{'x'.join(map(str, shape)) or '[]'}" for name, shape in sizes.items())
    nbytes = sum(math.prod(sizes[each.name]) * each.dtype.itemsize for each in bindings if not each.on_host)
    return Job(target, label, nbytes, make)


def _new(engine: EngineModule, binding: Binding, sizes: tuple[int, ...]) -> Tensor:
    """A tensor of zeros, or of host values."""
    if binding.on_host:
        return torch.tensor(sizes, dtype=binding.dtype).reshape(binding.shape)
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(sizes, dtype=binding.dtype, device=engine.device).zero_()


@contextmanager
def counting(title: str, steps: int, wanted: bool | None = None) -> Iterator[Callable[[], None]]:
    """Show how many steps are done, if stderr is a terminal and nobody minds; gives what to call after each."""
    stream, done = sys.stderr, count()
    if wanted is False or not steps or not stream.isatty():
        yield lambda: None
        return

    def step() -> None:
        stream.write(f"\r{title}: {next(done)}/{steps}")
        stream.flush()

    step()
    try:
        yield step
    finally:
        # To the start of the line, which is erased.
        stream.write("\r\x1b[K")
        stream.flush()


def _check_options(given: Sequence[Any], pin: object, deadline: Any, progress: object) -> None:
    if not given:
        raise ConfigError("prepare() was given nothing; expected calls, shapes, a manifest or its path")
    for name, value, allowed in (("pin", pin, (True, False)), ("progress", progress, (True, False, None))):
        if not any(value is each for each in allowed):
            raise ConfigError(f"{name}={shown(value)}: expected {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")
    if deadline is not None and not (type(deadline) in (int, float) and 0 < deadline < 1e9):
        raise ConfigError(f"deadline={shown(deadline)}: expected seconds, above 0 and below 1e9, or None")
