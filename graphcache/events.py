"""What happened: counters that are always kept, and who hears of it.

A hit costs its graph one integer addition, and more only while somebody observes replays. Whoever hears of something is
called when the thread holds no :class:`QuietLock`, but for ``Observer.before``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakSet

import torch

from graphcache.errors import EXPECTED, Cause, ConfigError, Reason, shown

log = logging.getLogger("graphcache")

_MAX_TOLD = 256
"""Causes that are remembered as logged."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph was captured, verified and stored; it answers calls of ``key`` from now on."""

    key: Hashable
    seconds: float
    """What capturing took, all of it."""
    nodes: int
    nbytes: int
    """Bytes that the graph owns."""


@dataclass(frozen=True, slots=True)
class Evicted:
    """A graph was closed to make room, because it was stale, or because its owner was closed."""

    key: Hashable
    hits: int


@dataclass(frozen=True, slots=True)
class RanEagerly:
    """A call was answered without a graph, and why."""

    cause: Cause


Kind = Literal["eager", "capture", "replay"]
Event = Captured | Evicted | RanEagerly
Subscriber = Callable[[Event], None]


class Observer(Protocol):
    """Hears of what a wrapped module does, in the thread that does it; what it raises is logged, and the call goes on.

    ``before`` a capture is called while the module's lock is held: do not wait there for a thread that uses the module.
    ``after`` is called when the locks are released.

    Example:
        >>> import torch, graphcache
        >>> class Prints:
        ...     def before(self, kind, module):
        ...         pass
        ...     def after(self, kind, module, seconds, done):
        ...         print(kind, module, done)
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> end = fast.observe(Prints())
        >>> _ = fast(torch.ones(2)), fast(torch.ones(2))
        capture ReLU True
        replay ReLU True
        >>> end()
    """

    def before(self, kind: Kind, module: str) -> None:
        """Hear what begins: an eager run, a capture (with the eager run that answers the call) or a replay.

        ``module`` is the wrapped module's name, or that of a part.
        """

    def after(self, kind: Kind, module: str, seconds: float, done: bool) -> None:
        """Hear that it has ended, after ``seconds`` of the host; the device may still be at work.

        It is not ``done`` after an exception, a capture that gave no graph, or a replay whose graph turned out to be
        stale, so that its answer was dropped.
        """


@dataclass(slots=True)
class Span:
    """Something that takes a while; whoever is inside says whether it is ``done``."""

    done: bool


class _Listener(NamedTuple):
    observer: Observer
    replays: bool
    eager: bool


class Observers:
    """The observers of one wrapped module and its parts, or of one engine."""

    def __init__(self) -> None:
        self.listeners: tuple[_Listener, ...] = ()
        self.active = False
        """Whether one of them hears of replays: native code may answer no hit then."""
        self.on_change: WeakSet[Any] = WeakSet()
        """Objects whose ``observed(active)`` is called when that changes."""
        self._lock = threading.Lock()

    def add(self, observer: Observer, *, replays: bool = True, eager: bool = True) -> Callable[[], None]:
        """Tell an observer from now on, until the function that is returned is called.

        ``replays`` stands for eager runs where graphs are off too. Raises a ``ConfigError`` for what has no ``before``
        and ``after``.
        """
        if not all(callable(getattr(observer, name, None)) for name in ("before", "after")):
            raise ConfigError(f"{shown(observer)} is no observer; expected an object with the methods before and after")
        listener = _Listener(observer, replays, eager)
        self._change(listener, hears=True)
        return partial(self._change, listener, hears=False)

    def _change(self, listener: _Listener, *, hears: bool) -> None:
        with self._lock:
            others = tuple(each for each in self.listeners if each is not listener)
            self.listeners = (*others, listener) if hears else others
            before, self.active = self.active, any(each.replays for each in self.listeners)
        if self.active is not before:
            for each in list(self.on_change):
                each.observed(self.active)

    @contextmanager
    def told(self, kind: Kind, name: str, *, traced: bool = True, profiled: bool = False) -> Iterator[Span]:
        """Tell before and after what happens inside; if it is not ``traced``, only who hears of replays."""
        span = Span(kind == "eager")
        profile = torch.profiler.record_function(f"graphcache: {kind} {name}") if profiled else nullcontext()
        found = [each for each in self.listeners if (traced or each.replays) and (kind != "eager" or each.eager)]
        hearing = [each.observer for each in found]
        for each in hearing:
            _tell(each.before, kind, name)
        start, done = time.perf_counter(), False
        try:
            with profile:
                yield span
            done = span.done
        finally:
            seconds = time.perf_counter() - start
            for each in hearing:
                _tell_unlocked(each.after, kind, name, seconds, done)


class Ledger:
    """Counts what one module does, and tells of it.

    For a part, ``observers`` are those of the whole; it is ``quiet`` if the whole tells of its eager calls.
    """

    def __init__(self, name: str, *, quiet: bool = False, observers: Observers | None = None) -> None:
        self.name = name
        self.quiet = quiet
        self.observers = observers or Observers()
        self.subscribers: list[Subscriber] = []
        self.captures = self.evictions = self.retired_hits = 0
        self.capture_seconds = 0.0
        self.eager: Counter[Reason] = Counter()
        self._lock = threading.Lock()
        self._told: set[Cause] = set()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` with every event, until the function that is returned is called."""
        if not callable(subscriber):
            raise ConfigError(f"subscriber={shown(subscriber)}: expected a function of an event")
        self.subscribers.append(subscriber)

        def end() -> None:
            with suppress(ValueError):
                self.subscribers.remove(subscriber)

        return end

    def captured(self, event: Captured) -> None:
        """Count a capture."""
        self.captures += 1
        self.capture_seconds += event.seconds
        log.debug("%s: captured %d nodes in %.3f s for %s", self.name, event.nodes, event.seconds, event.key)
        self._publish(event)

    def evicted(self, event: Evicted) -> None:
        """Count an eviction; the hits of the graph stay in the account."""
        self.evictions += 1
        self.retired_hits += event.hits
        self._publish(event)

    def ran_eagerly(self, cause: Cause) -> None:
        """Count an eager call; the first of each cause is logged, as a warning unless it was asked for."""
        # A reason's hash is a function in Python, in which another thread may take its turn.
        with self._lock:
            self.eager[cause.reason] += 1
            is_news = cause not in self._told
            if is_news:
                if len(self._told) >= _MAX_TOLD:
                    self._told.clear()
                self._told.add(cause)
        if is_news:
            level = logging.INFO if self.quiet or cause.reason in EXPECTED else logging.WARNING
            log.log(level, "%s ran eagerly: %s (Said once; later calls are counted.)", self.name, cause)
        self._publish(RanEagerly(cause))

    def span(self, kind: Kind, *, traced: bool = True) -> AbstractContextManager[Span]:
        """Tell the observers of what happens inside, and if ``traced`` PyTorch's profiler too."""
        profiled = traced and torch._C._autograd._profiler_enabled()
        if not (profiled or self.observers.listeners):
            return nullcontext(Span(kind == "eager"))
        return self.observers.told(kind, self.name, traced=traced, profiled=profiled)

    def _publish(self, event: Event) -> None:
        for subscriber in tuple(self.subscribers):
            _tell_unlocked(subscriber, event)


class QuietLock:
    """A re-entrant lock under which nobody outside is called: who is to be told in a thread that holds such locks is
    told when the thread has released the last of them.

    So a subscriber may call, clear and close any module, and wait for other threads that do.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = fork_safe_lock()

    def acquire(self, timeout: float = -1) -> bool:
        """Take the lock; whether it was taken within ``timeout`` seconds, -1 for as long as it takes."""
        taken = self._lock.acquire(timeout=timeout)
        _here.held += taken
        return taken

    def release(self) -> None:
        """Give the lock back, and tell what waited for it if it was the thread's last one."""
        self._lock.release()
        _here.held -= 1
        while not _here.held and _here.waiting:
            _here.waiting.popleft()()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


def fork_safe_lock() -> threading.RLock:
    """A re-entrant lock that no other thread holds in a fork of the process: those threads are not there."""
    _locks.add(lock := threading.RLock())
    return lock


def _after_fork() -> None:
    for lock in list(_locks):
        if not lock._is_owned():
            lock._at_fork_reinit()


_locks: WeakSet[Any] = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Here(threading.local):
    """How many such locks one thread holds, and who is told when it holds none."""

    def __init__(self) -> None:
        self.held = 0
        self.waiting: deque[Callable[[], object]] = deque()


_here = _Here()


def _tell_unlocked(function: Callable[..., object], *what: Any) -> None:
    """Tell now, or when this thread has released the last :class:`QuietLock` that it holds."""
    if _here.held:
        _here.waiting.append(partial(_tell, function, *what))
    else:
        _tell(function, *what)


def _tell(function: Callable[..., object], *what: Any) -> None:
    try:
        function(*what)
    except Exception:
        log.exception("%s failed on %s; the call goes on", shown(function), shown(what[0]))
