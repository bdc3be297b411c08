"""Graphs before serving: every call runs eagerly first, then all are captured."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch

from graphcache.config import graphs_off
from graphcache.dispatch.capture_manager import Preparation, preparing
from graphcache.errors import CaptureError, Cause, ClosedError, ConfigError, Refusal, is_a, shown
from graphcache.events import Event, RanEagerly, log
from graphcache.features import features
from graphcache.keys.call_key import CallKey
from graphcache.modules.examples import Job, job_of
from graphcache.modules.transparent import TransparentModule, controls, dispatcher_of
from graphcache.modules.wrapped import device_of


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
                    with dispatcher.on_device(call), graphs_off():
                        dispatcher.target.run(*call.args, **call.kwargs)
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
