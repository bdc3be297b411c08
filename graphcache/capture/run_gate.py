"""No two threads run one PyTorch module at once, where one of them is a background capture."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


class RunGate:
    """Callers of a module run it beside one another; a background capture runs it alone.

    A background capture waits until nobody runs the module, nor another wrapped module that shares a submodule with it.
    A caller that comes meanwhile waits until the capture has run the module once, which is measured, and goes before
    its next run. A thread that is inside may enter again, and may enter gates of other modules.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.callers = 0
        """How many threads are inside :meth:`shared`."""
        self.waits = 0
        """How many callers have waited for a run of a background capture, or wait now."""
        self.wait_seconds = 0.0
        """How long these callers have waited, together."""
        with _process.condition:
            _process.gates.add(self)

    @property
    def is_idle(self) -> bool:
        """Whether nobody runs the module through this gate."""
        return not self.callers and not any(turn.is_running and self in turn.gates for turn in list(_process.turns))

    @property
    def is_wanted(self) -> bool:
        """Whether a thread waits to run the module alone."""
        return any(not turn.is_running and self in turn.gates for turn in list(_process.turns))

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the caller runs the module, possibly beside other callers."""
        inside = _inside.gates
        if self in inside:
            yield
            return
        # Whoever waits to run alone may be waiting for the gates that this thread is inside.
        caller = _Caller(self, goes_first=bool(inside))
        with _process.condition:
            if not caller.may_enter():
                self.waits += 1
                _process.waiting.append(caller)
                start = time.perf_counter()
                try:
                    _process.condition.wait_for(caller.may_enter)
                finally:
                    _process.waiting.remove(caller)
                    self.wait_seconds += time.perf_counter() - start
                    _process.condition.notify_all()
            self.callers += 1
        inside.add(self)
        try:
            yield
        finally:
            inside.discard(self)
            with _process.condition:
                self.callers -= 1
                _process.condition.notify_all()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` inside :meth:`shared`."""
        with self.shared():
            return function(*args, **kwargs)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, the module is run by this thread alone. Not to be entered by a caller that runs the module."""
        # All gates at once: a caller may be inside one of them and go on into another.
        turn = _Turn(self._overlapping() - _inside.gates, threading.get_ident())
        with _process.condition:
            _process.turns.append(turn)
            try:
                _process.condition.wait_for(turn.may_begin)
                turn.is_running = True
            finally:
                if not turn.is_running:
                    _process.turns.remove(turn)
                _process.condition.notify_all()
        _inside.gates |= turn.gates
        try:
            yield
        finally:
            _inside.gates -= turn.gates
            with _process.condition:
                _process.turns.remove(turn)
                for caller in _process.waiting:
                    caller.goes_first = caller.goes_first or caller.gate in turn.gates
                _process.condition.notify_all()

    def _overlapping(self) -> set[RunGate]:
        """The gates of modules that share a submodule with this one, its own among them."""
        own = self._submodules()
        with _process.condition:
            gates = list(_process.gates)
        return {self, *(gate for gate in gates if not own.isdisjoint(gate._submodules()))}

    def _submodules(self) -> set[int]:
        """The module and its submodules by identity; empty if it is gone."""
        module = self._module()
        return set(map(id, module.modules())) if module is not None else set()


@dataclass(eq=False, slots=True)
class _Turn:
    """A thread that runs the modules of some gates alone, or waits for that."""

    gates: set[RunGate]
    thread: int
    is_running: bool = False

    def may_begin(self) -> bool:
        """Whether nobody runs any of the modules, nor has waited for a turn before this one."""
        owed = any(caller.goes_first and caller.gate in self.gates for caller in _process.waiting)
        return not owed and all(gate.is_idle for gate in self.gates)


@dataclass(eq=False, slots=True)
class _Caller:
    """A thread that enters a gate. It goes first if it has waited for one turn, or is inside another gate."""

    gate: RunGate
    goes_first: bool

    def may_enter(self) -> bool:
        """Otherwise a turn that waits goes first, so that callers that keep coming do not keep it waiting for ever."""
        turns = [turn for turn in _process.turns if self.gate in turn.gates]
        return not any(turn.is_running or not self.goes_first for turn in turns)


class _Process:
    """Every gate of the process, who has a turn or waits, and the one lock of them all."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.gates: weakref.WeakSet[RunGate] = weakref.WeakSet()
        self.turns: list[_Turn] = []
        self.waiting: list[_Caller] = []

    def after_fork(self) -> None:
        """Forget the threads that are not here."""
        self.condition = threading.Condition()
        self.turns = [turn for turn in self.turns if turn.is_running and turn.thread == threading.get_ident()]
        self.waiting = []
        alone = {gate for turn in self.turns for gate in turn.gates}
        for gate in self.gates:
            gate.callers = int(gate in _inside.gates - alone)


class _Inside(threading.local):
    """The gates that the current thread is inside."""

    def __init__(self) -> None:
        self.gates: set[RunGate] = set()


_process = _Process()
_inside = _Inside()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.after_fork)
