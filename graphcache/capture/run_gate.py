"""No two threads run one PyTorch module at once, where one of them is a background capture."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class RunGate:
    """Callers of a module run it beside one another; a background capture runs it alone.

    A background capture waits until nobody runs the module, nor another wrapped module that shares a submodule with it.
    A caller that comes meanwhile waits until the capture has run the module once, which is measured, and goes before
    its next run. A thread that is inside may enter again, and may enter gates of other modules.

    Example:
        >>> gate = RunGate(nn.ReLU())
        >>> with gate.shared():
        ...     gate.is_idle
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._turn = 0
        """How many threads have run the module alone so far."""
        self.waits = 0
        """How many callers have waited for a run of a background capture, or wait now."""
        self.wait_seconds = 0.0
        """How long these callers have waited, together."""
        self.forget_threads()
        with _process.condition:
            _process.gates.add(self)

    def forget_threads(self) -> None:
        """Only the current thread is there, as after a fork."""
        self._running = int(self in _inside.depths)
        """Threads that are inside :meth:`shared`."""
        self._runs_alone = False
        """Whether a thread is inside :meth:`exclusive`."""
        self._wanted = 0
        """Threads that wait to run the module alone."""
        self._queued = 0
        """Callers that wait."""
        self._owed = 0
        """Those of them that have waited for a run already, and go before the next one."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody runs the module through this gate."""
        return not self._running and not self._runs_alone

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the caller runs the module, possibly beside other callers."""
        depths = _inside.depths
        outermost = self not in depths
        if outermost:
            self._enter()
        depths[self] = depths.get(self, 0) + 1
        try:
            yield
        finally:
            depths[self] -= 1
            if outermost:
                del depths[self]
                with _process.condition:
                    self._running -= 1
                    if not self._running:
                        _process.condition.notify_all()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` inside :meth:`shared`."""
        with self.shared():
            return function(*args, **kwargs)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, the module is run by this thread alone. Not to be entered by a caller that runs the module."""
        # All of them at once: a caller may be inside one of them and go on into another.
        gates = [gate for gate in self._overlapping() if gate not in _inside.depths]
        with _process.condition:
            for gate in gates:
                gate.want()
            try:
                _process.condition.wait_for(lambda: all(gate.is_free for gate in gates))
            finally:
                for gate in gates:
                    gate.want(-1)
                _process.condition.notify_all()
            for gate in gates:
                gate.begin_alone()
        try:
            yield
        finally:
            with _process.condition:
                for gate in gates:
                    gate.end_alone()
                _process.condition.notify_all()

    # The next four are called with the condition held.

    @property
    def is_free(self) -> bool:
        """Whether a thread may run the module alone now."""
        return self.is_idle and not self._owed

    def want(self, threads: int = 1) -> None:
        """Count the threads that wait to run the module alone."""
        self._wanted += threads

    def begin_alone(self) -> None:
        """The current thread runs the module alone from now on."""
        self._runs_alone = True
        _inside.depths[self] = 1

    def end_alone(self) -> None:
        """Let others run the module, those that wait first."""
        del _inside.depths[self]
        self._runs_alone = False
        self._turn += 1
        self._owed = self._queued

    def shares_with(self, modules: set[int]) -> bool:
        """Whether any of these modules, by identity, is a part of the gate's module."""
        module = self._module()
        return module is not None and not modules.isdisjoint(map(id, module.modules()))

    def _enter(self) -> None:
        # Whoever waits to run alone may be waiting for the gates that this thread is inside.
        nested = bool(_inside.depths)
        with _process.condition:
            # Otherwise it goes first, so that callers in turn do not keep it waiting for ever.
            if self._runs_alone or (self._wanted and not nested):
                self._wait(nested)
            self._running += 1

    def _wait(self, nested: bool) -> None:
        turn, start = self._turn, time.perf_counter()
        self.waits += 1
        self._queued += 1
        try:
            _process.condition.wait_for(
                lambda: not self._runs_alone and (nested or not self._wanted or self._turn != turn),
            )
        finally:
            self._queued -= 1
            self._owed -= self._turn != turn
            self.wait_seconds += time.perf_counter() - start
            _process.condition.notify_all()

    def _overlapping(self) -> Sequence[RunGate]:
        """The gates of modules that share a submodule with this one, its own among them."""
        module = self._module()
        own = set(map(id, module.modules())) if module is not None else set()
        with _process.condition:
            gates = list(_process.gates)
        return [self, *(gate for gate in gates if gate is not self and gate.shares_with(own))]


class _Process:
    """Every gate of the process, and the one lock of them all."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.gates: weakref.WeakSet[RunGate] = weakref.WeakSet()

    def after_fork(self) -> None:
        """Forget the threads that are not here."""
        self.condition = threading.Condition()
        for gate in self.gates:
            gate.forget_threads()


class _Inside(threading.local):
    """The gates that the current thread is inside, and how often."""

    def __init__(self) -> None:
        self.depths: dict[RunGate, int] = {}


_process = _Process()
_inside = _Inside()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.after_fork)
