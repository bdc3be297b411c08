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

    Args:
        module: The module.

    Example:
        >>> gate = RunGate(nn.ReLU())
        >>> with gate.shared():
        ...     gate.is_idle
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._running = 0
        """Threads that are inside :meth:`shared`."""
        self._alone = False
        """Whether a thread is inside :meth:`exclusive`."""
        self._wanted = 0
        """Threads that wait to run the module alone."""
        self._turn = 0
        """How many threads have run it alone so far."""
        self._queued = 0
        """Callers that wait."""
        self._owed = 0
        """Those of them that have waited for a run already, and go before the next one."""
        self.waits = 0
        """How many callers have waited for a run of a background capture, or wait now."""
        self.wait_seconds = 0.0
        """How long these callers have waited, together."""
        with _all.condition:
            _all.gates.add(self)

    @property
    def is_idle(self) -> bool:
        """Whether nobody runs the module through this gate."""
        return not self._running and not self._alone

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the caller runs the module, possibly beside other callers."""
        depths = _inside.depths
        depth = depths.get(self, 0)
        if not depth:
            self._enter()
        depths[self] = depth + 1
        try:
            yield
        finally:
            _leave(self, depth)
            if not depth:
                with _all.condition:
                    self._running -= 1
                    if not self._running:
                        _all.condition.notify_all()

    def _enter(self) -> None:
        # Whoever waits to run alone may be waiting for the gates that this thread is inside.
        nested = bool(_inside.depths)
        with _all.condition:
            # Otherwise it goes first, so that callers in turn do not keep it waiting for ever.
            if self._alone or (self._wanted and not nested):
                self._wait(nested)
            self._running += 1

    def _wait(self, nested: bool) -> None:
        turn, start = self._turn, time.perf_counter()
        self.waits += 1
        self._queued += 1
        try:
            _all.condition.wait_for(
                lambda: not self._alone and (nested or not self._wanted or self._turn != turn),
            )
        finally:
            self._queued -= 1
            self._owed -= self._turn != turn
            self.wait_seconds += time.perf_counter() - start
            _all.condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, the module is run by this thread alone. Not to be entered by a caller that runs the module."""
        depths = _inside.depths
        # All of them at once: a caller may be inside one of them and go on into another.
        gates = [gate for gate in self._overlapping() if not depths.get(gate)]
        with _all.condition:
            for gate in gates:
                gate._wanted += 1
            try:
                _all.condition.wait_for(lambda: all(gate.is_idle and not gate._owed for gate in gates))
            finally:
                for gate in gates:
                    gate._wanted -= 1
                _all.condition.notify_all()
            for gate in gates:
                gate._alone = True
                depths[gate] = 1
        try:
            yield
        finally:
            with _all.condition:
                for gate in gates:
                    _leave(gate, 0)
                    gate._alone = False
                    gate._turn += 1
                    gate._owed = gate._queued
                _all.condition.notify_all()

    def _overlapping(self) -> Sequence[RunGate]:
        """The gates of modules that share a submodule with this one, its own among them."""
        module = self._module()
        if module is None:
            return [self]
        own = set(map(id, module.modules()))
        with _all.condition:
            gates = list(_all.gates)
        others = [(gate, gate._module()) for gate in gates if gate is not self]
        return [self, *(gate for gate, each in others if each is not None and own & set(map(id, each.modules())))]

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` inside :meth:`shared`."""
        with self.shared():
            return function(*args, **kwargs)


class _All:
    """Every gate of the process, and the one lock of them all."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.gates: weakref.WeakSet[RunGate] = weakref.WeakSet()

    def after_fork(self) -> None:
        """Forget the threads that are not here."""
        self.condition = threading.Condition()
        for gate in self.gates:
            gate._running = int(gate in _inside.depths)
            gate._alone = False
            gate._wanted = gate._queued = gate._owed = 0


class _Inside(threading.local):
    """The gates that the current thread is inside, and how often."""

    def __init__(self) -> None:
        self.depths: dict[RunGate, int] = {}


def _leave(gate: RunGate, depth: int) -> None:
    if depth:
        _inside.depths[gate] = depth
    else:
        del _inside.depths[gate]


_all = _All()
_inside = _Inside()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_all.after_fork)
