"""What happened: counters that are always kept, and events for those who subscribe.

A hit costs its graph one integer addition; it raises an event only while somebody listens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol
from weakref import WeakSet

import torch

from graphcache.errors import Cause, ConfigError, Reason, shown

log = logging.getLogger("graphcache")


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph was captured, verified and stored.

    Args:
        key: What it answers from now on.
        seconds: What capturing took, all of it.
        nodes: How many nodes the graph has.
        nbytes: How much memory the graph owns, in bytes.
    """

    key: Hashable
    seconds: float
    nodes: int
    nbytes: int


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
Tracer = Callable[[str], AbstractContextManager[object]]
"""Makes a context manager from the name of what goes on inside it, such as ``"capture policy"``."""


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
        """Hear that something begins.

        Args:
            kind: ``"eager"``, ``"capture"`` (with the eager run that answers the call) or ``"replay"``.
            module: The wrapped module's name, or that of a part.
        """

    def after(self, kind: Kind, module: str, seconds: float, done: bool) -> None:
        """Hear that it has ended.

        Args:
            kind: As before.
            module: As before.
            seconds: What it took the host, in seconds; the device may still be at work.
            done: Whether it came about: ``False`` for an exception, a capture that gave no graph, or a replay whose
                graph turned out to be stale, so that its answer was dropped.
        """


class Span:
    """Something that takes a while: a capture, an eager run or a replay."""

    __slots__ = ("done",)

    def __init__(self, done: bool) -> None:
        self.done = done
        """Whether it came about; whoever is inside says so."""


class Observers:
    """The observers of one wrapped module and its parts, or of one engine.

    Nobody is asked for at a hit in native code: :attr:`on_change` tells whoever has such a path to close it.
    """

    def __init__(self) -> None:
        self.active: tuple[Observer, ...] = ()
        """Those that are to be told now."""
        self.on_change: WeakSet[Any] = WeakSet()
        """Objects whose ``observed(active)`` is called when the first observer comes and when the last one goes."""
        self._lock = threading.Lock()

    def add(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer from now on.

        Returns:
            A function that ends it.

        Raises:
            ConfigError: For what has no ``before`` and ``after``.
        """
        check_observer(observer)
        entry: tuple[Observer, ...] = (observer,)
        self._set((*self.active, observer))

        def end() -> None:
            nonlocal entry
            if entry:
                entry = ()
                left = list(self.active)
                left.remove(observer)
                self._set(tuple(left))

        return end

    def _set(self, observers: tuple[Observer, ...]) -> None:
        with self._lock:
            changes = bool(observers) != bool(self.active)
            self.active = observers
        if changes:
            for each in list(self.on_change):
                each.observed(bool(observers))

    @contextmanager
    def told(self, kind: Kind, name: str, span: Span) -> Iterator[Span]:
        """Tell everybody before and after what happens inside."""
        observers = self.active
        for each in observers:
            _tell(each.before, kind, name)
        start, done = time.perf_counter(), False
        try:
            yield span
            done = span.done
        finally:
            seconds = time.perf_counter() - start
            for each in observers:
                when_unlocked(partial(_tell, each.after, kind, name, seconds, done))


@dataclass
class Ledger:
    """The account of one module.

    Args:
        name: The module's name, for messages.
        quiet: Whether eager calls are no news, since whoever this is a part of has told of them.
    """

    name: str
    quiet: bool = field(default=False, kw_only=True)
    captures: int = 0
    evictions: int = 0
    capture_seconds: float = 0.0
    eager: Counter[Reason] = field(default_factory=Counter)
    retired_hits: int = 0
    subscribers: list[Subscriber] = field(default_factory=list)
    tracers: list[Tracer] = field(default_factory=list)
    observers: Observers = field(default_factory=Observers, kw_only=True)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _told: set[Cause] = field(default_factory=set)
    _last: Cause | None = None

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
        # Mostly the very cause of the call before.
        if cause is not self._last and cause not in self._told:
            if len(self._told) >= _MAX_TOLD:
                self._told.clear()
            self._told.add(cause)
            level = logging.INFO if self.quiet or cause.reason.value in _EXPECTED else logging.WARNING
            log.log(level, "%s ran eagerly: %s (Said once; later calls are counted.)", self.name, cause)
        self._last = cause
        if self.subscribers:
            self._publish(RanEagerly(cause))

    def span(self, kind: Kind, *, traced: bool = True) -> AbstractContextManager[Span]:
        """Tell the observers of what happens inside, and if ``traced`` the tracers and PyTorch's profiler too."""
        traced = traced and bool(self.tracers or torch._C._autograd._profiler_enabled())
        if not (traced or self.observers.active):
            return nullcontext(Span(kind == "eager"))
        return self._span(kind, traced)

    @contextmanager
    def _span(self, kind: Kind, traced: bool) -> Iterator[Span]:
        label = f"{kind} {self.name}"
        with ExitStack() as entered:
            if traced and torch._C._autograd._profiler_enabled():
                entered.enter_context(torch.profiler.record_function(f"graphcache: {label}"))
            for tracer in tuple(self.tracers) if traced else ():
                entered.enter_context(tracer(label))
            yield entered.enter_context(self.observers.told(kind, self.name, Span(kind == "eager")))

    def _publish(self, event: Event) -> None:
        if self.subscribers:
            when_unlocked(lambda: self._deliver(event))

    def _deliver(self, event: Event) -> None:
        for subscriber in tuple(self.subscribers):
            try:
                subscriber(event)
            except Exception:
                log.exception("%s: a subscriber failed on %s; the call goes on", self.name, type(event).__name__)


class QuietLock:
    """A re-entrant lock under which nobody outside is called.

    What :func:`when_unlocked` was given in a thread that holds such locks is called when the thread has released the
    last of them. So a subscriber may call, clear and close any module, and wait for other threads that do.

    Example:
        >>> lock = QuietLock()
        >>> with lock, QuietLock():
        ...     when_unlocked(lambda: print("delivered"))
        ...     print("locked")
        locked
        delivered
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def acquire(self, timeout: float = -1) -> bool:
        """Take the lock; whether it was taken within ``timeout`` seconds, -1 for as long as it takes."""
        taken = self._lock.acquire(timeout=timeout)
        _here.held += taken
        return taken

    def release(self) -> None:
        """Give the lock back, and call what waited for it if it was the thread's last one."""
        self._lock.release()
        _here.held -= 1
        while not _here.held and _here.waiting:
            _here.waiting.popleft()()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class _Here(threading.local):
    """What one thread holds, and what is to be called when it holds nothing."""

    def __init__(self) -> None:
        self.held = 0
        self.waiting: deque[Callable[[], object]] = deque()


_here = _Here()


def when_unlocked(function: Callable[[], object]) -> None:
    """Call a function now, or when this thread has released the last :class:`QuietLock` that it holds."""
    if _here.held:
        _here.waiting.append(function)
    else:
        function()


def _tell(method: Callable[..., None], *what: Any) -> None:
    try:
        method(*what)
    except Exception:
        log.exception("an observer failed; the call goes on")


def check_observer(observer: object) -> None:
    """Raise for what is no observer.

    Raises:
        ConfigError: Then.
    """
    if not all(callable(getattr(observer, name, None)) for name in ("before", "after")):
        raise ConfigError(f"{shown(observer)} is no observer; expected an object with the methods before and after")


class GraphsAlone:
    """Passes captures and replays on to an observer, and no eager runs.

    Args:
        observer: Who hears of them.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def before(self, kind: Kind, module: str) -> None:
        """Hear that something begins."""
        if kind != "eager":
            self._observer.before(kind, module)

    def after(self, kind: Kind, module: str, seconds: float, done: bool) -> None:
        """Hear that it has ended."""
        if kind != "eager":
            self._observer.after(kind, module, seconds, done)


_EXPECTED = frozenset({"disabled", "tracing", "outer_capture", "cold", "pending", "not_worth_it", "not_prepared"})
_MAX_TOLD = 256
