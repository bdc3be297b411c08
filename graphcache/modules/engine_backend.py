"""Graphs and observers of bare engines: what :class:`EngineModule` calls and does not import."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from graphcache.modules import hooks
from graphcache.modules.cached import CachedModule
from graphcache.modules.engine import EngineModule
from graphcache.modules.observers import GraphsAlone, Observer, Observers, check

_observers: WeakKeyDictionary[EngineModule, Observers] = WeakKeyDictionary()


def observe_engine(engine: EngineModule, observer: Observer) -> Callable[[], None]:
    """Tell an observer of an engine's eager runs, and of its own graphs; see :meth:`EngineModule.observe`."""
    check(observer)
    with engine.lane.lock:
        if engine not in _observers:
            _observers[engine] = Observers()
            _observers[engine].join(engine)
    ends = _observers[engine].add(observer), engine.with_graphs().observe(GraphsAlone(observer))

    def end() -> None:
        for each in ends:
            each()

    return end


hooks.graph_backend = CachedModule
hooks.observe_engine = observe_engine
