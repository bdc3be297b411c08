"""What happened: counters that are always kept, and events for those who subscribe.

A hit costs its graph one integer addition; it raises an event only while somebody listens.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from graphcache.errors import Cause, Reason

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


Event = Captured | Evicted | RanEagerly
Subscriber = Callable[[Event], None]
Tracer = Callable[[str], AbstractContextManager[object]]
"""Makes a context manager from the name of what goes on inside it, such as ``"capture policy"``."""


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

    def span(self, what: Literal["capture", "eager"]) -> AbstractContextManager[object]:
        """What takes a while, for whoever traces it; PyTorch's profiler does while it runs. No hit comes here."""
        profiled = torch._C._autograd._profiler_enabled()
        if not profiled and not self.tracers:
            return _NOTHING
        label = f"{what} {self.name}"
        with ExitStack() as entered:
            if profiled:
                entered.enter_context(torch.profiler.record_function(f"graphcache: {label}"))
            for tracer in tuple(self.tracers):
                entered.enter_context(tracer(label))
            return entered.pop_all()

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


_NOTHING = nullcontext()
_EXPECTED = frozenset({"disabled", "tracing", "outer_capture", "cold", "pending", "not_worth_it", "not_prepared"})
_MAX_TOLD = 256
