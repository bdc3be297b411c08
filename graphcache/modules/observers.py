"""Who wants to know of every eager run, capture and replay, before and after it.

Nobody is asked for at a hit: while somebody observes, the methods of that one object are exchanged for watched ones,
and a hook of its own takes the short ways away from it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakSet

from graphcache.errors import ConfigError, shown
from graphcache.events import log, when_unlocked

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule
    from graphcache.modules.engine import EngineModule

Kind = Literal["eager", "capture", "replay"]


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


class Observers:
    """Those of one wrapped module and its parts, or of one engine."""

    def __init__(self) -> None:
        self._all: tuple[Observer, ...] = ()
        self._watched: WeakSet[CachedModule | EngineModule] = WeakSet()
        self._lock = threading.Lock()

    def join(self, module: CachedModule | EngineModule) -> None:
        """Let what a module does be observed too."""
        with self._lock:
            self._watched.add(module)
            if self._all:
                _watch(module, self)

    def add(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer from now on.

        Returns:
            A function that ends it.

        Raises:
            ConfigError: For what has no ``before`` and ``after``.
        """
        check(observer)
        entry: tuple[Observer, ...] = (observer,)
        with self._lock:
            self._all += entry
            if len(self._all) == 1:
                for module in self._watched:
                    _watch(module, self)

        def end() -> None:
            nonlocal entry
            with self._lock:
                if entry:
                    left = list(self._all)
                    left.remove(observer)
                    self._all, entry = tuple(left), ()
                    if not left:
                        for module in self._watched:
                            _unwatch(module)

        return end

    def tell(self, kind: Kind, name: str, work: Callable[[], Any], is_done: Callable[[Any], bool]) -> Any:
        """Do something, and tell of it before and afterwards."""
        observers = self._all
        for each in observers:
            _told(each.before, kind, name)
        start, done = time.perf_counter(), False
        try:
            found = work()
            done = is_done(found)
            return found
        finally:
            seconds = time.perf_counter() - start
            for each in observers:
                when_unlocked(partial(_told, each.after, kind, name, seconds, done))


def check(observer: object) -> None:
    """Raise for what is no observer.

    Raises:
        ConfigError: Then.
    """
    if not all(callable(getattr(observer, name, None)) for name in ("before", "after")):
        raise ConfigError(f"{shown(observer)} is no observer; expected an object with the methods before and after")


def _told(method: Callable[..., None], *what: Any) -> None:
    try:
        method(*what)
    except Exception:
        log.exception("an observer failed; the call goes on")


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


def _watch(module: Any, observers: Observers) -> None:
    from graphcache.modules.misses import STALE

    misses = module.__dict__.get("_misses")
    name = module.name if misses is None else module._ledger.name

    def watched(kind: Kind, original: Callable[..., Any], is_done: Callable[[Any], bool]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            return observers.tell(kind, name, lambda: original(*args, **kwargs), is_done)

        return method

    def always(_: Any) -> bool:
        return True

    # Past nn.Module's __setattr__.
    own = module.__dict__
    if misses is None:
        own["_run"] = watched("eager", module._run, always)
        return
    own["_hit"] = watched("replay", module._hit, lambda answer: answer is not STALE)
    own["_observed"] = module.register_forward_pre_hook(_nothing)
    misses.__dict__.update(
        _capture=watched("capture", misses._capture, lambda found: found[1] is None),
        _capture_beside=watched("capture", misses._capture_beside, bool),
        observed=watched("eager", misses.observed, always),
        alone=watched("capture", misses.alone, always),
        eagerly=watched("eager", misses.eagerly, always),
        timed=watched("eager", misses.timed, always),
    )


def _unwatch(module: Any) -> None:
    own = module.__dict__
    if (misses := own.get("_misses")) is None:
        del own["_run"]
        return
    del own["_hit"]
    own.pop("_observed").remove()
    for name in ("_capture", "_capture_beside", "observed", "alone", "eagerly", "timed"):
        del misses.__dict__[name]


def _nothing(*_: Any) -> None:
    """A hook that does nothing but be there."""
